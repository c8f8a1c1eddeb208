"""`stabrun judge` on anyone's record, on a growing file, and against another run."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY, run, stabrun, tiny

from stabrun.record.run_dir import RunDir
from stabrun.training.run import train

FOREIGN = Path(__file__).parent / "data" / "foreign"


def losses(count=300, bad=None):
    """A loss that falls, and from row `bad` on has risen by 1."""
    source = random.Random(0)
    lift = [1.0 if bad is not None and i >= bad else 0.0 for i in range(count)]
    return [2 + 3 * math.exp(-i / 40) + source.gauss(0, 0.03) + lift[i] for i in range(count)]


def judged(capsys, path, *words):
    status, out, err = run(capsys, "judge", path, "--json", *words)
    assert status == 0, err
    return json.loads(out)


def refused(capsys, path, *words):
    status, out, err = run(capsys, "judge", path, *words)
    assert (status, out) == (2, ""), out
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    return err


def test_state_of_a_real_trainer(capsys):
    """Two runs of Hugging Face's Trainer (transformers 5.23): GPT-2 of 2 layers × 32; one had a weight set to inf."""
    good = judged(capsys, FOREIGN / "trainer_converged.json")
    assert (good["verdict"], good["horizon"]) == ("converged", 200)
    bad = judged(capsys, FOREIGN / "trainer_diverged.json")
    assert (bad["verdict"], bad["reason"], bad["first_bad_step"]) == ("diverged", "nonfinite_loss", 121)
    assert any("0.0 with a NaN" in note for note in bad["notes"])


def test_history_of_a_real_wandb_run(capsys):
    """What `wandb leet inspect --json` (0.31) prints of an offline run whose loss rises by 1 at step 350."""
    facts = judged(capsys, FOREIGN / "wandb_history.jsonl")
    assert (facts["verdict"], facts["horizon"]) == ("diverged", 595)
    assert 350 <= facts["first_bad_step"] <= 400


def test_table_of_a_real_spreadsheet(capsys):
    """Written by Gnumeric (ssconvert, de_DE: semicolons, decimal commas), with Excel's byte-order mark before it."""
    facts = judged(capsys, FOREIGN / "spreadsheet_de.csv")
    assert (facts["verdict"], facts["horizon"]) == ("diverged", 299)
    assert 150 <= facts["first_bad_step"] <= 165


def csv_of(values, header="step,loss", sign=",", point="."):
    rows = [f"{i}{sign}{f'{value:.5f}'.replace('.', point)}" for i, value in enumerate(values)]
    return "\n".join([header, *rows]) + "\n"


def as_wandb(values):
    """The columns of a panel exported from W&B."""
    rows = [f'"{i}","{v}","{v}","{v}"' for i, v in enumerate(values)]
    name = "fancy-run - train/loss"
    return "\n".join([f'"Step","{name}","{name}__MIN","{name}__MAX"', *rows])


def as_log(template):
    return lambda values: "compiling\n" + "".join(template.format(i, value) + "\n" for i, value in enumerate(values))


FORMATS = {
    "plain.csv": lambda v: csv_of(v),
    "tabs.tsv": lambda v: csv_of(v, "iteration\ttrain_loss", "\t"),
    "german.csv": lambda v: "\ufeff" + csv_of(v, "Step;Loss", ";", ",").replace("\n", "\r\n"),
    "wandb.csv": as_wandb,
    "history.jsonl": lambda v: "".join(json.dumps({"_step": i, "train/loss": x}) + "\n" for i, x in enumerate(v)),
    "columns.json": lambda v: json.dumps({"step": list(range(len(v))), "loss": v}),
    "rows.json": lambda v: json.dumps([{"step": i, "loss": x} for i, x in enumerate(v)], indent=1),
    "nanogpt.log": as_log("iter {}: loss {:.4f}, time 12.50ms, mfu 3.1%"),
    "ours.log": as_log("step {}/300  loss {:.4f}  grad norm 0.52  lr 1e-2"),
    "megatron.log": as_log(" iteration {:8d}/     300 | lm loss: {:.6E} | z-loss: 1.0E-02 | grad norm: 0.5 |"),
    "lightning.txt": as_log("global_step={}, train/loss={:.3f}, val_loss=9.0"),
    "tqdm.log": lambda v: "".join(f" 9%|#  | {i}/300 [00:01<00:02, 3.1it/s, loss={x:.4f}]\r" for i, x in enumerate(v)),
    "commas.log": lambda v: "lr 3, batch 4\n" + "".join(f"Step {i:,}, loss {x:.4f}\n" for i, x in enumerate(v, 900)),
    "python.log": lambda v: "".join(f"{{'loss': {x:.4f}, 'grad_norm': 1.2, 'step': {i}}}\n" for i, x in enumerate(v)),
}


