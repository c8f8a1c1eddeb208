"""Several ranks on gloo: the same run as one, whatever starts them, however many resume it, and whichever one dies."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clusters import pids
from helpers import TINY, stabrun, tiny
from rank_targets import endless, exchanged, failing
from studies import (
    ENDLESS,
    a_plan,
    ended,
    recorded,
    running,
    sweeping,
    swept,
    wait_for,
    work_until_the_stop_file,
)

from stabrun.composition import SHIPPED
from stabrun.config import UserError, check
from stabrun.data.shards import prepare
from stabrun.model.memory import memory
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir
from stabrun.study.launch import worker_pool
from stabrun.study.ledger import Ledger
from stabrun.study.pool import LocalPool, groups
from stabrun.study.worker import train_cell, work
from stabrun.training.launcher import launch
from stabrun.training.place import Place
from stabrun.training.precision import pick_device
from stabrun.training.ranks import Ranks, buckets
from stabrun.training.run import refuse_different_data, train
from stabrun.training.stop import Stop
from stabrun.training.trainer import Trainer

FP64 = Path(__file__).parent / "rank_script.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
RICH = (  # accumulation, clipping and z-loss; fewer sequences to validate than ranks
    "train.val_sequences=3",
    "train.batch_size=8",
    "train.micro_batch_size=1",
    "optim.clip=0.5",
    "optim.z_loss=1e-3",
    "observe.slow_every=3",
    "train.val_every=5",
    "+variant=qk_norm",
)


def python(*words, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def metrics(directory):
    return list(RunDir(directory).rows())


def flat(rows):
    """Each number of rows in order, as `(step, key, place)` → value."""
    return {
        (row["step"], key, place): value
        for row in rows
        for key, values in row.items()
        for place, value in enumerate(values if isinstance(values, list) else [values])
    }


def assert_same(rows, others, within):
    """The rows have the same keys, and each number differs by less than `within`, relative to the number."""
    one, other = flat(rows), flat(others)
    assert one.keys() == other.keys()
    far = {where: (a, other[where]) for where, a in one.items() if abs(a - other[where]) > within * max(abs(a), 1e-3)}
    assert not far, dict(list(far.items())[:5])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The rows of a run of 12 steps by one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    train(tiny(*RICH, "train.steps=12", f"run_dir={directory}"))
    return metrics(directory)


def test_two_ranks_from_one_command_and_by_torchrun(tmp_path, alone):
    """Both are the run of one process up to rounding, and equal each other to the bit."""
    words = ("train", *TINY, *RICH, "train.steps=12")
    done = stabrun(*words, "train.ranks=2", "run_dir=ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") <= 1, "a run so short is reported as such, and nothing else"
    assert done.stdout.count("step 12/12") == done.stdout.count("record: ours") == 1, "one rank prints"
    python(*TORCHRUN, "--nproc-per-node=2", "-m", "stabrun", *words, "run_dir=theirs", cwd=tmp_path)
    ours, theirs = RunDir(tmp_path / "ours"), RunDir(tmp_path / "theirs")
    assert_same(metrics(ours.path), alone, within=1e-4)
    assert ours.metrics.read_bytes() == theirs.metrics.read_bytes()
    assert [run.environment()["ranks"] for run in (ours, theirs)] == [2, 2]
    assert [event["event"] for event in ours.events()] == ["start", "checkpoint", "complete"]


@pytest.mark.slow
def test_losses_in_fp64_on_1_2_and_4_ranks(tmp_path):
    """Over 50 steps, by both ways to start ranks. One process in fp64 is what they are compared with."""
    words = (*TINY, *RICH, "train.steps=50")
    python(FP64, *words, "run_dir=one", cwd=tmp_path)
    for count in (2, 4):
        python(FP64, *words, f"train.ranks={count}", f"run_dir=ours{count}", cwd=tmp_path)
        python(*TORCHRUN, f"--nproc-per-node={count}", FP64, *words, f"run_dir=theirs{count}", cwd=tmp_path)
        for run in (f"ours{count}", f"theirs{count}"):
            assert len(metrics(tmp_path / run)) == 50
            assert_same(metrics(tmp_path / run), metrics(tmp_path / "one"), within=1e-10)


def ranks_of(process):
    return pids(process.pid, "spawn_main")


def rank_processes_left(session):
    """The live processes of a session."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if " Z" not in line]


