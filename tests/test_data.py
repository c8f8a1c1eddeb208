import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow
import pytest
import torch
from helpers import a_trainer, configured, tiny
from hypothesis import given
from hypothesis import strategies as st
from preparing import prepare_at_barrier
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from stabrun.config import DataConfig, ModelConfig, UserError
from stabrun.data import hub, parts, shards, tokenizer
from stabrun.data.batches import starts, training_batch, validation_batch
from stabrun.data.corpus import EMBEDDED, split_blocks
from stabrun.data.degenerate import digest, findings
from stabrun.data.shards import Tokens, prepare
from stabrun.record.run_dir import RunDir
from stabrun.training import trainer
from stabrun.training.run import train


def test_shipped_text_is_the_one_described():
    raw = lzma.open(EMBEDDED).read()
    digest = hashlib.sha256(raw).hexdigest()
    assert digest in (EMBEDDED.parent / "README.md").read_text()
    assert EMBEDDED.stat().st_size < 1.5e6
    assert raw.count(b"\n") == 31102


def test_splits_hold_every_byte_once(cache):
    prepared = prepare(DataConfig(), ModelConfig())
    raw = lzma.open(EMBEDDED).read()
    train, val = (split.read(0, len(split)).tobytes() for split in (prepared.train, prepared.val))
    block = 1 << 16
    blocks = [raw[i : i + block] for i in range(0, len(raw), block)]
    assert val == b"".join(b for i, b in enumerate(blocks) if i % 20 == 19)
    assert train == b"".join(b for i, b in enumerate(blocks) if i % 20 != 19)
    assert prepared.train.shards[0].dtype == np.uint8


def test_bpe_learns_from_training_text_alone_and_decodes_back(tmp_path):
    data = DataConfig(name="local", path=str(tmp_path / "a.txt"), tokenizer="bpe", cache_dir=str(tmp_path / "c"))
    text = "".join(f"line {i} of a text about the number {i * i}\n" for i in range(9000))
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare(data, ModelConfig(vocab_size=512))
    assert prepared.manifest["vocab_size"] <= 512
    assert prepared.train.shards[0].dtype == np.uint16
    folder = tmp_path / "c" / shards.name(data, ModelConfig(vocab_size=512))
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoded = saved.decode(prepared.val.read(0, len(prepared.val)).tolist())
    assert decoded == "".join(piece.text for piece in split_blocks(data) if piece.split == "val")


def test_short_text_is_split_too(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    data = DataConfig(name="local", path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "c"), seq_len=8)
    prepared = prepare(data, ModelConfig())
    assert len(prepared.val) == 50
    assert len(prepared.train) == 950


def test_windows_across_shards():
    parts = [np.arange(0, 5), np.arange(5, 7), np.arange(7, 20)]
    tokens = Tokens(parts, np.array([0, 5, 7, 20]))
    for start in range(15):
        assert tokens.read(start, 5).tolist() == list(range(start, start + 5))


def test_shards_are_cut_at_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SHARD_TOKENS", 1 << 17)
    prepared = prepare(DataConfig(cache_dir=str(tmp_path)), ModelConfig())
    whole = prepare(DataConfig(), ModelConfig())
    assert len(prepared.train.shards) > 10
    assert prepared.train.read(0, len(whole.train)).tobytes() == whole.train.read(0, len(whole.train)).tobytes()


def test_batch_is_a_function_of_seed_and_step():
    tokens = prepare(DataConfig(), ModelConfig()).train
    batch = training_batch(tokens, 3, 7, 4, 16)
    assert batch.shape == (4, 17)
    assert batch.equal(training_batch(tokens, 3, 7, 4, 16))
    assert not batch.equal(training_batch(tokens, 3, 8, 4, 16))
    assert not batch.equal(training_batch(tokens, 4, 7, 4, 16))


def test_training_windows_reach_both_ends():
    tokens = Tokens([np.arange(20)], np.array([0, 20]))
    starts = {int(training_batch(tokens, 0, step, 8, 4)[i, 0]) for step in range(50) for i in range(8)}
    assert starts == set(range(16))


