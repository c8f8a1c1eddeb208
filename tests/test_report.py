"""`stabrun report`: the files that it writes, and what it refuses."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import run
from made import CHARTS, a_study

from stabrun.config import UserError
from stabrun.report import figures
from stabrun.report.report import part_of, write_report
from stabrun.report.study_data import read


@pytest.fixture
def no_figures(monkeypatch):
    """Without the files of the figures, which take most of the time."""
    monkeypatch.setattr("stabrun.report.report.write_figures", lambda drawn, directory: None)


@pytest.mark.parametrize("kinds", [("svg",), pytest.param(("svg", "pdf", "png"), marks=pytest.mark.slow)])
def test_the_command_writes_tables_figures_and_a_page(made_study, tmp_path, capsys, monkeypatch, kinds):
    monkeypatch.setattr(figures, "METADATA", {kind: figures.METADATA[kind] for kind in kinds})
    shutil.copytree(made_study, tmp_path / "study")
    (tmp_path / "study" / "report").mkdir()
    (tmp_path / "study" / "report" / "left over").touch()
    status, out, err = run(capsys, "report", tmp_path / "study")
    assert (status, err) == (0, "")
    assert "qk_norm: lr50 = 0.196" in out
    report = tmp_path / "study" / "report"
    assert {f"variants.{kind}" for kind in ("csv", "md", "tex")} | {"runs.csv", "leads.csv"} < set(
        os.listdir(report / "tables")
    )
    drawn = set(os.listdir(report / "figures"))
    assert drawn == {f"{name}.{kind}" for name in CHARTS for kind in kinds}
    assert sorted(os.listdir(report)) == ["figures", "index.html", "tables"], "a report is replaced as a whole"
    assert not [name for name in os.listdir(tmp_path / "study") if name.startswith(".report")]


@pytest.mark.parametrize("names", [{"loss_by_lr"}, pytest.param(CHARTS, marks=pytest.mark.slow)])
def test_the_same_data_give_the_same_bytes(made_study, names):
    files = [
        dict(figures.files([chart for chart in part_of(read(made_study)).charts if chart.name in names]))
        for _ in range(2)
    ]
    assert files[0] == files[1]
    assert set(files[0]) == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf", "png")}


def test_two_studies_have_a_directory_each(made_study, tmp_path, no_figures):
    shutil.copytree(made_study, tmp_path / "one")
    a_study(tmp_path / "two", "model.n_layer=1", skip=3)
    write_report(tmp_path / "one", tmp_path / "two")
    report = tmp_path / "one" / "report-beside-two"
    assert (report / "tables" / "side_by_side.csv").is_file()
    assert (report / "b" / "tables" / "variants.csv").is_file()
    assert not (tmp_path / "one" / "report").exists()


def test_a_study_without_finished_runs_has_a_report(missing_runs, tmp_path, capsys):
    shutil.copytree(missing_runs["empty"], tmp_path / "study")
    assert run(capsys, "report", tmp_path / "study")[0] == 0
    assert os.listdir(tmp_path / "study" / "report" / "figures") == []


def test_a_failure_leaves_the_old_report(made_study, tmp_path, no_figures, monkeypatch):
    shutil.copytree(made_study, tmp_path / "study")
    write_report(tmp_path / "study")
    before = (tmp_path / "study" / "report" / "index.html").stat().st_ino
    monkeypatch.setattr("stabrun.report.report.page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path / "study")
    assert (tmp_path / "study" / "report" / "index.html").stat().st_ino == before
    assert not [name for name in os.listdir(tmp_path / "study") if name.startswith(".report")]


def test_user_errors(tmp_path, capsys):
    for words in ([], ["a", "b", "c"]):
        assert run(capsys, "report", *words)[0] == 2
    status, _, err = run(capsys, "report", tmp_path)
    assert (status, "neither a study nor a run" in err) == (2, True)


def test_missing_packages_are_named(made_study, monkeypatch):
    monkeypatch.setattr("stabrun.report.report.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jinja2, matplotlib, plotly.*pip install 'stabrun\[report\]'"):
        write_report(made_study)


def test_a_report_imports_no_torch(made_study, tmp_path):
    shutil.copytree(made_study, tmp_path / "study")
    code = "import sys; from pathlib import Path; from stabrun.report import report; "
    code += (
        "report.write_figures = lambda *_: None; report.write_report(Path('study')); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
