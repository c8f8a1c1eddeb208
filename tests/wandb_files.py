"""What an offline W&B run holds, by W&B's own tool."""

import json
import subprocess

import pytest
import wandb
from wandb.util import get_core_path


def inspected(folder):
    """The records of an offline W&B run, as `wandb leet inspect --json` prints them; this starts no Python."""
    wandb.teardown()  # waits until what this process sent is on disk
    (file,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, folder.parent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Inspected:
    """The parts of an offline W&B run, read once."""

    def __init__(self, folder):
        self.records = inspected(folder)

    @property
    def history(self):
        return [record["history"]["item"] for record in self.records if record["type"] == "history"]

    @property
    def summary(self):
        updates = [record["summary"].get("update", {}) for record in self.records if record["type"] == "summary"]
        return {key: value for update in updates for key, value in update.items()}

    @property
    def run(self):
        """How the run was opened: its id, group, name, tags and configuration."""
        return next(record["run"] for record in self.records if record["type"] == "run")

    @property
    def exit_code(self):
        return next(record["exit"] for record in self.records if record["type"] == "exit").get("exit_code", 0)


def projected(row, norms_every):
    """A row as W&B is to have it: numbers always, lists over layers every so many steps."""
    flat = {}
    for key, value in row.items():
        if not isinstance(value, list):
            flat[key] = float(value)
        elif row["step"] % norms_every == 0:
            for layer, item in enumerate(value):
                flat[key if key.endswith("/head") else f"{key}/layer_{layer:02d}"] = float(item)
    return flat


def assert_holds(folder, rows, norms_every):
    """The offline run has these rows and no others. Returns it."""
    found = Inspected(folder)
    assert [item["_step"] for item in found.history] == [row["step"] for row in rows]
    for row, item in zip(rows, found.history, strict=True):
        values = {key: value for key, value in item.items() if not key.startswith("_")}
        assert values == pytest.approx(projected(row, norms_every), rel=1e-12)
    return found