def test_validation_windows_do_not_overlap():
    tokens = Tokens([np.arange(1000)], np.array([0, 1000]))
    batch = validation_batch(tokens, 12, 16)
    inputs = batch[:, :-1].flatten().tolist()
    assert len(inputs) == len(set(inputs)) == 12 * 16


def test_several_processes_ask_at_the_same_time(tmp_path):
    (tmp_path / "a.txt").write_text("some words that come again and again\n" * 20000)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path / "a.txt"), str(tmp_path / "c"), barrier, results)
    workers = [context.Process(target=prepare_at_barrier, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    hashes = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(hashes) == 1
    assert len([f for f in (tmp_path / "c").iterdir() if f.is_dir()]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "contains no text"), (b"\xff\xfe\x00junk", "not UTF-8"), (b"a\x00b", "NUL bytes"), (b"short", "has only")],
)
def test_unusable_texts_are_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    data = DataConfig(name="local", path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match=message):
        prepare(data, ModelConfig())
    assert not list((tmp_path / "c").glob("*.part"))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="regular file"):
        prepare(DataConfig(name="local", path=str(tmp_path / "pipe"), cache_dir=str(tmp_path / "c")), ModelConfig())


def test_link_loops_directories_and_pipes_are_skipped(tmp_path):
    texts = tmp_path / "texts"
    (texts / "folder.txt").mkdir(parents=True)
    os.mkfifo(texts / "pipe.txt")
    (texts / "loop.txt").symlink_to(texts / "loop.txt")
    (texts / "good.txt").write_text("0123456789" * 300)
    data = DataConfig(name="local", path=str(texts), cache_dir=str(tmp_path / "c"))
    assert sum(prepare(data, ModelConfig()).manifest["tokens"].values()) == 3000


@pytest.mark.parametrize("content", [b"junk", lzma.compress(b"words " * 999)[:-20]])
def test_a_damaged_xz_is_refused(tmp_path, content):
    (tmp_path / "text.xz").write_bytes(content)
    with pytest.raises(UserError, match="not a complete"):
        prepare(DataConfig(name="local", path=str(tmp_path / "text.xz"), cache_dir=str(tmp_path / "c")), ModelConfig())


def test_a_truncated_shard_is_noticed(tmp_path):
    data = tiny(f"data.cache_dir={tmp_path}").data
    prepare(data, ModelConfig())
    shard = next(tmp_path.glob("*/train-00000.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        prepare(data, ModelConfig())


def test_manifest_tells_what_was_prepared(tmp_path):
    data = configured("model=nano", f"data.cache_dir={tmp_path}").data
    prepare(data, ModelConfig())
    manifest = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())
    shard = next(tmp_path.glob("*/train-00000.bin"))
    assert manifest["shards"]["train"][0]["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert manifest["tokens"]["train"] == shard.stat().st_size


DOCUMENTS = [f"document {i} — “{'word ' * (i % 7)}” 漢字\n" for i in range(500)]


def local(path, **keys):
    """Data of one's own, cached beside it."""
    return DataConfig(name="local", path=str(path), cache_dir=str(path.parent / "cache"), **keys)


def as_text(folder):
    for i, document in enumerate(DOCUMENTS):
        file = folder / f"{i // 100}" / f"{i:04d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(document)


def lines(key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


def as_table(folder, **columns):
    table = pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS} | columns)
    parquet.write_table(table, folder / "a.parquet", row_group_size=77)


def mixed(folder):
    half = lines().splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(half[:250]))
    parquet.write_table(pyarrow.table({"text": DOCUMENTS[250:400]}), folder / "b.parquet")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(half[400:])))
    (folder / "notes.md").write_text("passed over")


