"""Figures fit for a paper: from a study's data to matplotlib's Figure, and from there to SVG, PDF and PNG."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

from stabrun.record.jsonl import number
from stabrun.record.metrics import BLOCK_SITES as SITES
from stabrun.record.metrics import signals
from stabrun.report import style
from stabrun.report.run_curves import Curve, Trace
from stabrun.report.selection import pair, stable
from stabrun.report.source import RUN, Row, Source
from stabrun.report.tables import lead_of
from stabrun.study.facts import estimate_text
from stabrun.text import rate_text, run_name
from stabrun.verdict.judge import CONVERGED, DIVERGED

COLUMN, PAGE = 3.4, 7.0  # inches: one column of a paper, and both
RC: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.5, "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
    "axes.axisbelow": True,
    "text.parse_math": False, "svg.hashsalt": "stabrun", "pdf.fonttype": 42,
}  # fmt: skip
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
NAMES = {"qkv": "QKV", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}
NORMS = {"out": "output norm ‖Y‖", "in": "input norm ‖X‖", "weight": "weight norm ‖W‖"}
NOTHING = Curve(0)
BEYOND = 1.3  # how far the arrow of an end that is not known leads on
LEVELS = {"lenient": ("v", 0.6), "standard": ("o", 1.0), "strict": ("^", 0.6)}  # strictness → marker, opacity

Figure = Any
Traces = dict[str, Trace]


def figures(source: Source, traces: Traces) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each that the source has data for."""
    import matplotlib

    with matplotlib.rc_context(RC):
        for name, draw in drawings(source, traces):
            figure = draw()
            if figure is not None:
                yield name, figure


def drawings(source: Source, traces: Traces) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    if source.strategy != RUN and source.rows:
        yield "loss_by_lr", lambda: loss_by_lr(source)
        yield "divergence_map", lambda: divergence_map(source)
        yield "clipped_share", lambda: clipped_share(source)
        yield "lead_times", lambda: lead_times(source)
    yield "training_curves", lambda: training_curves(source, traces)
    sides = [row for row in pair(source.rows) if row] or source.rows[:1]
    sides = [row for row in sides if row["run_id"] in traces]
    for kind, label in NORMS.items():
        yield f"norms_{kind}", partial(norms, sides, traces, kind, label)
    yield "gradient_by_depth", lambda: gradient_by_depth(sides, traces)
    yield "adam", lambda: adam(sides, traces)
    yield "attention", lambda: attention(sides, traces)


