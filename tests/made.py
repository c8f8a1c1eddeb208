"""Studies with made-up records, as `stabrun sweep` would have left them, with known numbers."""

import csv
import json
import math
from dataclasses import asdict

import yaml
from helpers import TINY
from studies import asked, write_results

from stabrun.record.jsonl import dumps
from stabrun.verdict.judge import Judge
from stabrun.verdict.rule import STRICTNESS

SITES = "qkv", "proj", "fc1", "fc2"
EVERY = "norm/out", "norm/in", "norm/weight", "norm/grad"
SLOW = "norm/in_grad", "norm/update", "norm/adam_m", "norm/adam_v", "adam/surprise"
EDGES = {"baseline": 0.05, "qk_norm": 0.3}
CHARTS = {  # of a report on such a study
    "lr50", "loss_by_lr", "divergence_map", "clipped_share", "lead_times", "training_curves", "norms_out", "norms_in",
    "norms_weight", "norms_grad", "gradient_by_depth", "adam", "attention", "update", "input_gradient", "block_output",
    "parameters",
}  # fmt: skip


def a_study(
    directory, *words, variants=("baseline", "qk_norm"), lrs=(1e-2, 1e-1, 1.0), seeds=2, steps=120, skip=0, edges=EDGES
):
    """A grid study whose runs above an arm's edge diverge; the last `skip` cells are not finished."""
    grid = f"study.variants=[{','.join(variants)}]", f"study.lrs=[{','.join(map(str, lrs))}]", f"study.seeds={seeds}"
    plan = asked(*TINY, f"train.steps={steps}", *grid, *words)
    for folder in ("runs", "ledger"):
        (directory / folder).mkdir(parents=True)
    plan.save(directory)
    cells = list(plan.cells.values())
    for cell in cells[: len(cells) - skip]:
        edge = edges.get(cell.arm.split(" ")[0], 0.3)
        a_run(directory / "runs" / cell.id, plan.config(cell), cell, cell.lr > edge)
    write_results(plan, directory)
    return plan


def a_run(folder, config, cell, lost):
    """A finished run directory: its rows, and the verdict that they get."""
    folder.mkdir()
    judge, layers, steps = Judge.of(config), config.model.n_layer, config.train.steps
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(steps):
            row = a_row(step, steps, layers, cell, lost)
            judge.add(row)
            file.write(dumps(row) + "\n")
    verdict = asdict(judge.conclude())
    facts = {"run_id": cell.id, "variant": config.variant, "lr": cell.lr, "seed": cell.seed, "status": "complete"}
    val = None if lost else verdict["final_loss"] + 0.05
    ends = {"val_loss": val, "val_perplexity": val and math.exp(val), "clipped_share": 0.25 if lost else 0.05}
    ends |= {"skipped_steps": None, "steps": steps, "tokens": steps * 64, "seconds": 1.5, "tokens_per_second": 43.0}
    (folder / "summary.json").write_text(dumps({**facts, **verdict, **ends}))
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (folder / "environment.json").write_text(json.dumps({"stabrun": "0.1.0", "packages": {"torch": "2.13.0"}}))
    event = [{"event": "start", "time": 1.0, "step": 0}, {"event": "start", "time": 2.0, "step": steps // 2}]
    event += [{"event": "complete", "time": 3.0, "step": steps}]
    (folder / "events.jsonl").write_text("".join(dumps(line) + "\n" for line in event))


def a_row(step, steps, layers, cell, lost):
    """A row whose loss falls and, if the run is lost, rises again with its norms."""
    done = step / steps
    wave = 0.02 * math.sin(12.9898 * step + 7.3 * cell.seed + cell.lr)
    loss = 6 * math.exp(-4 * done) + 1.5 + wave - 0.1 * (cell.arm != "baseline") + 0.3 * abs(math.log10(cell.lr / 0.03))
    rise = max(0.0, done - 0.4) if lost else 0.0
    row = {"step": step, "tokens": 64 * (step + 1), "train/lr": cell.lr, "train/loss": loss + 6 * rise}
    row |= {"grad/norm": 1 + 5 * rise + wave, "grad/clipped": float(lost)}
    grown = math.exp(4 * rise) * (1 + 0.1 * wave)
    for name in EVERY:
        row |= {
            f"{name}/{site}": [grown * (k + 1.0) * (layer + 1) for layer in range(layers)]
            for k, site in enumerate(SITES)
        }
    row |= {"grad/norm_by_layer": [grown / (layer + 1) for layer in range(layers)], "residual/norm": [grown] * layers}
    if step % 10 == 0:
        for name in SLOW:
            row |= {f"{name}/{site}": [1e-4 * grown * (layer + 1)] * layers for layer, site in enumerate(SITES)}
        row |= {"attn/max_logit": [3 * grown] * layers, "attn/entropy": [2.5 / grown] * layers}
    return row


RATES = (1e-2, 1e-1, 1.0)


def summaries(directory, arms=("baseline", "qk_norm"), seeds=2, missing=(), rates=RATES):
    """`results.csv` and `study.json` of a study with all of its runs but the `missing` ones: (arm, rate, seed)."""
    words = f"study.variants=[{','.join(arms)}]", f"study.lrs=[{','.join(map(str, rates))}]", f"study.seeds={seeds}"
    plan = asked(*TINY, *words)
    for cell in plan.cells.values():
        if (cell.arm, cell.lr, cell.seed) in missing:
            continue
        lost = cell.lr == 1.0 and cell.arm == "baseline"
        better = 0.1 * (cell.arm == "qk_norm")
        final = "nan" if lost else 2.0 + cell.lr + 0.01 * cell.seed - better
        facts = {
            "run_id": cell.id, "variant": cell.arm, "lr": cell.lr, "seed": cell.seed, "status": "complete",
            "verdict": "diverged" if lost else "converged", "final_loss": final, "init_loss": 6.0, "reason": "",
            "by_strictness": dict.fromkeys(STRICTNESS, "diverged" if lost else "converged") | strictly(cell),
            "first_bad_step": None, "spikes": {"count": 1, "list": []}, "tokens": 100,
        }  # fmt: skip
        (directory / "runs" / cell.id).mkdir(parents=True)
        (directory / "runs" / cell.id / "summary.json").write_text(json.dumps(facts))
    write_results(plan, directory)
    with open(directory / "results.csv", newline="") as file:
        return list(csv.DictReader(file)), json.loads((directory / "study.json").read_text())


def strictly(cell):
    """The strict rule calls one more run diverged."""
    return {"strict": "diverged"} if (cell.arm, cell.lr) == ("baseline", 0.1) else {}