@pytest.mark.parametrize("bad", [None, 150])
@pytest.mark.parametrize("name", FORMATS)
def test_records_of_other_tools(capsys, tmp_path, name, bad):
    (tmp_path / name).write_text(FORMATS[name](losses(bad=bad)), newline="")
    facts = judged(capsys, tmp_path / name)
    assert facts["verdict"] == ("converged" if bad is None else "diverged")
    start = 900 if name == "commas.log" else 0
    assert facts["horizon"] == 299 + start
    if bad:
        assert 150 <= facts["first_bad_step"] - start <= 165


def test_columns_are_named_where_they_cannot_be_guessed(capsys, tmp_path):
    file = tmp_path / "odd.csv"
    file.write_text(csv_of(losses(bad=150), "batch,perte"))
    assert "choose a column with --loss: batch, perte" in refused(capsys, file)
    assert "no such column. Columns: batch, perte" in refused(capsys, file, "--loss", "lost")
    facts = judged(capsys, file, "--loss", "perte", "--step=batch")
    assert facts["verdict"] == "diverged"
    assert any("rows are counted" in note for note in judged(capsys, file, "--loss", "perte")["notes"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"step,loss\n", "no loss column found"),
        (b"hello world\n", "no loss column found"),
        (b"step,loss\n1,abc\n", "'abc' in column loss is not a number"),
        (b'{"step": 1, "loss": 2}\nrubbish\n{"step": 2, "loss": 2}\n', "line 2: not JSON"),
        (b"Step,a - train/loss,b - train/loss\n1,2,3\n", "several columns"),
        (b"step,loss\n1,\n2,\n", "has no numbers"),
        (b"[1, 2]", "it has no columns"),
        (b"step,loss\n3,2\n2,3\n1,4\n", "steps descend"),
        (b"step,loss\n1e30,2\n", "1e+30 in column step"),
        (b"step,loss\n0.5,2\n", "0.5 in column step"),
        (b'{"step": 99999999999999999999, "loss": 2}', "1e+20 in column step"),
        (b'{"step": 1, "loss": true}', "True in column loss"),
        (b'{"step": 1, "loss": {"a": 1}}', "in column loss is not a number"),
        (b"\0\0\0", "no loss column found"),
        (b'step,loss\n"1,' + b"2" * 200_000 + b"\n", "cannot be read"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", "cannot be read"),
    ],
)
def test_invalid_records_are_refused(capsys, tmp_path, content, said):
    (tmp_path / "file").write_bytes(content)
    assert said in refused(capsys, tmp_path / "file")


def rows_of(steps, values):
    return "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in zip(steps, values, strict=True))


@pytest.mark.parametrize("norm", ["Infinity", "NaN"])
def test_a_gradient_norm_that_is_not_finite_before_finite_losses_decides_nothing(capsys, tmp_path, norm):
    rows = [
        f'{{"step": {i}, "loss": {v}, "grad_norm": {norm if i % 10 == 0 else 1.0}}}' for i, v in enumerate(losses())
    ]
    (tmp_path / "amp.jsonl").write_text("\n".join(rows) + "\n")
    facts = judged(capsys, tmp_path / "amp.jsonl")
    assert facts["verdict"] == "converged"
    assert len(facts["notes"]) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("norm/out/fc2", ["x", 1.0]), ("attn/entropy", {"a": 1}), ("grad/norm", "large")]
)
def test_a_statistic_that_is_no_number_is_refused(capsys, tmp_path, key, value):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=50"))
    rows = list(RunDir(tmp_path / "run").rows())
    rows[3][key] = value
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert f"{key} is not a number at step 3" in refused(capsys, tmp_path / "run")


