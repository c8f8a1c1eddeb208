import hashlib
import json
import lzma
import multiprocessing
import os

import numpy as np
import pytest
from conftest import configured, tiny

from stabrun.config import DataConfig, MistakeError, ModelConfig
from stabrun.data import parts, shards
from stabrun.data.batches import training_batch, validation_batch
from stabrun.data.corpus import EMBEDDED, split_blocks
from stabrun.data.shards import Tokens, prepare


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
    from tokenizers import Tokenizer

    folder = tmp_path / "c" / shards.name(data, ModelConfig(vocab_size=512))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoded = tokenizer.decode(prepared.val.read(0, len(prepared.val)).tolist())
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


def _prepare(path, cache, barrier, results):
    barrier.wait()
    data = DataConfig(name="local", path=path, tokenizer="bpe", cache_dir=cache)
    results.put(prepare(data, ModelConfig(vocab_size=400)).manifest["hash"])


def test_several_processes_ask_at_the_same_time(tmp_path):
    (tmp_path / "a.txt").write_text("some words that come again and again\n" * 20000)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path / "a.txt"), str(tmp_path / "c"), barrier, results)
    workers = [context.Process(target=_prepare, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    hashes = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(hashes) == 1
    assert len([f for f in (tmp_path / "c").iterdir() if f.is_dir()]) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "holds no text"), (b"\xff\xfe\x00junk", "not UTF-8"), (b"a\x00b", "zero bytes"), (b"short", "has only")],
)
def test_texts_that_cannot_be_used(tmp_path, content, said):
    (tmp_path / "a.txt").write_bytes(content)
    data = DataConfig(name="local", path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "c"))
    with pytest.raises(MistakeError, match=said):
        prepare(data, ModelConfig())
    assert not list((tmp_path / "c").glob("*.part"))


def test_a_pipe_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MistakeError, match="regular file"):
        prepare(DataConfig(name="local", path=str(tmp_path / "pipe"), cache_dir=str(tmp_path / "c")), ModelConfig())


def test_links_in_a_circle_folders_and_pipes_are_passed_over(tmp_path):
    texts = tmp_path / "texts"
    (texts / "folder.txt").mkdir(parents=True)
    os.mkfifo(texts / "pipe.txt")
    (texts / "loop.txt").symlink_to(texts / "loop.txt")
    (texts / "good.txt").write_text("0123456789" * 300)
    data = DataConfig(name="local", path=str(texts), cache_dir=str(tmp_path / "c"))
    assert sum(prepare(data, ModelConfig()).manifest["tokens"].values()) == 3000


@pytest.mark.parametrize("content", [b"junk", lzma.compress(b"words " * 999)[:-20]])
def test_a_damaged_xz_is_no_text(tmp_path, content):
    (tmp_path / "text.xz").write_bytes(content)
    with pytest.raises(MistakeError, match="no whole"):
        prepare(DataConfig(name="local", path=str(tmp_path / "text.xz"), cache_dir=str(tmp_path / "c")), ModelConfig())


def test_cut_shard_is_noticed(tmp_path):
    data = tiny(f"data.cache_dir={tmp_path}").data
    prepare(data, ModelConfig())
    shard = next(tmp_path.glob("*/train-00000.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MistakeError, match="cut short"):
        prepare(data, ModelConfig())


def test_manifest_tells_what_was_prepared(tmp_path):
    data = configured("model=nano", f"data.cache_dir={tmp_path}").data
    prepare(data, ModelConfig())
    manifest = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())
    shard = next(tmp_path.glob("*/train-00000.bin"))
    assert manifest["shards"]["train"][0]["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert manifest["tokens"]["train"] == shard.stat().st_size
