"""`train.recovery`: outliers that are left out, and runs that go back to an earlier state."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import RICH, a_trainer, events, metrics, run, tiny

from stabrun.record.run_dir import RunDir
from stabrun.training.outliers import LEAST, WINDOW, Outliers, highest_loss
from stabrun.training.rewinds import Levels, Rewinds, points, target
from stabrun.training.run import train
from stabrun.training.trainer import Trainer

SKIP = ("train.recovery=skip", "train.steps=60")
REWIND = ("train.recovery=rewind", "train.recovery_every=10", "train.steps=60")


@pytest.fixture
def poison(monkeypatch):
    """Replaces the losses, and with them the gradients, of batches: {index of the batch: factor}."""
    own, bad = Trainer.scaled, {}

    def step(self, step, before=Trainer.step):
        self.index = step + self.rewinds.batches
        return before(self, step)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "scaled", lambda self, loss: own(self, loss * bad.get(self.index, 1.0)))
    return bad


def rows(directory):
    return list(RunDir(directory).rows())


def weights(trainer):
    return [p.detach().clone() for p in trainer.parameters]


def test_the_highest_loss_is_the_formula_written_out():
    values = np.random.default_rng(0).normal(3.0, 0.1, 100)
    median = np.median(values[:99])
    limit = median + 6.0 * 1.4826 * np.median(np.abs(values[:99] - median))
    padded = torch.cat([torch.tensor(values[:99]), torch.full((29,), torch.nan)])
    assert float(highest_loss(padded, 6.0)) == pytest.approx(limit, rel=1e-12)


def test_one_nan_and_one_huge_loss_do_not_change_what_is_an_outlier():
    outliers = Outliers(tiny(*SKIP).train, torch.device("cpu"))
    norm = torch.tensor(1.0)
    losses = np.random.default_rng(1).normal(3.0, 0.1, 60).astype(np.float32)
    for place, loss in enumerate(losses):
        if place in (40, 45):
            bad = torch.tensor(math.nan if place == 40 else 1e30)
            assert outliers.judge(bad, norm) == 1
        assert outliers.judge(torch.tensor(loss), norm) == 0
    assert outliers.judge(torch.tensor(4.0), norm) == 1
    assert outliers.judge(torch.tensor(3.0), torch.tensor(9.9)) == 0
    assert outliers.judge(torch.tensor(3.0), torch.tensor(10.1)) == 1


def test_a_level_that_has_changed_for_good_is_followed():
    outliers = Outliers(tiny(*SKIP, "train.recovery_limit=3").train, torch.device("cpu"))
    norm = torch.tensor(1.0)
    for _ in range(LEAST):
        outliers.judge(torch.tensor(2.0), norm)
    found = [float(outliers.judge(torch.tensor(5.0), norm)) for _ in range(WINDOW)]
    assert found == [1, 1, 1] + [0] * (WINDOW - 3)


@pytest.mark.parametrize("recovery", ["skip", "rewind"])
def test_a_healthy_run_is_the_same_with_recovery(tmp_path, whole, recovery):
    own = "recovery/skipped", "recovery/rewinds"
    summary = train(tiny(*RICH, f"train.recovery={recovery}", f"run_dir={tmp_path / 'run'}"))
    kept = [{key: value for key, value in row.items() if key not in own} for row in rows(tmp_path / "run")]
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    assert kept == rows(tmp_path)
    assert (summary["outliers_skipped"], summary["rewinds"]) == ((0, None) if recovery == "skip" else (None, 0))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_skipped_step_changes_no_weight_and_no_moment(precision):
    """By hand: the state before, and one step on a loss that is not finite."""
    trainer = a_trainer(tiny(*SKIP, f"train.precision={precision}"))
    for step in range(3):
        trainer.step(step).read()
    before, moments = weights(trainer), [dict(trainer.optimizer.state[p]) for p in trainer.parameters]
    moments = [{name: value.clone() for name, value in parts.items()} for parts in moments]
    trainer.outliers.judge = lambda loss, norm: torch.ones(())
    row = trainer.step(3).read()
    assert row["recovery/skipped"] == 1
    assert all(map(torch.equal, before, weights(trainer)))
    for parameter, parts in zip(trainer.parameters, moments, strict=True):
        assert all(torch.equal(trainer.optimizer.state[parameter][name], value) for name, value in parts.items())
    if precision == "fp16":
        assert row["scale/skipped"] == 0  # the loss scale has nothing to do with it


def test_skip_passes_a_batch_that_is_not_finite(tmp_path, poison):
    poison[40] = math.nan
    assert train(tiny(*SKIP[1:], f"run_dir={tmp_path / 'without'}"))["verdict"] == "diverged"
    summary = train(tiny(*SKIP, f"run_dir={tmp_path / 'with'}"))
    assert (summary["verdict"], summary["outliers_skipped"], summary["steps"]) == ("converged", 1, 60)
    assert [row["step"] for row in rows(tmp_path / "with") if row["recovery/skipped"]] == [40]
    assert [event["step"] for event in events(tmp_path / "with", "skipped")] == [40]


def test_skip_passes_a_gradient_that_is_too_large(tmp_path, poison):
    poison[40] = 100.0
    train(tiny(*SKIP, f"run_dir={tmp_path / 'run'}"))
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if row["recovery/skipped"]] == [40]
    norms = [row["grad/norm"] for row in found[:40]]
    assert found[40]["grad/norm"] > 10 * np.median(norms) > max(norms)


def test_a_run_whose_loss_stays_not_finite_ends(tmp_path, poison):
    poison.update(dict.fromkeys(range(40, 60), math.nan))
    summary = train(tiny(*SKIP, "train.recovery_limit=3", f"run_dir={tmp_path / 'run'}"))
    assert (summary["verdict"], summary["reason"]) == ("diverged", "nonfinite_grad")
    assert (summary["first_bad_step"], summary["outliers_skipped"], summary["steps"]) == (43, 3, 44)


def test_points_depend_on_the_result_only():
    config = tiny(*REWIND)
    assert points(config, [0, 7, 10, 15, 20, 30, 40]) == [40, 30, 20]
    assert points(tiny(), [0, 10]) == []
    assert target([40, 30, 20], 31) == 30
    assert target([40, 30, 20], 29) == 30
    assert target([40, 30, 20], 12) == 20
    assert target([40, 30, 20], None) == 20


def test_a_single_high_loss_is_no_spike_and_a_level_is():
    levels = Levels(6.0)
    losses = np.random.default_rng(2).normal(3.0, 0.1, 80)
    losses[50], losses[70:] = 30.0, 5.0
    found = []
    for loss in losses:
        levels.add({"train/loss": float(loss)})
        found.append(levels.spike)
    assert found.index(True) == 72  # the third of five: their median


def test_rewind_passes_over_a_stretch_that_is_not_finite(tmp_path, poison):
    poison.update(dict.fromkeys((33, 38), math.nan))
    summary = train(tiny(*REWIND, f"run_dir={tmp_path / 'run'}"))
    assert (summary["verdict"], summary["rewinds"], summary["steps"]) == ("converged", 2, 60)
    told = [(event["number"], event["step"], event["to"]) for event in events(tmp_path / "run", "rewind")]
    # Batch 33 is that of step 33; from 30 on the batches begin at 34, so that batch 38 is that of step 34.
    assert told == [(1, 33, 30), (2, 34, 30)]
    assert RunDir(tmp_path / "run").rewinds() == [30, 30]
    first, second = (
        [json.loads(line) for line in (tmp_path / "run" / f"rewound_{number}.jsonl").read_text().splitlines()]
        for number in (1, 2)
    )
    assert [row["step"] for row in first] == [30, 31, 32, 33]
    assert [row["step"] for row in second] == [30, 31, 32, 33, 34]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(60))


def test_after_a_rewind_the_run_is_that_on_the_other_batches(tmp_path, poison, monkeypatch):
    """Independently: an undisturbed run to the state, then a trainer that is given the later batches by hand."""
    poison[33] = math.nan
    train(tiny(*REWIND, f"run_dir={tmp_path / 'run'}"))
    del poison[33]
    by_hand = a_trainer(tiny(*REWIND))
    for step in range(30):
        by_hand.step(step).read()
    by_hand.rewinds = Rewinds(1, 4)
    assert [by_hand.step(step).read()["train/loss"] for step in range(30, 60)] == [
        row["train/loss"] for row in rows(tmp_path / "run")[30:]
    ]


def test_each_rewind_passes_over_twice_as_many_batches():
    once = Rewinds().back(30, 34)
    assert (once, once.back(30, 34), once.back(30, 34).back(20, 25)) == (Rewinds(1, 4), Rewinds(2, 12), Rewinds(3, 32))


def test_the_rate_is_lowered_at_each_rewind(tmp_path, poison):
    poison.update(dict.fromkeys((33, 38), math.nan))
    config = tiny(*REWIND, "train.recovery_lr=0.5", "schedule=constant", f"run_dir={tmp_path / 'run'}")
    train(config)
    rates = [row["train/lr"] for row in rows(tmp_path / "run")]
    assert rates[29:31] == [config.optim.lr, config.optim.lr / 4]


def test_rewinds_are_limited(tmp_path, poison):
    poison.update(dict.fromkeys(range(33, 200), math.nan))
    summary = train(tiny(*REWIND, "train.recovery_limit=2", f"run_dir={tmp_path / 'run'}"))
    assert (summary["verdict"], summary["rewinds"], summary["status"]) == ("diverged", 2, "stopped")


def test_a_run_goes_back_to_its_start(tmp_path, poison):
    poison[4] = math.nan
    summary = train(tiny(*REWIND, f"run_dir={tmp_path / 'run'}"))
    assert (summary["verdict"], summary["rewinds"]) == ("converged", 1)
    assert [event["to"] for event in events(tmp_path / "run", "rewind")] == [0]


@pytest.mark.parametrize("place", ["keep_rewound", "rewind", "cut", "event"])
def test_killed_while_it_goes_back_and_resumed(tmp_path, poison, monkeypatch, place):
    """The process ends right after a part of a rewind: the result is that of the undisturbed run."""
    from stabrun.record.run_dir import RunWriter
    from stabrun.training import checkpoint

    poison.update(dict.fromkeys((33, 47), math.nan))
    other = ("train.checkpoint_every=7", "train.keep_checkpoints=1")
    train(tiny(*REWIND, f"run_dir={tmp_path / 'whole'}"))

    class Killed(BaseException):
        pass

    owner = checkpoint if place == "rewind" else RunWriter
    own = getattr(owner, place)
    with monkeypatch.context() as patch:

        def deadly(*words, **facts):
            result = own(*words, **facts)
            if events(tmp_path / "run", "rewind") and not (place == "event" and words[1] != "rewind"):
                raise Killed
            return result

        patch.setattr(owner, place, deadly)
        with pytest.raises(Killed):
            train(tiny(*REWIND, *other, f"run_dir={tmp_path / 'run'}"))
    summary = train(tiny(*REWIND, *other, f"run_dir={tmp_path / 'run'}"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert summary["rewinds"] == 2 == len(RunDir(tmp_path / "run").rewinds())
    for number in (1, 2):
        name = f"rewound_{number}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("recovery", [SKIP, REWIND])
@pytest.mark.parametrize("at", [20, 39, 45])
def test_stopped_and_resumed(tmp_path, poison, recovery, at):
    from stabrun.training.stop import Stop

    poison.update({34: math.nan, 43: 1e4})
    train(tiny(*recovery, f"run_dir={tmp_path / 'whole'}"))
    stop = Stop(())
    config = tiny(*recovery, f"run_dir={tmp_path / 'run'}")

    def watch(row):
        stop.asked = stop.asked or row["step"] == at

    assert train(config, watch=watch, stop=stop)["status"] == "interrupted"
    train(config)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "words", [(*SKIP, "train.outlier_grad=1.1"), (*REWIND, "optim.lr=1e-6", "train.outlier_loss=0.01")]
)
def test_two_ranks_decide_as_one(tmp_path, words):
    config = [*words, "schedule=constant", "train.val_every=0"]
    alone = train(tiny(*config, f"run_dir={tmp_path / 'alone'}"))
    together = train(tiny(*config, "train.ranks=2", f"run_dir={tmp_path / 'together'}"))
    assert (alone["outliers_skipped"] or 0) + (alone["rewinds"] or 0) > 0
    for field in ("outliers_skipped", "rewinds", "verdict", "steps"):
        assert alone[field] == together[field]
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "together"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=2e-3)


def test_the_verdict_and_the_curves_say_what_was_needed(tmp_path, poison, capsys):
    from stabrun.report.run_curves import curves_of

    poison[40] = math.nan
    skipped, rewound = tmp_path / "skipped", tmp_path / "rewound"
    train(tiny(*SKIP, f"run_dir={skipped}"))
    train(tiny(*REWIND, f"run_dir={rewound}"))
    assert (curves_of(rows(skipped)).skipped, curves_of(rows(rewound)).rewinds) == ([40], [40])
    capsys.readouterr()
    told = [run(capsys, "judge", directory)[1] for directory in (skipped, rewound)]
    assert told[0].startswith("converged (fell), after 1 outlier was left out; loss ")
    assert told[1].startswith("converged (fell), after 1 rewind; loss ")
