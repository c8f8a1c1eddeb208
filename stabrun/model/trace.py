"""The peak memory of a training step, traced on fake tensors: slow, and exact up to the workspaces of kernels.

`FakeTensorMode` and `MemTracker` are private to torch. There is no public way to run a step without allocating it, or
to account memory on the CPU.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from stabrun.config import Config, micro_batch
from stabrun.model.describe import LOW
from stabrun.model.gpt import GPT


def traced_memory(config: Config) -> int:
    """Peak bytes of the second step of a micro-batch, when Adam's moments exist; nothing is allocated."""
    sequences = micro_batch(config)
    low = getattr(torch, LOW.get(config.train.precision, "float32"))
    with FakeTensorMode():
        model = GPT(config.model, config.data.seq_len)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.zeros(sequences, config.data.seq_len, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, tokens)
        with tracker:
            for step in range(2):
                if step:
                    tracker.reset_mod_stats()
                with torch.autocast("cpu", low, enabled=low != torch.float32):
                    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                del loss
        peak = tracker.get_tracker_snapshot("peak")
    return max(int(parts["Total"]) for parts in peak.values())
