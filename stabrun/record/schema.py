"""The types of what the files of a run and of a study hold, and the states of a run."""

from typing import Any

RUNNING, COMPLETE, STOPPED, INTERRUPTED, FAILED = "running", "complete", "stopped", "interrupted", "failed"
OVER = COMPLETE, STOPPED  # states after which a run is never trained again

Row = dict[str, Any]  # of metrics.jsonl
Event = dict[str, Any]  # of events.jsonl
Summary = dict[str, Any]  # summary.json
StudySummary = dict[str, Any]  # study.json
