"""`stabrun ramp`: one run whose learning rate rises exponentially, and what its loss says about the edge."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stabrun.config import Config, UserError, run_dir, run_id
from stabrun.record.jsonl import jsonable, write_atomic, write_checked
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import INTERRUPTED, Row
from stabrun.text import rate_text, shown, warn
from stabrun.verdict.ramp import FOUND, NO_LEARNING, NO_RISE, NONFINITE, SPREAD, TOO_SHORT, Edge, Ramp, first_site
from stabrun.verdict.wording import interrupted_line, short, too_short

DEFAULTS = ("schedule=ramp", "optim.lr=5", "train.steps=400", "train.val_every=0")
BELOW = 0.9  # of the rate at which weight decay erases the weights in each step
REASONS = {
    FOUND: "from there on, the loss stays above its lowest level",
    NONFINITE: "from there on, the loss is not finite",
    NO_RISE: "the loss did not leave its lowest level for good; raise optim.lr",
    NO_LEARNING: "the loss did not fall before; lower schedule.min_lr or raise train.steps",
    TOO_SHORT: "too few steps; raise train.steps",
}


def with_defaults(overrides: Sequence[str]) -> list[str]:
    """The overrides of a run, after those of DEFAULTS whose key they do not name."""
    given = {word.partition("=")[0] for word in overrides}
    return [*(word for word in DEFAULTS if word.partition("=")[0] not in given), *overrides]


def ramp(config: Config, as_json: bool = False) -> int:
    """Train a ramp; print and write what it shows. Returns 130 if interrupted.

    Raises UserError if the configuration is not that of a ramp.
    """
    from stabrun.training.offline import write_run
    from stabrun.training.place import Place
    from stabrun.training.run import train

    refuse_others(config)
    if warning := too_short([config.train.steps]):
        warn(warning)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        summary = train(config)
        if summary["status"] == INTERRUPTED:
            print(interrupted_line(summary), flush=True)
    if summary["status"] != INTERRUPTED and Place.here().first:  # torchrun starts the command once per rank
        facts = result(config)
        text = json.dumps(facts, indent=1) if as_json else "\n".join(shown(line) for line in lines(facts))
        print(text, flush=True)
    write_run(config.tracker, RunDir(run_dir(config)), summary)
    return 130 if summary["status"] == INTERRUPTED else 0


def refuse_others(config: Config) -> None:
    if config.schedule.kind != "ramp":
        raise UserError(f"schedule.kind={config.schedule.kind}: must be ramp; `stabrun train` takes other schedules.")
    if config.train.recovery != "none":
        raise UserError(f"train.recovery={config.train.recovery}: must be none, because a ramp is to leave its edge.")


def result(config: Config) -> dict[str, Any]:
    """What a finished ramp shows, as JSON: written to the run directory as `ramp.json`, with the figure."""
    run = RunDir(run_dir(config))
    rows = list(run.rows())
    ramp = Ramp.of_rows(rows)
    edge, lowest, search = ramp.edge, ramp.lowest, search_range(config, ramp.edge)
    title = f"{config.variant}, seed {config.seed}, {config.train.steps} steps"
    facts: dict[str, Any] = jsonable(
        {
            "run_id": run_id(config),
            "run_dir": str(run.path),
            "variant": config.variant,
            "seed": config.seed,
            "steps": len(rows),
            "lowest_lr": lowest and lowest[0],
            "lowest_loss": lowest and lowest[1],
            "edge_lr": edge.rate,
            "edge_octaves": edge.octaves,
            "edge_step": None if edge.row is None else rows[edge.row]["step"],
            "reason": edge.reason,
            "first_site": first_site(rows, ramp),
            "lr50_guess": edge.lr50,
            "lr_range": search,
            "figure": draw(run.path, ramp, rows, search, title),
        }
    )
    write_checked(run.ramp_file, facts)
    return facts


def search_range(config: Config, edge: Edge) -> list[float] | None:
    """The range for a search, to two digits; its rates stay below those at which weight decay erases the weights."""
    if edge.lr_range is None:
        return None
    low, high = edge.lr_range
    optim = config.optim
    if optim.decay == "decoupled" and not optim.decay_independent and optim.weight_decay > 0:
        high = min(high, BELOW / optim.weight_decay)
    return [float(f"{rate:.2g}") for rate in (low, high)]


def draw(directory: Path, ramp: Ramp, rows: list[Row], search: list[float] | None, title: str) -> str | None:
    """Write the figure. Returns the path of its PNG; None without matplotlib, or without a finite loss."""
    if find_spec("matplotlib") is None or not len(ramp.finite):
        return None
    from stabrun.report.figures import files
    from stabrun.report.ramp import ramp_chart

    for name, content in files([ramp_chart(ramp, rows, search, title)]):
        write_atomic(directory / name, content)
    return str(directory / "ramp.png")


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The result as sentences."""
    if facts["lowest_lr"] is not None:
        yield f"lowest loss: {short(float(facts['lowest_loss']))} at learning rate {rate_text(facts['lowest_lr'])}"
    if facts["edge_lr"] is None:
        yield f"no edge: {REASONS[facts['reason']]}"
    else:
        site = f", first in {facts['first_site']}" if facts["first_site"] else ""
        yield f"edge: {rate_text(facts['edge_lr'])} at step {facts['edge_step']}{site}; {REASONS[facts['reason']]}"
        guess, factor = rate_text(facts["lr50_guess"]), f"{2**SPREAD:.1f}"
        yield f"guess at lr50: {guess}; its standard deviation is a factor of {factor} for the smallest model"
        ends = ",".join(map(rate_text, facts["lr_range"]))
        yield f"range for a search: study.strategy=frontier study.lr_range=[{ends}]"
    yield f"figure: {facts['figure'] or 'not drawn; it needs the package matplotlib and a finite loss'}"
    yield f"record: {facts['run_dir']}"
