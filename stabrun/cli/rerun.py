"""`stabrun rerun`: one recorded run again, with changes."""

from dataclasses import replace
from pathlib import Path

from stabrun.composition import override
from stabrun.config import Config, UserError, run_id
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir


def rerun_config(directory: Path, overrides: list[str]) -> Config:
    """The recorded configuration with `overrides`, with a run directory and a W&B group and name of its own.

    Unless given, the directory is `runs/<run_id>` of the working directory, with `-rerun` if no override changes the
    results. A study counts its `runs/`, so that inside a study it is `reruns/`.
    """
    source = RunDir(directory)
    if not source.is_run():
        raise UserError(f"{directory}: not a run directory: {source.config_file.name} is missing.")
    recorded = source.config(to_train=True)
    anonymous = replace(recorded, run_dir=None, tracker=replace(recorded.tracker, group=None, run_name=None))
    config = override(anonymous, overrides)
    if config.run_dir is None:
        parent = "reruns" if StudyDir(Path()).is_study() else "runs"
        suffix = "-rerun" * (run_id(config) == run_id(recorded))
        config.run_dir = f"{parent}/{run_id(config)}{suffix}"
    return config