@pytest.mark.parametrize(
    "write",
    [
        as_text,
        as_table,
        mixed,
        lambda folder: (folder / "a.jsonl").write_bytes(b"\n" + lines()),
        lambda folder: (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines())),
        lambda folder: parquet.write_table(
            pyarrow.table({"text": pyarrow.array(["", *DOCUMENTS, None]).dictionary_encode()}), folder / "a.parquet"
        ),
    ],
    ids=["txt", "parquet", "mixed", "jsonl", "jsonl.xz", "parquet of a dictionary"],
)
def test_the_same_documents_in_any_format_are_the_same_tokens(tmp_path, write):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts")
    prepared = prepare(local(tmp_path / "texts", separator="\n--\n"), ModelConfig())
    train, val = (split.read(0, len(split)).tobytes() for split in (prepared.train, prepared.val))
    assert train.decode() == "".join(d + "\n--\n" for i, d in enumerate(DOCUMENTS) if i % 20 != 19)
    assert val.decode() == "".join(d + "\n--\n" for i, d in enumerate(DOCUMENTS) if i % 20 == 19)


def test_field_and_number_of_documents_are_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("body"))
    prepared = prepare(local(tmp_path / "a.jsonl", text_key="body", max_documents=300), ModelConfig())
    assert sum(prepared.manifest["tokens"].values()) == len("".join(DOCUMENTS[:300]).encode())


def test_a_separator_follows_the_last_block_of_a_document_in_its_split(tmp_path):
    long = "x" * (3 * (1 << 16) + 5)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (long, "short", long)))
    prepared = prepare(local(tmp_path / "a.jsonl", separator="|", val_fraction=0.25), ModelConfig())
    train, val = (split.read(0, len(split)).tobytes().decode() for split in (prepared.train, prepared.val))
    block = "x" * (1 << 16)
    assert train == block * 3 + "short|" + block * 2 + "xxxxx|"
    assert val == "xxxxx|" + block


def test_short_documents_keep_their_separators(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "0123456789"}\n' * 3)
    prepared = prepare(local(tmp_path / "a.jsonl", separator="|", val_fraction=0.25, seq_len=2), ModelConfig())
    train, val = (split.read(0, len(split)).tobytes() for split in (prepared.train, prepared.val))
    assert (train, val) == (b"0123456789|0123456789|01", b"23456789|")


