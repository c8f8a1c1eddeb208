"""The Hugging Face Hub: streamed datasets and tokenizers. Errors of its libraries become user errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stabrun.config import DataConfig, UserError
from stabrun.data.formats import Document, cut, listed, text_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Names instead of classes: the errors come from several libraries (requests, httpx), some of which may be missing.
REASONS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "RepositoryNotFoundError": "not found on the Hub, or it requires a login",
    "DatasetNotFoundError": "not found on the Hub, or it requires a login",
    "RevisionNotFoundError": "no such revision",
    "EntryNotFoundError": "a required file is missing",
    "LocalEntryNotFoundError": "the Hub cannot be reached",
    "HTTPError": "the Hub cannot be reached",
    "ConnectionError": "the Hub cannot be reached",
    "HFValidationError": "not a valid name on the Hub",
}


def commit(config: DataConfig) -> str:
    """The current commit of the dataset. Raises UserError if the Hub cannot be asked."""
    with _as_user_error(f"data.path={config.path}:"):
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(str(config.path), revision=config.revision).sha)


def documents(config: DataConfig, revision: str | None) -> Iterator[Document]:
    """Stream the documents of `config.split` at `revision`. Code in a dataset is never run."""
    import datasets

    path = str(config.path)
    with _as_user_error(f"data.path={path}:"):
        if config.split not in (splits := datasets.get_dataset_split_names(path, config.config, revision=revision)):
            raise UserError(f"data.split={config.split}: {path} has no such split. {listed('Splits', splits)}.")
        rows = datasets.load_dataset(path, config.config, split=config.split, revision=revision, streaming=True)
        for row in rows:
            yield cut(text_of(row, config.text_key, path))


def tokenizer(name: str, revision: str | None) -> "Tokenizer":
    """The tokenizer with this name on the Hub. Raises UserError if it cannot be loaded."""
    with _as_user_error(f"data.tokenizer={name}: not bytes, bpe or a file, and"):
        from tokenizers import Tokenizer

        return Tokenizer.from_pretrained(name, revision=revision or "main")


def is_local(config: DataConfig) -> bool:
    """Whether the dataset is a directory on this machine."""
    return Path(str(config.path)).is_dir()


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    try:
        yield
    except (UserError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # one of many libraries may raise anything
        causes = [cls.__name__ for e in (error, error.__cause__) if e for cls in type(e).__mro__]
        reason = next((REASONS[name] for name in causes if name in REASONS), None)
        if reason is None:
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            reason = f"cannot be read ({type(error).__name__}: {first[:160]})"
        raise UserError(f"{what} {reason}.") from error
