"""The commands as click declares them; each imports what it needs when it is called."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import click

from stabrun.cli import completion
from stabrun.cli.overrides import COMMON, COMMON_OF_STUDY
from stabrun.config import Config, UserError, added_groups, choices, config_yaml, groups, keys, run_dir
from stabrun.text import human, shown, warn
from stabrun.version import __version__

if TYPE_CHECKING:
    from stabrun.composition import Sources

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
EXIT_STATUS = (
    "Exit status: 0 done (a diverged run included), 2 user error, 1 runtime error, 130 interrupted (resumable)."
)
DIRECTORY = click.Path(path_type=Path)


class Command(click.Command):
    """A command whose help ends with examples and, if it takes overrides, with groups and common keys."""

    def __init__(
        self,
        *args: Any,
        examples: Iterable[str] = (),
        common: Iterable[str] = (),
        override_prefix: str | None = None,
        **kw: Any,
    ) -> None:
        super().__init__(*args, **kw)
        self.examples, self.common, self.override_prefix = tuple(examples), tuple(common), override_prefix

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")
        if self.common:
            added, docs = added_groups(), {key.path: key.doc for key in keys()}
            with formatter.section("Config groups (GROUP=NAME; +GROUP=NAME if marked with +)"):
                formatter.write_dl(
                    [(f"{'+' * (group in added)}{group}", ", ".join(choices(group))) for group in groups()]
                )
            with formatter.section("Common keys (KEY=VALUE; `stabrun train --cfg job` prints all of them)"):
                formatter.write_dl([(path, docs[path]) for path in self.common])
        formatter.write(f"\n{EXIT_STATUS}\n")


class Group(click.Group):
    """A group that lists its commands in the order of their definition."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def install_completion(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell is not None and not ctx.resilient_parsing:
        click.echo(completion.install(cli, shell))
        ctx.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="stabrun %(version)s")
@click.option(
    "--install-completion", metavar="[bash|zsh|fish]", is_flag=False, flag_value="", is_eager=True, expose_value=False,
    callback=install_completion, help="Install completion for a shell (default: that of $SHELL) and exit.",
)  # fmt: skip
def cli() -> None:
    """Find the highest stable learning rate of small GPT models, the layer that diverges first, and the norm
    placements that help."""


def overrides_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument(
        "overrides", metavar="[OVERRIDE]...", nargs=-1, callback=lambda _ctx, _param, words: list(words),
        shell_complete=completion.complete_override,
    )(command)  # fmt: skip


