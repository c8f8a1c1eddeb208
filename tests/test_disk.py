"""Full and read-only disks: status 1 and a sentence; what was recorded stays, and the same command goes on."""

import errno
import re
import shutil

import pytest
from disks import PAGE, disk
from helpers import TINY, metrics, run, tiny

from stabrun.record import checkpoints
from stabrun.record.disk import advice, as_os_error, writing
from stabrun.report.report import replacing
from stabrun.training.checkpoint import damage
from stabrun.training.run import train

WORDS = (*TINY, "train.checkpoint_every=8", "data=local")
POINTS = 20


def start(capsys, folder, text, cache=None):
    """`stabrun train` whose data, unless they are in `cache`, and run lie in `folder`."""
    places = f"data.path={text}", f"data.cache_dir={cache or folder / 'cache'}", f"run_dir={folder / 'run'}"
    return run(capsys, "train", *WORDS, *places)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("In the beginning God created the heaven and the earth.\n" * 400)
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The directory of the run on a disk with space."""
    folder = tmp_path_factory.mktemp("whole")
    train(
        tiny(
            *WORDS[len(TINY) :], f"data.path={text}", f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}"
        )
    )
    return folder / "run"


def assert_one_sentence(err, folder, why="No space left on device. Make space there"):
    """One line, which names a path below `folder`. Returns that path."""
    found = re.fullmatch(rf"stabrun: ({re.escape(str(folder))}/?.*): {why}, then run the same command again\.\n", err)
    assert found, err
    return found[1].removeprefix(str(folder)).lstrip("/")


def assert_same(here, whole):
    assert metrics(here) == metrics(whole)
    mine, theirs = (max(path.glob("checkpoints/step_*/model.safetensors")) for path in (here, whole))
    assert mine.read_bytes() == theirs.read_bytes()


def filled_at(capsys, size, text, whole, cache=None):
    """Train on a disk of `size` bytes, then on the larger one. Returns where it was full, None if it was not."""
    with disk(size) as small:
        status, _, err = start(capsys, small.path, text, cache)
        if status == 0:
            return None
        assert status == 1, err
        where = assert_one_sentence(err, small.path)
        folder = small.path / "run" / "checkpoints"
        assert {damage(path) for path in checkpoints.steps(folder).values()} <= {None}
        small.resize(100_000_000)
        status, _, err = start(capsys, small.path, text, cache)
        assert (status, "Traceback" in err) == (0, False), err
        assert_same(small.path / "run", whole)
        return where


@pytest.mark.parametrize("pages", [3, 40, 90])
def test_a_full_disk(capsys, text, whole, pages):
    assert filled_at(capsys, pages * PAGE, text, whole)


@pytest.mark.slow
def test_a_disk_that_is_full_at_twenty_points(capsys, text, whole):
    """Of sizes from one page up to what the run needs, at first in steps of one page: these are many small files."""
    with disk(100_000_000) as large:
        start(capsys, large.path, text)
        needed = large.used() // PAGE
    sizes = sorted({*range(1, 20), *range(10, needed + 40, max(1, (needed + 30) // 16))})
    points = {}
    for pages in sizes:
        where = filled_at(capsys, pages * PAGE, text, whole)
        if where is None:
            break
        points.setdefault(re.sub(r"\d+", "N", where), []).append(pages)
    print(f"{sum(map(len, points.values()))} sizes: {points}")
    assert sum(map(len, points.values())) >= POINTS
    assert len(points) >= 6, points


@pytest.mark.slow
def test_a_disk_that_is_full_at_each_of_the_first_files_of_a_run(capsys, text, whole):
    points = [filled_at(capsys, pages * PAGE, text, whole, whole.parent / "cache") for pages in range(1, 7)]
    print(points)
    assert {"run/config.yaml", "run/metrics.jsonl"} & {*points}
    assert len({*points}) >= 3


def test_a_read_only_disk(capsys, text, whole):
    with disk(100_000_000) as mounted:
        assert start(capsys, mounted.path, text)[0] == 0
        here = mounted.path / "run"
        (here / "summary.json").unlink()
        shutil.rmtree(here / "checkpoints")
        mounted.remount("ro")
        status, _, err = start(capsys, mounted.path, text)
        assert status == 1
        assert_one_sentence(err, mounted.path, "Read-only file system. Make it writable")
        mounted.remount("rw")
        assert start(capsys, mounted.path, text)[0] == 0
        assert_same(here, whole)


def test_a_report_on_a_full_disk_leaves_the_earlier_one():
    with disk(PAGE * 10) as full:
        target = full.path / "report"
        target.mkdir()
        (target / "index.html").write_text("earlier")
        with pytest.raises(OSError, match="No space") as raised, replacing(target) as scratch:
            (scratch / "index.html").write_bytes(bytes(PAGE * 11))
        assert raised.value.filename == str(target)
        assert [file.name for file in full.path.iterdir()] == ["report"]
        assert (target / "index.html").read_text() == "earlier"


def test_an_error_while_writing_names_its_file(tmp_path):
    with pytest.raises(OSError, match="No space") as raised, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "a")
    assert advice(raised.value) == (
        f"{tmp_path / 'a'}: No space left on device. Make space there, then run the same command again."
    )
    with pytest.raises(OSError, match="other") as raised, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device", "other")
    assert raised.value.filename == "other"


def test_the_number_of_an_error_is_found_in_the_text_of_another_library(tmp_path):
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert as_os_error(ValueError(text), tmp_path).errno == errno.ENOSPC
    assert as_os_error(ValueError("header too large"), tmp_path).errno == errno.EIO
