"""What an offline W&B run holds, by W&B's own tool."""

import json
import subprocess
import sys
from pathlib import Path

import wandb

WANDB = Path(sys.executable).parent / "wandb"


def inspected(folder):
    """The records of an offline W&B run, as its own tool prints them."""
    wandb.teardown()  # waits until what this process sent is on the disk
    done = subprocess.run([WANDB, "leet", "inspect", "--json", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(folder):
    return [record["history"]["item"] for record in inspected(folder) if record["type"] == "history"]


def summary_of(folder):
    merged = {}
    for record in inspected(folder):
        if record["type"] == "summary":
            merged |= record["summary"].get("update", {})
    return merged