@pytest.mark.slow
def test_two_ranks_resumed_on_four_and_on_one(tmp_path):
    """In fp64, each continuation is the run of one process, and its record says how many ranks it had."""
    words = (FP64, *TINY, "train.steps=200", "train.checkpoint_every=20", "optim.z_loss=1e-3")
    python(*words, "run_dir=one", cwd=tmp_path)
    for count in (4, 1):
        run = RunDir(tmp_path / f"on{count}")
        with running(*words, "train.ranks=2", f"run_dir={run.path}", cwd=tmp_path) as process:
            wait_for(lambda run=run: run.checkpoint_step())
            process.send_signal(signal.SIGINT)
            process.wait()
        stopped = run.checkpoint_step()
        assert stopped < 200
        python(*words, f"train.ranks={count}", f"run_dir={run.path}", cwd=tmp_path)
        assert_same(metrics(run.path), metrics(tmp_path / "one"), within=1e-9)
        starts = [event for event in run.events() if event["event"] == "start"]
        assert [(event["step"], event["environment"]["ranks"]) for event in starts] == [(0, 2), (stopped, count)]


@pytest.mark.slow
def test_a_killed_rank_of_torchrun(tmp_path):
    """The other one ends with a sentence, and the same command resumes to the bytes of an undisturbed run."""
    words = (*TORCHRUN, "--nproc-per-node=2", "-m", "stabrun", "train", *TINY, "train.steps=400")
    words = (*words, "train.checkpoint_every=50")
    python(*words, "run_dir=whole", cwd=tmp_path)
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    with running(*words, "run_dir=run", cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > 100)
        os.kill(pids(process.pid, "stabrun")[1], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert re.search(
            r"^stabrun: rank 0: an exchange with the other ranks failed \(.+\); the same command", err, re.M
        )
    assert run.checkpoint_step() < run.steps_done() < 400
    python(*words, "run_dir=run", cwd=tmp_path)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()


@pytest.mark.slow
def test_ctrl_c_a_killed_rank_and_a_killed_launcher(tmp_path):
    """Each ends the job, and the same command resumes. The record is that of an undisturbed run, to the bit."""
    words = ("-m", "stabrun", "train", *TINY, "train.steps=400", "train.checkpoint_every=50", "train.ranks=2")
    python(*words, "run_dir=whole", cwd=tmp_path)
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    words = (*words, "run_dir=run")

    with running(*words, cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > 10)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err.count("Traceback")) == (130, 0), err
        assert "interrupted after step" in out
    first = run.checkpoint_step()
    assert first == run.steps_done() < 400

    for which in (0, 1):
        with running(*words, cwd=tmp_path) as process:
            wait_for(lambda which=which: run.steps_done() > first + 60 * (which + 1))
            os.kill(ranks_of(process)[which], signal.SIGKILL)
            out, err = process.communicate(timeout=30)
            assert process.returncode == 1
            sentence = r"stabrun: rank [01]: ended \(signal 9\); the same command resumes from the last checkpoint\."
            assert re.fullmatch(sentence, err.splitlines()[-1]), err
            assert "Traceback" not in err
            wait_for(lambda pid=process.pid: not rank_processes_left(pid))

    with running(*words, cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > first + 200)
        process.kill()
        wait_for(lambda: not rank_processes_left(process.pid))
    assert run.checkpoint_step() == run.steps_done(), "orphans save a checkpoint and end"
    python(*words, cwd=tmp_path)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()


