"""A verdict as text."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stabrun.verdict.chart import LEAST_ROWS, LEAST_WINDOW
from stabrun.verdict.judge import CONVERGED, UNDECIDED, Verdict

EXPLAINED = {
    "objective_changed": "the training loss rises while the validation loss falls: the objective may have changed",
    "restarted": "the loss rose when the schedule began again",
    "around_zero": "the loss is 0 or negative where it starts: what was learned since cannot be measured",
    "above_start": "the loss stays above its first value",
}
"""Reasons that need a sentence."""


def verdict_line(facts: Mapping[str, Any]) -> str:
    """`diverged (runaway) at step 83, first in layer_00/qkv; loss init 5.931 → best 2.712 → final 3.020`."""
    text = f"{facts['verdict']} ({facts['reason']})"
    if facts["first_bad_step"] is not None:
        text += f" at step {facts['first_bad_step']}"
    if facts["first_bad_site"]:
        text += f", first in {facts['first_bad_site']}"
    if facts.get("overfit"):
        text += f", overfits from step {facts['overfit']['step']}"
    text += needed(facts)
    losses = [(name, facts[f"{name}_loss"]) for name in ("init", "best", "final")]
    values = [f"{name} {short(float(value))}" for name, value in losses if value is not None]
    return f"{text}; loss {' → '.join(values)}" if values else text


def needed(facts: Mapping[str, Any]) -> str:
    """`, after 2 rewinds`, `, after 1 outlier was left out`; empty if the run needed no recovery."""
    rewinds, outliers = facts.get("rewinds") or 0, facts.get("outliers_skipped") or 0
    text = f", after {rewinds} rewind{'s' * (rewinds > 1)}" if rewinds else ""
    were = "outliers were" if outliers > 1 else "outlier was"
    return text + (f", after {outliers} {were} left out" if outliers else "")


def above_lowest(facts: Mapping[str, Any]) -> str:
    """`, 0.312 above its lowest level`; empty if it is not above, or not a number."""
    best, final = (float(facts[name] if facts[name] is not None else "nan") for name in ("best_loss", "final_loss"))
    return f", {short(final - best)} above its lowest level" if final > best and math.isfinite(final) else ""


def short(loss: float) -> str:
    return f"{loss:.3f}" if loss == 0 or 0.05 <= abs(loss) < 1e5 or not math.isfinite(loss) else f"{loss:.4g}"


def interrupted_line(facts: Mapping[str, Any]) -> str:
    return f"interrupted after step {facts['steps']}; the same command resumes from there."


def too_short(steps: Iterable[int]) -> str | None:
    """A warning before training if runs of these lengths, in steps, will have no verdict; else None."""
    short = ",".join(map(str, sorted({count for count in steps if count < LEAST_ROWS})))
    if not short:
        return None
    needs = f"train.steps={short} is too short for a verdict, which needs at least {LEAST_ROWS} steps"
    return f"warning: {needs}; every run whose loss stays finite will be undecided (too_short)."


def details(facts: dict[str, Any]) -> Iterator[str]:
    """The lines below the verdict: horizon, scar, spikes, signals, comparison with another run, notes."""
    yield f"judged up to step {facts['horizon']} (rule {facts['rule']})"
    if len(set(facts["by_strictness"].values())) > 1:
        yield "by strictness: " + ", ".join(f"{name} {verdict}" for name, verdict in facts["by_strictness"].items())
    if facts["certain_step"] is not None:
        yield f"certain from step {facts['certain_step']}"
    if facts["verdict"] != CONVERGED and facts["direction"] and facts["reason"] != "too_short":
        yield f"at the end, the loss is {facts['direction']}{above_lowest(facts)}"
    if facts["reason"] in EXPLAINED:
        yield EXPLAINED[facts["reason"]]
    if facts["restarts"]:
        plural = "s" * (len(facts["restarts"]) > 1)
        yield f"begins again at step{plural} {', '.join(str(step) for step in facts['restarts'])}"
    if facts["first_bad_step"] is not None and facts["last_healthy_step"] is not None:
        yield healthy_line(facts)
    if facts["lost_steps"]:
        above = f", and the level is {short(facts['scar'])} above the lowest" if facts["scar"] else ""
        yield f"scar: {facts['lost_steps']} steps were lost{above}"
    if over := facts.get("overfit"):
        rise = f"the validation loss is {short(over['rise'])} above its lowest value at step {over['best_step']}"
        yield f"overfitting: {rise}, while the training loss fell; their gap is {short(facts['val_gap'])}"
    yield from spikes_line(facts)
    if facts["first_bad_step"] is not None:
        for name, signal in sorted(facts["signals"].items(), key=lambda item: item[1]["step"]):
            lead = signal["lead"]
            when = f"{lead} steps before" if lead > 0 else f"{-lead} steps after" if lead < 0 else "together with"
            yield f"{alarm(name, signal)} at step {signal['step']}, {when} the loss"
    if comparison := facts.get("against"):
        yield from comparison_lines(comparison)
    yield from facts["notes"]


def spikes_line(facts: Mapping[str, Any]) -> Iterator[str]:
    """`spikes: 3, the highest 0.738 at step 115`; nothing if there are none."""
    if spikes := facts["spikes"] and facts["spikes"]["list"]:
        step, height = max(spikes, key=lambda spike: spike[1])
        yield f"spikes: {facts['spikes']['count']}, the highest {short(height)} at step {step}"


def signal_lines(signals: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The name of each signal that raised an alarm, and `step 104: alarm of output_norm in layer_03/fc2`, by step."""
    for name, signal in sorted(signals.items(), key=lambda item: item[1]["step"]):
        yield name, f"step {signal['step']}: {alarm(name, signal)}"