def written(figure: Figure, kind: str) -> bytes:
    """A figure's file; the same data give the same bytes."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(RC):
        if figure.get_layout_engine() is not None:  # laid out once; with an engine, each format would be drawn twice
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(file, format=kind, dpi=200, metadata=METADATA[kind])
    return file.getvalue()


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def loss_by_lr(source: Source) -> Figure | None:
    """A curve an arm through the median over seeds; each run a point, a diverged one an X."""
    figure, ((axes,),) = canvas(PAGE, 3.4)
    arms = [arm for arm in source.arms if any(row["arm"] == arm for row in source.rows)]
    start = median([number(row["init_loss"]) for row in source.rows if row["init_loss"] is not None] or [math.nan])
    for arm in arms:
        rows = [row for row in source.rows if row["arm"] == arm and row["final_loss"] is not None]
        look = {"color": style.colour(arm), "zorder": 3}
        at = {
            rate: [capped(row, start) for row in rows if row["lr"] == rate] for rate in sorted({r["lr"] for r in rows})
        }
        mark, line = style.marker(arm), style.dash(arm, arms)
        axes.plot(list(at), [median(ends) for ends in at.values()], line, **look)
        axes.plot([], [], line, marker=mark, label=arm_label(source, arm), **look)
        for rate, ends in at.items():
            axes.plot([rate, rate], [min(ends), max(ends)], lw=0.8, alpha=0.7, **look)
        for row in rows:
            lost = row["verdict"] == DIVERGED
            axes.plot(
                row["lr"],
                capped(row, start),
                "x" if lost else mark,
                ms=6 if lost else 3,
                mew=1.4 if lost else 0.5,
                **look,
            )
    axes.axhline(start, color="#767676", lw=0.7, ls=":")
    axes.annotate("loss at initialisation", (1, start), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=6.5, color="#555555")  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="final training loss (nats a token)")
    rate_axis(axes)
    axes.plot([], [], "x", color="#555555", ms=6, mew=1.4, label="diverged")
    below_legend(figure, axes, 2)
    return figure


def arm_label(source: Source, arm: str) -> str:
    found = source.variants.get(arm, {}).get("lr_sensitivity")
    return f"{arm}, LR sensitivity {estimate_text(found)}" if found else arm


def capped(row: Row, start: float) -> float:
    """A final loss, no higher than the loss before anything was learned."""
    loss = number(row["final_loss"])
    return min(loss, start) if math.isfinite(loss) else start


def divergence_map(source: Source) -> Figure | None:
    """A row an arm: share of runs that diverged at each rate, and below it lr50 and lr10 at three strictnesses."""
    from matplotlib.colors import LinearSegmentedColormap

    arms = list(source.variants)
    figure, ((axes,),) = canvas(PAGE, 1.1 + 0.7 * len(arms))
    shades = LinearSegmentedColormap.from_list("share", ["#F4F1EA", "#E69F00", "#8C2D04"])
    rates = [at["lr"] for told in source.variants.values() for at in told["runs"]]
    span = math.log(max(rates) / min(rates)) + 2
    for place, arm in enumerate(arms):
        told, y = source.variants[arm], -place
        for at, height in zip(told["runs"], dodged([at["lr"] for at in told["runs"]], span), strict=True):
            share = at["diverged"] / at["runs"]
            axes.scatter(at["lr"], y + height, s=60, marker="s", color=[shades(share)], ec="#444444", lw=0.5, zorder=3)
            text = f"{at['diverged']}/{at['runs']}"
            axes.annotate(text, (at["lr"], y + height), ha="center", va="center", fontsize=4.5, zorder=4,
                          color="white" if share > 0.6 else "black")  # fmt: skip
        for level, (strictness, (mark, alpha)) in enumerate(LEVELS.items()):
            known, low = told["frontier"].get(strictness), y - 0.1 - 0.13 * level
            if known:
                interval(axes, known["lr50"], low, style.colour(arm), alpha, mark, filled=True)
                interval(axes, known["lr10"], low - 0.05, style.colour(arm), alpha * 0.7, mark, filled=False)
    axes.set(xscale="log", xlabel="learning rate", ylim=(-len(arms) + 0.5, 0.5))
    axes.set_yticks([-place for place in range(len(arms))], arms)
    axes.grid(axis="y", visible=False)
    for place in range(1, len(arms)):
        axes.axhline(0.5 - place, color="#BBBBBB", lw=0.5)
    rate_axis(axes)
    for strictness, (mark, alpha) in LEVELS.items():
        axes.plot([], [], mark, color="#555555", alpha=alpha, label=f"lr50, {strictness}")
    axes.plot([], [], "o", color="#555555", mfc="white", label="lr10 (hollow)")
    axes.scatter([], [], marker="s", s=50, color=[shades(1.0)], label="all runs diverged")
    axes.scatter([], [], marker="s", s=50, color=[shades(0.0)], ec="#444444", lw=0.5, label="none")
    below_legend(figure, axes, 6)
    return figure


def dodged(rates: list[float], span: float) -> list[float]:
    """The height of each rate's square: one that would cover its neighbour stands above it."""
    heights, ends = [0.1, 0.24, 0.38], [-math.inf] * 3
    found = []
    for rate in map(math.log, rates):
        level = next((level for level in range(3) if rate - ends[level] > span / 55), 2)
        ends[level] = rate
        found.append(heights[level])
    return found


