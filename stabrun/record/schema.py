"""The types of what the files of a run and of a study hold, and the states of a run.

Records of other versions may lack fields or have more: every field is optional to a reader.
"""

from typing import Any, NotRequired, TypedDict

FORMAT = 1  # of the files of runs and studies: records of a higher format are read, but not written to
RUNNING, COMPLETE, STOPPED, INTERRUPTED, FAILED = "running", "complete", "stopped", "interrupted", "failed"
OVER = COMPLETE, STOPPED  # states after which a run is never trained again

Number = float | str  # "nan", "inf" and "-inf" are strings: every line is valid JSON
Row = dict[str, Any]  # of metrics.jsonl; `metrics.METRICS` is its schema


class Event(TypedDict, total=False):
    """A line of `events.jsonl`; what else it holds depends on `event`."""

    event: str
    time: float
    step: int
    error: str


class CheckpointFacts(TypedDict):
    """A checkpoint: the updates that it holds, and its path, relative to the run directory if it is there."""

    step: int
    path: str


class SignalFacts(TypedDict):
    """The first alarm of a signal: its step, its site, and its lead over the loss in steps."""

    step: float
    site: str | None
    lead: float | None


class SpikeFacts(TypedDict):
    count: int
    list: list[tuple[float, Number]]
    score: NotRequired[float | None]
    rate: NotRequired[Any]


"""See `stabrun.verdict.spikes`; the list holds (step, height)."""


class OverfitFacts(TypedDict):
    """The fields of `stabrun.verdict.overfit.Overfit`."""

    step: float
    best_step: float
    rise: float


class Summary(TypedDict, total=False):
    """`summary.json`, its fields in order. `arm` is not among them, but added by a study."""

    run_id: str
    variant: str
    lr: float
    seed: int
    status: str
    verdict: str
    reason: str
    horizon: int
    direction: str | None
    last_healthy_step: int | None
    last_healthy_checkpoint: CheckpointFacts | None
    first_bad_step: int | None
    first_bad_site: str | None
    certain_step: int | None
    scar: Number | None
    lost_steps: int | None
    restarts: list[int]
    init_loss: Number | None
    best_loss: Number | None
    final_loss: Number | None
    signals: dict[str, SignalFacts]
    spikes: SpikeFacts | None
    best_val_loss: Number | None
    val_gap: Number | None
    overfit: OverfitFacts | None
    outliers_skipped: int | None
    rewinds: int | None
    by_strictness: dict[str, str]
    rule: int
    clipped_share: float | None
    skipped_steps: int | None
    val_loss: Number | None
    val_perplexity: Number | None
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int | None
    arm: str


WRITTEN = [name for name in Summary.__annotations__ if name != "arm"]
EMPTY = dict.fromkeys(WRITTEN) | {"verdict": "undecided", "by_strictness": {}, "signals": {}, "steps": 0, "tokens": 0}


class Result(TypedDict):
    """A row of `results.csv`, its columns in order: the summary of a run without nested values.

    `lr` and `seed` may be None in the report of a watched run.
    """

    run_id: str
    arm: str
    variant: str
    lr: float
    seed: int
    status: str
    verdict: str
    reason: str
    lenient: str
    standard: str
    strict: str
    horizon: int
    rule: int
    first_bad_step: int | None
    first_bad_site: str
    certain_step: int | None
    scar: Number | None
    init_loss: Number | None
    best_loss: Number | None
    final_loss: Number | None
    val_loss: Number | None
    val_perplexity: Number | None
    val_gap: Number | None
    clipped_share: float | None
    skipped_steps: int | None
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int | None
    outliers_skipped: int | None
    rewinds: int | None


class Estimate(TypedDict):
    """A number with its 95 % interval; one seed gives no interval."""

    value: float
    low: float | None
    high: float | None


class Interval(TypedDict):
    """Median and 95 % interval of a learning rate; None for an end that the range searched does not reach."""

    median: float | None
    low: float | None
    high: float | None


class ArmFrontier(TypedDict):
    """The frontier of an arm by one strictness of the rule, and its lr50 divided by that of other variants."""

    lr50: Interval
    lr10: Interval
    spread: Interval
    over: dict[str, Interval]


class Point(TypedDict):
    """The runs of an arm at one learning rate."""

    lr: float
    runs: int
    diverged: int
    undecided: int


class ArmSummary(TypedDict):
    """What the runs of one arm show."""

    runs: list[Point]
    max_stable_lr: float | None
    min_diverged_lr: float | None
    separated: bool
    frontier: dict[str, ArmFrontier | None]
    enough: NotRequired[bool]  # of a search
    lr_sensitivity: NotRequired[Estimate | None]  # these four of a grid that is complete; of one rate: None
    best_lr: NotRequired[float]
    best_final_loss: NotRequired[Estimate]
    gain: NotRequired[Estimate | None]


class StudySummary(TypedDict):
    """`study.json`."""

    name: str
    strategy: str
    rule: int
    cells: int
    runs: int
    tokens: int
    lr_range: NotRequired[list[float]]  # these three of a search
    width: NotRequired[float]
    grid: NotRequired[dict[str, int]]
    variants: dict[str, ArmSummary]
