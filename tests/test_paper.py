"""The table that compares a study to the paper."""

from stabrun.report.paper import paper_comparison
from stabrun.report.study_data import read


def test_results_of_the_paper_and_the_differences(made_study):
    table = paper_comparison(read(made_study))
    row = dict(zip((column.key for column in table.columns), table.rows[1], strict=True))
    assert row["paper_last_stable"].values == (0.04,)
    assert row["paper_perplexity"].text == "10.84"
    assert "830M parameters" in table.note
    assert "2,097,152 tokens per step, 64 here" in table.note
