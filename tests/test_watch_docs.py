"""Every block of Python code of docs/watch.md runs, in their order, and leaves the records that the page speaks of."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import stabrun
from stabrun.record.jsonl import read_lines

PAGE = Path(__file__).parent.parent / "docs" / "watch.md"
STEPS = {"plain": 20, "resumed": 20, "nan": 1, "llama": 20, "lightning": 20, "accelerate": 20}


@pytest.mark.trainers
@pytest.mark.skipif(
    not all(map(find_spec, ("transformers", "accelerate", "lightning"))),
    reason="stabrun[huggingface,lightning] is not installed",
)
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    from accelerate.state import GradientState

    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        GradientState._reset_state()  # Accelerate shares it among all that is trained in a process
        exec(compile(block, str(PAGE), "exec"), scope)
    found = {}
    for run in sorted(Path("runs").iterdir()):
        rows = [line.value for line in read_lines(run / "metrics.jsonl")]
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert all(any(key.startswith("norm/out/") for key in row) for row in rows[::10])
        assert stabrun.load_run(run).summary["status"] == "complete"
        found[run.name] = len(rows)
        if run.name == "nan":
            assert (rows[0]["train/loss"], rows[0]["scale/skipped"]) == ("nan", 1)
            assert "blocks.1.up (Linear)" in (run / "events.jsonl").read_text()
        else:
            assert all(row["train/loss"] < 7 for row in rows)
    assert found == STEPS
