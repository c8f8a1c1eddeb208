"""The commands that need more than the standard library; each imports what it needs."""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stabrun.composition import Sources, checked_words, compose, compose_each, multirun, no_such_key, plainly
from stabrun.config import Config, UserError, check, config_yaml, keys, run_dir, run_id
from stabrun.record.schema import INTERRUPTED

MODEL_FLAGS = ("--config-dir DIR", "--json", "--trace")


def parse(words: list[str], *known: str) -> tuple[list[str], dict[str, Any]]:
    """The words that are no flags, and the flags."""
    rest, flags, source = list[str](), dict[str, Any](), iter(words)
    for word in source:
        flag = {"--multirun": "-m", "-c": "--cfg"}.get(word, word.partition("=")[0])
        if flag.startswith("-") and flag not in [name.split()[0] for name in known]:
            raise UserError(f"{word}: no such flag here; there are {' and '.join(known) or 'none'}.")
        if flag == "--config-dir":
            flags[flag] = Path(word.partition("=")[2] or next(source, ""))
        elif flag.startswith("-"):
            flags[flag] = True
        else:
            rest.append(word)
    return rest, flags


def run(name: str, words: list[str], conf: Path) -> int:
    """Call one command; a mistake is a sentence on stderr and status 2, a fault of the machine status 1."""
    try:
        return COMMANDS[name](words, conf)
    except UserError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"{error.filename or 'the disk'}: {error.strerror or error}.")
        return 1
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() + type(error).__name__.lower():
            raise
        complain("out of memory; a smaller train.micro_batch_size needs less, and `stabrun model` tells how much.")
        return 1


def complain(text: str) -> None:
    print(f"stabrun: {text}", file=sys.stderr)


def train(words: list[str], conf: Path) -> int:
    overrides, flags = parse(words, "-m", "--cfg", "--config-dir DIR")
    sources = Sources(flags.get("--config-dir"))
    if "-m" not in flags or "--cfg" in flags:
        (config,) = compose_each([overrides], sources)
        return show(config) if "--cfg" in flags else train_one(config)

    def job(config: Config) -> None:
        if train_one(config) == 130:
            raise KeyboardInterrupt

    multirun(overrides, sources, job)
    return 0


def show(config: Config) -> int:
    print(config_yaml(config), end="")
    return 0


def train_one(config: Config) -> int:
    """One run, and its verdict in words; 130 where it was interrupted."""
    from stabrun.training.run import train as train_run

    summary = train_run(config)
    tell(summary, config)
    return 130 if summary["status"] == INTERRUPTED else 0


def tell(summary: dict[str, Any], config: Config) -> None:
    from stabrun.verdict.wording import verdict_line

    print(verdict_line(summary))
    if summary["val_loss"] is not None:
        print(f"validation loss {summary['val_loss']:.4f}, perplexity {summary['val_perplexity']:.2f}")
    print(f"record: {run_dir(config)}")
    if summary["status"] == INTERRUPTED:
        print(f"interrupted after step {summary['steps']}; the same command goes on from there.")


def sweep(words: list[str], conf: Path) -> int:
    from stabrun.study.sweep import sweep as run_study

    overrides, flags = parse(words, "--dry-run", "--config-dir DIR")
    return run_study(overrides, Sources(flags.get("--config-dir")), "--dry-run" in flags)


def status(words: list[str], conf: Path) -> int:
    from stabrun.cli import status

    rest, flags = parse(words, "--json")
    if len(rest) != 1:
        raise UserError("status: name one DIR, of a study or a run; the only flag is --json.")
    status.status(Path(rest[0]), "--json" in flags)
    return 0