config_dir_option = click.option(
    "-cd", "--config-dir", type=DIRECTORY, help="Add a directory of configuration files, such as DIR/variant/mine.yaml."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be done; change nothing.")


def hydra_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of Hydra that print something instead of running, and those that choose the files."""
    for option in reversed((
        click.option("-c", "--cfg", type=click.Choice(["job", "hydra", "all"]), is_flag=False, flag_value="job",
                     help="Print the configuration instead of running."),
        click.option("-p", "--package", metavar="PACKAGE", help="With --cfg: print this part only, such as optim."),
        click.option("--resolve", is_flag=True, help="With --cfg: resolve interpolations."),
        click.option("-i", "--info", type=click.Choice(INFO), is_flag=False, flag_value="all",
                     help="Print information about the composition instead of running."),
        config_dir_option,
        click.option("-cn", "--config-name", metavar="NAME", default="config", help="Name of the primary config file."),
        click.option("--hydra-help", is_flag=True, help="Print Hydra's help."),
    )):  # fmt: skip
        command = option(command)
    return command


@dataclass
class HydraFlags:
    """The values of `hydra_options`."""

    cfg: str | None
    package: str | None
    resolve: bool
    info: str | None
    config_dir: Path | None
    config_name: str
    hydra_help: bool

    def sources(self) -> "Sources":
        from stabrun.composition import Sources

        return Sources(self.config_dir, self.config_name)

    def show(self, overrides: list[str]) -> bool:
        """Print what --cfg, --info or --hydra-help asks for. False if none of them was given."""
        from stabrun import composition

        if (self.package or self.resolve) and not self.cfg:
            raise UserError("--package and --resolve are allowed with --cfg only.")
        if self.cfg and self.info:
            raise UserError("--cfg and --info cannot be combined.")
        if self.cfg:
            print(composition.shown(overrides, self.sources(), self.cfg, self.package, self.resolve), end="")
        elif self.info or self.hydra_help:
            print(composition.information(overrides, self.sources(), self.info), end="")
        return bool(self.cfg or self.info or self.hydra_help)


@cli.command(
    common=(*COMMON, "run_dir"),
    examples=(
        "stabrun train +variant=qk_norm_cap optim.lr=3e-2",
        "stabrun train model=micro train.precision=bf16 --cfg job",
        "stabrun train -m optim.lr=1e-2,1e-1 seed=0,1",
        "stabrun train -m hydra/sweeper=optuna 'optim.lr=tag(log,interval(1e-3,1))' hydra.sweeper.n_trials=20",
    ),
)
@overrides_argument
@click.option("-m", "--multirun", is_flag=True, help="Train one run per combination of comma-separated values.")
@hydra_options
def train(overrides: list[str], multirun: bool, **flags: Any) -> int:
    """Train one run and print its verdict."""
    from stabrun import composition

    hydra = HydraFlags(**flags)
    if multirun and (hydra.cfg or hydra.info):
        raise UserError("--multirun cannot be combined with --cfg or --info.")
    if hydra.show(overrides):
        return 0
    if multirun:
        composition.multirun(overrides, hydra.sources(), objective)
        return 0
    (config,) = composition.compose_each([overrides], hydra.sources())
    return train_one(config)


def train_one(config: Config) -> int:
    """Train, and print the verdict; 130 if interrupted."""
    from stabrun.record.schema import INTERRUPTED

    return 130 if trained(config)["status"] == INTERRUPTED else 0


def objective(config: Config) -> float:
    """The final training loss of a run, for sweepers that minimize: infinite if there is none, or it is not finite."""
    from stabrun.record.jsonl import number
    from stabrun.record.schema import INTERRUPTED

    summary = trained(config)
    if summary["status"] == INTERRUPTED:
        raise KeyboardInterrupt
    loss = number(summary["final_loss"]) if summary["final_loss"] is not None else math.inf
    return loss if math.isfinite(loss) else math.inf


def trained(config: Config) -> Any:
    """The summary of a run, trained now and printed."""
    from stabrun.record.jsonl import number
    from stabrun.record.run_dir import RunDir
    from stabrun.record.schema import INTERRUPTED
    from stabrun.training.offline import write_run
    from stabrun.training.run import train as train_run
    from stabrun.verdict.wording import interrupted_line, too_short, verdict_line

    if warning := too_short([config.train.steps]):
        warn(warning)
    summary = train_run(config)
    print(verdict_line(summary))
    if summary["val_loss"] is not None:
        loss, perplexity = number(summary["val_loss"]), number(summary["val_perplexity"])
        print(f"validation loss {loss:.4f}, perplexity {perplexity:.2f}")
    print(shown(f"record: {run_dir(config)}"), flush=True)  # before W&B, which takes a moment
    if summary["status"] == INTERRUPTED:
        print(interrupted_line(summary), flush=True)
    write_run(config.tracker, RunDir(run_dir(config)), summary)
    return summary


@cli.command(
    common=("schedule.min_lr", *COMMON, "run_dir"),
    examples=(
        "stabrun ramp +variant=qk_norm",
        "stabrun ramp model=micro schedule.min_lr=1e-5 optim.lr=1 train.steps=1000 --json",
    ),
)
@overrides_argument
@json_option
@hydra_options
def ramp(overrides: list[str], as_json: bool, **flags: Any) -> int:
    """Train one run whose learning rate rises exponentially, from schedule.min_lr to optim.lr, and print the rate from
    which on its loss stays up: a first guess at lr50. Its defaults are schedule=ramp, from 1e-4 to 5 in 400 steps."""
    from stabrun import composition
    from stabrun.cli.ramp import ramp, with_defaults

    hydra, words = HydraFlags(**flags), with_defaults(overrides)
    if hydra.show(words):
        return 0
    (config,) = composition.compose_each([words], hydra.sources())
    return ramp(config, as_json)


@cli.command(
    common=(*COMMON_OF_STUDY, *COMMON),
    examples=(
        "stabrun sweep +experiment=quickstart",
        "stabrun sweep study.variants=[baseline,qk_norm] study.lrs=[1e-2,1e-1,1] study.seeds=3 study.workers=2",
        "stabrun sweep +experiment=frontier model=micro --dry-run",
    ),
)
@overrides_argument
@click.option("--dry-run", is_flag=True, help="List cells, tokens, FLOPs, memory and time; train nothing.")
@hydra_options
def sweep(overrides: list[str], dry_run: bool, **flags: Any) -> int:
    """Run a study: variants × learning rates × seeds. The same command resumes it."""
    from stabrun.study.question import split_axes
    from stabrun.study.sweep import sweep as run_study

    hydra = HydraFlags(**flags)
    if hydra.show(split_axes(overrides)[0]):  # what all cells have in common
        return 0
    return run_study(overrides, hydra.sources(), dry_run)


@cli.command(examples=("stabrun status studies/quickstart-1a2b3c4d", "stabrun status runs/0123456789ab --json"))
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Show the state of a study or a run. It may be running in another terminal."""
    from stabrun.cli import status

    status.status(directory, as_json)


@cli.command(examples=("stabrun top runs/0123456789ab", "stabrun top studies/quickstart-1a2b3c4d"))
@click.argument("directory", metavar="DIR", type=DIRECTORY)
def top(directory: Path) -> int:
    """Show a run or a study live on the terminal. Of a run: its loss, the verdict so far, the output norms that grow
    most, and alarms. It ends when the run or the study does. Nothing is written."""
    from stabrun.cli import top

    return top.top(directory)


@cli.command(
    override_prefix="",
    examples=("stabrun rerun runs/0123456789ab optim.lr=0.1", "stabrun rerun runs/0123456789ab --cfg job"),
)
@click.argument("directory", metavar="RUN_DIR", type=DIRECTORY)
@overrides_argument
@click.option(
    "-c", "--cfg", type=click.Choice(["job"]), is_flag=False, flag_value="job", help="Print the configuration."
)
def rerun(directory: Path, overrides: list[str], cfg: str | None) -> int:
    """Train a recorded run again in a new directory. Overrides change its configuration."""
    from stabrun.cli.rerun import rerun_config

    config = rerun_config(directory, overrides)
    if cfg:
        print(config_yaml(config), end="")
        return 0
    return train_one(config)


step_option = click.option("--step", type=int, metavar="N", help="The checkpoint after N updates (default: newest).")


@cli.command(examples=("stabrun sample runs/0123456789ab --prompt 'In the beginning' --temperature 0.8 --top-k 20",))
@click.argument("directory", metavar="RUN_DIR", type=DIRECTORY)
@click.option("--prompt", default="\n", help="Text to continue (default: a line break).")
@click.option("--tokens", default=200, show_default=True, help="Tokens to generate.")
@click.option("--temperature", default=1.0, show_default=True, help="Divides the logits; 0: the most likely token.")
@click.option("--top-k", type=int, help="Sample from the K most likely tokens only.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@step_option
def sample(directory: Path, **options: Any) -> None:
    """Generate text from a checkpoint, on the CPU."""
    from stabrun.api import Run

    print(Run(directory).sample(**options))


@cli.command(
    "eval", override_prefix="data.",
    examples=("stabrun eval runs/0123456789ab", "stabrun eval runs/0123456789ab data=local data.path=text.txt"),
)  # fmt: skip
@click.argument("directory", metavar="RUN_DIR", type=DIRECTORY)
@overrides_argument
@step_option
def evaluate(directory: Path, overrides: list[str], step: int | None) -> None:
    """Compute the loss of a checkpoint. The data are the validation split of its run, or all of another text."""
    from stabrun.api import Run

    found = Run(directory).evaluate(overrides, step)
    name = "loss" if overrides else "validation loss"
    print(f"{name} {found.loss:.4f}, perplexity {found.perplexity:.2f} on {found.tokens:,} tokens")


@cli.command(
    examples=(
        "stabrun judge runs/0123456789ab --follow",
        "stabrun judge trainer_state.json --json",
        "stabrun judge wandb/offline-run-20250101_120000-a1b2c3d4",
        "stabrun judge logs/",
        "stabrun judge curve.csv --step iteration --loss train_loss --against other.csv",
        "stabrun judge runs/fp8 --against runs/bf16 --tolerance 0.01",
    ),
)
@click.argument("path", metavar="PATH", type=DIRECTORY)
@json_option
@click.option("--follow", is_flag=True, help="Watch a run or a log until it ends or its divergence is certain.")
@click.option(
    "--against",
    metavar="OTHER",
    type=DIRECTORY,
    help="Compare with another run: from which step losses and sites differ.",
)
@click.option(
    "--tolerance",
    metavar="NATS",
    type=float,
    help="With --against: are the levels of the losses the same within this? Exit status 3 unless that is shown.",
)
@click.option("--step", metavar="COLUMN", help="Name of the step column.")
@click.option("--loss", metavar="COLUMN", help="Name of the loss column.")
@click.option("--split", metavar="COLUMN", help="Name of the column that says train or val.")
def judge(**words: Any) -> int:
    """Print the verdict on saved records. PATH: a run, a study, another tool's file (a table, JSON, a log, TensorBoard
    events, W&B's .wandb), or a folder of such files."""
    from stabrun.cli.judge import Request, judge

    return judge(Request(**words))


@cli.command(examples=("stabrun report studies/quickstart-1a2b3c4d", "stabrun report runs/a runs/b"))
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("other", metavar="[OTHER]", type=DIRECTORY, required=False)
def report(directory: Path, other: Path | None) -> None:
    """Write tables, figures and an HTML page. DIR is a study or a run; OTHER is compared with it."""
    from stabrun.report.report import write_report

    write_report(directory, other)


@cli.command(examples=("stabrun pack studies/quickstart-1a2b3c4d quickstart.tar.xz",))
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--every", metavar="N", default=50, show_default=True, help="Keep statistics every N steps.",
              type=click.IntRange(min=1))  # fmt: skip
def pack(directory: Path, file: Path, every: int) -> None:
    """Write the record of a study to a small file: losses of each step, statistics of some. DIR is a study."""
    from stabrun.publish.pack import pack

    pack(directory, file, every)
    print(f"{file}: {human(file.stat().st_size)}")


@cli.command(examples=("stabrun unpack quickstart.tar.xz studies",))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("parent", metavar="[DIR]", type=DIRECTORY, default=Path("."))
def unpack(file: Path, parent: Path) -> None:
    """Write a packed study to a new directory in DIR, by default the working directory."""
    from stabrun.publish.pack import unpack

    print(unpack(file, parent))


@cli.command(override_prefix="tracker.", examples=("stabrun upload studies/quickstart-1a2b3c4d tracker.project=edges",))
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@overrides_argument
@dry_run_option
def upload(directory: Path, overrides: list[str], dry_run: bool) -> int:
    """Send saved records to W&B. DIR is a study or a run. Overrides are keys of `tracker`."""
    from stabrun.publish import upload

    return upload.upload(directory, overrides, dry_run)


@cli.command(override_prefix="tracker.", examples=("stabrun dashboard studies/quickstart-1a2b3c4d --dry-run",))
@click.argument("words", metavar="[STUDY_DIR] [OVERRIDE]...", nargs=-1, shell_complete=completion.complete_override)
@dry_run_option
def dashboard(words: tuple[str, ...], dry_run: bool) -> int:
    """Create a W&B workspace and report. Overrides are keys of `tracker`."""
    if find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: the package wandb-workspaces is missing: pip install 'stabrun[dashboard]'.")
    from stabrun.publish import dashboard

    study = Path(words[0]) if words and "=" not in words[0] else None
    return dashboard.dashboard(study, words[study is not None :], dry_run)


@cli.command(common=COMMON, examples=("stabrun model model=830m", "stabrun model +variant=qk_norm +check=init --json"))
@overrides_argument
@config_dir_option
@json_option
@click.option("--trace", is_flag=True, help="Also measure peak memory by tracing.")
def model(overrides: list[str], config_dir: Path | None, as_json: bool, trace: bool) -> None:
    """Describe a model: parameters, FLOPs, memory. +check=init also runs one pass at the initial weights."""
    from stabrun.composition import compose
    from stabrun.model.describe import describe, report
    from stabrun.record.jsonl import jsonable

    config = compose(overrides, config_dir)
    facts = describe(config)
    if trace:
        from stabrun.training.trace import traced_memory

        facts["memory"]["traced_peak_bytes"] = traced_memory(config)
    lines = [report(facts, config)]
    if config.check == "init":
        from stabrun.training.initial_check import check_initial, check_lines

        facts["init"] = check_initial(config)
        lines += ["", *check_lines(facts["init"])]
    print(json.dumps(jsonable(facts), indent=1) if as_json else "\n".join(lines))


@cli.command(examples=("stabrun variants", "stabrun variants --config-dir my_conf --json"))
@config_dir_option
@json_option
def variants(config_dir: Path | None, as_json: bool) -> None:
    """List the variants by group, with their definitions, sources and switches."""
    from stabrun.cli.variants import entries, facts, lines

    listed = entries(config_dir)
    text = "\n".join(lines(listed, get_terminal_size().columns))
    print(json.dumps(facts(listed), indent=1, default=str) if as_json else text)


@cli.group(cls=Group, no_args_is_help=False)
def data() -> None:
    """Prepare datasets."""


@data.command(
    common=("data.path", "data.tokenizer", "data.workers"),
    examples=("stabrun data prepare data=local data.path=texts data.workers=4",),
)
@overrides_argument
@config_dir_option
def prepare(overrides: list[str], config_dir: Path | None) -> int:
    """Tokenize the corpus into memory-mapped shards."""
    from stabrun.composition import compose
    from stabrun.data.shards import opened, prepare

    config = compose(overrides, config_dir)
    try:
        prepared = prepare(config.data, config.model, verbose=True)
        opened(prepared.folder, math.inf)
    except KeyboardInterrupt:
        warn("interrupted; the same command resumes from the parts that are finished.")
        return 130
    tokens = prepared.manifest["tokens"]
    print(f"{tokens['train']:,} training and {tokens['val']:,} validation tokens in {prepared.folder}")
    return 0
