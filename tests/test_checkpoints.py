"""Checkpoints that are damaged, several, or not stabrun's."""

import json
import random
import shutil

import pytest
import torch
from helpers import RICH, events, metrics, tiny
from helpers import run as stabrun
from safetensors.torch import load_file, save_file

import stabrun as package
from stabrun.config import UserError
from stabrun.record import checkpoints
from stabrun.training import checkpoint
from stabrun.training.run import train

FILES = "meta.json", "model.safetensors", "optimizer.safetensors"


def cut(content, random):
    return content[: random.randrange(len(content))]


def overwritten(content, random):
    """With 1 to 16 bytes changed."""
    content = bytearray(content)
    start = random.randrange(len(content))
    for place in range(start, min(start + random.randint(1, 16), len(content))):
        content[place] ^= random.randint(1, 255)
    return bytes(content)


DAMAGES = {"cut": cut, "overwritten": overwritten, "empty": lambda content, random: b""}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(tmp_path, interrupted, whole, capsys, file, damage):
    path = tmp_path / "run" / "checkpoints" / "step_00000013" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(0)))
    assert train(interrupted)["status"] == "complete"
    assert metrics(tmp_path / "run") == whole
    starts = [event["step"] for event in events(tmp_path / "run", "start")]
    assert starts == [0, 8]
    if file == "meta.json" and damage == "missing":  # no checkpoint, as after an interrupted copy
        return
    err = capsys.readouterr().err
    assert f"step_00000013: {file}" in err
    assert "an older checkpoint is used" in err
    assert [event["path"] for event in events(tmp_path / "run", "damaged")] == ["step_00000013"]
    assert (tmp_path / "run" / "checkpoints" / "damaged_step_00000013").is_dir()


def test_every_kind_of_damage_is_found(tmp_path, stopped):
    """300 times a random file, a random place and random bytes."""
    path = tmp_path / "step_00000013"
    shutil.copytree(stopped / "checkpoints" / path.name, path)
    assert checkpoint.damage(path) is None
    seeded = random.Random(1)
    for number in range(300):
        file = path / seeded.choice(FILES)
        before = file.read_bytes()
        file.write_bytes(DAMAGES[seeded.choice(["cut", "overwritten"])](before, seeded))
        assert checkpoint.damage(path), number
        file.write_bytes(before)
    assert checkpoint.damage(path) is None


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_kept(tmp_path, interrupted):
    before = metrics(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"step_00000013: model\.safetensors is damaged\. The older ones .* Delete"):
        train(interrupted)
    assert metrics(tmp_path / "run") == before
    assert sorted(checkpoints.steps(tmp_path / "run" / "checkpoints")) == [8, 13]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(interrupted)["status"] == "complete"


def test_a_checkpoint_of_another_model_is_refused(tmp_path, interrupted):
    folder = tmp_path / "run" / "checkpoints"
    train(tiny("model.d_model=32", "train.steps=13", f"run_dir={tmp_path / 'other'}"))
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other" / "checkpoints", folder)
    with pytest.raises(UserError, match="another model"):
        train(interrupted)


def test_the_model_of_a_damaged_checkpoint_is_not_loaded(tmp_path, interrupted):
    run = package.load_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000013" / "model.safetensors"
    state = load_file(path)
    assert run.model().state_dict()["blocks.0.mlp.layer.fc1.weight"].equal(state["blocks.0.mlp.layer.fc1.weight"])
    save_file({name: tensor + 1 for name, tensor in state.items()}, path)
    older = load_file(path.parent.parent / "step_00000008" / "model.safetensors")
    assert run.model().state_dict()["blocks.0.mlp.layer.fc1.weight"].equal(older["blocks.0.mlp.layer.fc1.weight"])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        run.model(13)
    with pytest.raises(UserError, match="it has those of step 8, 13"):
        run.model(12)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((), [24, 30]),
        (("train.keep_checkpoints=1",), [30]),
        (("train.keep_checkpoints=9",), [8, 16, 24, 30]),
        (("train.checkpoint_every=0",), []),
        (("train.checkpoint_every=0", "train.checkpoint_minutes=1e-9", "train.keep_checkpoints=3"), [28, 29, 30]),
        (("train.checkpoint_minutes=60",), [24, 30]),
    ],
)
def test_how_many_checkpoints_are_kept_and_when(tmp_path, whole, words, kept):
    train(tiny(*RICH, *words, f"run_dir={tmp_path / 'run'}"))
    assert sorted(checkpoints.steps(tmp_path / "run" / "checkpoints")) == kept
    assert metrics(tmp_path / "run") == whole


STRANGE = (
    "step_abc",
    "step_99999999999999999999",
    "step_-0000001",
    "step_٠٠٠٠٠٠٩٩",
    "step_99",
    "step_00000099.old",
    "step_",
)


def test_directories_of_other_names_are_ignored(tmp_path, interrupted, whole, capsys):
    folder = tmp_path / "run" / "checkpoints"
    for name in STRANGE:
        shutil.copytree(folder / "step_00000013", folder / name)
    (folder / "step_00000077").write_text("a file")
    assert [*checkpoints.steps(folder)] == [13, 8]
    for command in ("status", "judge", "train"):
        words = [tmp_path / "run"] if command != "train" else []
        if command == "train":
            assert train(interrupted)["status"] == "complete"
        else:
            status, out, err = stabrun(capsys, command, *words)
            assert (status, err) == (0, "")
            assert "13" in out or command == "judge"
    assert metrics(tmp_path / "run") == whole
    assert all((folder / name).is_dir() for name in STRANGE)


def test_checkpoints_can_be_read_by_whom_the_record_can(stopped):
    mode = (stopped / "metrics.jsonl").stat().st_mode
    for path in stopped.glob("checkpoints/*/*"):
        assert path.stat().st_mode == mode


def test_a_checkpoint_has_no_code(stopped):
    """Every file is one that is read without running anything."""
    for path in stopped.glob("checkpoints/*/*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert all(isinstance(value, torch.Tensor) for value in load_file(path).values())
