"""`stabrun judge --follow` on growing logs of other tools, and `stabrun judge` on a folder of files."""

import json
import os
import signal
import time

import pytest
from foreign_samples import SAMPLES
from helpers import run
from test_foreign import FOREIGN, losses
from test_judge import following

from stabrun.config import UserError
from stabrun.foreign.follow import followed
from stabrun.foreign.read import read_foreign_runs

GROWING = sorted(set(SAMPLES) - {"tensorboard.json", "history.json", "losses.json"})


@pytest.mark.parametrize("name", GROWING)
def test_rows_of_a_growing_text_are_those_of_the_whole(tmp_path, monkeypatch, name):
    """Written in pieces that are cut anywhere, between polls."""
    data, file = SAMPLES[name].write(losses()).encode(), tmp_path / name
    pieces = [data[start : start + 1501] for start in range(0, len(data), 1501)]

    def write(_seconds=0.0):
        with open(file, "ab") as handle:
            handle.write(pieces.pop(0))

    monkeypatch.setattr("time.sleep", write)
    rows = []
    for row in followed(file, lambda: not pieces, None, None, None):
        rows = [] if row is None else [*rows, row]
    (whole,) = read_foreign_runs(file)
    expected = list(whole.rows())
    assert len(rows) >= 299  # a last row that may not be complete is waited for
    for row, of_whole in zip(rows, expected, strict=False):
        assert (row["step"], row["train/loss"]) == (of_whole["step"], of_whole["train/loss"])
        assert row.get("train/lr") == of_whole.get("train/lr")
        assert row.get("grad/norm") == of_whole.get("grad/norm")


def test_the_parts_of_a_growing_detectors_loss_are_added(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("epoch,train/box_loss,train/cls_loss\n" + "".join(f"{i},{1 + i},0.5\n" for i in range(30)))
    rows = list(followed(file, lambda: True, None, None, None))
    assert [row["train/loss"] for row in rows] == [1.5 + i for i in range(len(rows))]
    assert len(rows) >= 29


def test_a_second_run_and_a_resume_begin_anew(tmp_path):
    file, ended = tmp_path / "log.txt", iter([False, True])
    steps = [*range(100), *range(50, 60), *range(30)]
    file.write_text("".join(f"step {step} loss {5 - step / 100:.4f}\n" for step in steps))
    rows = []
    for row in followed(file, lambda: next(ended), None, None, None):
        rows = [] if row is None else [*rows, row]
    assert [row["step"] for row in rows] == list(range(30))


def test_what_cannot_be_followed(tmp_path):
    for file, said in (
        (FOREIGN / "trainer_converged.json", "a JSON document cannot be followed"),
        (FOREIGN / "events.out.tfevents.converged", "a file of TensorBoard cannot be followed"),
    ):
        with pytest.raises(UserError, match=said):
            next(followed(file, lambda: True, None, None, None))


def test_follow_a_log_until_it_diverges(tmp_path):
    """A console of Hugging Face's Trainer whose loss becomes NaN, with a column that must be named."""
    file = tmp_path / "train.log"
    process = following(file, "--loss", "perte", "--step", "pas")
    time.sleep(0.5)
    with open(file, "w") as handle:
        handle.write("pas,perte\n")
        for step, loss in enumerate(losses(100)):
            handle.write(f"{step},{loss:.4f}\n")
            handle.flush()
        handle.write("100,nan\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "diverged (nonfinite_loss) at step 100" in out


def test_ctrl_c_ends_following_a_log(tmp_path):
    file = tmp_path / "train.log"
    spiked = [x + 2 * (step == 150) for step, x in enumerate(losses())]
    file.write_text("".join(f"step {step}: loss {x:.4f}\n" for step, x in enumerate(spiked)))
    process = following(file)
    assert "a spike of" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "converged (fell)" in out
    assert "Traceback" not in err


def a_folder(tmp_path):
    folder = tmp_path / "logs"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for name in ("nanogpt.log", "plain.csv", "deep/titan.log"):
        sample = SAMPLES[os.path.basename(name)] if "plain" not in name else SAMPLES["pairs.csv"]
        (folder / name).write_text(sample.write(losses(bad=150 if "titan" in name else None)), newline="")
    (folder / "notes.txt").write_text("Nothing to be read here.\n")
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (folder / "deep" / ".hidden" / "a.csv").write_text("step,loss\n1,2\n")
    (folder / ".hidden.csv").write_text("step,loss\n1,2\n")
    return folder


def test_a_folder_of_files(capsys, tmp_path):
    folder = a_folder(tmp_path)
    status, out, _ = run(capsys, "judge", folder)
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith(f"{folder}/deep/titan.log: diverged (runaway) at step ")
    assert lines[1].startswith(f"{folder}/nanogpt.log: converged (fell); loss")
    assert lines[2] == f"{folder}/notes.txt: no loss column found; it is neither a table nor a log with losses."
    assert lines[3].startswith(f"{folder}/plain.csv: converged")
    assert lines[4] == f"{folder}/weights.bin: no loss column found; it is not text."
    assert lines[5:] == ["5 files: 2 converged, 1 diverged, 2 not read"]
    status, out, _ = run(capsys, "judge", folder, "--json")
    facts = json.loads(out)
    assert [fact.get("verdict") for fact in facts] == ["diverged", "converged", None, "converged", None]
    assert facts[4]["error"] == lines[4]


def test_a_folder_without_a_curve_is_an_error(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("nothing\n")
    (tmp_path / "b.txt").write_text("")
    status, out, err = run(capsys, "judge", tmp_path)
    assert (status, out) == (2, "")
    assert "neither a run nor a study, and none of its 2 files can be judged" in err


def test_the_directory_of_a_wandb_run_is_one_record(capsys, tmp_path):
    import lzma

    place = tmp_path / "wandb" / "offline-run-20250101_120000-a1b2c3d4"
    (place / "files").mkdir(parents=True)
    (place / "files" / "output.log").write_text("step 1 loss 2\n")
    content = lzma.decompress((FOREIGN / "wandb_diverged.wandb.xz").read_bytes())
    (place / "run-a1b2c3d4.wandb").write_bytes(content)
    for path in (place, place / "run-a1b2c3d4.wandb"):
        status, out, _ = run(capsys, "judge", path, "--json")
        assert (status, json.loads(out)["verdict"]) == (0, "diverged")
    status, out, _ = run(capsys, "judge", tmp_path)
    assert out.splitlines()[-1] == "1 file: 1 diverged"


def test_rows_of_another_tool_in_a_file_with_the_name_of_ours(capsys, tmp_path):
    """Lingua writes `metrics.jsonl` and `config.yaml` too."""
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "metrics.jsonl").write_text(SAMPLES["lingua.jsonl"].write(losses(bad=150)))
    status, out, _ = run(capsys, "judge", tmp_path / "metrics.jsonl", "--json")
    assert (status, json.loads(out)["verdict"]) == (0, "diverged")
    assert "1 diverged" in run(capsys, "judge", tmp_path)[1]
