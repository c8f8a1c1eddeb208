"""Files of other tools, read by `stabrun.foreign`: the numbers are exact, and the verdict is right."""

import bz2
import gzip
import json
import lzma
import math
import sys
from pathlib import Path

import pytest
from foreign_samples import SAMPLES
from losses import folded

from stabrun.config import UserError
from stabrun.foreign.read import read_foreign_runs

FOREIGN = Path(__file__).parent / "data" / "foreign"


def losses(count=300, bad=None):
    """A loss that falls, and from row `bad` on has risen by 1."""
    import random

    source = random.Random(0)
    return [2 + 3 * math.exp(-i / 40) + source.gauss(0, 0.03) + (bad is not None and i >= bad) for i in range(count)]


def runs_of(tmp_path, text, name="file", **columns):
    """The runs in a file with this content."""
    file = tmp_path / name
    if isinstance(text, bytes):
        file.write_bytes(text)
    else:
        file.write_text(text, newline="")
    return read_foreign_runs(file, **columns)


def run_of(tmp_path, text, name="file", **columns):
    (run,) = runs_of(tmp_path, text, name, **columns)
    return run


def verdict(run):
    """The verdict on a run, on a clock of whole numbers."""
    return folded({**row, "step": index} for index, row in enumerate(run.rows())).conclude()


@pytest.mark.parametrize("bad", [None, 150])
@pytest.mark.parametrize("name", SAMPLES)
def test_formats(tmp_path, name, bad):
    """Each format, 300 rows: steps, losses, norms and rates as they are written, validations, and the verdict."""
    sample, values = SAMPLES[name], losses(bad=bad)
    run = run_of(tmp_path, sample.write(values), name)
    assert list(run.steps) == [sample.clock(row) for row in range(300)]
    assert list(run.losses) == [float(f"{x:.{sample.digits}{'e' if sample.exponent else 'f'}}") for x in values]
    assert len(run.validations) == sample.validations
    assert set(run.gradients) == {-1.0 if sample.gradient is None else sample.gradient} or sample.gradient is None
    assert sample.rate is None or set(run.rates) == {sample.rate}
    found = verdict(run)
    assert found.verdict == ("converged" if bad is None else "diverged")
    if bad:
        assert 150 <= found.first_bad_step <= 165


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_losses_that_are_not_finite(tmp_path, value):
    """In each format, as Python writes them: at the end of a column that was full, they are a divergence."""
    for name, sample in SAMPLES.items():
        run = run_of(tmp_path, sample.write([*losses(297), *[float(value)] * 3]), name)
        assert (len(run.losses), run.steps[-1]) == (300, sample.clock(299)), name
        assert verdict(run).reason == "nonfinite_loss", name


@pytest.mark.parametrize("name", SAMPLES)
def test_a_cut_last_line_is_skipped(tmp_path, name):
    """Without its last three bytes, each text has no number that it did not have before."""
    sample = SAMPLES[name]
    text = sample.write(losses())
    whole = run_of(tmp_path, text, name)
    try:
        cut = run_of(tmp_path, text.rstrip()[:-3], name)
    except UserError:
        assert name in ("tensorboard.json", "history.json", "losses.json")  # documents
    else:
        assert set(zip(cut.steps, cut.losses, strict=True)) <= set(zip(whole.steps, whole.losses, strict=True))
        assert len(cut.losses) >= 298


REAL = {  # file: rows, first loss, last step, number of validations, rate, verdict
    "events.out.tfevents.converged": (150, 5.02825, 149, 6, 0.1, "converged"),
    "events.out.tfevents.diverged": (150, 5.02825, 149, 6, 0.1, "diverged"),
    "lightning_converged.csv": (160, 3.38370, 159, 4, 0.02, "converged"),
    "lightning_diverged.csv": (160, 3.38370, 159, 4, None, "diverged"),
    "keras_converged.csv": (80, 8.95702, 79, 80, None, "converged"),
    "keras_diverged.csv": (80, 3.64498, 79, 80, None, "diverged"),
    "keras_console.log.xz": (80, 8.9570, 80, 80, None, "converged"),
    "trainer_console.log.xz": (120, 3.226, 2.4, 4, 0.001, "converged"),
    "wandb_diverged.wandb.xz": (150, 5.02825, 745, 6, 0.1, "diverged"),
    "wandb_killed.wandb.xz": (82, 5.02825, 405, 3, 0.1, "converged"),
}


