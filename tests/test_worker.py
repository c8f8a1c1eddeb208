"""Workers on a real study: side by side, killed, and with cells that cannot be trained."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from helpers import TINY

from stabrun.study.ledger import DONE, FAILED, Ledger
from stabrun.study.plan import Plan, load, planned
from stabrun.training.run import train

WORKER = (
    "import sys; from pathlib import Path; from stabrun.study.worker import work; work(Path(sys.argv[1]), lease=5.0)"
)
WORDS = (
    *TINY,
    "study.variants=[baseline,qk_norm]",
    "study.lrs=[1e-2,1e-1]",
    "study.seeds=1",
    "train.checkpoint_every=5",
)


def a_study(tmp_path, *words):
    plan, _, _ = planned([*WORDS, *words])
    tmp_path.mkdir(exist_ok=True)
    plan.save(tmp_path)
    return plan


def worker(directory):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(directory)], stdout=subprocess.DEVNULL)


def await_any(folder, pattern):
    """Wait until a file of this pattern is there."""
    deadline = time.monotonic() + 90
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def statuses(plan: Plan, directory):
    return {cell: entry.status for cell, entry in Ledger(directory).entries(plan.cells).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The bytes of each cell's record, trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    plan = a_study(folder / "study")
    for cell in plan.cells.values():
        train(plan.config(cell), folder / cell.id)
    return {cell: (folder / cell / "metrics.jsonl").read_bytes() for cell in plan.cells}


def records(directory, cells):
    return {cell: (directory / "runs" / cell / "metrics.jsonl").read_bytes() for cell in cells}


def test_two_workers_train_each_cell_once_as_it_is_trained_alone(tmp_path, alone):
    plan = a_study(tmp_path)
    workers = [worker(tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in workers] == [0, 0]
    assert set(statuses(plan, tmp_path).values()) == {DONE}
    assert records(tmp_path, plan.cells) == alone
    assert len(list((tmp_path / "ledger").glob("*.claim"))) == len(plan.cells)
    assert list((tmp_path / "attempts").iterdir()) == []


def test_a_killed_worker_s_cell_goes_on_from_its_checkpoint(tmp_path, alone):
    plan = a_study(tmp_path)
    process = worker(tmp_path)
    await_any(tmp_path, "attempts/*/checkpoints/step_*/meta.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert worker(tmp_path).wait(timeout=120) == 0
    assert set(statuses(plan, tmp_path).values()) == {DONE}
    assert records(tmp_path, plan.cells) == alone
    again = [path.name[:12] for path in (tmp_path / "ledger").glob("*.0002.claim")]
    for cell in again:
        events = (tmp_path / "runs" / cell / "events.jsonl").read_text().splitlines()
        starts = [json.loads(line) for line in events if json.loads(line)["event"] == "start"]
        assert len(starts) == 2
        assert starts[1]["step"] > 0


def test_a_cell_that_cannot_be_trained_is_given_up_and_the_rest_goes_on(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe no text")
    plan = a_study(tmp_path / "study")
    sound = plan.arms["baseline"]
    plan.arms["broken"] = replace(sound, data=replace(sound.data, name="local", path=str(tmp_path / "bad.txt")))
    broken = plan.add("broken", 0.1, 0)
    plan.save(tmp_path / "study")
    assert worker(tmp_path / "study").wait(timeout=120) == 0
    told = statuses(load(tmp_path / "study"), tmp_path / "study")
    assert told.pop(broken.id) == FAILED
    assert set(told.values()) == {DONE}
    assert "not UTF-8 text" in Ledger(tmp_path / "study").reason(broken.id, 2)


def test_ctrl_c_gives_the_cell_back(tmp_path, alone):
    plan = a_study(tmp_path)
    process = worker(tmp_path)
    await_any(tmp_path, "attempts/*/metrics.jsonl")
    os.kill(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert len(list((tmp_path / "ledger").glob("*.left"))) <= 1
    assert worker(tmp_path).wait(timeout=120) == 0
    assert records(tmp_path, plan.cells) == alone
