"""Words typed → functions called. Only the standard library is imported here; each command imports what it needs."""

import os
import signal
import sys
from collections.abc import Callable

import stabrun

USAGE = """usage: stabrun COMMAND [WORD …]

How high can the learning rate go before a language model diverges, which layer goes first,
and which norm placement buys room?

commands
  train [OVERRIDE…]     one run, to a verdict:  stabrun train +variant=qk_norm_cap optim.lr=3e-2
                        -m runs several:        stabrun train -m optim.lr=1e-2,1e-1 seed=0,1
  sweep [OVERRIDE…]     a study: study.variants × study.lrs × study.seeds by study.workers processes; the same
                        command again resumes or extends it  (--dry-run)
  status DIR            what a study or a run is doing now, from another terminal  (--json)
  rerun RUN_DIR [OVERRIDE…]
                        one recorded run again, from its own config
  judge PATH            the verdict again, from a run, a study, or anyone's CSV, JSON lines,
                        trainer_state.json or log  (--json, --follow, --against OTHER, --step, --loss)
  report DIR [OTHER]    tables, figures and one page to open in a browser, of a study or a run; two side by side
  upload DIR [tracker.KEY=VALUE…]
                        the record of a study or a run into W&B, once and under the runs' own ids  (--dry-run)
  dashboard [STUDY_DIR] [tracker.KEY=VALUE…]
                        a workspace in W&B, and a report of the study  (--dry-run prints them)
  model [OVERRIDE…]     parameters, FLOPs, memory, switches; trains nothing  (--json, --trace)
                        +check=init: variance and gradient by layer at the first weights
  variants              each variant, one line, and where it comes from
  data prepare [OVERRIDE…]
                        tokenizes the corpus into memory-mapped shards  (data.workers=4)

An OVERRIDE is Hydra's KEY=VALUE; `stabrun train --cfg` prints the configuration instead of training.
--config-dir DIR adds a folder of your own configuration files, such as DIR/variant/mine.yaml.

exit status: 0 done, a diverged run included; 2 a mistake in what was typed; 1 a fault; 130 interrupted, resumable
"""


def main(arguments: list[str] | None = None) -> None:
    """The entry point: run one command and exit with its status."""
    words = sys.argv[1:] if arguments is None else arguments
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the caller has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = dispatch(words)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: Ctrl-C must not spoil the exit
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumable = {*words[:1]} & {"train", "rerun", "sweep"}
        goes_on = "; the same command goes on from the last checkpoint" if resumable else ""
        print(f"stabrun: interrupted{goes_on}.", file=sys.stderr)
        status = 130
    except OSError as error:  # stdout's reader has gone, or its disk is full
        if not isinstance(error, BrokenPipeError):
            print(f"stabrun: standard output: {error.strerror}.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"stabrun {stabrun.__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"stabrun: {command}: no such command; it is one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if any(word in ("-h", "--help") for word in rest):
        print(USAGE, end="")
        return 0
    return COMMANDS[command](rest)


def variants(words: list[str]) -> int:
    """Print each variant's name and the first comment line of its file: what it is, and where it comes from."""
    if words:
        print(f"stabrun: variants takes no words; {words[0]!r} was given.", file=sys.stderr)
        return 2
    from stabrun.config import conf_dir

    files = sorted((conf_dir() / "variant").glob("*.yaml"), key=lambda f: (f.stem != "baseline", f.stem))
    for file in files:
        comments = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
        print(f"{file.stem:<14} {next(line for line in comments if not line.startswith('@'))}")
    return 0


def later(name: str) -> Callable[[list[str]], int]:
    """A command of `stabrun.cli.commands`, imported when it is called."""

    def run(words: list[str]) -> int:
        from stabrun.cli import commands
        from stabrun.config import conf_dir

        return commands.run(name, words, conf_dir())

    return run


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": later("train"),
    "sweep": later("sweep"),
    "status": later("status"),
    "rerun": later("rerun"),
    "judge": later("judge"),
    "report": later("report"),
    "upload": later("upload"),
    "dashboard": later("dashboard"),
    "model": later("model"),
    "variants": variants,
    "data": later("data"),
}