@pytest.mark.parametrize("name", REAL)
def test_files_of_real_tools(tmp_path, name):
    """Written by `scripts/make_foreign.py`: TensorBoard 2.21, Lightning 2.6, Keras 3.15, Trainer 5.24, W&B 0.31."""
    rows, first, last, validations, rate, expected = REAL[name]
    content = (FOREIGN / name).read_bytes()
    if name.endswith(".xz"):
        content = lzma.decompress(content)
    run = run_of(tmp_path, content, name.removesuffix(".xz"))
    assert (len(run.steps), run.steps[-1], len(run.validations)) == (rows, last, validations)
    assert run.losses[0] == pytest.approx(first, rel=1e-5)
    assert rate is None or run.rates[0] == pytest.approx(rate)
    assert verdict(run).verdict == expected
    if "killed" in name:
        assert run.notes == ["the last line is incomplete and was skipped"]


def test_the_losses_of_event_files_and_wandb_files_are_those_that_were_logged(tmp_path):
    import random

    source = random.Random(0)
    logged = [2 + 3 * math.exp(-i / 20) + source.gauss(0, 0.03) + (i >= 75) for i in range(150)]
    wandb = run_of(tmp_path, lzma.decompress((FOREIGN / "wandb_diverged.wandb.xz").read_bytes()), "run-x.wandb")
    assert list(wandb.losses) == logged
    (events,) = read_foreign_runs(FOREIGN / "events.out.tfevents.diverged")
    assert list(events.losses) == pytest.approx(logged, rel=1e-7)  # single precision
    for run in (events, wandb):
        assert [row for row, _ in run.validations] == list(range(24, 150, 25))
        assert [loss for _, loss in run.validations] == pytest.approx([x + 0.1 for x in logged[24::25]], rel=1e-7)
    assert set(events.gradients) == {1.5}


@pytest.mark.parametrize(("name", "least"), [("events.out.tfevents.converged", 60), ("wandb_diverged.wandb.xz", 60)])
def test_binary_files_that_were_cut_are_read_up_to_there(tmp_path, name, least):
    content = (FOREIGN / name).read_bytes()
    content = lzma.decompress(content) if name.endswith(".xz") else content
    name = "events.out.tfevents.1" if "events" in name else "run-x.wandb"
    whole = run_of(tmp_path, content, name)
    for size in range(len(content) // 2, len(content), 2003):
        run = run_of(tmp_path, content[:size], name)
        assert least <= len(run.losses) <= 150
        assert list(run.losses) == list(whole.losses)[: len(run.losses)]


def test_without_its_package_an_event_file_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    with pytest.raises(UserError, match=r"pip install 'stabrun\[tensorboard\]'"):
        read_foreign_runs(FOREIGN / "events.out.tfevents.converged")


CURVE = "".join(f"{step},{loss:.4f}\n" for step, loss in enumerate(losses()))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.replace("lr", "größe").encode("cp1252"),
        lambda text: text.replace("lr", "größe").encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\n\n").encode(),
        lambda text: gzip.compress(text.encode()),
        lambda text: lzma.compress(text.encode()),
        lambda text: bz2.compress(text.encode()),
    ],
)
def test_encodings(tmp_path, encode):
    text = "".join(f"{i},0.1,{x:.4f}\n" for i, x in enumerate(losses()))
    run = run_of(tmp_path, encode("step,lr,loss\n" + text))
    assert list(run.losses) == [round(x, 4) for x in losses()]


def test_a_cut_gzip_file_is_read_up_to_there(tmp_path):
    run = run_of(tmp_path, gzip.compress(("step,loss\n" + CURVE).encode())[:-400])
    assert 100 < len(run.losses) < 300
    assert list(run.losses) == [round(x, 4) for x in losses()][: len(run.losses)]
    assert run.notes == ["the last line is incomplete and was skipped"]


TRIALS = [
    "number,value,datetime_start,params_lr,state\n0,2.5,2024-01-01,0.1,COMPLETE\n1,2.4,2024-01-01,0.2,COMPLETE\n",
    "trial_id,loss,training_iteration,config/lr\na1,2.5,10,0.1\na2,2.4,10,0.2\na3,2.3,10,0.3\n",
    "Name,State,Created,lr,train/loss\nfancy-1,finished,2024,0.1,2.5\nfancy-2,finished,2024,0.2,2.4\n",
    "run_id,variant,lr,seed,final_loss,loss\nab,x,0.1,0,2,2\nac,x,0.1,1,2,2\nad,x,0.2,0,2,2\n",
    "lr,seed,loss\n0.1,0,2.5\n0.1,1,2.4\n0.1,2,2.3\n",
]


