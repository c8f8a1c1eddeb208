"""The rows of a run as curves of bounded length."""

from stabrun.report.run_curves import MAX_LAYER_POINTS, MAX_POINTS, curves_of


def test_curves_are_bounded_and_keep_their_ends_and_extremes():
    rows = [
        {"step": step, "train/loss": 1.0 + (step == 1234) * 50, "norm/out/qkv": [step, 2.0]} for step in range(5001)
    ]
    curves = curves_of(rows)
    assert len(curves.loss) <= MAX_POINTS + 2
    assert (1234, 51.0) in curves.loss
    series = curves.series["norm/out/qkv"]
    assert MAX_LAYER_POINTS / 2 <= len(series.steps) <= MAX_LAYER_POINTS + 1
    assert (series.steps[0], series.steps[-1]) == (0, 5000)
    assert series.layers[0] == [float(step) for step in series.steps]


def test_every_number_of_the_table_of_metrics_is_a_curve():
    curves = curves_of([{"step": 0, "tokens": 4, "train/loss": 2.0, "train/lr": 0.1, "scale/skipped": 0, "mine": 1}])
    assert set(curves.series) == {"train/lr", "scale/skipped"}
