"""A worker on a real study: killed, and with a cell that cannot be trained."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

from opens import opened
from studies import QUESTION, a_plan, wait_for

from stabrun.record.study_dir import StudyDir
from stabrun.study.ledger import DONE, FAILED, Ledger
from stabrun.study.plan import load
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.worker import next_claim, work
from stabrun.training.stop import Stop

WORKER = (
    "import sys; from pathlib import Path; from stabrun.study.worker import work; work(Path(sys.argv[1]), lease=5.0)"
)
WORDS = (*QUESTION, "study.seeds=1")  # half of the cells of `undisturbed`


def worker(directory):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(directory)], stdout=subprocess.DEVNULL)


def statuses(plan, directory):
    return {cell: entry.status for cell, entry in Ledger(directory).entries(plan.cells).items()}


def assert_trained(plan, directory, undisturbed):
    """Each cell is done, and its record is that of the cell trained by itself."""
    assert set(statuses(plan, directory).values()) == {DONE}
    for cell in plan.cells:
        assert StudyDir(directory).run(cell).metrics.read_bytes() == undisturbed.record(cell)


def test_the_cell_of_a_killed_worker_is_resumed_from_its_checkpoint(tmp_path, undisturbed):
    plan = a_plan(tmp_path, *WORDS)
    process = worker(tmp_path)
    wait_for(lambda: list(tmp_path.glob("attempts/*/checkpoints/step_*/meta.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    work(tmp_path)
    assert_trained(plan, tmp_path, undisturbed)
    for claim in (tmp_path / "ledger").glob("*.0002.claim"):
        events = (tmp_path / "runs" / claim.name[:12] / "events.jsonl").read_text().splitlines()
        starts = [json.loads(line)["step"] for line in events if json.loads(line)["event"] == "start"]
        assert len(starts) == 2
        assert starts[1] > 0


def test_a_cell_that_cannot_be_trained_is_given_up_and_the_rest_is_trained(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe no text")
    plan = a_plan(tmp_path, *WORDS, "study.lrs=[1e-2]")
    baseline = plan.arms["baseline"]
    plan.arms["broken"] = replace(baseline, data=replace(baseline.data, name="local", path=str(tmp_path / "bad.txt")))
    broken = plan.add("broken", 0.1, 0)
    plan.save(tmp_path)
    work(tmp_path)
    found = statuses(load(tmp_path), tmp_path)
    assert found.pop(broken.id) == FAILED
    assert set(found.values()) == {DONE}
    assert "not UTF-8 text" in Ledger(tmp_path).reason(broken.id, 2)


def test_the_choice_of_a_cell_reads_no_files(tmp_path):
    """However many cells there are: the plan once, then nothing but the two listings."""
    rates = ",".join(str(1e-3 * 1.05**k) for k in range(40))
    a_plan(tmp_path, *WORDS, f"study.lrs=[{rates}]")
    reader = SnapshotReader(tmp_path, to_train=True)
    assert next_claim(reader, Stop())
    for number in range(2, 5):
        with opened(tmp_path) as paths:
            claim = next_claim(reader, Stop())
        assert [path.parent.name for path in paths] == ["ledger"], "the claim that is written"
        assert claim.cell == list(reader.plan().cells)[number - 1]
