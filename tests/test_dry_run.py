"""The output of `stabrun sweep --dry-run`: its table, its total and what the times assume."""

import re

import pytest
from helpers import run
from snapshots import a_plan

from stabrun.config import GPUS, StudyConfig
from stabrun.model.memory import memory
from stabrun.study import cost, dry_run
from stabrun.study.dry_run import COLUMNS, dry_run_lines

H100_BF16, PARAMETERS, CELL_TOKENS = 989.5e12, 830.5e6, 1500 * 512 * 4096


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(dry_run, "matrix_speed", lambda threads: 1e7)


def no_benchmark(threads):
    raise AssertionError("the speed of the CPU is measured")


def table(lines):
    """Rows of the table, by arm: column → text; and the lines after it."""
    head, *rest = lines
    starts = [head.index(name) for name in COLUMNS]
    ends = [*starts[1:], None]
    count = next(index for index, line in enumerate(rest) if line.startswith("total: "))
    rows = [
        {name: line[start:end].strip() for name, start, end in zip(COLUMNS, starts, ends, strict=True)}
        for line in rest[:count]
    ]
    return {row["arm"]: row for row in rows}, rest[count:]


def hours(text):
    return float(text.removesuffix(" h").replace(",", ""))


def test_the_papers_grid_on_a_gpu_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "matrix_speed", no_benchmark)
    words = "+experiment=rybakov2024_divergence", "train.device=cuda", "study.gpu=h100"
    status, out, _ = run(capsys, "sweep", "--dry-run", *words)
    assert status == 0
    rows, (total, assumed, *notes) = table(out.splitlines())
    assert len(rows) == 10
    weights = 24 * 12 * 1024**2 + 256000 * 1024
    cell = CELL_TOKENS * (6 * weights + 12 * 24 * 1024 * 4096) / (0.35 * H100_BF16) / 3600
    for row in rows.values():
        assert float(row["parameters"].removesuffix("M")) * 1e6 == pytest.approx(PARAMETERS, rel=1e-3)
        assert row["cells"] == "6"
        assert row["tokens"] == f"{6 * CELL_TOKENS:,}"
        assert float(row["FLOPs"]) == pytest.approx(6 * cell * 3600 * 0.35 * H100_BF16, rel=5e-3)
        assert row["peak memory"].endswith(" GiB")
        assert hours(row["time per cell"]) == pytest.approx(cell, abs=0.06)
        assert hours(row["total time"]) == pytest.approx(6 * cell, abs=0.06)
    whole = re.fullmatch(r"total: 60 of 60 cells, ([\d,]+) tokens, \S+ FLOPs, ([\d,.]+ h) of GPU time: (.*)", total)
    assert int(whole[1].replace(",", "")) == sum(int(row["tokens"].replace(",", "")) for row in rows.values())
    assert hours(whole[2]) == pytest.approx(sum(hours(row["total time"]) for row in rows.values()), abs=0.6)
    assert whole[3] == f"{round(60 * cell / 24)} days with 1 worker"
    assert assumed == "times assume 0.35 of the peak of h100, 989.5 TFLOP/s in bf16 (study.mfu)"
    large = {arm for arm, row in rows.items() if float(row["peak memory"].split()[0]) > 80}
    told = [note for note in notes if note.startswith("a step of ")]
    assert len(told) == bool(large)
    assert all(arm in told[0] for arm in large)


def lines_of(directory, *words, rows=(), study=None, lrs="study.lrs=[1e-2]"):
    return list(dry_run_lines(a_plan(lrs, *words), list(rows), directory, study or StudyConfig()))


def ended(arm):
    return {"run_id": "a", "arm": arm, "steps": 30, "seconds": 6.0}


def test_more_workers_and_another_utilization(tmp_path):
    """The wall-clock time is divided by the workers, down to that of one cell; the time of the GPUs is not."""
    words = "train.device=cuda", "study.seeds=3", "train.steps=60000000000"
    assumed = StudyConfig(gpu="l4", mfu=0.5)
    rows, (total, note, *_) = table(lines_of(tmp_path, *words, study=assumed))
    cell = hours(rows["baseline"]["time per cell"])
    assert hours(rows["baseline"]["total time"]) == pytest.approx(3 * cell, abs=0.2)
    assert note == "times assume 0.5 of the peak of l4, 30.3 TFLOP/s in fp32 (study.mfu)"
    assert "GPU time" in total
    assert total.endswith(" with 1 worker")
    for workers, share in ((2, 3), (100, 1)):
        assumed.workers = workers
        _, (total, *_) = table(lines_of(tmp_path, *words, study=assumed))
        found = re.search(r" h of GPU time: (\d+) h (?:(\d+) min )?with (\d+) workers, each on its own GPU$", total)
        assert int(found[3]) == workers
        assert int(found[1]) + int(found[2] or 0) / 60 == pytest.approx(share * cell, abs=0.1 * share)


