"""Shell completion by click's protocol, and its installation for bash, zsh and fish."""

import os
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from stabrun.cli.overrides import complete
from stabrun.config import UserError

COMPLETE_VARIABLE = "_STABRUN_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
SCRIPTS = Path(__file__).parent


@add_completion_class
class Bash(BashComplete):
    """Bash splits words at the characters of COMP_WORDBREAKS, `=` among them, and replaces only the last part."""

    source_template = (SCRIPTS / "completion.bash").read_text(encoding="utf-8")

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode(errors="ignore")
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        _, incomplete = self.get_completion_args()
        kept = max((incomplete.rfind(c) + 1 for c in os.environ.get("COMP_WORDBREAKS", "") if c in "=:"), default=0)
        return f"{item.type},{item.value[kept:]}"


@add_completion_class
class Zsh(ZshComplete):
    """click's class with a script that adds no space after `KEY=` and `SECTION.`."""

    source_template = (SCRIPTS / "completion.zsh").read_text(encoding="utf-8")


def complete_override(context: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem[str]]:
    """Completions of an override argument; a command's `override_prefix` restricts them to some keys."""
    config_dir, prefix = context.params.get("config_dir"), getattr(context.command, "override_prefix", None)
    return [CompletionItem(value, help=text or None) for value, text in complete(word, config_dir, prefix)]


def install(cli: click.Command, shell: str) -> str:
    """Write the completion script of a shell and make the shell load it. Returns a sentence that names the files."""
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise UserError(f"--install-completion {shell}: must be one of {', '.join(SHELLS)}.")
    completion = get_completion_class(shell)
    assert completion is not None
    script, startup, lines = places(Path.home())[shell]
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(completion(cli, {}, "stabrun", COMPLETE_VARIABLE).source())
    if startup is None:
        return f"{shell} completion written to {script}; open a new terminal to use it."
    if lines not in (startup.read_text(encoding="utf-8") if startup.is_file() else ""):
        with open(startup, "a") as file:
            file.write(f"\n{lines}\n")
    return f"{shell} completion written to {script} and loaded from {startup}; open a new terminal to use it."


def places(home: Path) -> dict[str, tuple[Path, Path | None, str]]:
    """For each shell: the completion script, the startup file that loads it, and the line added there."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    zsh = Path(os.environ.get("ZDOTDIR") or home)
    bash = home / ".bash_completions" / "stabrun.sh"
    return {
        "bash": (bash, home / ".bashrc", f"source '{bash}'"),
        "zsh": (home / ".zfunc" / "_stabrun", zsh / ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
        "fish": (config / "fish" / "completions" / "stabrun.fish", None, ""),
    }