def test_exchanges_of_two_ranks(capfd):
    got = launch(2, exchanged, (), Stop(), lambda: None)
    assert got.pop("threads") == 1
    assert capfd.readouterr().out == "rank 1\n"
    assert got == {
        "add": [[[3.0] * 3] * 2, [30.0] * 4, 300.0],
        "gather": [[1.0, -1.0], [2.0, -1.0]],
        "total": pytest.approx(0.3),
        "any": [False, True, True],
        "from_first": {"mine": 1},
        "copy_first": [1.0] * 3,
        "part": [0, 2, 4],
        "parts": [[0, 2, 4], [1, 3, 5]],
        "printed": None,
        "everyone": [None],
    }


@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        ("user", UserError, "data.path=x: no text."),
        pytest.param("disk", OSError, "No space left on device: 'metrics.jsonl'", marks=pytest.mark.slow),
        pytest.param("other", RuntimeError, "LocalError: not to be pickled", marks=pytest.mark.slow),
    ],
)
def test_the_error_of_a_rank_ends_all(kind, expected, text):
    with pytest.raises(expected, match=re.escape(text)) as raised:
        launch(2, failing, (kind,), Stop(), lambda: None)
    assert "in failing" in raised.value.__notes__[0], "its traceback comes with it"
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_script_without_a_guard(tmp_path):
    """Its ranks import it, and must not start others."""
    overrides = [*TINY, "train.ranks=2"]
    (tmp_path / "bare.py").write_text(
        f"import stabrun\nfrom stabrun.composition import compose\nstabrun.train(compose({overrides}))\n"
    )
    done = subprocess.run([sys.executable, "bare.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert 'must call stabrun.train below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ranks_are_stopped_and_ended():
    """By the caller's stop, which they follow, and by an error of what is called meanwhile."""
    stop = Stop()
    stop.asked = True
    assert launch(2, endless, (), stop, lambda: None) == "stopped"

    def lost():
        if len(multiprocessing.active_children()) == 2:
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        launch(2, endless, (), Stop(), lost)
    assert not multiprocessing.active_children()


def test_each_rank_draws_its_own_dropout(monkeypatch):
    config, seeds = tiny("model.dropout=0.1", "train.ranks=2"), list[int]()
    data = prepare(config.data, config.model)
    trainers = [Trainer(config, data, Ranks(Place(number, 4))) for number in range(4)]
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    for trainer in trainers:
        monkeypatch.setattr(trainer, "backward", lambda step: seeds.append(torch.initial_seed()) or 1 / 0)
        for step in (0, 1):
            with pytest.raises(ZeroDivisionError):
                trainer.step(step)
    drawn = [number for number in seeds if number > 1]
    assert len(set(drawn)) == 6, "three other ranks, two steps"
    assert seeds[:4] == [0, 0, 1, 1], "the first rank's are those of a single process"


def test_the_parts_of_a_batch_are_interleaved_and_without_gaps():
    """A copy to a GPU is not waited for only if the tensor is contiguous."""
    batch = torch.arange(24).view(6, 4)
    parts = [Ranks(Place(number, 3)).part(batch) for number in range(3)]
    assert [part[:, 0].tolist() for part in parts] == [[0, 12], [4, 16], [8, 20]]
    assert all(part.is_contiguous() for part in parts)


def test_gradients_are_summed_in_buckets():
    sizes = [3, 4, 20, 1, 9, 2]
    tensors = [torch.zeros(size) for size in sizes]
    assert [[len(t) for t in bucket] for bucket in buckets(tensors, limit=10)] == [[3, 4], [20], [1, 9], [2]]
    assert list(buckets([])) == []


GIVEN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1"}


def test_the_place_that_torchrun_gives():
    place = Place.here(GIVEN | {"MASTER_PORT": "29500"})
    assert place == Place(5, 8, 1, 4, started=True)
    assert Place.here(GIVEN) == Place.here({}) == Place(), "an incomplete one is not torchrun's"
    config = tiny("tracker=wandb", "train.batch_size=8")
    assert place.of_rank(config).train.ranks == 8
    assert place.of_rank(config).tracker.name == "none"
    assert Place().of_rank(config) == config
    with pytest.raises(UserError, match=r"train\.ranks=2: torchrun started 8"):
        place.of_rank(tiny("train.ranks=2"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train.ranks=3"], "train.ranks=3: must divide train.batch_size=4."),
        (["train.ranks=2", "train.micro_batch_size=4"], "train.micro_batch_size=4: must divide .*=4/2=2"),
        (["train.ranks=0"], "train.ranks=0: must be at least 1."),
    ],
)
def test_ranks_that_cannot_share_a_batch(words, text):
    with pytest.raises(UserError, match=text):
        check(tiny(*words))


def test_errors_before_training_start_no_rank(tmp_path, monkeypatch):
    """A run that is finished, or another one in its directory, does not either."""
    monkeypatch.setattr("stabrun.training.run.launch", lambda *args: pytest.fail("ranks were started"))
    directory = tmp_path / "run"
    summary = train(tiny("train.steps=2", f"run_dir={directory}"))
    assert train(tiny("train.steps=2", "train.ranks=2", f"run_dir={directory}")) == summary
    with pytest.raises(UserError, match="contains a run with"):
        train(tiny("train.steps=3", "train.ranks=2", f"run_dir={directory}"))
    config = tiny("train.ranks=2", f"run_dir={tmp_path / 'other'}")
    monkeypatch.setattr("stabrun.training.memory.free_memory", lambda device: int(1.5 * memory(config)["peak_bytes"]))
    with pytest.raises(UserError, match="are free"):
        train(config)
    assert not (tmp_path / "other").exists()


def test_machines_with_different_data_do_not_train_together(monkeypatch):
    config = tiny()
    data, ranks = prepare(config.data, config.model), Ranks(Place(1, 2))
    refuse_different_data(ranks, data)
    monkeypatch.setattr(ranks, "from_first", lambda value: "0123")
    with pytest.raises(UserError, match="rank 1 has other tokens than rank 0"):
        refuse_different_data(ranks, data)


def test_a_study_whose_cells_take_two_ranks(tmp_path):
    words = ("train.batch_size=8", "study.variants=[baseline]", "study.lrs=[1e-2]", "study.seeds=1")
    plan = a_plan(tmp_path, *words, "train.ranks=2")
    work(tmp_path)
    for cell in plan.cells.values():
        run = StudyDir(tmp_path).run(cell.id)
        config = plan.config(cell)
        train(replace(config, train=replace(config.train, ranks=1)), tmp_path / cell.id)
        assert_same(metrics(run.path), metrics(tmp_path / cell.id), within=1e-3)
        assert run.environment()["ranks"] == 2
        assert Ledger(tmp_path).heartbeat(cell.id, 1)["step"] == 30


@pytest.mark.slow
def test_ctrl_c_and_a_killed_worker_in_a_sweep(tmp_path):
    """The ranks of a killed worker end, and its cell is resumed; Ctrl-C gives the cell back with a checkpoint."""
    words = ("study.lrs=[1e-2]", "study.seeds=1", "study.variants=[baseline]", "study.workers=1", "train.ranks=2")
    words = (*words, "train.steps=600", "train.checkpoint_every=50")
    study = tmp_path / "study"
    with sweeping(tmp_path, *words) as process:
        (attempt,) = wait_for(lambda: recorded(study))
        first = RunDir(attempt.parent)
        wait_for(lambda: first.steps_done() > 60)
        (worker,) = pids(process.pid, "stabrun.study.worker")
        os.kill(worker, signal.SIGKILL)
        second = RunDir(study / "attempts" / f"{attempt.parent.name.partition('.')[0]}.0002")
        wait_for(lambda: second.metrics.exists() and len(second.starts()) == 2 and second.steps_done() > 200)
        assert not first.is_locked()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        status, _ = ended(process)
        assert status == 130
    assert not rank_processes_left(process.pid)
    stopped = second.checkpoint_step()
    assert stopped == second.steps_done() < 600
    (reason,) = study.glob("ledger/*.0002.left")
    assert "interrupted" in reason.read_text()
    assert "Traceback" not in (study / "worker.log").read_text()
    swept(tmp_path, *words)
    (run,) = map(RunDir, (study / "runs").iterdir())
    assert run.starts()[2:] == [stopped]
    train(tiny(*words[-2:], "train.ranks=1", f"run_dir={tmp_path / 'alone'}"))
    assert_same(metrics(run.path)[:50], metrics(tmp_path / "alone")[:50], within=1e-3)


@pytest.mark.slow
def test_a_worker_with_ranks_follows_the_stop_file(tmp_path):
    plan = a_plan(tmp_path, "study.variants=[baseline]", "study.lrs=[1e-2]", "study.seeds=1", *ENDLESS, "train.ranks=2")
    (cell,) = plan.cells
    work_until_the_stop_file(tmp_path, "cafe", lambda: Ledger(tmp_path).heartbeat(cell, 1).get("step"))
    assert [path.name.split(".", 1)[1] for path in (tmp_path / "ledger").glob(f"{cell}*.left")] == ["0001.left"]


@pytest.mark.slow
def test_a_worker_with_ranks_that_lost_its_cell_ends_them(tmp_path):
    """Another process claims the cell; the ranks of the worker would otherwise train it beside the new owner."""
    plan = a_plan(tmp_path, "study.variants=[baseline]", "study.lrs=[1e-2]", "study.seeds=1", *ENDLESS, "train.ranks=2")
    ledger = Ledger(tmp_path)
    claim = ledger.claim(*next(iter(ledger.entries(plan.cells).items())))
    ledger.lease = 1.0

    def take_over():
        wait_for(lambda: ledger.heartbeat(claim.cell, 1).get("step"))
        ledger.path(claim.cell, 2, "claim").write_text("{}")

    thread = threading.Thread(target=take_over)
    thread.start()
    train_cell(plan, claim, Stop())
    thread.join()
    assert not multiprocessing.active_children()
    assert not ledger.entries(plan.cells)[claim.cell].left


def test_a_worker_of_two_ranks_has_two_gpus(tmp_path, monkeypatch):
    assert groups(list("abcde"), 2) == ["a,b", "c,d"]
    assert groups(["a"], 2) == ["a"], "the run says that they are too few"
    assert groups([], 2) == []
    assert groups(["a", "b"], 1) == ["a", "b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")
    pool, given = LocalPool(tmp_path, 3, ranks=2), []
    monkeypatch.setattr(pool, "process", lambda module, **env: given.append(env["CUDA_VISIBLE_DEVICES"]))
    pool.start(3)
    assert given == ["3,5", "7,9", "3,5"]


@pytest.mark.parametrize(("count", "local"), [(2, 1), (4, 0)])
def test_a_rank_takes_a_gpu_of_its_own(monkeypatch, count, local):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = tiny("train.batch_size=8", f"train.ranks={count}").train
    if count == 2:
        assert pick_device(config, Place(local, count, local, count, started=True)) == torch.device("cuda", local)
        assert pick_device(tiny("train.ranks=1").train) == torch.device("cuda")
    else:
        with pytest.raises(UserError, match=r"train\.ranks=4: needs 4 GPUs on this machine, which has 2"):
            pick_device(config)
        two_nodes = Place(3, 4, 1, 2, started=True)
        assert pick_device(config, two_nodes) == torch.device("cuda", 1)


def test_a_sweep_is_not_started_by_torchrun(tmp_path, monkeypatch):
    for name, value in (GIVEN | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"study\.workers and train\.ranks"):
        worker_pool([*TINY], SHIPPED, tmp_path, 2)


def test_a_rank_that_sees_its_own_gpu_only_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = tiny("train.batch_size=8", "train.ranks=2").train
    assert pick_device(config, Place(1, 2, 1, 2, started=True)) == torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"train\.ranks=2: needs 2 GPUs on this machine, which has 1"):
        pick_device(config)