def test_a_statistic_of_fewer_layers_harms_nothing(capsys, tmp_path):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=50"))
    rows = list(RunDir(tmp_path / "run").rows())
    rows[4]["norm/out/qkv"] = [1.0]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert judged(capsys, tmp_path / "run")["horizon"] == 49


def test_two_runs_in_one_file(capsys, tmp_path):
    values = losses() + losses(bad=100)
    (tmp_path / "two.jsonl").write_text(rows_of([*range(300), *range(300)], values))
    both = judged(capsys, tmp_path / "two.jsonl")
    assert [facts["verdict"] for facts in both] == ["converged", "diverged"]
    assert both[1]["notes"] == ["run 2 of 2 in one file"]


def test_a_resume_takes_the_place_of_what_it_repeats(capsys, tmp_path):
    values = losses()
    (tmp_path / "resumed.jsonl").write_text(
        rows_of([*range(200), *range(150, 300)], [*values[:150], *[9.0] * 50, *values[150:]])
    )
    (tmp_path / "whole.jsonl").write_text(rows_of(range(300), values))
    resumed, whole = (judged(capsys, tmp_path / f"{name}.jsonl") for name in ("resumed", "whole"))
    assert resumed.pop("notes") == ["steps repeat or go back: the later rows are used"]
    assert {**resumed, "path": "", "notes": []} == {**whole, "path": ""}


@pytest.mark.parametrize(
    ("tail", "verdict"),
    [
        ([("nan", 1.0)] * 3, "diverged"),  # a column that was full until now
        ([("nan", "nan")] * 3, "diverged"),
        ([(0.0, "nan")] * 3, "diverged"),
        ([(0.0, 1.0)], "converged"),
    ],
)
def test_what_nan_means_at_the_end(capsys, tmp_path, tail, verdict):
    rows = [(value, 1.0) for value in losses()] + tail
    text = "step,loss,grad_norm\n" + "".join(f"{i},{x},{g}\n" for i, (x, g) in enumerate(rows))
    (tmp_path / "file.csv").write_text(text)
    assert judged(capsys, tmp_path / "file.csv")["verdict"] == verdict


def test_nan_that_meant_not_recorded_does_so_at_the_end(capsys, tmp_path):
    rows = [row for i, value in enumerate(losses()) for row in ((i, value), (i, "nan"))]
    (tmp_path / "file.csv").write_text("step,loss\n" + "".join(f"{i},{x}\n" for i, x in rows))
    facts = judged(capsys, tmp_path / "file.csv")
    assert facts["verdict"] == "converged"
    assert any("without a recorded loss" in note for note in facts["notes"])


def test_evaluations_alone(capsys, tmp_path):
    text = "".join(json.dumps({"step": i * 50, "eval_loss": v}) + "\n" for i, v in enumerate(losses(100)))
    (tmp_path / "evals.jsonl").write_text(text + '{"step": 50')
    facts = judged(capsys, tmp_path / "evals.jsonl")
    assert facts["verdict"] == "converged"
    assert len(facts["notes"]) == 2
    (tmp_path / "few.jsonl").write_text("".join(text.splitlines(keepends=True)[:10]))
    assert judged(capsys, tmp_path / "few.jsonl")["reason"] == "too_short"


def test_a_study_has_a_verdict_for_each_run(capsys, tmp_path):
    for seed in (0, 1):
        train(tiny(f"run_dir={tmp_path / 'study' / 'runs' / str(seed)}", "train.steps=50", f"seed={seed}"))
    capsys.readouterr()
    status, out, _ = run(capsys, "judge", tmp_path / "study")
    assert status == 0
    assert sum("converged (fell)" in line or "undecided" in line for line in out.splitlines()) == 2
    assert "runs/0: " in out
    for name in ("summary.json", "events.jsonl"):
        (tmp_path / "study" / "runs" / "0" / name).unlink()
    (tmp_path / "study" / "runs" / "0" / "metrics.jsonl").write_text("")  # planned, and not begun
    facts = judged(capsys, tmp_path / "study")
    assert [(fact["reason"] == "too_short", fact["horizon"]) for fact in facts] == [(True, -1), (False, 49)]
    assert "not a run directory" in refused(capsys, tmp_path / "study", "--follow")
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a study, and no file in it" in refused(capsys, tmp_path / "empty")


