"""Tokenizers: bytes, a byte-level BPE trained on the training text, or a tokenizer file."""

import base64
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stabrun.config import DataConfig, UserError
from stabrun.data import hub

FILE = "tokenizer.json"
# Characters of text that a BPE is trained on: more hardly change the merges, and would need more memory.
TRAINING_TEXT = 64_000_000
LARGEST = 200_000_000  # bytes of a tokenizer.json
GROWTH = 100  # of a text by a tokenizer, at most: Unicode's own normalization forms reach 18
CACHED_WORDS = 1 << 20  # about 200 MB per process


class Tokenizer(Protocol):
    size: int  # one more than the largest token
    definition: str  # the content of its file

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, including special tokens. Ids outside the vocabulary are skipped."""
        ...


class Bytes:
    """UTF-8 bytes as tokens."""

    size = 256
    definition = '{"type": "bytes"}\n'

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < self.size).decode(errors="replace")


class Vocabulary:
    """A tokenizer of the `tokenizers` library. `definition` is the text of its tokenizer.json."""

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer

        self.definition = definition
        self.inner = Tokenizer.from_str(definition)
        steps = json.loads(self.inner.to_str())
        if (
            factor := math.prod(map(growth, (steps["normalizer"], steps["pre_tokenizer"], steps["post_processor"])))
        ) > GROWTH:
            raise UserError(
                f"data.tokenizer: makes text up to {factor:.3g} times as long; at most {GROWTH} is accepted."
            )
        self.inner.no_truncation()
        self.inner.no_padding()
        self.size = max(self.inner.get_vocab().values()) + 1
        added = [token.content for token in self.inner.get_added_tokens_decoder().values()]
        self.added = re.compile("|".join(map(re.escape, added))) if added else None
        self.words = _Words(self.inner) if _splits_as_gpt2(steps) else None

    def encode(self, text: str) -> np.ndarray:
        """The tokens of the text, `[count]`. Special tokens in the text are recognized; none are added."""
        if self.words is None or (self.added and self.added.search(text)):
            return np.asarray(self._ids(text), dtype=np.uint32)
        look_up = self.words.__getitem__
        ids = (map(look_up, WORD.findall(part)) if common else [self._ids(part)] for common, part in _stretches(text))
        chain = itertools.chain.from_iterable
        return np.fromiter(chain(chain(ids)), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        try:
            return self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"data.tokenizer: cannot encode {text[:40]!r} ({error}).") from error


# The word split of GPT-2's byte-level tokenizers, for characters with the same class in all versions of Unicode.
# Looking up each word in a table is several times faster than the library, and gives the same tokens.
COMMON = "".join(
    map(chr, [*range(0x80), *range(0xA0, 0x250), *range(0x2010, 0x2028), *range(0x2030, 0x205F), 0x20AC, 0x2122])
)


def _of_class(letter: str) -> str:
    return re.escape("".join(c for c in COMMON if unicodedata.category(c).startswith(letter)))


_L, _N, _S = _of_class("L"), _of_class("N"), "\t-\r \xa0"
WORD = re.compile(rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+| ?[^{_S}{_L}{_N}]+|[{_S}]+(?![^{_S}])|[{_S}]+")
UNCOMMON = re.compile(f"[^{re.escape(COMMON)}]")
# A letter followed by a space and a letter ends a word, independent of the text around it.
LAST_END = re.compile(r".*[A-Za-z](?= [A-Za-z])", re.DOTALL)
NEXT_END = re.compile(r"[A-Za-z](?= [A-Za-z])")


def _stretches(text: str) -> Iterator[tuple[bool, str]]:
    """Cut the text at word ends: (True, only common characters) or (False, text around uncommon characters)."""
    start = 0
    while uncommon := UNCOMMON.search(text, start):
        before = LAST_END.match(text, start, uncommon.start())
        after = NEXT_END.search(text, uncommon.end())
        cut = before.end() if before else start
        end = after.end() if after else len(text)
        yield True, text[start:cut]
        yield False, text[cut:end]
        start = end
    yield True, text[start:]


def growth(step: dict[str, Any] | None) -> float:
    """How many times as long a step of a tokenizer may make a text, at most: from its definition."""
    if not step:
        return 1.0
    parts = [part for name in ("normalizers", "pretokenizers", "processors") for part in step.get(name) or ()]
    kind, factor = step["type"], math.prod(map(growth, parts))
    if kind == "Replace":
        pattern, length = step["pattern"].get("String"), len(step["content"])
        factor *= max(1.0, length / len(pattern)) if pattern else length + 1.0  # a regular expression may match nothing
    elif kind == "Prepend":
        factor *= 1 + len(step["prepend"]) / 1000  # once per block
    elif kind == "ByteLevel":
        factor *= 2
    elif kind == "Precompiled":  # size of a trie, the trie, and the replacements, each ended by NUL
        packed = base64.b64decode(step["precompiled_charsmap"] or "")
        replacements = packed[4 + int.from_bytes(packed[:4], "little") :].split(b"\0")
        factor *= max(len(text.decode(errors="replace")) for text in replacements)
    elif kind == "TemplateProcessing":
        factor *= max(1, sum("Sequence" in piece for piece in step["single"]))
    return factor


def _splits_as_gpt2(definition: dict[str, Any]) -> bool:
    split = definition.get("pre_tokenizer") or {}
    return (
        definition.get("normalizer") is None
        and definition["model"]["type"] == "BPE"
        and not definition["model"].get("dropout")
        and split.get("type") == "ByteLevel"
        and not split["add_prefix_space"]
        and split["use_regex"]
    )


class _Words(dict[str, tuple[int, ...]]):
    """Word → tokens. The library is called once per word."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= CACHED_WORDS:
            self.clear()
        ids = self[word] = tuple(self.inner.encode(word, add_special_tokens=False).ids)
        return ids


