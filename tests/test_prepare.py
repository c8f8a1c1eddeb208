"""`stabrun data prepare`: several processes, kills, and folders that were damaged afterwards."""

import hashlib
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import stabrun

from stabrun.config import DataConfig, ModelConfig, UserError
from stabrun.data import parts, shards, tokenizer
from stabrun.data.corpus import EMBEDDED
from stabrun.data.progress import shown_progress
from stabrun.data.shards import opened, prepare

MODEL = ModelConfig(vocab_size=2000)
KEYS = {"tokenizer": "bpe", "separator": "|"}
DEADLINE = 60
# The command with small chunks, so that a small text has many.
COMMAND = """
import sys
from stabrun.data import parts
parts.CHUNK = 25_000
if __name__ == "__main__":
    from stabrun.cli.main import main
    main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1 MB of English as JSON lines."""
    verses = lzma.open(EMBEDDED, "rt").read(1_000_000).splitlines()
    file = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"text": "\n".join(verses[i : i + 9])}) + "\n" for i in range(0, len(verses), 9))
    )
    return file


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The folder that one process makes in one pass, in one chunk."""
    return prepare(data(corpus, tmp_path_factory.mktemp("uninterrupted")), MODEL).folder


def data(corpus, cache, **keys):
    return DataConfig(name="local", path=str(corpus), cache_dir=str(cache), **(KEYS | keys))


def start(corpus, cache, workers, **options):
    words = ["data", "prepare", "data=local", f"data.path={corpus}", f"data.cache_dir={cache}"]
    words += ["data.tokenizer=bpe", "model.vocab_size=2000", "data.separator='|'", f"data.workers={workers}"]
    script = cache.parent / "small_chunks.py"
    script.write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, str(script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        **options,
    )


def until(found, process=None):
    """Wait for something to become true, or for the process to end."""
    end = time.monotonic() + DEADLINE
    while not found() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def finished(cache):
    return len(list(cache.glob("*.part/[0-9]*.json")))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def group_is_gone(process):
    """Whether no process of its session is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_twice_and_continued_gives_the_bytes_of_an_uninterrupted_pass(corpus, uninterrupted, tmp_path, workers):
    cache = tmp_path / "cache"
    for kill in (1, 2):
        process = start(corpus, cache, workers)
        until(lambda: finished(cache) >= 5 * kill, process)  # noqa: B023
        process.kill()
        process.communicate(timeout=DEADLINE)
        assert process.returncode == -signal.SIGKILL
        assert not (cache / uninterrupted.name).exists()
        until(lambda: group_is_gone(process))  # noqa: B023
    left = finished(cache)
    process = start(corpus, cache, workers)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert f"resuming from {left} finished parts" in out
    assert "MB/s" in out
    assert contents(cache / uninterrupted.name) == contents(uninterrupted)
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ctrl_c_ends_all_processes_and_loses_nothing(corpus, uninterrupted, tmp_path, sign):
    cache = tmp_path / "cache"
    process = start(corpus, cache, 2)
    until(lambda: finished(cache) >= 3, process)
    os.killpg(process.pid, sign)  # as a terminal does it: the workers get it too
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert err == "stabrun: interrupted; the same command resumes from the parts that are finished.\n"
    until(lambda: group_is_gone(process))
    assert finished(cache) >= 3
    prepare(data(corpus, cache), MODEL)
    assert contents(cache / uninterrupted.name) == contents(uninterrupted)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_reported_with_status_1(corpus, tmp_path):
    cache = tmp_path / "cache"
    process = start(corpus, cache, 2)
    until(lambda: finished(cache) >= 3, process)
    process.send_signal(signal.SIGSTOP)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert err.startswith("stabrun: data.workers=2: a worker was killed")
    assert err.count("\n") == 1


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_is_a_fault_and_the_parts_are_kept(corpus, uninterrupted, tmp_path):
    """A limit on the size of files simulates a disk that fills up while the parts are joined."""
    cache = tmp_path / "cache"
    process = start(corpus, cache, 2, preexec_fn=limited)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert err.startswith("stabrun: ")
    assert err.count("\n") == 1
    assert not (cache / uninterrupted.name).exists()
    left = finished(cache)
    assert left > 20
    out, err = start(corpus, cache, 1).communicate(timeout=DEADLINE)
    assert f"resuming from {left} finished parts" in out, err
    assert contents(cache / uninterrupted.name) == contents(uninterrupted)