@pytest.mark.parametrize("text", TRIALS)
def test_a_table_of_trials_is_no_curve(tmp_path, text):
    with pytest.raises(UserError, match="looks like a table of runs or trials, not a curve"):
        runs_of(tmp_path, text, "results.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch,gen_loss,disc_loss,val/box_loss\n1,2,3,4\n2,2,3,4\n",
         "no total loss found; choose one with --loss: gen_loss, disc_loss"),
        ("step,loss\n" + "1,2\n" * 30 + "x,y\n" * 20, "'y' in column loss is not a number"),
        ('{"log_history": [\n{"step": 1, "loss": 2},\n{"step"', "line 3: not JSON"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(32)) * 9, "it is not text"),
        ("\ufeff".encode("utf-16-le"), "the file is empty"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, text, said):
    with pytest.raises(UserError) as raised:
        runs_of(tmp_path, text)
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "file"))


def test_few_unreadable_rows_are_skipped_with_a_note(tmp_path):
    lines = [f"{i},{x:.4f}" for i, x in enumerate(losses())]
    lines[100], lines[200] = "100,abc", "200,x"
    run = run_of(tmp_path, "step,loss\n" + "\n".join(lines) + "\n")
    assert len(run.losses) == 298
    assert run.notes == [
        "2 of 300 rows cannot be read and were skipped; the first: 'abc' in column loss is not a number"
    ]


def test_validations_belong_to_the_last_row_before_them(tmp_path):
    """Before the first row, between rows, at a row, on a row of their own, and after the last row."""
    text = "step,loss,val_loss\n0,,9\n1,5,\n3,4,3.5\n4,,3.4\n7,2,\n9,,1.5\n"
    run = run_of(tmp_path, text)
    assert list(run.steps) == [1, 3, 7]
    assert run.validations == [(0, 9.0), (1, 3.4), (2, 1.5)]
    assert [row.get("val/loss") for row in run.rows()] == [9.0, 3.4, 1.5]


