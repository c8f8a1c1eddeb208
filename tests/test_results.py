"""`results.csv` and `study.json` from made-up summaries, read back by the standard library."""

import csv
import json

import pytest
from conftest import TINY

from stabrun.config import conf_dir
from stabrun.study.plan import planned
from stabrun.study.results import COLUMNS, write

RATES = (1e-2, 1e-1, 1.0)


def a_study(directory, arms=("baseline", "qk_norm"), seeds=2, missing=()):
    """A plan, and the summaries of all of its runs but the `missing` ones: (arm, rate, seed)."""
    words = f"study.variants=[{','.join(arms)}]", f"study.lrs=[{','.join(map(str, RATES))}]", f"study.seeds={seeds}"
    plan, _, _ = planned(conf_dir(), [*TINY, *words])
    for cell in plan.cells.values():
        if (cell.arm, cell.lr, cell.seed) in missing:
            continue
        lost = cell.lr == 1.0 and cell.arm == "baseline"
        better = 0.1 * (cell.arm == "qk_norm")
        final = "nan" if lost else 2.0 + cell.lr + 0.01 * cell.seed - better
        facts = {
            "run_id": cell.id, "variant": cell.arm, "lr": cell.lr, "seed": cell.seed, "status": "complete",
            "verdict": "diverged" if lost else "converged", "final_loss": final, "init_loss": 6.0,
            "first_bad_step": None, "spikes": {"count": 1},
        }  # fmt: skip
        (directory / "runs" / cell.id).mkdir(parents=True)
        (directory / "runs" / cell.id / "summary.json").write_text(json.dumps(facts))
    write(plan, directory)
    with open(directory / "results.csv", newline="") as file:
        return list(csv.DictReader(file)), json.loads((directory / "study.json").read_text())


def test_a_row_a_run(tmp_path):
    rows, _ = a_study(tmp_path)
    assert [(row["arm"], float(row["lr"]), int(row["seed"])) for row in rows] == [
        (arm, rate, seed) for arm in ("baseline", "qk_norm") for rate in RATES for seed in (0, 1)
    ]
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["first_bad_step"] == ""
    assert rows[4]["final_loss"] == "nan"


def test_numbers_by_arm(tmp_path):
    _, told = a_study(tmp_path)
    baseline, normed = told["baseline"], told["qk_norm"]
    assert baseline["runs"][2] == {"lr": 1.0, "runs": 2, "diverged": 2}
    assert (baseline["max_stable_lr"], baseline["min_diverged_lr"]) == (0.1, 1.0)
    assert (normed["max_stable_lr"], normed["min_diverged_lr"]) == (1.0, None)
    assert normed["gain"]["value"] == pytest.approx(0.1)
    assert baseline["best_lr"] == 1e-2
    # Means over seeds of min(loss, 6): 2.015, 2.105 and 6, above the lowest by 0, 0.09 and 3.985.
    assert baseline["lr_sensitivity"]["value"] == pytest.approx((0.09 + 3.985) / 3)
    assert baseline["lr_sensitivity"]["low"] <= baseline["lr_sensitivity"]["value"]


def test_a_study_that_is_not_whole_has_no_sensitivity_yet(tmp_path):
    rows, told = a_study(tmp_path, missing={("qk_norm", 1.0, 1)})
    assert len(rows) == 11
    assert "lr_sensitivity" not in told["qk_norm"]
    assert told["qk_norm"]["runs"][2]["runs"] == 1
    assert told["baseline"]["lr_sensitivity"]["value"] > 0


def test_one_seed_and_nothing_finished(tmp_path):
    _, told = a_study(tmp_path / "one", seeds=1)
    assert told["baseline"]["lr_sensitivity"]["low"] is None
    places = {(arm, rate, 0) for arm in ("baseline", "qk_norm") for rate in RATES}
    (tmp_path / "none" / "runs").mkdir(parents=True)
    rows, told = a_study(tmp_path / "none", seeds=1, missing=places)
    assert rows == []
    assert told["baseline"] == {"runs": [], "max_stable_lr": None, "min_diverged_lr": None}
