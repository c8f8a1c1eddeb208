"""The summary run of a study in W&B, read back with W&B's own tool."""

import json

from helpers import tiny
from wandb_files import Inspected

from stabrun.study.tracking import track_study

ROWS = [
    {"run_id": "a", "arm": "baseline", "lr": 0.1, "final_loss": "nan"},
    {"run_id": "b", "arm": "baseline", "lr": 0.2, "final_loss": 2.5},
]
SUMMARY = {
    "name": "edge",
    "variants": {"baseline": {"runs": [1], "frontier": {"strict": {"median": 0.1, "low": None}}}},
}


def test_a_study_has_a_summary_run_with_its_table_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    directory = tmp_path / "edge-0123"
    directory.mkdir()
    track_study(tiny("tracker=wandb").tracker, directory, ROWS, SUMMARY)
    folder = directory / "wandb" / "latest-run"
    found = Inspected(folder)
    facts = {key: found.run[key] for key in ("run_id", "run_group", "job_type", "display_name")}
    assert facts == {
        "run_id": "edge-0123", "run_group": "edge-0123", "job_type": "study", "display_name": "edge-0123: summary",
    }  # fmt: skip
    assert found.summary["variants/baseline/frontier/strict/median"] == 0.1
    assert "variants/baseline/frontier/strict/low" not in found.summary
    (file,) = (folder / "files" / "media" / "table").glob("results*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["run_id", "arm", "lr", "final_loss"]
    assert table["data"] == [list(row.values()) for row in ROWS]


def test_a_failure_of_wandb_is_reported_and_nothing_else(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ConnectionError("no server")

    monkeypatch.setattr("stabrun.study.tracking.open_wandb", broken)
    track_study(tiny("tracker=wandb").tracker, tmp_path, ROWS, SUMMARY)
    assert "ConnectionError: no server" in capsys.readouterr().err