def trained(texts: Iterable[str], size: int, separator: str | None) -> Vocabulary:
    """Train a byte-level BPE with at most `size` tokens (fewer for short texts). The separator is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[separator] if separator else [],
        show_progress=False,
    )
    inner.train_from_iterator(_at_most(TRAINING_TEXT, texts), trainer)
    return Vocabulary(inner.to_str(pretty=True))


def _at_most(characters: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def file_of(data: DataConfig) -> Path | None:
    """The file that `data.tokenizer` names, or None if it is `bytes`, `bpe` or a name on the Hub."""
    file = Path(data.tokenizer)
    if data.tokenizer in ("bytes", "bpe") or not (file.exists() or file.suffix == ".json"):
        return None
    if not file.is_file():
        raise UserError(f"data.tokenizer={file}: no such file.")
    if not 0 < file.stat().st_size <= LARGEST:  # empty, as are those of /proc, some of which never end
        raise UserError(f"data.tokenizer={file}: empty, or larger than {LARGEST // 10**6} MB; not a tokenizer.json.")
    return file


def chosen(data: DataConfig, size: int, training: Iterable[str]) -> Tokenizer:
    """The tokenizer of this configuration, trained to `size` tokens if it is a BPE. Raises UserError if invalid."""
    if data.tokenizer == "bytes":
        return Bytes()
    if data.tokenizer == "bpe":
        return trained(training, size, data.separator)
    if file := file_of(data):
        return _of_file(file)
    return Vocabulary(hub.tokenizer(data.tokenizer, data.tokenizer_revision).to_str(pretty=True))


def load(file: Path) -> Tokenizer:
    """The tokenizer saved in `file`."""
    text = file.read_bytes().decode()
    return Bytes() if text == Bytes.definition else Vocabulary(text)


def _of_file(file: Path) -> Vocabulary:
    try:
        return Vocabulary(file.read_bytes().decode())
    except UserError as error:
        raise UserError(str(error).replace("data.tokenizer", f"data.tokenizer={file}", 1)) from error
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"data.tokenizer={file}: not a tokenizer.json of the tokenizers library.") from error