def interval(axes: Any, ends: Row, y: float, colour: str, alpha: float, mark: str, filled: bool) -> None:
    """A median with its interval; an end that is not known is an arrow."""
    middle, low, high = ends["median"], ends["low"], ends["high"]
    known = [end for end in (low, middle, high) if end is not None]
    if not known:
        return
    width = 1.3 if filled else 0.7
    left = min(known) / (BEYOND if low is None else 1)
    right = max(known) * (BEYOND if high is None else 1)
    axes.plot([left, right], [y, y], "-", color=colour, alpha=alpha, lw=width, zorder=2)
    for end, side, arrow in ((low, left, "<"), (high, right, ">")):
        axes.plot(side, y, arrow if end is None else "|", color=colour, alpha=alpha, ms=4, zorder=2)
    if middle is not None:
        axes.plot(middle, y, mark, color=colour, alpha=alpha, ms=4, mfc=colour if filled else "white", zorder=3)


def clipped_share(source: Source) -> Figure | None:
    rows = [row for row in source.rows if row["clipped_share"] is not None]
    if not rows:
        return None
    figure, ((axes,),) = canvas(COLUMN, 2.7)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["lr"])
        rates = sorted({row["lr"] for row in own})
        middles = [median([number(row["clipped_share"]) for row in own if row["lr"] == rate]) for rate in rates]
        look = {"color": style.colour(arm)}
        axes.plot(rates, middles, style.dash(arm, list(source.arms)), marker=style.marker(arm), label=arm, **look)
        axes.plot([row["lr"] for row in own], [row["clipped_share"] for row in own], ".", ms=3, **look)
    axes.set(xscale="log", xlabel="learning rate", ylabel="share of clipped steps", ylim=(-0.03, 1.03))
    rate_axis(axes)
    below_legend(figure, axes, 2)
    return figure


def lead_times(source: Source) -> Figure | None:
    """A dot a diverged run, and beside it the share of converged runs in which the signal gave a false alarm."""
    lost = [row for row in source.rows if row["verdict"] == DIVERGED]
    held = [row for row in source.rows if row["verdict"] == CONVERGED]
    if not lost:
        return None
    figure, ((left, right),) = canvas(PAGE, 3.2, 1, 2, sharey=True, width_ratios=(3, 1))
    names = list(signals())[::-1]
    for y, signal in enumerate(names):
        leads = [
            (row["arm"], lead) for row in lost if (lead := lead_of(source.summary(row["run_id"]), signal)) is not None
        ]
        for arm, lead in leads:
            left.plot(lead, y, style.marker(arm), color=style.colour(arm), ms=3.5, alpha=0.75)
        if leads:
            left.plot(median([lead for _, lead in leads]), y, "|", color="black", ms=11, mew=1.6)
        if held:
            share = sum(signal in source.summary(row["run_id"]).get("signals", {}) for row in held) / len(held)
            right.barh(y, share, color="#999999", height=0.6)
    for arm in dict.fromkeys(row["arm"] for row in lost):
        left.plot([], [], style.marker(arm), color=style.colour(arm), ms=3.5, label=arm)
    left.plot([], [], "|", color="black", ms=9, mew=1.6, label="median")
    left.axvline(0, color="#555555", lw=0.8)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.set(xlabel=f"steps before the loss, {len(lost)} diverged runs (below 0: after it)")
    right.set(xlabel=f"false alarms, share\nof {len(held)} converged runs", xlim=(0, 1))
    below_legend(figure, left, 6)
    return figure


def training_curves(source: Source, traces: Traces) -> Figure | None:
    """A panel an arm: the chosen runs' losses, with first bad step, spikes, scars and restarts."""
    rows = [row for row in source.rows if row["run_id"] in traces and traces[row["run_id"]].loss]
    arms = [arm for arm in source.arms if any(row["arm"] == arm for row in rows)]
    if not arms:
        return None
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    figure, grid = canvas(PAGE if columns > 1 else 5.0, 0.7 + 2.1 * lines, lines, columns, sharey=True)
    panels = list(grid.flat)
    for panel in panels[len(arms) :]:
        panel.set_visible(False)
    for arm, panel in zip(arms, panels, strict=False):
        own = [row for row in rows if row["arm"] == arm]
        for index, row in enumerate(own):
            a_curve(panel, row, traces[row["run_id"]], source.summary(row["run_id"]), index, len(own))
        panel.set_xlabel("step")
        panel.set_title(arm, color=style.colour(arm), fontweight="bold")
        panel.legend(
            loc="upper right",
            handlelength=1.2,
            borderaxespad=0.1,
            labelspacing=0.2,
            fontsize=6,
            frameon=True,
            edgecolor="none",
        )
    start = max(loss for row in rows for _, loss in traces[row["run_id"]].loss[:1] if math.isfinite(loss))
    panels[0].set_ylim(None, start * 1.08)
    figure.supylabel("training loss (nats a token)", fontsize=8)
    marks = [("v", "counted as diverged or risen from here"), ("2", "spike"), ("|", "restart")]
    handles = [panels[0].plot([], [], mark, color="black", ms=5)[0] for mark, _ in marks]
    figure.legend(handles, [label for _, label in marks], loc="outside lower center", ncols=3)
    return figure