def rerun(words: list[str], conf: Path) -> int:
    """Train again from a recorded configuration, in a directory of its own unless run_dir says otherwise."""
    from omegaconf import OmegaConf

    from stabrun.record.run_dir import RunDir

    if not words:
        raise UserError("rerun: name a run directory, such as runs/0123456789ab.")
    source = RunDir(Path(words[0]))
    if not source.is_run():
        raise UserError(f"{words[0]}: not a run directory: {source.config_file.name} is missing.")
    with plainly():
        recorded = source.config()
        overrides, flags = parse(words[1:], "--cfg")
        refuse_groups(checked_words(overrides))
        merged = OmegaConf.merge(OmegaConf.structured(recorded), OmegaConf.from_dotlist(overrides))
        config: Any = OmegaConf.to_object(merged)
    check(config)
    if not any(word.startswith("run_dir=") for word in overrides):
        same = run_id(config) == run_id(recorded)
        config.run_dir = f"{words[0].rstrip('/')}-rerun" if same else str(Path(words[0]).parent / run_id(config))
    return show(config) if "--cfg" in flags else train_one(config)


def refuse_groups(overrides: list[str]) -> None:
    """UserError at a word that is no single key: what is recorded has no groups to choose from."""
    known = {k.path for k in keys()}
    for word in overrides:
        path = word.partition("=")[0]
        if path not in known:
            raise UserError(f"rerun takes single keys, no groups and no variants; {no_such_key(path)}")


def judge(words: list[str], conf: Path) -> int:
    from stabrun.cli import judge as judging

    return judging.judge(words)


def report(words: list[str], conf: Path) -> int:
    from stabrun.report.report import write_report

    rest, _ = parse(words)
    if not 1 <= len(rest) <= 2:
        raise UserError("report: name a study or a run, or two of them: stabrun report DIR [OTHER].")
    write_report(*map(Path, rest))
    return 0


def upload(words: list[str], conf: Path) -> int:
    from stabrun.publish import upload

    rest, flags = parse(words, "--dry-run")
    if not rest or "=" in rest[0]:
        raise UserError(
            "upload: name one DIR, of a study or a run, then perhaps tracker.KEY=VALUE; the only flag is --dry-run."
        )
    return upload.upload(Path(rest[0]), checked_words(rest[1:]), "--dry-run" in flags)


def dashboard(words: list[str], conf: Path) -> int:
    if find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: it needs the package wandb-workspaces: pip install 'stabrun[dashboard]'.")
    from stabrun.publish import dashboard as workspace

    rest, flags = parse(words, "--dry-run")
    places = rest[:1] if rest and "=" not in rest[0] else []
    study = Path(places[0]) if places else None
    return workspace.dashboard(study, checked_words(rest[len(places) :]), "--dry-run" in flags)


def model(words: list[str], conf: Path) -> int:
    from stabrun.model.describe import describe, report
    from stabrun.record.jsonl import jsonable

    overrides, flags = parse(words, *MODEL_FLAGS)
    config = compose(overrides, flags.get("--config-dir"))
    facts = describe(config)
    if "--trace" in flags:
        from stabrun.model.trace import traced_memory

        facts["memory"]["traced_peak_bytes"] = traced_memory(config)
    lines = [report(facts, config)]
    if config.check == "init":
        from stabrun.training.initial_check import check_initial, told

        facts["init"] = check_initial(config)
        lines += ["", *told(facts["init"])]
    print(json.dumps(jsonable(facts), indent=1) if "--json" in flags else "\n".join(lines))
    return 0


def data(words: list[str], conf: Path) -> int:
    from stabrun.data.shards import opened, prepare

    if not words or words[0] != "prepare":
        raise UserError("data: it is `stabrun data prepare [OVERRIDE…]`.")
    overrides, flags = parse(words[1:], "--config-dir DIR")
    config = compose(overrides, flags.get("--config-dir"))
    try:
        prepared = prepare(config.data, config.model, verbose=True)
        opened(prepared.folder, math.inf)
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the parts that are finished.")
        return 130
    tokens = prepared.manifest["tokens"]
    print(f"{tokens['train']:,} training and {tokens['val']:,} validation tokens in {prepared.folder}")
    return 0


COMMANDS = {
    "train": train,
    "sweep": sweep,
    "status": status,
    "rerun": rerun,
    "judge": judge,
    "report": report,
    "upload": upload,
    "dashboard": dashboard,
    "model": model,
    "data": data,
}
