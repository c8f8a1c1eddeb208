"""Damaged files of other tools: no traceback, and no wrong number from a line that is whole."""

import random
import traceback

import pytest
from foreign_samples import SAMPLES
from test_foreign import FOREIGN, losses

from stabrun.config import UserError
from stabrun.foreign.read import read_foreign_runs

HEADER = 8  # lines at the begin, whose damage can change what the others mean


def damaged(text, source):
    """The text with one kind of damage; how many lines it touched, the header among them or not."""
    kind = source.choice(["cut", "bytes", "double", "swap"])
    lines, data = text.splitlines(keepends=True), bytearray(text.encode())
    if kind == "cut":
        return data[: source.randrange(1, len(data))], 0, False
    if kind == "bytes":
        places = [source.randrange(len(data)) for _ in range(source.randint(1, 4))]
        touched = {data[:at].count(b"\n") + more for at in places for more in range(1 + (data[at] == 10))}
        for at in places:
            data[at] = source.randrange(256)
        return data, len(touched), min(touched) < HEADER
    first, second = source.randrange(len(lines)), source.randrange(len(lines))
    if kind == "double":
        lines.insert(first, lines[first])
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines).encode(), 2, min(first, second) < HEADER


def numbers(file, sample):
    """The steps and losses that are read; the losses alone if rows are counted."""
    return {
        loss if sample.counted else (step, loss)
        for run in read_foreign_runs(file) for step, loss in zip(run.steps, run.losses, strict=True)
    }  # fmt: skip


@pytest.mark.parametrize("variants", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_damage(tmp_path, variants):
    """Of each format so many variants. What is read was read before, or comes from a line that was touched."""
    for name, sample in SAMPLES.items():
        text, file = sample.write(losses(100)), tmp_path / name
        file.write_text(text, newline="")
        whole = numbers(file, sample)
        for seed in range(variants):
            content, touched, header = damaged(text, random.Random(f"{name} {seed}"))
            file.write_bytes(content)
            try:
                found = numbers(file, sample)
            except UserError:
                continue
            except Exception:
                pytest.fail(f"{name}, variant {seed}: {traceback.format_exc()}")
            assert header or len(found - whole) <= touched, f"{name}, variant {seed}"


@pytest.mark.parametrize("variants", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_event_files(tmp_path, variants):
    """Checksums tell: what is read from a damaged file was read before."""
    content, file = (FOREIGN / "events.out.tfevents.converged").read_bytes(), tmp_path / "events.out.tfevents.1"
    file.write_bytes(content)
    (run,) = read_foreign_runs(file)
    whole = set(zip(run.steps, run.losses, strict=True))
    for seed in range(variants):
        source, data = random.Random(seed), bytearray(content)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        file.write_bytes(data)
        try:
            found = [pair for run in read_foreign_runs(file) for pair in zip(run.steps, run.losses, strict=True)]
        except UserError:
            continue
        assert set(found) <= whole


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_damaged_byte_does_not_change_the_names_of_columns(tmp_path, mark):
    """One that is not valid UTF-8: the file is still UTF-8, and its byte-order mark is not part of a name."""
    lines = [b"Schritt \xc3\xbc,Step,Loss"] + [b"0,%d,%.4f" % (10 * i, x) for i, x in enumerate(losses(100))]
    lines[50] = lines[50][:-2] + b"\xff" + lines[50][-1:]
    (tmp_path / "file.csv").write_bytes(mark + b"\n".join(lines) + b"\n")
    (run,) = read_foreign_runs(tmp_path / "file.csv")
    assert list(run.steps) == [10 * i for i in range(100) if i != 49]