def test_memory_does_not_grow_by_a_dictionary_a_row(tmp_path):
    used = []
    for count in (1_000, 200_000):
        with open(tmp_path / "long.csv", "w") as file:
            file.write("step,loss\n")
            file.writelines(f"{i},{3 + (i % 7) / 100}\n" for i in range(count))
        ask = (
            "import pathlib, resource, sys\nfrom stabrun.cli.judge import Request, judge\n"
            "judge(Request(pathlib.Path(sys.argv[1])))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", ask, str(tmp_path / "long.csv")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used.append(int(done.stderr) * 1024)
    assert (used[1] - used[0]) / 200_000 < 250, "bytes a row"


def test_against_another_run(capsys, tmp_path):
    for name, rate in (("a", "0.01"), ("b", "0.01"), ("c", "3.0")):
        train(tiny(f"run_dir={tmp_path / name}", "train.steps=120", f"optim.lr={rate}"))
    capsys.readouterr()
    same = judged(capsys, tmp_path / "a", "--against", tmp_path / "b")["against"]
    assert (same["loss_step"], same["site"], same["steps"]) == (None, None, 120)
    other = judged(capsys, tmp_path / "c", "--against", tmp_path / "a")["against"]
    assert other["loss_step"] < 60
    assert other["difference"] > 0
    assert other["site_step"] <= other["loss_step"]
    assert other["site_factor"] > 1.5
    status, out, _ = run(capsys, "judge", tmp_path / "c", "--against", tmp_path / "a")
    assert status == 0
    assert "the losses differ from step" in out
    assert "no such file" in refused(capsys, tmp_path / "a", "--against", tmp_path / "nothing")
    (tmp_path / "gone.jsonl").write_text(rows_of(range(120), [math.nan] * 120))
    gone = judged(capsys, tmp_path / "a", "--against", tmp_path / "gone.jsonl")["against"]
    assert (gone["loss_step"], gone["difference"]) == (0, None)


def test_the_same_within_a_tolerance(capsys, tmp_path):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=120"))
    own = list(RunDir(tmp_path / "run").rows())
    copies = {"near": 0.005, "far": 0.5}
    for name, offset in copies.items():
        values = [row["train/loss"] + offset for row in own]
        (tmp_path / f"{name}.csv").write_text(csv_of(values))
    capsys.readouterr()

    def compared(other, tolerance):
        against = "--against", tmp_path / other, "--tolerance", tolerance
        status, out, err = run(capsys, "judge", tmp_path / "run", *against)
        told = [line.strip() for line in out.splitlines() if " same within " in line]
        assert "the losses do not differ" not in out, "a tolerance says it more precisely"
        status_of_json, facts, _ = run(capsys, "judge", tmp_path / "run", "--json", *against)
        assert (status_of_json, len(told), err) == (status, 1, "")
        return status, told[0], json.loads(facts)["against"]

    status, line, facts = compared("near.csv", 0.01)
    assert (status, facts["same"], facts["tolerance"]) == (0, True, 0.01)
    assert line.startswith("the losses are the same within 0.01, and within 0.005")
    status, line, facts = compared("far.csv", 0.01)
    assert (status, facts["same"], facts["apart"]) == (3, False, pytest.approx(-0.5, abs=1e-4))
    step = facts["apart_step"]
    assert line == f"not the same within 0.01: at step {step}, the level of this run's loss is 0.500 below the other's"
    noisy = [row["train/loss"] + random.Random(i).gauss(0, 0.05) for i, row in enumerate(own)]
    (tmp_path / "noisy.csv").write_text(csv_of(noisy))
    status, line, facts = compared("noisy.csv", 0.01)
    assert (status, facts["same"]) == (3, None)
    shown = float(line.split("no tolerance below ")[1].split(";")[0])
    assert compared("noisy.csv", shown)[0] == 0
    assert compared("run", 0)[0] == 0
    (tmp_path / "gone.csv").write_text(csv_of([row["train/loss"] for row in own[:60]] + [math.nan] * 60))
    status, line, _ = compared("gone.csv", 0.01)
    assert (status, line) == (3, "not the same within 0.01: at step 60, one of the losses is not finite")
    assert run(capsys, "judge", tmp_path / "run", "--against", tmp_path / "far.csv")[0] == 0, "without a tolerance"


def following(path, *words):
    command = [sys.executable, "-m", "stabrun", "judge", str(path), "--follow", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_follow_a_run_from_before_its_first_step_to_its_end(tmp_path):
    words = [
        "train",
        *TINY,
        "train.steps=60",
        "optim.lr=1e18",
        "optim.weight_decay=0",
        "optim.clip=null",
        "run_dir=run",
    ]
    assert stabrun(*words, cwd=tmp_path).returncode == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "copy" / "summary.json").unlink()
    (tmp_path / "copy" / "metrics.jsonl").unlink()
    process = following(tmp_path / "copy")
    time.sleep(0.5)
    with open(tmp_path / "copy" / "metrics.jsonl", "w") as file:
        for start in range(0, len(rows), 1000):  # lines are cut anywhere
            file.write(rows[start : start + 1000])
            file.flush()
            time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "diverged (nonfinite" in out.splitlines()[-3] or "diverged (nonfinite" in out


@pytest.mark.parametrize("how", ["cut", "replaced"])
def test_follow_a_file_that_is_cut_or_replaced(tmp_path, how):
    file = tmp_path / "metrics.jsonl"
    first = "".join(json.dumps({"step": i, "train/loss": v}) + "\n" for i, v in enumerate(losses(bad=150)))
    second = "".join(
        json.dumps({"step": i, "train/loss": v, "grad/norm": 1.0}) + "\n" for i, v in enumerate(losses(100))
    )
    file.write_text(first)
    process = following(file)
    assert any("diverged" in said for said in iter(process.stdout.readline, ""))
    if how == "cut":
        os.truncate(file, 0)
    else:
        (tmp_path / "new").write_text("")
        os.replace(tmp_path / "new", file)
    time.sleep(0.6)
    with open(file, "a") as handle:
        handle.write(second + '{"step": 100, "train/loss": "nan"}\n')
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "diverged (nonfinite_loss) at step 100" in out


def test_a_damaged_line_is_named_whether_followed_or_not(capsys, tmp_path):
    rows = [json.dumps({"step": i, "train/loss": v}) + "\n" for i, v in enumerate(losses())]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(rows))
    assert judged(capsys, run)["verdict"] == "converged", "without a configuration beside it"
    (run / "metrics.jsonl").write_text("".join(rows[:100]) + '{"step": 10\n' + "".join(rows[101:]))
    assert "is damaged" in refused(capsys, run)
    assert "is damaged" in refused(capsys, run / "metrics.jsonl", "--follow")


