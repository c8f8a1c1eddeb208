"""What a directory holds: a study, a run, or neither."""

import pytest

from stabrun.config import UserError
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir, find


def test_a_directory_is_a_study_a_run_or_neither(tmp_path):
    with pytest.raises(UserError, match=r"study\.yaml, config\.yaml and watch\.json are missing"):
        find(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        find(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("")
    assert isinstance(find(tmp_path), RunDir)
    (tmp_path / "study.yaml").write_text("")
    assert isinstance(find(tmp_path), StudyDir)


def test_only_a_study_is_extended(tmp_path):
    study = StudyDir(tmp_path)
    with study.lock():
        study.refuse_other_content()
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(UserError, match="not empty, and not a study"):
        study.refuse_other_content()


def test_runs_with_a_record_are_listed_by_name(tmp_path):
    study = StudyDir(tmp_path)
    assert study.recorded_runs() == []
    for name in "cba":
        study.run(name).path.mkdir(parents=True)
        study.run(name).metrics.touch()
    study.run("empty").path.mkdir()
    assert [run.path.name for run in study.recorded_runs()] == ["a", "b", "c"]
