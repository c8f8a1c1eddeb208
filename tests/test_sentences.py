"""The sentences of a report compared to `study.json`, and what is said if runs are missing."""

import json
import shutil

import pytest
from made import a_study

from stabrun.report import sentences
from stabrun.report.selection import stable_and_diverged
from stabrun.report.study_data import read
from stabrun.text import rate_text


def state_of(directory):
    return " ".join(sentences.state(read(directory)))


def test_one_sentence_per_variant(made_study):
    frontier = json.loads((made_study / "study.json").read_text())["variants"]["qk_norm"]["frontier"]["standard"]
    study = read(made_study)
    sentence = dict(sentences.results(study))["qk_norm"]
    median, low, high = (rate_text(frontier["lr50"][end]) for end in ("median", "low", "high"))
    times = [sentences.two_digits(frontier["over"]["baseline"][end]) for end in ("median", "low", "high")]
    assert sentence.startswith(
        f"lr50 = {median} (95 % interval {low} to {high}), {times[0]} times the baseline's ({times[1]} to {times[2]});"
    )
    assert "stable up to 0.1, lowest diverged learning rate 1;" in sentence
    assert list(sentences.state(study)) == []


@pytest.mark.parametrize(
    ("ends", "sentence"),
    [
        ((0.15, 0.1, 0.2), "lr50 = 0.15 (95 % interval 0.1 to 0.2)"),
        ((0.15, None, 0.2), "lr50 = 0.15 (95 % interval below the search range to 0.2)"),
        ((0.15, 0.1, None), "lr50 = 0.15 (95 % interval 0.1 to above the search range)"),
        ((0.15, None, None), "lr50 = 0.15 (95 % interval wider than the search range)"),
        ((None, 3.0, None), "lr50 > 3"),
        ((None, None, 0.003), "lr50 < 3e-3"),
        ((None, None, None), "lr50 unknown"),
    ],
)
def test_bounds_in_words(ends, sentence):
    assert sentences.lr50_text(dict(zip(("median", "low", "high"), ends, strict=True))) == sentence


@pytest.mark.parametrize(
    ("ends", "sentence"),
    [
        ((9.6, 3.04, 22.4), ", 9.6 times the baseline's (3.0 to 22)"),
        ((9.6, 3.0, None), ", 9.6 times the baseline's (at least 3.0)"),
        ((9.6, None, 22.4), ", 9.6 times the baseline's (at most 22)"),
        ((None, 3.0, None), ", more than 3.0 times the baseline's"),
        ((None, None, None), ""),
    ],
)
def test_ratios_in_words(ends, sentence):
    assert sentences.ratio_text(dict(zip(("median", "low", "high"), ends, strict=True))) == sentence


def test_missing_runs(tmp_path, missing_runs):
    assert "Partial: 0 of 12" in state_of(missing_runs["empty"])
    assert "No run is finished yet" in state_of(missing_runs["empty"])
    assert dict(sentences.results(read(missing_runs["empty"])))["baseline"] == "no finished runs."
    assert "Partial: 1 of 12 planned runs are finished (11 planned)" in state_of(missing_runs["one"])
    assert "One run is finished" in state_of(missing_runs["one"])
    assert "All finished runs diverged" in state_of(missing_runs["lost"])
    assert "One seed: losses have no intervals" in state_of(missing_runs["alone"])
    assert "(one seed: no interval)" in dict(sentences.results(read(missing_runs["alone"])))["qk_norm"]
    plan = a_study(tmp_path / "failed", skip=12)
    for cell in plan.cells:
        for attempt in (1, 2):
            for kind in ("claim", "failed"):
                (tmp_path / "failed" / "ledger" / f"{cell}.{attempt}.{kind}").write_text('{"reason": "boom"}')
    assert "All runs failed" in state_of(tmp_path / "failed")


def test_a_run_that_is_not_over(made_study, tmp_path):
    stable, _ = stable_and_diverged(read(made_study).rows)
    shutil.copytree(made_study / "runs" / stable["run_id"], tmp_path / "run")
    run = read(tmp_path / "run")
    assert list(sentences.state(run)) == []
    assert "converged (fell)" in dict(sentences.results(run))["baseline"]
    (tmp_path / "run" / "summary.json").unlink()
    assert "The run is not finished (120 steps so far)" in state_of(tmp_path / "run")
