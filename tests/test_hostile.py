"""Generated configurations and overrides: each trains its steps, or is refused in one sentence with status 2."""

from hostile import all_tried


def test_generated_overrides_train_or_are_refused():
    counts, wrong = all_tried(60)
    assert not wrong
    assert min(counts["trained"], counts["refused"]) > 1, counts