def test_validations_of_rows_that_a_resume_replaced_are_dropped(tmp_path):
    rows = [(0, 5, ""), (1, 4, 4.1), (2, 3, ""), (3, 3, 9.9), (2, 3, ""), (3, 2, ""), (4, 1, 1.1)]
    run = run_of(tmp_path, "step,loss,val_loss\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    assert list(run.losses) == [5, 4, 3, 2, 1]
    assert run.validations == [(1, 4.1), (4, 1.1)]


def test_split_columns(tmp_path):
    rows = [(step, "fit" if step % 3 else "holdout", 5 - step / 100) for step in range(1, 100)]
    text = "step,which,loss\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows)
    run = run_of(tmp_path, text, split="which")
    assert (len(run.losses), len(run.validations)) == (66, 33)
    with pytest.raises(UserError, match=r"--split step: its values in .* one of them must be train or val"):
        run_of(tmp_path, text, split="step")
    with pytest.raises(UserError, match=r"--split x: .* has no such column"):
        run_of(tmp_path, text, split="x")


def test_runs_in_one_table(tmp_path):
    """Appended runs, with and without a repeated header, and runs told apart by a column."""
    one = "step,loss\n" + CURVE
    for text in (one + one, one + CURVE):
        first, second = runs_of(tmp_path, text)
        assert first.losses == second.losses
        assert second.notes == ["run 2 of 2 in one file"]
    epochs = "loss,val_loss\n" + "".join(f"{x:.4f},3\n" for x in losses())
    assert len(runs_of(tmp_path, epochs + epochs)) == 2
    mixed = "".join(
        f"{i},{name},{x + lift:.4f}\n" for i, x in enumerate(losses()) for name, lift in (("a", 0), ("b", 1))
    )
    a, b = runs_of(tmp_path, "step,run,loss\n" + mixed)
    assert (a.notes, b.notes) == (["run = a"], ["run = b"])
    assert list(b.losses) == [round(x + 1, 4) for x in losses()]


def test_a_single_row_out_of_place_is_skipped(tmp_path):
    lines = CURVE.splitlines()
    lines[100], lines[200] = lines[200], lines[100]
    run = run_of(tmp_path, "step,loss\n" + "\n".join(lines) + "\n")
    assert len(run.losses) == 298
    assert "rows out of order were skipped" in run.notes


def test_clocks(tmp_path):
    """Fractional epochs are a clock; epochs that are too coarse are not; thousands may be grouped."""
    fine = run_of(tmp_path, "epoch,loss\n" + "".join(f"{i / 50},{x}\n" for i, x in enumerate(losses())))
    assert (fine.steps.typecode, fine.steps[1], fine.notes) == ("d", 0.02, ["the clock is column epoch"])
    assert [type(row["step"]) for row in fine.rows()][:2] == [float, float]
    coarse = run_of(tmp_path, "epoch,loss\n" + "".join(f"{i // 50},{x}\n" for i, x in enumerate(losses())))
    assert (list(coarse.steps), coarse.notes) == (list(range(300)), ["no step column: rows are counted"])
    grouped = run_of(tmp_path, "step,loss\n" + "".join(f'"{i:,}",{x}\n' for i, x in enumerate(losses(), 900)))
    assert (grouped.steps.typecode, list(grouped.steps)) == ("q", list(range(900, 1200)))


def test_only_one_of_several_processes_is_read(tmp_path):
    text = "".join(f"[rank{r}] step {i} loss {x + r:.4f}\n" for i, x in enumerate(losses()) for r in (1, 0, 2))
    assert list(run_of(tmp_path, text).losses) == [round(x + 1, 4) for x in losses()]


def test_a_summary_does_not_take_the_place_of_the_losses(tmp_path):
    rows = [{"_step": i, "train/ce_loss": x} for i, x in enumerate(losses())] + [{"_step": 300, "loss": 9.0}]
    run = run_of(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    assert list(run.losses) == losses()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Step,Loss/train,Loss/val", "Loss/train"),
        ("global_step,loss/train/total,loss_scale", "loss/train/total"),
        ("iterations,Training Loss,Validation Loss", "Training Loss"),
        ("it,metrics/train/loss,lr", "metrics/train/loss"),
        ("updates,trainLoss,valLoss", "trainLoss"),
        ("tokens,fancy-run - train/loss,other", "fancy-run - train/loss"),
        ("step,perplexity,my_loss", "my_loss"),
        ("samples,loss,train_loss", "loss"),
    ],
)
def test_usual_names(tmp_path, header, expected):
    names = header.split(",")
    at = names.index(expected)
    rows = [[str(i), "7", "7"] for i in range(300)]
    for row, x in zip(rows, losses(), strict=True):
        row[at] = f"{x:.4f}"
    run = run_of(tmp_path, header + "\n" + "".join(",".join(row) + "\n" for row in rows))
    assert list(run.losses) == [round(x, 4) for x in losses()]
    assert list(run.steps) == list(range(300))


def test_the_parts_of_a_detectors_loss_are_added(tmp_path):
    file = tmp_path / "results.csv"
    head = "   epoch,  train/box_loss,  train/cls_loss,  train/dfl_loss,  val/box_loss,  val/cls_loss,  val/dfl_loss\n"
    file.write_text(head + "".join(f"{i},{1 + i},{0.5},{0.25},{2},{3},{4}\n" for i in range(60)))
    (run,) = read_foreign_runs(file)
    assert list(run.losses) == [i + 1.75 for i in range(60)]
    assert run.validations[3] == (3, 9.0)
    assert "the loss is the sum of train/box_loss, train/cls_loss, train/dfl_loss" in run.notes
    (run,) = read_foreign_runs(file, loss="train/cls_loss")
    assert set(run.losses) == {0.5}


def test_a_loss_that_repeats_until_the_next_one_is_read_once(tmp_path):
    file = tmp_path / "policy.csv"
    file.write_text("step,loss\n" + "".join(f"{i},{1 / (1 + i // 10)}\n" for i in range(600)))
    (run,) = read_foreign_runs(file)
    assert list(run.steps) == list(range(0, 600, 10))
    assert any("repeats until the next" in note for note in run.notes)
    file.write_text("step,loss\n" + "".join(f"{i},2.5\n" for i in range(600)))
    assert len(read_foreign_runs(file)[0].steps) == 600


def test_a_table_whose_training_rows_have_no_loss_is_judged_on_its_validations(tmp_path):
    file = tmp_path / "metrics.csv"
    rows = [f"{i},val,{3 - i / 100},0" if i % 10 == 0 else f"{i},train,,{i}" for i in range(300)]
    file.write_text("\n".join(["step,type,loss,time_ms", *rows]) + "\n")
    (run,) = read_foreign_runs(file)
    assert list(run.steps) == list(range(0, 300, 10))
    assert run.losses[3] == pytest.approx(2.7)
    assert any("only evaluations" in note for note in run.notes)