def test_the_separator_of_a_trained_bpe_is_one_token(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    data = local(tmp_path / "a.jsonl", separator="<|end|>", tokenizer="bpe")
    prepared = prepare(data, ModelConfig(vocab_size=400))
    saved = Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    ids = prepared.train.read(0, len(prepared.train)).tolist()
    assert ids.count(saved.token_to_id("<|end|>")) == 475
    ends = [i for i in range(500) if i % 20 != 19]
    assert saved.decode(ids, skip_special_tokens=False) == "".join(DOCUMENTS[i] + "<|end|>" for i in ends)


def test_a_local_directory_can_be_used_as_a_dataset(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines())
    (tmp_path / "a.jsonl").write_bytes(lines())
    data = DataConfig(name="hub", path=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"), separator="|")
    prepared = prepare(data, ModelConfig())
    assert (
        prepared.manifest["hash"] == prepare(local(tmp_path / "a.jsonl", separator="|"), ModelConfig()).manifest["hash"]
    )
    assert prepared.manifest["revision"]
    for wrong, message in (
        ({"split": "test"}, "data.split=test.*Splits: train"),
        ({"text_key": "body"}, "data.text_key=body.*Fields: id, text"),
        ({"text_key": "id"}, "must be text, not int"),
        ({"config": "fr"}, "'fr' not found"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(DataConfig(**(vars(data) | wrong)), ModelConfig())
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_dataset_of_the_hub_is_pinned_and_needs_no_network_again(tmp_path, monkeypatch):
    data = DataConfig(name="hub", path="org/name", cache_dir=str(tmp_path), revision="v1")
    with pytest.raises(UserError, match=r"data.path=org/name: HF_HUB_OFFLINE is set"):
        prepare(data, ModelConfig())
    read = []
    monkeypatch.setattr(hub, "commit", lambda config: "c0ffee")
    monkeypatch.setattr(hub, "documents", lambda config, at: read.append(at) or iter(map(iter, zip(DOCUMENTS))))
    first = prepare(data, ModelConfig())
    assert first.manifest["revision"] == "c0ffee"
    assert set(read) == {"c0ffee"}
    monkeypatch.undo()
    assert prepare(data, ModelConfig()).manifest == first.manifest


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "cannot be reached"),
        (type("RepositoryNotFoundError", (OSError,), {})("404"), "not found on the Hub"),
        (ValueError("what\na library says"), r"cannot be read \(ValueError: what\)"),
    ],
)
def test_errors_of_the_hub_become_user_errors(tmp_path, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_, **__: ["train"])
    with pytest.raises(UserError, match=message):
        list(hub.documents(DataConfig(name="hub", path="org/name"), "c0ffee"))


def gpt2_like(file, texts, added=(), **keys):
    """A tokenizer.json with the split of GPT-2's, trained here on `texts`."""
    vocabulary = tokenizer.trained(texts, 400, None)
    vocabulary.inner.add_special_tokens(list(added))
    definition = json.loads(vocabulary.inner.to_str()) | keys
    file.write_text(json.dumps(definition))
    return Tokenizer.from_file(str(file))


def test_a_tokenizer_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    library = gpt2_like(tmp_path / "tokenizer.json", DOCUMENTS, ["<|endoftext|>"], truncation=cut)
    library.no_truncation()
    data = local(tmp_path / "a.jsonl", separator="<|endoftext|>", tokenizer=str(tmp_path / "tokenizer.json"))
    prepared = prepare(data, ModelConfig(vocab_size=1000))
    expected = [id for i, d in enumerate(DOCUMENTS) if i % 20 != 19 for id in library.encode(d + "<|endoftext|>").ids]
    assert prepared.train.read(0, len(prepared.train)).tolist() == expected
    raw = (tmp_path / "tokenizer.json").read_bytes()
    assert prepared.manifest["tokenizer_sha256"] == hashlib.sha256(raw).hexdigest()
    with pytest.raises(UserError, match=r"model.vocab_size=256: must be at least 401, the number of tokens"):
        prepare(data, ModelConfig())
    gpt2_like(tmp_path / "tokenizer.json", ["other text"])
    assert shards.name(data, ModelConfig(vocab_size=1000)) != prepared.folder.name


@pytest.mark.parametrize("content", [None, b"junk", b"{}", b"\xff", b'{"type": "bytes"}\n'])
def test_invalid_tokenizer_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    data = DataConfig(tokenizer=str(tmp_path / "t.json"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data.tokenizer=.*(no such file|not a tokenizer.json)"):
        prepare(data, ModelConfig())


def test_a_tokenizer_of_the_hub_is_fetched_once(tmp_path, monkeypatch):
    data = DataConfig(tokenizer="gpt2", tokenizer_revision="e7da7f2", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data.tokenizer=gpt2: not bytes, bpe or a file, and .*cannot be reached"):
        prepare(data, ModelConfig(vocab_size=1000))
    asked = []
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_tokens(sorted(pre_tokenizers.ByteLevel.alphabet()))
    monkeypatch.setattr(hub, "tokenizer", lambda *words: asked.append(words) or inner)
    for _ in range(2):
        prepare(data, ModelConfig(vocab_size=1000))
    assert asked == [("gpt2", "e7da7f2")]


@cache
def bpe():
    return tokenizer.trained([lzma.open(EMBEDDED, "rt").read(200_000)], 1000, "<|end|>")


@pytest.mark.parametrize(
    "around", ["{}", "a{}b", " {} ", "{0}{0}", "1{}2", "'{}s", "\n{}\n x", " {}a", " {}1", " {}.", "  {}"]
)
def test_words_looked_up_are_as_the_library_splits_them(around):
    assert bpe().words is not None
    for character in tokenizer.COMMON:
        text = around.format(character)
        assert bpe().encode(text).tolist() == bpe().inner.encode(text).ids, repr(text)


COMMON_AND_NOT = st.one_of(st.sampled_from("abst '\n\t.,!019 éß—’²→漢я\u200b"), st.characters(codec="utf-8"))


@given(
    st.one_of(
        st.text(COMMON_AND_NOT),
        st.lists(st.sampled_from(["a b", " c", "→", "d ", "'s", " → ", "1", "\n"])).map("".join),
    )
)
def test_any_text_is_encoded_as_the_library_does(text):
    for each in (text, text + "<|end|>" + text):
        assert bpe().encode(each).tolist() == bpe().inner.encode(each, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)
def test_tokenizers_that_split_otherwise_are_asked_each_time(tmp_path, changed):
    library = gpt2_like(tmp_path / "t.json", DOCUMENTS, **changed)
    ours = tokenizer.Vocabulary((tmp_path / "t.json").read_text())
    assert ours.encode("Document 3: A word").tolist() == library.encode("Document 3: A word").ids


def test_a_file_of_an_old_version_splits_as_gpt2_too(tmp_path):
    old = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    gpt2_like(tmp_path / "t.json", DOCUMENTS, pre_tokenizer=old)
    definition = json.loads((tmp_path / "t.json").read_text())
    del definition["model"]["type"]
    assert tokenizer.Vocabulary(json.dumps(definition)).words is not None


@pytest.mark.parametrize("text", ["In the beginning", "é — 漢字 \U0001f600\n", "a<|end|>b", ""])
@pytest.mark.parametrize("make", [tokenizer.Bytes, bpe])
def test_decode_inverts_encode(make, text):
    words = make()
    ids = words.encode(text).tolist()
    assert words.decode(ids) == text
    assert words.decode([*ids, words.size, words.size + 5]) == text, "ids outside the vocabulary are left out"


def test_bytes_that_are_not_utf_8_decode_to_the_replacement_character():
    assert tokenizer.Bytes().decode([65, 0xC3, 66]) == "A\ufffdB"


def test_a_bpe_learns_from_a_bounded_text(monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAINING_TEXT", 300)

    def texts():
        yield from ["ab " * 60] * 2
        raise AssertionError("read on")

    assert (
        tokenizer.trained(texts(), 300, None).definition
        == tokenizer.trained(["ab " * 60, "ab " * 40], 300, None).definition
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"good " * 20_000 + "é".encode("latin-1") + b" bad", r"not UTF-8 text \(.*at byte 100000\)"),
        ("a.txt.gz", gzip.compress(b"good \xc3", mtime=0), "unexpected end of data at byte 5"),
        ("a.txt", "utf-16 text".encode("utf-16"), "at byte 0"),
        ("a.jsonl", lines() + b'{"text": "cut', "a.jsonl: line 501 is not a complete JSON"),
        ("a.jsonl", lines() + b'{"text": "caf\xe9"}', "a.jsonl: line 501 is not UTF-8"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "data.text_key=text: .*line 1 has no such field. Fields: body, id"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 must be text, not int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "unpaired surrogate"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not a complete JSON"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-50], "not a complete .gz"),
        ("a.jsonl.gz", lines(), "not a complete .gz"),
        ("a.jsonl", b"", "a.jsonl: contains no text"),
        ("a.txt", b"", "a.txt: contains no text"),
        ("a.parquet", b"PAR1 junk", "not a complete Parquet"),
        ("a.parquet", b"", "not a complete Parquet"),
    ],
)
def test_a_damaged_file_among_good_ones_is_named(tmp_path, file, content, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.txt").write_text("good text " * 500)
    (tmp_path / "texts" / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        prepare(local(tmp_path / "texts"), ModelConfig())
    assert str(tmp_path / "texts" / file) in str(raised.value)
    assert os.listdir(tmp_path / "cache") == [file for file in os.listdir(tmp_path / "cache") if file.endswith(".lock")]


@pytest.mark.parametrize(
    ("key", "message"), [("body", "no such column. Columns: id, text"), ("id", "must be text, not int64")]
)
def test_a_column_without_text_is_refused(tmp_path, key, message):
    as_table(tmp_path)
    with pytest.raises(UserError, match=f"data.text_key={key}: .*{message}"):
        prepare(local(tmp_path / "a.parquet", text_key=key), ModelConfig())


def test_a_parquet_damaged_in_the_middle(tmp_path):
    as_table(tmp_path)
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4:2000] = bytes(1996)
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(UserError, match="not a complete Parquet"):
        prepare(local(tmp_path / "a.parquet"), ModelConfig())


def test_tokens_beyond_two_to_the_31(tmp_path):
    """A sparse file of 2³¹ + 2²⁰ tokens takes no room; only its end is written."""
    count, end = (1 << 31) + (1 << 20), np.arange(1000, dtype="<u2")
    with open(tmp_path / "train-00000.bin", "wb") as file:
        os.truncate(file.fileno(), 2 * count)
        file.seek(2 * (count - 1000))
        file.write(end.tobytes())
    first = np.memmap(tmp_path / "train-00000.bin", dtype="<u2", mode="r")
    tokens = Tokens([first, end], np.array([0, count, count + 1000]))
    assert tokens.read(count - 1000, 1000).tolist() == end.tolist()
    assert tokens.read(count - 3, 6).tolist() == [997, 998, 999, 0, 1, 2]
    assert tokens.where(count - 1) == f"train-00000.bin, token {count - 1}"
    assert tokens.where(count + 7) == "shard 1, token 7"
    places = [(step, starts(tokens, 0, step, 64, 16)) for step in range(100)]
    step, far = next((step, where) for step, where in places if where.max() >= 1 << 31)
    batch = training_batch(tokens, 0, step, 64, 16)
    row = int(far.argmax())
    assert batch[row].tolist() == tokens.read(int(far[row]), 17).tolist()
    assert validation_batch(tokens, 4, 16)[-1, -1] == tokens.read((len(tokens) - 1) // 16 * 16, 1)[0]


def test_starts_are_where_the_batch_was_read():
    tokens = Tokens([np.arange(1000)], np.array([0, 1000]))
    for step in range(5):
        assert training_batch(tokens, 1, step, 4, 8)[:, 0].tolist() == starts(tokens, 1, step, 4, 8).tolist()


@pytest.mark.parametrize("as_batch", [lambda rows: np.array(rows, dtype=np.uint16), torch.tensor])
def test_degenerate_batches_are_found(as_batch):
    good, other = as_batch([[1, 2, 3], [4, 5, 6]]), as_batch([[7, 7, 7], [1, 9, 8]])
    assert list(findings(good, [10, 20], 10)) == []
    (again,) = findings(good, [10, 20], 10, earlier=3)
    assert again == (None, 10, "the batch is identical to that of step 3", False)
    same, wrong = findings(other, [30, 40], 9)
    assert same == (0, 30, "sequence 0 is token 7 repeated 3 times", False)
    assert wrong == (1, 41, "sequence 1 contains token 9, but the vocabulary has 9 tokens", True)
    assert digest(other) == digest(np.asarray(other).astype(np.int32))


def test_a_run_names_its_degenerate_batches(capsys, tmp_path):
    text = "The same again. " * 40 + " " * 3000 + "And other things, once.\n" * 20
    (tmp_path / "text.txt").write_text(text)
    words = "data=local", f"data.path={tmp_path / 'text.txt'}", f"data.cache_dir={tmp_path / 'cache'}"
    train(tiny(*words, "train.batch_size=1", f"run_dir={tmp_path / 'run'}"))
    events = [e for e in RunDir(tmp_path / "run").events() if e["event"] == "batch"]
    again = [e for e in events if e["sequence"] is None]
    blank = [e for e in events if e["sequence"] == 0]
    assert len(blank) > 3
    assert "token 32 repeated 17 times" in blank[0]["finding"]
    assert again
    assert "is identical to that of step" in again[0]["finding"]
    tokens = prepare(tiny(*words).data, ModelConfig()).train
    for event in events:
        place = int(event["where"].removeprefix("train-00000.bin, token "))
        assert place == starts(tokens, 0, event["step"], 1, 16)[0]
    lines = [line for line in capsys.readouterr().out.splitlines() if "train-00000.bin, token" in line]
    assert len(lines) == 3
    assert lines[-1].endswith("further findings are in events.jsonl only")


def test_the_trainer_remembers_the_newest_batches_only(monkeypatch):
    monkeypatch.setattr(trainer, "REMEMBERED", 3)
    ours = a_trainer(tiny())
    for step in (*range(5), 4):
        ours.batch(step)
    assert sorted(ours.seen.values()) == [2, 3, 4]
    ours.batch(1)
    assert ours.findings == []


def test_a_token_out_of_range_is_a_user_error(tmp_path):
    (tmp_path / "text.txt").write_text("Some text, and more of it. " * 200)
    words = "data=local", f"data.path={tmp_path / 'text.txt'}", f"data.cache_dir={tmp_path / 'cache'}"
    config = tiny(*words, f"run_dir={tmp_path / 'run'}")
    data = prepare(config.data, config.model)
    shards = [np.where(np.arange(len(data.train)) == 1000, 300, data.train.shards[0].astype(np.int64))]
    ours = trainer.Trainer(config, replace(data, train=Tokens(shards, data.train.starts)))
    places = ((step, starts(data.train, 0, step, 4, 16)) for step in range(1000))
    steps = (step for step, starting in places if ((starting >= 984) & (starting <= 1000)).any())
    with pytest.raises(
        UserError, match=r"token 1000: sequence \d contains token 300, but the vocabulary has 256 tokens"
    ):
        ours.batch(next(steps))


@pytest.mark.parametrize(("given", "put"), [(r"\n\n", "\n\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), ("<|e|>", "<|e|>")])
def test_a_separator_may_be_escaped(tmp_path, given, put):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(100)))
    words = "data=local", f"data.path={tmp_path}", f"data.cache_dir={tmp_path / 'c'}", f"data.separator='{given}'"
    prepared = prepare(tiny(*words).data, ModelConfig())
    train = prepared.train.read(0, len(prepared.train)).tobytes().decode()
    assert train.startswith(f"document 0{put}document 1{put}")


def test_names_of_files_in_capitals_and_byte_order_marks(tmp_path):
    text = "In the beginning was the word. " * 50
    for name, content in {"A.TXT": text, "B.JSONL": json.dumps({"text": text}) + "\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("\ufeff" + content, encoding="utf-8")
        data = DataConfig(name="local", path=str(tmp_path / name), cache_dir=str(tmp_path / "c"), seq_len=8)
        prepared = prepare(data, ModelConfig())
        assert prepared.train.read(0, 16).tobytes() == b"In the beginning", name


def test_hidden_directories_are_skipped(tmp_path):
    (tmp_path / "t" / ".git").mkdir(parents=True)
    (tmp_path / "t" / ".git" / "x.txt").write_text("hidden " * 100)
    (tmp_path / "t" / "x.txt").write_text("shown " * 100)
    data = DataConfig(name="local", path=str(tmp_path / "t"), cache_dir=str(tmp_path / "c"), seq_len=8)
    prepared = prepare(data, ModelConfig())
    assert b"hidden" not in prepared.train.read(0, len(prepared.train)).tobytes()


def test_ambiguous_files_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("text\nsome\n")
    with pytest.raises(UserError, match=r"x.csv: not one of .txt, .jsonl, .parquet"):
        prepare(DataConfig(name="local", path=str(tmp_path / "x.csv"), cache_dir=str(tmp_path / "c")), ModelConfig())
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="several columns with this name"):
        prepare(
            DataConfig(name="local", path=str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "c")), ModelConfig()
        )
    words = Tokenizer(models.WordLevel({"some": 0}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "x.txt").write_text("some other words " * 100)
    data = DataConfig(name="local", path=str(tmp_path / "x.txt"), cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match="cannot encode 'some other"):
        prepare(replace(data, tokenizer=str(tmp_path / "words.json")), ModelConfig())