def test_ranks_shorten_a_cell_and_take_as_much_gpu_time(tmp_path):
    words = "train.device=cuda", "study.seeds=3", "train.steps=60000000000"
    assumed = StudyConfig(gpu="l4", workers=2)
    found = {ranks: table(lines_of(tmp_path, *words, f"train.ranks={ranks}", study=assumed)) for ranks in (1, 4)}
    (alone, (total, *_)), (shared, (shorter, *_)) = found[1], found[4]
    for arm, row in alone.items():
        assert hours(shared[arm]["time per cell"]) == pytest.approx(hours(row["time per cell"]) / 4, abs=0.06)
        assert shared[arm]["total time"] == row["total time"]
    gpu_time, wall = (re.search(pattern, total)[1] for pattern in (r"([\d.,]+ h) of GPU time", r": (\d+) h .*workers"))
    assert f"{gpu_time} of GPU time" in shorter
    assert shorter.endswith(" with 2 workers of 4 GPUs")
    assert int(re.search(r"time: (\d+) h", shorter)[1]) == pytest.approx(int(wall) / 4, abs=1)
    measured, _ = table(lines_of(tmp_path, *words[:2], "train.ranks=4", rows=[ended("baseline")], study=assumed))
    assert (measured["baseline"]["time per cell"], measured["baseline"]["total time"]) == ("6 s", "72 s")


def test_a_gpu_without_the_precision(tmp_path):
    words = "train.device=cuda", "train.precision=bf16"
    rows, (total, note, *_) = table(lines_of(tmp_path, *words, study=StudyConfig(gpu="v100")))
    assert note == "times are unknown in bf16: v100 has no units for it"
    assert [row["total time"] for row in rows.values()] == ["?", "?"]
    assert "worker" not in total


def test_times_on_an_unknown_gpu_come_from_finished_runs(tmp_path):
    rows, (total, note, *_) = table(lines_of(tmp_path, "train.device=cuda"))
    assert note.startswith("times are unknown until a run of each arm is finished, or the GPU is named: set study.gpu")
    assert note.endswith(", ".join(GPUS))
    assert [row["total time"] for row in rows.values()] == ["?", "?"]
    assert "worker" not in total
    rows, (total, note, *_) = table(lines_of(tmp_path, "train.device=cuda", rows=[ended("qk_norm")]))
    assert [row["time per cell"] for row in rows.values()] == ["?", "6 s"]
    assert "worker" not in total
    both = [ended("qk_norm"), ended("baseline")]
    _, (total, note, *_) = table(lines_of(tmp_path, "train.device=cuda", "study.seeds=2", rows=both))
    assert total.endswith(", 24 s of GPU time: 24 s with 1 worker")
    assert note == "learning rates: 1e-2"


def test_a_measured_time_replaces_an_assumed_one(tmp_path):
    lines = lines_of(tmp_path, "train.device=cuda", rows=[ended("qk_norm")], study=StudyConfig(gpu="h100"))
    rows, (_, assumed, measured, *_) = table(lines)
    assert rows["qk_norm"]["time per cell"] == "6 s"
    assert rows["baseline"]["time per cell"] not in ("6 s", "?")
    assert assumed.startswith("times assume")
    assert measured == "times of arms with a finished run are measured"


def test_on_a_cpu_times_are_lower_bounds(tmp_path):
    study = StudyConfig(workers=2)
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=2")
    seconds = cost.flops_per_run(plan.arms["baseline"]) / 1e7
    rows, (total, note, *_) = table(lines_of(tmp_path, "study.seeds=2", study=study))
    assert rows["baseline"]["time per cell"] == f"≥ {seconds:.0f} s"
    assert total.endswith(f", at least {2 * seconds:.0f} s with 2 workers")
    assert note.startswith("times are lower bounds, at 0.01 GFLOP/s per worker")
    rows, (total, *_) = table(
        lines_of(tmp_path, "study.seeds=1", study=study, rows=[ended("qk_norm"), ended("baseline")])
    )
    assert rows["qk_norm"]["total time"] == "6 s"
    assert total.endswith(", 6 s with 2 workers")


def test_a_search_is_told_as_a_limit(tmp_path):
    words = "study.strategy=frontier", "study.lr_range=[1e-2,1]", "study.max_runs=5"
    rows, (total, *notes) = table(lines_of(tmp_path, *words, lrs="study.lrs=[]"))
    assert rows["baseline"]["cells"] == "up to 5"
    assert total.startswith("total: up to 10 cells, 19,200 tokens")
    assert not any(note.startswith("learning rates") for note in notes)


@pytest.mark.parametrize(
    ("micro", "length", "remedy"),
    [
        (4, 500000, "train.micro_batch_size=2 fits"),
        (4, 1500000, "train.micro_batch_size=1 train.recompute=blocks fits"),
        (1, 8000000, "use a smaller model"),
    ],
)
def test_a_step_that_does_not_fit_is_told_with_what_to_change(tmp_path, micro, length, remedy):
    words = "train.device=cuda", f"train.micro_batch_size={micro}", f"data.seq_len={length}", "model.d_model=64"
    plan = a_plan("study.lrs=[1e-2]", *words)
    assert memory(plan.arms["baseline"])["peak_bytes"] > 16 * 2**30
    lines = lines_of(tmp_path, *words, study=StudyConfig(gpu="t4"))
    assert f"a step of each arm needs more than the 14.4 GiB that are usable of t4; {remedy}" in lines
    fits = lines_of(tmp_path, "train.device=cuda", study=StudyConfig(gpu="t4"))
    assert not any(line.startswith("a step of") for line in fits)


def test_learning_rates_are_told_by_arm_where_they_differ(tmp_path):
    plan = a_plan("study.lrs=[1e-2,1e-1]", "study.seeds=1")
    cell = next(cell for cell in plan.cells.values() if (cell.arm, cell.lr) == ("qk_norm", 0.1))
    lines = list(dry_run_lines(plan, [ended("qk_norm") | {"run_id": cell.id}], tmp_path, StudyConfig()))
    assert "learning rates of baseline: 1e-2, 0.1" in lines
    assert "learning rates of qk_norm: 1e-2" in lines
