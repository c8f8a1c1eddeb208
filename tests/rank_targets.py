"""What ranks do in tests of the launcher: imported by each of them."""

import errno
import time

import torch

from stabrun.config import UserError
from stabrun.training.place import Place
from stabrun.training.ranks import joined


def exchanged(stop):
    """What a rank got by each exchange, given its number from 1 on."""
    place = Place.here()
    mine = place.number + 1
    with joined(place, torch.device("cpu")) as ranks:
        tensors = [torch.full((2, 3), float(mine)), torch.full((4,), 10.0 * mine), torch.full((), 100.0 * mine)]
        ranks.add(tensors)
        copied = torch.full((3,), float(mine))
        ranks.copy_first([copied])
        got = {
            "add": [t.tolist() for t in tensors],
            "gather": ranks.gather(torch.tensor([float(mine), -1.0])).tolist(),
            "total": ranks.total(0.1 * mine),
            "any": [ranks.any(False), ranks.any(mine == 2), ranks.any(True)],
            "from_first": ranks.from_first({"mine": mine}),
            "copy_first": copied.tolist(),
            "part": ranks.part(torch.arange(6)).tolist(),
            "printed": print(f"rank {mine}"),
        }
        everyone = [ranks.from_first(None)]
        last = ranks.gather(torch.tensor(ranks.part(torch.arange(6)).tolist()))  # so that the second one is seen, too
        return got | {"parts": last.tolist(), "everyone": everyone, "threads": torch.get_num_threads()}


def failing(kind, stop):
    """The second rank fails while the first one waits for it."""
    place = Place.here()
    with joined(place, torch.device("cpu")) as ranks:
        if not place.first:
            raise {
                "user": UserError("data.path=x: no text."),
                "disk": OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
                "other": type("LocalError", (Exception,), {})("not to be pickled"),
            }[kind]
        ranks.any(False)


def endless(stop):
    """Until it is asked to stop."""
    while not stop.asked:
        time.sleep(0.05)
    return "stopped"
