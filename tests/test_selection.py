"""Which runs are shown in detail."""

from stabrun.record.jsonl import number
from stabrun.report.selection import selected, stable_and_diverged
from stabrun.report.study_data import read


def test_runs_on_both_sides_of_the_edge_are_selected(made_study):
    rows = read(made_study).rows
    picked = [(row["arm"], row["lr"], row["verdict"]) for row in selected(rows)]
    assert ("baseline", 0.1, "diverged") in picked
    assert ("baseline", 0.01, "converged") in picked
    assert ("qk_norm", 1.0, "diverged") in picked
    assert ("qk_norm", 0.1, "converged") in picked
    stable, diverged = stable_and_diverged(rows)
    assert (stable["arm"], stable["lr"], diverged["lr"]) == ("baseline", 0.01, 0.1)
    assert stable_and_diverged([]) == (None, None)
    assert stable_and_diverged([row for row in rows if row["verdict"] == "diverged"])[0] is None
    losses = [number(row["final_loss"]) for row in rows]
    assert min(number(row["final_loss"]) for row in selected(rows)) == min(losses)


def test_a_converged_run_is_compared_although_a_recovered_one_has_a_higher_rate(made_study):
    rows = read(made_study).rows
    recovered = next(row for row in rows if (row["arm"], row["verdict"]) == ("baseline", "converged"))
    rows.append({**recovered, "run_id": "other", "lr": 0.05, "verdict": "recovered"})
    (stable, _), picked = stable_and_diverged(rows), [row["run_id"] for row in selected(rows)]
    assert (stable["verdict"], stable["lr"]) == ("converged", 0.01)
    assert {stable["run_id"], "other"} <= set(picked)
