"""The Hugging Face hub: datasets streamed, tokenizers fetched; its libraries' many errors become sentences."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stabrun.config import DataConfig, UserError
from stabrun.data.formats import Document, cut, those_there

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Names, not classes: the libraries raise their own, those of requests and those of httpx, of which any may be absent.
REASONS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, so that nothing is fetched",
    "RepositoryNotFoundError": "the hub has none of that name, or it needs a login",
    "DatasetNotFoundError": "the hub has none of that name, or it needs a login",
    "RevisionNotFoundError": "it has no such revision",
    "EntryNotFoundError": "a file that is needed is not there",
    "LocalEntryNotFoundError": "the hub cannot be reached",
    "HTTPError": "the hub cannot be reached",
    "ConnectionError": "the hub cannot be reached",
    "HFValidationError": "that is no name on the hub",
}


def commit(config: DataConfig) -> str:
    """The commit that the hub's dataset stands at. UserError where the hub cannot tell."""
    with _plainly(f"data.path={config.path}:"):
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(str(config.path), revision=config.revision).sha)


def documents(config: DataConfig, revision: str | None) -> Iterator[Document]:
    """The documents of `config.split` at `revision`, streamed; code that comes with a dataset is never run."""
    import datasets

    path = str(config.path)
    with _plainly(f"data.path={path}:"):
        if config.split not in (there := datasets.get_dataset_split_names(path, config.config, revision=revision)):
            raise UserError(f"data.split={config.split}: {path} has no such split; {those_there(there)}.")
        rows = datasets.load_dataset(path, config.config, split=config.split, revision=revision, streaming=True)
        for row in rows:
            yield cut(_text(row, config))


def _text(row: dict, config: DataConfig) -> str:
    if config.text_key not in row:
        raise UserError(f"data.text_key={config.text_key}: {config.path} has no such column; {those_there(row)}.")
    text = row[config.text_key]
    if not isinstance(text, str | None):
        raise UserError(
            f"data.text_key={config.text_key}: that column of {config.path} is no text, but {type(text).__name__}."
        )
    return text or ""


def tokenizer(name: str, revision: str | None) -> "Tokenizer":
    """The hub's tokenizer of that name. UserError where it is not to be had."""
    with _plainly(f"data.tokenizer={name}: it is neither bytes, bpe nor a file, and"):
        from tokenizers import Tokenizer

        return Tokenizer.from_pretrained(name, revision=revision or "main")


def is_local(config: DataConfig) -> bool:
    """Whether the "dataset of the hub" is a folder on this machine."""
    return Path(str(config.path)).is_dir()


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each attempt
    try:
        yield
    except (UserError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # whatever one of a dozen libraries below raises
        causes = [cls.__name__ for e in (error, error.__cause__) if e for cls in type(e).__mro__]
        reason = next((REASONS[name] for name in causes if name in REASONS), None)
        if reason is None:
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            reason = f"it cannot be read ({type(error).__name__}: {first[:160]})"
        raise UserError(f"{what} {reason}.") from error