def test_small_losses_are_told_with_their_digits(capsys, tmp_path):
    file = tmp_path / "small.csv"
    file.write_text("step,loss\n" + "".join(f"{i},{v * 1e-6:.12f}\n" for i, v in enumerate(losses())))
    status, out, _ = run(capsys, "judge", file)
    assert status == 0
    assert "init 5.0" in out


def test_ctrl_c_ends_following_with_the_verdict_so_far(tmp_path):
    file = tmp_path / "metrics.jsonl"
    spiked = [value + 2.0 * (i == 150) for i, value in enumerate(losses())]
    file.write_text("".join(json.dumps({"step": i, "train/loss": v}) + "\n" for i, v in enumerate(spiked)))
    process = following(file)
    assert "a spike of" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "converged (fell); loss" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against"], "'--against' requires an argument"),
        (["--fast"], "no such option '--fast'"),
        (["--json=3"], "'--json' does not take a value"),
        (["b"], "unexpected extra argument (b). Usage: stabrun judge [OPTIONS] PATH"),
        (["--follow", "--against", "b"], "--follow cannot be combined with --against"),
        (["--tolerance", "0.1"], "--tolerance 0.1: --against OTHER is missing"),
        (["--against", "b", "--tolerance", "-1"], "--tolerance -1: must be a finite number of at least zero"),
        (["--against", "b", "--tolerance", "nan"], "--tolerance nan: must be a finite number of at least zero"),
        (["--against", "b", "--tolerance", "inf"], "--tolerance inf: must be a finite number of at least zero"),
        (["--against", "b", "--tolerance", "much"], "'much' is not a valid float"),
    ],
)
def test_mistakes_in_judge(capsys, words, said):
    assert said in refused(capsys, "a", *words)