def test_progress_is_printed_in_plain_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with shown_progress(3, verbose=False) as progress:
        progress.skip({"bytes": 2_000_000, "tokens": {"train": 5, "val": 1}})
        for _ in range(4):
            progress.add({"bytes": 4_000_000, "tokens": {"train": 900, "val": 100}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resuming from 3 finished parts of an earlier pass"
    assert lines[1] == "tokenizing: 14.0 MB of text, 3,006 tokens, 0.8 MB/s"  # 12 MB in 16 s
    assert lines[2].startswith("tokenized 18.0 MB of text, 4,006 tokens, ")


@pytest.fixture
def stopped(corpus, tmp_path, monkeypatch):
    """The cache of a pass that was stopped after its seventh part."""
    monkeypatch.setattr(parts, "CHUNK", 50_000)
    whole = parts.write_part

    def stop(folder, words, separator, index, chunk):
        if index == 7:
            raise KeyboardInterrupt
        return whole(folder, words, separator, index, chunk)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(data(corpus, tmp_path), MODEL)
    assert finished(tmp_path) == 7
    return tmp_path


def test_finished_parts_and_the_trained_tokenizer_are_used_again(corpus, uninterrupted, stopped, monkeypatch):
    made, write = [], parts.write_part
    monkeypatch.setattr(parts, "write_part", lambda *words: made.append(words[3]) or write(*words))
    monkeypatch.setattr(tokenizer, "trained", None)
    prepare(data(corpus, stopped), MODEL)
    assert made[0] == 7
    assert contents(stopped / uninterrupted.name) == contents(uninterrupted)


def test_damaged_parts_are_made_again(corpus, uninterrupted, stopped):
    scratch = next(stopped.glob("*.part"))
    (scratch / "00001.bin").write_bytes((scratch / "00001.bin").read_bytes()[:-1])
    (scratch / "00002.bin").write_bytes(b"\0" * (scratch / "00002.bin").stat().st_size)
    (scratch / "00003.json").write_text('{"sha')
    (scratch / "00004.bin").unlink()
    for end in ("bin", "json"):
        shutil.copy(scratch / f"00006.{end}", scratch / f"00005.{end}")
    (scratch / "whole").mkdir()
    (scratch / "whole" / "train-00009.bin").write_text("of a pass that was killed while it joined its parts")
    prepare(data(corpus, stopped), MODEL)
    assert contents(stopped / uninterrupted.name) == contents(uninterrupted)


def test_parts_of_other_content_never_mix(corpus, stopped):
    (scratch,) = stopped.glob("*.part")
    other = prepare(data(corpus, stopped, separator="#"), MODEL)
    assert other.folder.name not in scratch.name
    assert finished(stopped) == 7


def test_another_number_of_workers_is_the_same_data(corpus):
    names = {shards.name(data(corpus, "x", workers=n), MODEL) for n in (1, 7)}
    assert len(names) == 1


@pytest.mark.parametrize("limit", [1, 999, 1000, 5000])
def test_no_shard_is_larger_than_the_limit(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(parts, "SHARD_TOKENS", limit)
    (tmp_path / "a.txt").write_text("0123456789" * (1 if limit == 1 else 500))
    config = DataConfig(
        name="local", path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path), seq_len=2, val_fraction=0.4
    )
    prepared = prepare(config, ModelConfig())
    sizes = [shard["tokens"] for shard in prepared.manifest["shards"]["train"]]
    total = prepared.manifest["tokens"]["train"]
    assert sizes == [limit] * (total // limit) + [total % limit] * (total % limit > 0)


@pytest.fixture
def folder(tmp_path):
    return prepare(DataConfig(cache_dir=str(tmp_path)), ModelConfig()).folder


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def manifest(change):
    def damage(folder):
        facts = json.loads((folder / "manifest.json").read_text())
        change(facts)
        (folder / "manifest.json").write_text(json.dumps(facts))

    return damage


def forge(folder):
    """A shard and its sha256 changed together: `hash` still tells."""
    flip(folder / "val-00000.bin")
    digest = hashlib.sha256((folder / "val-00000.bin").read_bytes()).hexdigest()
    manifest(lambda facts: facts["shards"]["val"][0].update(sha256=digest))(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "train-00000.bin"), "train-00000.bin is missing or damaged"),
        (lambda folder: (folder / "val-00000.bin").unlink(), "val-00000.bin is missing or truncated"),
        (lambda folder: flip(folder / "tokenizer.json"), "tokenizer.json is missing or damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1,'), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is missing or damaged"),
        (manifest(lambda facts: facts.pop("shards")), "manifest.json is missing or damaged"),
        (manifest(lambda facts: facts.update(dtype="junk")), "manifest.json is missing or damaged"),
        (manifest(lambda facts: facts.update(hash="0" * 16)), "manifest.json is inconsistent"),
        (manifest(lambda facts: facts["tokens"].update(train=5)), "manifest.json is inconsistent"),
        (forge, "manifest.json is inconsistent"),
    ],
)
def test_a_damaged_folder_is_noticed_and_left(folder, damage, message):
    damage(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=f"{message}.*. Delete {folder} to prepare the data again"):
        prepare(DataConfig(cache_dir=str(folder.parent)), ModelConfig())
    assert contents(folder) == before


def test_training_verifies_the_first_shards_and_prepare_all(folder, monkeypatch):
    monkeypatch.setattr(shards, "CHECKED_BYTES", 1_000_000)
    flip(folder / "val-00000.bin")
    prepare(DataConfig(cache_dir=str(folder.parent)), ModelConfig())
    with pytest.raises(UserError, match=r"val-00000.bin is missing or damaged"):
        opened(folder, float("inf"))
    done = stabrun("data", "prepare", f"data.cache_dir={folder.parent}", cwd=folder.parent)
    assert done.returncode == 2
    assert "val-00000.bin" in done.stderr


def test_folders_of_before_these_checks_are_opened(folder):
    manifest(lambda facts: [facts.pop(key) for key in ("tokenizer_sha256", "revision", "separator")])(folder)
    assert len(prepare(DataConfig(cache_dir=str(folder.parent)), ModelConfig()).train) == 3_941_242
