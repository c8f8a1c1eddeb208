"""The results of arXiv 2410.16682 next to those of a study with variants of the same names, and how the two differ."""

import math
from collections.abc import Iterator

from stabrun.model.counts import parameters
from stabrun.record.schema import Interval
from stabrun.report.study_data import StudyData
from stabrun.report.tables import (
    Column,
    Table,
    TableCell,
    decimal,
    fact_cell,
    fact_column,
    interval,
    interval_column,
    lowest_perplexity,
    plain,
    rate,
)
from stabrun.study.cost import tokens_per_run
from stabrun.study.facts import FACTS, GRID_FACTS, lr50_over
from stabrun.study.summary import BASELINE, QK_NORM, counterpart

D_MODEL = 1024
STEPS = 1_500  # about, of the runs that test for divergence
TOKENS = 512 * 4096 * STEPS  # of such a run
# Variant → last stable rate, whether that one is inferred, first diverging rate, perplexity at 3e-4. Sources disagree
# on whether qk_norm_cap diverges at 80e-3.
PAPER: dict[str, tuple[float, bool, float | None, float | None]] = {
    "baseline": (6e-3, False, 8e-3, 11.19),
    "soft_temp": (8e-3, True, 20e-3, None),
    "soft_clip": (8e-3, True, 20e-3, None),
    "sigma_reparam": (20e-3, True, 40e-3, None),
    "layer_scale": (20e-3, True, 40e-3, None),
    "soft_cap": (40e-3, False, 60e-3, 11.24),
    "qk_norm": (40e-3, False, 60e-3, 10.84),
    "qk_fc_norm": (40e-3, True, 60e-3, 10.87),
    "qkv_norm": (60e-3, False, 80e-3, 10.85),
    "qk_norm_cap": (60e-3, False, None, 11.00),
}
OURS = [fact for fact in FACTS if fact.key in ("lr50", "over_qk_norm", "max_stable_lr", "min_diverged_lr")]


def over_qk_norm(variant: str) -> TableCell:
    """The ratio of two edges of the paper: that of the last stable rates, and what both pairs of rates allow.

    An edge is between the last stable and the first diverging rate.
    """
    (last, _, first, _), (qk_last, _, qk_first, _) = PAPER[variant], PAPER[QK_NORM]
    assert qk_first is not None
    if variant == QK_NORM:
        return interval(None)
    ends = last / qk_last, last / qk_first, None if first is None else first / qk_last
    return interval(dict(zip(("median", "low", "high"), ends, strict=True)))


def last_stable(variant: str) -> TableCell:
    """The paper's last stable learning rate, and whether it is inferred."""
    last, inferred, _, _ = PAPER[variant]
    return TableCell(rate(last).text + " (inferred)" * inferred, (last,))


def agreement(variant: str, ours: Interval | None) -> str:
    """How the paper's ratio to qk_norm's edge compares to the interval of that found; empty if either is unknown."""
    paper, low, high = over_qk_norm(variant).values
    if paper is None or ours is None or ours["low"] is None or ours["high"] is None:
        return ""
    if ours["low"] <= paper <= ours["high"]:
        return "paper's ratio in the interval"
    return "ranges overlap" if low <= ours["high"] and ours["low"] <= (high or math.inf) else "apart"


def gain_of(perplexity: float | None) -> float | None:
    """Loss of the baseline minus that of a perplexity, in nats."""
    baseline = PAPER[BASELINE][3]
    return math.log(baseline / perplexity) if baseline and perplexity else None


def paper_comparison(study: StudyData) -> Table | None:
    """None if the study has none of the paper's variants."""
    rows, in_grid = [], any("gain" in summary for summary in study.arm_summaries.values())
    ours = [*OURS, *(fact for fact in GRID_FACTS if fact.key == "gain" and in_grid)]
    plain_arms = [arm for arm in study.arm_summaries if arm in PAPER]  # without further settings
    for arm, summary in study.arm_summaries.items():
        if (variant := arm.split(" ")[0]) in PAPER and (arm in plain_arms or not plain_arms):
            _, _, first, perplexity = PAPER[variant]
            rows.append([
                plain(arm), last_stable(variant), rate(first),
                over_qk_norm(variant), plain(agreement(variant, lr50_over(summary, QK_NORM))),
                decimal(perplexity, 2), decimal(gain_of(perplexity)),
                *(fact_cell(fact, summary) for fact in ours), decimal(lowest_perplexity(study.rows, arm), 2),
            ])  # fmt: skip
    columns = [
        Column("variant", "variant"),
        Column("paper_last_stable", "paper: last stable LR"),
        Column("paper_first_diverging", "paper: first diverging LR"),
        interval_column("paper_over_qk_norm", "paper: edge / qk_norm's"),
        Column("agreement", "agreement of the ratios"),
        Column("paper_perplexity", "paper: perplexity at 3e-4 (± 0.1)"),
        Column("paper_gain", "paper: gain over baseline (nats)"),
        *(fact_column(fact, label="here: ") for fact in ours),
        Column("val_perplexity", "here: lowest validation perplexity"),
    ]
    if not rows:
        return None
    note = (
        "Edge: the ratio of the last stable rates, and in parentheses what the gaps between the paper's rates allow. "
        "Inferred: not stated in the paper. Sources disagree whether qk_norm_cap diverges at 8e-2. "
        f"The experiments differ: {'; '.join(differences(study, [row[0].text for row in rows]))}."
    )
    return Table("paper", "Compared to arXiv 2410.16682", columns, rows, note)


def differences(study: StudyData, arms: list[str]) -> Iterator[str]:
    """How the experiments differ; `arms` are those compared."""
    arm = arms[0]
    config = study.plan.arms.get(counterpart(arm, BASELINE), study.plan.arms[arm])
    size = parameters(config.model, config.data.seq_len)["total"]
    yield f"830M parameters in the paper, {size:,} here"
    yield f"{TOKENS // STEPS:,} tokens per step, {config.train.batch_size * config.data.seq_len:,} here"
    yield f"about {STEPS:,} steps to test for divergence, {config.train.steps:,} here"
    yield f"{TOKENS:,} tokens in them, {tokens_per_run(config):,} here"
    yield "a subset of an unnamed text of 1T tokens with a vocabulary of about 256,000, " + (
        f"{config.data.path or config.data.name} with {config.model.vocab_size:,} here"
    )
    yield f"a cosine schedule, {config.schedule.kind} here"
    runs = sum(row["arm"] in arms for row in study.rows)
    yield f"one run at each learning rate, judged by eye; here {runs} in all, judged by a rule"
    yield "perplexities after 0.2T tokens at 3e-4, of the best stable run here"
