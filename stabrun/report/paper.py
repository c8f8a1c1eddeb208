"""The figures of arXiv 2410.16682 beside a study that has rows of the same names, and what differs between the two."""

from collections.abc import Iterator

from stabrun.model.describe import parameters
from stabrun.report.source import Source
from stabrun.report.tables import Cell, Column, Table, decimal, lowest_perplexity, plain, rate, rates
from stabrun.study.cost import tokens_per_run
from stabrun.study.summary import counterpart

# Row → last stable rate, whether that one is inferred, first diverging rate, perplexity at 3e-4. Sources disagree
# whether qk_norm_cap diverges at 80e-3.
ROWS: dict[str, tuple[float, bool, float | None, float | None]] = {
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
PARAMETERS, TOKENS_A_STEP, DIVERGENCE_STEPS = "830M", 512 * 4096, "about 1,500"


def beside_paper(source: Source) -> Table | None:
    """None where the study has none of the paper's rows."""
    common = [(arm, told) for arm, told in source.variants.items() if arm.split(" ")[0] in ROWS]
    if not common:
        return None
    rows = []
    for arm, told in common:
        last, inferred, first, perplexity = ROWS[arm.split(" ")[0]]
        seen = rate(last)
        frontier = told["frontier"].get("standard")
        rows.append([
            plain(arm),
            Cell(seen.text + " (inferred)" * inferred, seen.values), rate(first),
            decimal(perplexity, 2),
            rate(told["max_stable_lr"]), rate(told["min_diverged_lr"]), rates(frontier and frontier["lr50"]),
            decimal(lowest_perplexity(source.rows, arm), 2),
        ])  # fmt: skip
    columns = [
        Column("variant", "variant"),
        Column("paper_last_stable", "paper: last stable LR"),
        Column("paper_first_diverging", "paper: first diverging LR"),
        Column("paper_perplexity", "paper: perplexity at 3e-4 (± 0.1)"),
        Column("max_stable_lr", "here: highest stable LR"),
        Column("min_diverged_lr", "here: lowest diverged LR"),
        Column("lr50", "here: lr50", ("", "low", "high")),
        Column("val_perplexity", "here: lowest validation perplexity"),
    ]
    note = "Not to be taken for one another: " + "; ".join(differences(source)) + "."
    return Table("paper", "Beside arXiv 2410.16682", columns, rows, note)


def differences(source: Source) -> Iterator[str]:
    """What is not the same there and here."""
    arm = next(arm for arm in source.arms if arm.split(" ")[0] in ROWS)
    config = source.arms.get(counterpart(arm, "baseline"), source.arms[arm])
    size = parameters(config.model, config.data.seq_len)["total"]
    step = config.train.batch_size * config.data.seq_len
    data = config.data.path or config.data.name
    yield f"the paper has {PARAMETERS} parameters, this study {size:,}"
    yield f"{TOKENS_A_STEP:,} tokens a step, here {step:,}"
    tokens = tokens_per_run(config)
    yield f"{DIVERGENCE_STEPS} steps for divergence, here {config.train.steps:,} ({tokens:,} tokens a run)"
    yield "a subset of an unnamed 1T-token text under a vocabulary of about 256,000, here " + (
        f"{data} under one of {config.model.vocab_size:,}"
    )
    yield f"cosine schedule, here {config.schedule.kind}"
    yield f"one seed judged by eye, here {len({row['seed'] for row in source.rows})} by a written rule"
    yield "its perplexities are of 0.2T tokens at 3e-4, here of the stable run that has the lowest"