def a_curve(panel: Any, row: Row, found: Trace, summary: Row, index: int, count: int) -> None:
    """One run's loss and marks; lighter for lower rates, dashed where it diverged."""
    steps, losses = [step for step, _ in found.loss], [loss for _, loss in found.loss]
    shade = 0.4 + 0.6 * (index + 1) / count
    look = {"color": style.colour(row["arm"]), "alpha": shade}
    lost = row["verdict"] == DIVERGED
    scar = f", scar {row['scar']:.2f}" if row["scar"] else ""
    label = f"{rate_text(row['lr'])} s{row['seed']} {row['verdict']}{scar}"
    panel.plot(steps, losses, "--" if lost else "-", lw=0.9, label=label, **look)

    def height(step: int) -> float:
        return losses[min(range(len(steps)), key=lambda place: abs(steps[place] - step))]

    if row["first_bad_step"] is not None:
        panel.plot(row["first_bad_step"], height(row["first_bad_step"]), "v", color="black", ms=4, zorder=5)
    for step, _ in (summary.get("spikes") or {}).get("list", [])[:20]:
        panel.plot(step, height(step), "2", color="black", ms=5, zorder=4)
    for step in found.restarts:
        panel.plot(step, height(step), "|", color="black", ms=8, zorder=4)


def norms(sides: list[Row], traces: Traces, kind: str, label: str) -> Figure | None:
    """A row a site, a line a layer; a stable and a diverged run side by side."""
    keys = [f"norm/{kind}/{site}" for site in SITES]
    return layered(sides, traces, keys, [f"{NAMES[site]}\n{label}" for site in SITES])


def attention(sides: list[Row], traces: Traces) -> Figure | None:
    return layered(
        sides, traces, ["attn/max_logit", "attn/entropy"], ["maximum\nattention logit", "attention\nentropy (nats)"]
    )


def layered(sides: list[Row], traces: Traces, keys: Sequence[str], labels: Sequence[str]) -> Figure | None:
    """A row a key, a column a run, a line a layer; a row has one scale, so that the two can be compared."""
    import matplotlib

    keys, labels = present(sides, traces, keys, labels)
    if not keys:
        return None
    figure, grid = canvas(
        PAGE if len(sides) > 1 else 4.4, 0.8 + 1.35 * len(keys), len(keys), len(sides), sharey="row", sharex="col"
    )
    depth = max(len(layers_of(row, traces, key)) for row in sides for key in keys)
    colours = matplotlib.colormaps["viridis"]
    for column, row in enumerate(sides):
        for line, key in enumerate(keys):
            axes, curve = grid[line][column], traces[row["run_id"]].curves.get(key, NOTHING)
            for layer, values in enumerate(curve.layers):
                axes.plot(curve.steps, values, color=colours(0.92 * layer / max(1, depth - 1)), lw=1.0)
            framed(grid, line, column, row, labels[line])
    depth_key(figure, grid, depth, colours)
    return figure


def framed(grid: Any, line: int, column: int, row: Row, label: str) -> None:
    """What each panel of runs side by side has: logarithmic values, the bad step, and words at the grid's edges."""
    axes = grid[line][column]
    log_values(axes)
    mark_bad(axes, row)
    if not column:
        axes.set_ylabel(label)
    if not line:
        axes.set_title(side_title(row))
    if line == len(grid) - 1:
        axes.set_xlabel("step")