def healthy_line(facts: Mapping[str, Any]) -> str:
    """`last healthy step: 71; newest checkpoint before it: runs/mine/checkpoints/step_00000050 (step 50)`."""
    line = f"last healthy step: {facts['last_healthy_step']}"
    saved = facts.get("last_healthy_checkpoint")
    return f"{line}; newest checkpoint before it: {saved['path']} (step {saved['step']})" if saved else line


def alarm(name: str, signal: dict[str, Any]) -> str:
    """`alarm of output_norm in layer_03/fc2`."""
    return f"alarm of {name}" + (f" in {signal['site']}" if signal["site"] else "")


def comparison_lines(other: dict[str, Any]) -> Iterator[str]:
    yield f"other run: {other['verdict']}; {other['steps']} common step{'s' * (other['steps'] != 1)}"
    if "tolerance" in other:
        yield sameness_line(other)
    elif other["loss_step"] is None:
        few = other["steps"] < LEAST_WINDOW
        yield "too few common steps to compare the losses" if few else "the losses do not differ"
    if other["loss_step"] is not None and other["difference"] is None:
        yield f"the losses differ from step {other['loss_step']} on; one of them is not finite at the end"
    elif other["loss_step"] is not None:
        end = f"{short(abs(other['difference']))} {'above' if other['difference'] > 0 else 'below'} the other"
        yield f"the losses differ from step {other['loss_step']} on; at the end, this run is {end}"
    if other["site"]:
        start, factor = f"step {other['site_step']}", f"{other['site_factor']:.2f}"
        yield f"the output norm of {other['site']} is the first to differ, from {start} on; at the end by ×{factor}"


def sameness_line(other: Mapping[str, Any]) -> str:
    """Whether the losses of two runs are the same within the tolerance asked for, and what would be shown otherwise."""
    tolerance, within, step = f"{other['tolerance']:g}", other["within"], other["apart_step"]
    if other["same"]:
        return f"the losses are the same within {tolerance}, and within {rounded_up(float(within))}"
    if other["same"] is None and within is None:
        needs = f"fewer than {LEAST_ROWS} common steps with finite losses"
        return f"not shown to be the same within {tolerance}: {needs}"
    if other["same"] is None:
        shown = f"these steps show no tolerance below {rounded_up(float(within))}; more steps may"
        return f"not shown to be the same within {tolerance}: the difference is too noisy; {shown}"
    if step is None:
        return f"not the same within {tolerance}: one run diverged, and the other did not"
    if other["apart"] is None:
        return f"not the same within {tolerance}: at step {step}, one of the losses is not finite"
    end = f"{short(abs(other['apart']))} {'above' if other['apart'] > 0 else 'below'} the other's"
    return f"not the same within {tolerance}: at step {step}, the level of this run's loss is {end}"


def rounded_up(value: float) -> str:
    """Two digits, not less than the value: a tolerance that is shown."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.3g}"


def alarm_lines(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """The alarms of a verdict: an identifier and a line of text each."""
    for step, height in (verdict.spikes or {"list": []})["list"]:
        yield f"spike {step}", f"step {step}: a spike of {short(height)}"
    yield from signal_lines(verdict.signals)
    if verdict.reason == "rising":
        yield "rising", f"step {verdict.horizon}: the loss is rising"
    elif verdict.first_bad_step is not None and verdict.verdict != UNDECIDED:
        first = f", first in {verdict.first_bad_site}" if verdict.first_bad_site else ""
        yield verdict.verdict, f"step {verdict.first_bad_step}: {verdict.verdict} ({verdict.reason}){first}"
    if verdict.certain_step is not None:
        yield "certain", f"step {verdict.certain_step}: the divergence is certain"
