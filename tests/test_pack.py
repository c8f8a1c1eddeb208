"""`stabrun pack` and `stabrun unpack`: what a packed study keeps, and that reports, verdicts and reruns read it."""

import filecmp
import io
import tarfile

import pytest
from helpers import run
from studies import trained_alone

from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir
from stabrun.report.report import write_report
from stabrun.report.selection import sides
from stabrun.report.study_data import read

WORDS = ("train.steps=25", "study.variants=[baseline,qk_norm]", "study.lrs=[1e-2]", "study.seeds=2")
EVERY = 10


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    trained_alone(folder, *WORDS)
    return folder / "study"


@pytest.fixture
def again(study, tmp_path, capsys, monkeypatch):
    """The study, packed and unpacked, in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "pack", study, "study.tar.xz", "--every", EVERY)[0] == 0
    assert run(capsys, "unpack", "study.tar.xz") == (0, "study\n", "")
    return StudyDir(tmp_path / "study")


def test_losses_stay_exact_and_statistics_are_kept_at_some_steps(study, again):
    runs = StudyDir(study).recorded_runs()
    detailed = [row["run_id"] for row in sides(read(study).rows)]
    assert len(detailed) == 1
    assert len(runs) == len(again.recorded_runs()) == 4
    for before, after in zip(runs, again.recorded_runs(), strict=True):
        for row, kept in zip(before.rows(), after.rows(), strict=True):
            step = {key: value for key, value in row.items() if not isinstance(value, list)}
            assert {"step", "train/loss", "grad/norm"} <= step.keys() < row.keys()
            if row["step"] % EVERY and before.path.name not in detailed:
                assert kept == step
                continue
            assert kept.keys() == row.keys()
            assert {key: kept[key] for key in step} == step
            for key in row.keys() - step.keys():
                assert kept[key] == pytest.approx(row[key], rel=5e-4)
                assert kept[key] != row[key] or all(len(str(value)) < 8 for value in row[key])


def test_statistics_of_the_first_bad_step_are_kept(made_study, tmp_path, capsys):
    assert run(capsys, "pack", made_study, tmp_path / "made.tar.xz", "--every", 1000)[0] == 0
    assert run(capsys, "unpack", tmp_path / "made.tar.xz", tmp_path)[0] == 0
    for row in read(made_study).rows:
        rows = RunDir(tmp_path / made_study.name / "runs" / row["run_id"]).rows()
        whole = [kept["step"] for kept in rows if "norm/out/qkv" in kept]
        assert len(whole) > 2 or whole == ([0, row["first_bad_step"]] if row["verdict"] == "diverged" else [0])


def test_reports_verdicts_and_reruns_read_it(study, again, capsys):
    """Tables of a report do not depend on the statistics that were left out; a rerun has the recorded losses."""
    write_report(study, None)
    write_report(again.path, None)
    tables = sorted(path.name for path in (study / "report" / "tables").iterdir())
    assert tables
    assert filecmp.cmpfiles(study / "report" / "tables", again.path / "report" / "tables", tables)[0] == tables
    capsys.readouterr()
    said = [run(capsys, "judge", path)[1].replace(str(path), "STUDY") for path in (study, again.path)]
    assert said[0] == said[1] != ""
    first = again.recorded_runs()[0]
    assert run(capsys, "rerun", first.path, "run_dir=rerun")[0] == 0
    losses = [[row["train/loss"] for row in one.rows()] for one in (first, RunDir(again.path.parent / "rerun"))]
    assert losses[0] == losses[1]


def test_the_same_study_gives_the_same_bytes(again, capsys):
    run(capsys, "pack", again.path, "one.tar.xz")
    run(capsys, "pack", again.path, "two.tar.xz")
    assert filecmp.cmp("one.tar.xz", "two.tar.xz", shallow=False)


def archive(name, *members):
    with tarfile.open(name, "w:xz") as file:
        for path in members:
            file.addfile(tarfile.TarInfo(path), io.BytesIO())
    return name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pack", "nothing", "x.tar.xz"], "nothing: not a study: study.yaml is missing."),
        (["unpack", "missing.tar.xz"], "missing.tar.xz: cannot be unpacked: No such file or directory."),
        (["unpack", "study.tar.xz"], "study: exists already; give another directory to unpack into."),
        (["unpack", "text"], "text: cannot be unpacked: "),
        (["unpack", "other.tar.xz"], "other.tar.xz: not a packed study: study.yaml is missing."),
        (["unpack", "two.tar.xz"], "two.tar.xz: not a packed study."),
        (["unpack", "outside.tar.xz"], "outside.tar.xz: not a packed study."),
    ],
)
def test_mistakes_are_one_sentence(again, capsys, words, sentence):
    archive("other.tar.xz", "other/file")
    archive("two.tar.xz", "one/study.yaml", "two/study.yaml")
    archive("outside.tar.xz", "../outside/study.yaml")
    again.path.with_name("text").write_text("no archive")
    status, _, err = run(capsys, *words)
    assert (status, len(err.splitlines())) == (2, 1)
    assert sentence in err
    left = {path.name for path in again.path.parent.iterdir()}
    assert left == {"study", "study.tar.xz", "other.tar.xz", "two.tar.xz", "outside.tar.xz", "text"}
    assert not again.path.parent.with_name("outside").exists()