def depth_key(figure: Figure, grid: Any, depth: int, colours: Any) -> None:
    """A legend where the layers are few, a bar of colours where they are many."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if depth <= 8:
        handles = [
            grid[0][0].plot([], [], color=colours(0.92 * layer / max(1, depth - 1)))[0] for layer in range(depth)
        ]
        figure.legend(
            handles, [f"layer {layer}" for layer in range(depth)], loc="outside lower center", ncols=min(depth, 8)
        )
    else:
        figure.colorbar(
            ScalarMappable(Normalize(0, depth - 1), colours), ax=list(grid.flat), label="layer", fraction=0.04
        )


def gradient_by_depth(sides: list[Row], traces: Traces) -> Figure | None:
    """Gradient norm of each block, a line a step: where along the depth it grows or fades."""
    import matplotlib

    key = "grad/norm_by_layer"
    sides = [row for row in sides if len(layers_of(row, traces, key)) > 1]
    if not sides:
        return None
    figure, (grid,) = canvas(PAGE if len(sides) > 1 else 4.4, 2.6, 1, len(sides), sharey=True)
    colours = matplotlib.colormaps["plasma"]
    for axes, row in zip(grid, sides, strict=True):
        curve = traces[row["run_id"]].curves[key]
        for line, place in enumerate(spread(len(curve.steps), 7)):
            label = f"step {curve.steps[place]}"
            axes.plot(curve.values[place], ".-", color=colours(0.9 * line / 6), label=label, lw=1)
        log_values(axes)
        axes.set(xlabel="layer", title=side_title(row))
        axes.set_xticks(range(len(curve.layers)) if len(curve.layers) <= 12 else spread(len(curve.layers), 7))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=6)
    grid[0].set_ylabel("gradient norm of the block")
    return figure


def adam(sides: list[Row], traces: Traces) -> Figure | None:
    """Adam's moments and surprise, a line a site: the largest over its layers."""
    kinds = {
        "norm/adam_m": "first moment\n‖m‖",
        "norm/adam_v": "second moment\n‖v‖",
        "adam/surprise": "surprise\nmean g² / mean v",
    }
    keys, labels = present(sides, traces, [f"{kind}/{SITES[0]}" for kind in kinds], list(kinds.values()))
    if not keys:
        return None
    figure, grid = canvas(
        PAGE if len(sides) > 1 else 4.4, 0.8 + 1.5 * len(keys), len(keys), len(sides), sharey="row", sharex="col"
    )
    shades = dict(zip(SITES, ("#0072B2", "#D55E00", "#009E73", "#C45C99"), strict=True))
    for column, row in enumerate(sides):
        for line, key in enumerate(keys):
            axes = grid[line][column]
            for site, line_style in zip(SITES, style.DASHES, strict=True):
                curve = traces[row["run_id"]].curves.get(f"{key.rsplit('/', 1)[0]}/{site}")
                if curve:
                    tops = [max(values) for values in curve.values]
                    axes.plot(curve.steps, tops, line_style, color=shades[site], lw=1, label=NAMES[site])
            framed(grid, line, column, row, labels[line])
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, [f"{name}, largest layer" for name in names], loc="outside lower center", ncols=4)
    return figure


def present(
    sides: list[Row], traces: Traces, keys: Sequence[str], labels: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The keys that a run has, and their labels."""
    kept = [place for place, key in enumerate(keys) if any(layers_of(row, traces, key) for row in sides)]
    return [keys[place] for place in kept], [labels[place] for place in kept]


def layers_of(row: Row, traces: Traces, key: str) -> list[list[float]]:
    return traces[row["run_id"]].curves.get(key, NOTHING).layers


def spread(count: int, most: int) -> list[int]:
    """Places from the first to the last, `most` at most, evenly."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def side_title(row: Row) -> str:
    return f"{'stable' if stable(row) else row['verdict']}: {run_name(row['arm'], row['lr'], row['seed'])}"


def mark_bad(axes: Any, row: Row) -> None:
    if row["first_bad_step"] is not None:
        axes.axvline(row["first_bad_step"], color="black", lw=0.8, ls=":")


def log_values(axes: Any) -> None:
    """A logarithmic axis of values, with a label or two however little it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 30 else (1.0,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def rate_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: rate_text(rate)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def below_legend(figure: Figure, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
