"""The entry point: run a click command. Every failure becomes an exit status and one line on standard error."""

import os
import signal
import sys

import click
from click.exceptions import Exit, NoArgsIsHelpError

from stabrun.cli.commands import cli
from stabrun.cli.completion import COMPLETE_VARIABLE
from stabrun.config import UserError
from stabrun.record.disk import advice
from stabrun.text import warn, write_any_text
from stabrun.training.place import Place
from stabrun.training.stop import BOTH, be_interruptible

RESUMABLE = ("train", "ramp", "rerun", "sweep")


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its status."""
    words = sys.argv[1:] if arguments is None else arguments
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the caller has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if not Place.here().first:
        sys.stdout = open(os.devnull, "w")  # the first rank prints
    for stream in (sys.stdout, sys.stderr):
        write_any_text(stream)
    if COMPLETE_VARIABLE in os.environ:
        cli.main(prog_name="stabrun", complete_var=COMPLETE_VARIABLE)
    be_interruptible()
    try:
        status = dispatch(words)
        for which in BOTH:  # the work is done: ignore Ctrl-C during exit
            signal.signal(which, signal.SIG_IGN)
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumes = "; the same command resumes from the last checkpoint" if {*words[:1]} & {*RESUMABLE} else ""
        warn(f"interrupted{resumes}.")
        status = 130
    except OSError as error:  # the reader of stdout is gone, or its disk is full
        if not isinstance(error, BrokenPipeError):
            warn(f"standard output: {error.strerror}.")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def dispatch(words: list[str]) -> int:
    """Exit status of one command: 2 after a user error, 1 after a runtime error."""
    try:
        # Not cli.main(), which handles interrupts and broken pipes in its own way.
        with cli.make_context("stabrun", list(words)) as context:
            return cli.invoke(context) or 0
    except Exit as done:
        return done.exit_code
    except NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        warn(usage_text(error))
        return 2
    except UserError as error:
        warn(str(error))
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        warn(advice(error))
        return 1
    except MemoryError:  # torch raises RuntimeError
        warn("out of memory while a file was read or prepared; use smaller files or shorter documents.")
        return 1
    except RuntimeError as error:
        if "memory" not in str(error).lower() + type(error).__name__.lower():
            raise
        warn("out of memory; reduce train.micro_batch_size, or run `stabrun model` for an estimate.")
        return 1


def usage_text(error: click.UsageError) -> str:
    """click's message as one or two sentences: what was given, and what is allowed."""
    text = error.format_message().rstrip(".").partition(". ")[0]
    text = text[0].lower() + text[1:]
    if error.ctx is None:
        return f"{text}."
    command = error.ctx.command
    if isinstance(command, click.Group):
        allowed = f"The commands are {', '.join(command.commands)}."
    elif isinstance(error, click.NoSuchOption):
        allowed = f"The options are {', '.join(option_names(command))}."
    else:
        allowed = " ".join(error.ctx.get_usage().split())
    path = error.ctx.command_path.removeprefix("stabrun").strip()
    return f"{path}{': ' * bool(path)}{text}. {allowed}"


def option_names(command: click.Command) -> list[str]:
    return [max(option.opts, key=len) for option in command.params if isinstance(option, click.Option)] + ["--help"]
