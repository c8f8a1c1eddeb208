"""Data from outside that would take all memory or never end: refused in a sentence, or read in little memory."""

import json
import os
from pathlib import Path

import pytest

from stabrun.config import DataConfig, ModelConfig, UserError
from stabrun.data import formats, tokenizer
from stabrun.data.corpus import blocks
from stabrun.data.shards import prepare

POOLS = {}


def local(path, **more):
    return DataConfig(name="local", path=str(path), **more)


@pytest.mark.skipif(not Path("/proc/kmsg").exists(), reason="needs Linux")
@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_a_file_that_never_ends_is_not_read(key):
    with pytest.raises(UserError, match=rf"data\.{key}=/proc/kmsg: "):
        prepare(local("/proc/kmsg") if key == "path" else DataConfig(tokenizer="/proc/kmsg"), ModelConfig())


@pytest.mark.parametrize("path", ["fifo", "/dev/zero"])
def test_what_is_not_a_file_is_not_read(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    for config in (local(tmp_path / path), DataConfig(tokenizer=str(tmp_path / path))):
        with pytest.raises(UserError, match=r"no such file|neither a regular file nor a directory"):
            prepare(config, ModelConfig())


def test_a_json_line_has_a_length(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "short"}\n' + json.dumps({"text": "x" * 2000}) + "\n")
    assert len(list(blocks(local(file)))) == 2
    monkeypatch.setattr(formats, "LONGEST", 1000)
    with pytest.raises(UserError, match="line 2 is longer than"):
        list(blocks(local(file)))


def test_an_error_lists_few_fields(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({f"{'x' * 1000}{i}": 0 for i in range(1000)}) + "\n")
    with pytest.raises(UserError) as refused:
        list(blocks(local(file)))
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize("kind", ["dictionary", "pages"])
def test_a_parquet_file_is_unpacked_in_little_memory(tmp_path, kind):
    """100 MB of text, in a file of less than a hundredth of that, in 10 MB."""
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    if kind == "dictionary":
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["a" * 1_000_000]))
        parquet.write_table(pa.table({"text": texts}), file, compression="zstd")
    else:
        texts = pa.array(["a" * 100_000] * 1000)
        parquet.write_table(
            pa.table({"text": texts}), file, compression="zstd", use_dictionary=False, write_batch_size=8
        )
    assert file.stat().st_size < 1_000_000
    usual = pa.default_memory_pool()
    counted = POOLS.setdefault(kind, pa.proxy_memory_pool(usual))  # must live longer than what it holds
    pa.set_memory_pool(counted)
    try:
        read = sum(len(block.text) for block in blocks(local(file)))
    finally:
        pa.set_memory_pool(usual)
    assert read == 100_000_000
    assert 0 < counted.max_memory() < 10_000_000


def with_step(name, step):
    """The definition of a small BPE with another step."""
    definition = json.loads(tokenizer.trained(["some text"], 300, None).definition)
    return json.dumps(definition | {name: step})


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        replace({"String": " "}, "x" * 1000),
        replace({"Regex": "e"}, "x" * 1000),
        {"type": "Sequence", "normalizers": [replace({"String": "e"}, "ee")] * 20},
        {"type": "Prepend", "prepend": "x" * 1_000_000},
    ],
)
def test_a_tokenizer_that_multiplies_text_is_refused(tmp_path, normalizer):
    file = tmp_path / "tokenizer.json"
    file.write_text(with_step("normalizer", normalizer))
    with pytest.raises(UserError, match=r"tokenizer\.json: makes text up to .* times as long"):
        tokenizer.chosen(DataConfig(tokenizer=str(file)), 0, [])


def test_usual_tokenizers_are_read():
    metaspace = {"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"),
        replace({"Regex": " {2,}"}, " "),
    ]}  # fmt: skip
    for step in (None, {"type": "NFD"}, metaspace):
        assert tokenizer.Vocabulary(with_step("normalizer", step)).size
