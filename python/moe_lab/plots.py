"""Figures of a run: frame in, figure out. No pyplot, no global state, nothing compiled of ours."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from moe_lab import frames, gates

# Okabe and Ito's colours, told apart by colour-blind readers; black is kept for bounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
INK, FAINT = "#333333", "#999999"
DASHES = "╌╌ "  # before the name of a line that is not drawn through
STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))  # of the first lines, and where the colours come again


class Chart(Figure):
    """A Figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def loss(frame: pl.DataFrame, target: float | None = gates.LOSS) -> Figure:
    """Training loss of every epoch, evaluation loss, the entropy floor of the data and the roadmap's target."""
    rows, x, figure, axes = _start(frame, "Loss", "nats per token, mean over sequences")
    for name, label, colour in (("epoch/loss", "training", COLOURS[0]), ("eval/loss", "evaluation", COLOURS[1])):
        _line(axes, rows, x, name, label, colour)
    if _known(rows, "epoch/loss").is_empty():
        _line(axes, rows, x, "train/loss", "training", COLOURS[0])
    _line(axes, rows, x, "epoch/floor", "entropy floor", INK, style="--")
    if target is not None and "chat" in rows["phase"]:
        _bound(axes, target, f"target {target:g}")
    _log_scale(axes)
    return _finish(figure, axes, rows, x)


def routing(frame: pl.DataFrame, band: tuple[float, float] = gates.BAND) -> Figure:
    """Experts per token by layer over the epochs, their mean, and the roadmap's band."""
    rows, x, figure, axes = _start(frame, "Experts per token", "mean over tokens")
    axes.axhspan(*band, color=COLOURS[2], alpha=0.12, lw=0)
    place = axes.get_yaxis_transform()
    label = f"roadmap {band[0]:g}-{band[1]:g}"
    axes.annotate(label, (0.99, band[1]), xycoords=place, va="top", ha="right", color=COLOURS[2], fontsize=9)
    for order, layer in enumerate(frames.sparse_layers(frame)):
        _line(axes, rows, x, f"moe/layer_{layer:02}/experts_per_token", f"block {layer}", **_look(order))
    _line(axes, rows, x, "moe/experts_per_token", "mean", INK, style="--")
    axes.set_ylim(bottom=0.95)
    return _finish(figure, axes, rows, x)


def entropy(frame: pl.DataFrame) -> Figure:
    """Router entropy by layer over the epochs; a uniform router has ln E."""
    rows, x, figure, axes = _start(frame, "Router entropy", "nats, mean over tokens")
    for order, layer in enumerate(frames.sparse_layers(frame)):
        _line(axes, rows, x, f"moe/layer_{layer:02}/router_entropy", f"block {layer}", **_look(order))
    experts = max((len(load) for load in _last_loads(rows).values()), default=0)
    if experts > 1:
        _bound(axes, log(experts), f"uniform: ln {experts}")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, rows, x)


def utilisation(frame: pl.DataFrame) -> Figure:
    """Load of every expert over the fair load 1/E, one panel a layer, epochs across; the last epoch in numbers."""
    layers = frames.sparse_layers(frame)
    rows = frames.epochs(frame)
    most = max((len(load) for load in _last_loads(rows).values()), default=1)
    tall = max(1.6, 0.16 * most)  # a line of text for every expert
    figure = Chart(figsize=(9, 1.2 + tall * max(1, len(layers))), dpi=120, layout="constrained")
    figure.suptitle("Expert load over the fair load (1 = fair, 0 = dead)", x=0.01, ha="left", fontsize=12, color=INK)
    if not layers:
        figure.text(0.5, 0.5, "this run has no experts", ha="center", color=FAINT)
        return figure
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=2.0)
    for layer, axes in zip(layers, panels, strict=True):
        known = rows.filter(pl.col(f"moe/layer_{layer:02}/load").is_not_null())
        loads = known[f"moe/layer_{layer:02}/load"].to_list()
        fair = [[share * len(load) for share in load] for load in loads]
        by_expert = list(zip(*fair, strict=True))
        first, last = int(known["index"][0]), int(known["index"][-1])
        extent = (first - 0.5, last + 0.5, len(by_expert) - 0.5, -0.5)
        image = axes.imshow(by_expert, aspect="auto", cmap="PuOr_r", norm=norm, extent=extent, interpolation="none")
        axes.set_ylabel(f"block {layer}\nexpert", color=INK)
        axes.set_yticks(range(len(by_expert)))
        for expert, share in enumerate(fair[-1]):
            place = axes.get_yaxis_transform()
            axes.annotate(f"{share:.2f}", (1.01, expert), xycoords=place, va="center", fontsize=8, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _phases(axes, rows, label=axes is panels[0])
    panels[-1].set_xlabel("epoch", color=INK)
    figure.colorbar(image, ax=panels, pad=0.09, shrink=0.8, extend="max")
    return figure


def gradients(frame: pl.DataFrame, measure: str = "param_norm") -> Figure:
    """Gradient norms of the flat layers, by kind of layer; `measure` is "param_norm" or "activation_norm"."""
    rows, x = _rows(frame)
    numbers = sorted(name for name in rows.columns if name.startswith("grad/layer_") and name.endswith(f"/{measure}"))
    figure = Chart(figsize=(10, 6.4), dpi=120, layout="constrained")
    of = {"param_norm": "parameters", "activation_norm": "the layer's input"}[measure]
    figure.suptitle(f"Gradient norm of {of}, mean over the steps of an epoch", x=0.01, ha="left", color=INK)
    panels = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
    kinds = _kinds(len(numbers))
    for axes, kind in zip(panels, ("embedding and output", "attention", "feed-forward", "norms"), strict=True):
        members = [index for index, (name, _) in enumerate(kinds) if name == kind]
        for order, index in enumerate(members):
            _line(axes, rows, x, numbers[index], kinds[index][1], **_look(order))
        _log_scale(axes)
        axes.set_title(kind, loc="left", fontsize=10, color=INK, pad=16)
    for axes in panels:  # after all lines: the panels share their scale, and the labels stand on it
        _finish(figure, axes, rows, x)
    return figure


def l0(frame: pl.DataFrame, bound: float = gates.L0) -> Figure:
    """L0, the gradient norm at the embedding output: mean and range of every epoch, and its upper bound."""
    rows, x, figure, axes = _start(frame, "L0: gradient norm at the embedding output", "per sequence")
    known = rows.filter(_known_mask(rows, "epoch/l0_min") & _known_mask(rows, "epoch/l0_max"))
    if known.height:
        axes.fill_between(known[x], known["epoch/l0_min"], known["epoch/l0_max"], color=COLOURS[0], alpha=0.2, lw=0)
        _line(axes, rows, x, "epoch/l0_mean", "mean, min to max", COLOURS[0])
    else:
        _line(axes, rows, x, "train/l0", "mean", COLOURS[0])
    _bound(axes, bound, f"upper bound {bound:g}")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, rows, x)


def learning_rate(frame: pl.DataFrame) -> Figure:
    """The schedule, and what the gradient-norm scale of the layers makes of it on average."""
    rows, x, figure, axes = _start(frame, "Learning rate", "rate")
    scaled = _column(rows, "train/learning_rate") * _column(rows, "train/lr_scale_mean")
    rows = rows.with_columns(scaled.alias("mean"))
    _line(axes, rows, x, "mean", "with mean layer scale", COLOURS[1])
    _line(axes, rows, x, "train/learning_rate", "schedule", COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:.1e}")
    return _finish(figure, axes, rows, x)


def compare(
    runs: Mapping[str, pl.DataFrame | Sequence[pl.DataFrame]],
    name: str,
    title: str,
    unit: str,
    log_scale: bool = False,
    floor: str | None = None,
    target: float | None = None,
) -> Figure:
    """One measure of several models over their epochs, each line named at its end; their common floor and a target.

    Of a model with several runs (seeds) the mean is drawn, and a band from the least to the most. Where the floor is
    known, a second panel shows how far above it the models end.
    """
    every = {label: _all_rows([each] if isinstance(each, pl.DataFrame) else each) for label, each in runs.items()}
    ends = {} if floor is None else _ends(every, name, floor)
    figure = Chart(figsize=(9, 8.6 if ends else 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1 + bool(ends), 1, squeeze=False)[:, 0]
    dress(panels[0], title, unit)
    rows, x = _models(panels[0], every, name)
    if floor is not None:
        _line(panels[0], rows, x, floor, "entropy floor", INK, style="--")
    if target is not None:
        _bound(panels[0], target, f"target {target:g}")
    if log_scale:
        _log_scale(panels[0])
    _finish(figure, panels[0], rows, x)
    if ends:
        rows, x = _models(panels[1], ends, EXCESS)
        dress(panels[1], f"{title} above the entropy floor, second half of {rows['phase'][-1]}", unit)
        _log_scale(panels[1])
        _finish(figure, panels[1], rows, x)
    return figure


EXCESS = "excess"
Rows = tuple[pl.DataFrame, str]  # what is drawn of a run, and its horizontal axis


def _all_rows(runs: Sequence[pl.DataFrame]) -> list[Rows]:
    return [_rows(frame) for frame in runs]


def _models(axes: Axes, models: Mapping[str, Sequence[Rows]], name: str) -> Rows:
    """Draws the mean of every model over its runs, and a band. Returns the rows of the longest."""
    every = {label: _over_seeds(runs, name) for label, runs in models.items()}
    for order, (label, (rows, x)) in enumerate(every.items()):
        if {"low", "high"} <= set(rows.columns):
            axes.fill_between(rows[x], rows["low"], rows["high"], color=_colour(order), alpha=0.2, lw=0)
        _line(axes, rows, x, name, label, **_look(order))
    return _longest(every.values())


def _longest(runs: Iterable[Rows]) -> Rows:
    return max(runs, key=lambda pair: pair[0].height)


def _over_seeds(runs: Sequence[Rows], name: str) -> Rows:
    """The rows of the longest run with the mean of the measure over all runs, and its least and most."""
    rows, x = _longest(runs)
    parts = [part.select(x, name) for part, axis in runs if axis == x and name in part.columns]
    if len(parts) < 2:
        return rows, x
    value = pl.col(name)
    joined = pl.concat(parts).group_by(x).agg(value.mean(), value.min().alias("low"), value.max().alias("high"))
    return rows.drop(name, strict=False).join(joined, on=x, how="left", maintain_order="left"), x


def _ends(models: Mapping[str, Sequence[Rows]], name: str, floor: str) -> dict[str, list[Rows]]:
    """The second half of each run's last phase with the excess over its own floor; {} where no floor is known."""
    found = {label: [(_end(rows, x, name, floor), x) for rows, x in runs] for label, runs in models.items()}
    return found if any(rows.height for runs in found.values() for rows, _ in runs) else {}


def _end(rows: pl.DataFrame, x: str, name: str, floor: str) -> pl.DataFrame:
    last = rows.filter(pl.col("phase") == pl.col("phase").last())[x]
    known = rows.filter(_known_mask(rows, name) & _known_mask(rows, floor))
    late = known.filter(pl.col(x) >= last[len(last) // 2]) if x == "index" and len(last) else known.clear()
    return late.with_columns((_column(late, name) - _column(late, floor)).alias(EXCESS))


def comparisons(models: Mapping[str, Sequence[pl.DataFrame]]) -> dict[str, Figure]:
    """Models in one figure a measure, each the mean of its runs (one a seed); those on a text in figures of their own.

    A text's losses are of characters and held out: neither the scale nor the roadmap's numbers of documents apply.
    """
    on_text = {name for name, runs in models.items() if any(map(frames.is_of_text, runs))}
    documents = {name: runs for name, runs in models.items() if name not in on_text}
    text = {name: runs for name, runs in models.items() if name in on_text}
    figures: dict[str, Figure] = {}
    if documents:
        unit = "nats, mean over sequences"
        figures["loss"] = compare(documents, "epoch/loss", "Training loss", unit, True, "epoch/floor", gates.LOSS)
        figures |= _courses(documents)
        if "experts" in figures:
            figures["experts"].axes[0].axhspan(*gates.BAND, color=COLOURS[2], alpha=0.12, lw=0)
    if text:
        figures["text_loss"] = compare(text, "eval/loss", "Held-out loss, text", "nats per token", True)
        figures |= {f"text_{name}": figure for name, figure in _courses(text).items()}
    return figures


def _courses(models: Mapping[str, Sequence[pl.DataFrame]]) -> dict[str, Figure]:
    """Experts per token of the models that have any, and L0 of all."""
    figures = {}
    if any(frames.sparse_layers(frame) for runs in models.values() for frame in runs):
        unit = "mean over tokens and layers"
        figures["experts"] = compare(models, "moe/experts_per_token", "Experts per token", unit)
    figures["l0"] = compare(models, "epoch/l0_mean", "L0: gradient norm at the embedding output", "per sequence")
    return figures


def sweep(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """p against loss and against experts per token, one point a run; a line joins the means over seeds."""
    figure = Chart(figsize=(9, 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    measures = (("loss", "loss, nats"), ("experts_per_token", "experts per token"))
    for axes, (key, label) in zip(panels, measures, strict=True):
        points = [(float(entry["p"]), float(entry[key])) for entry in summaries if entry.get(key) is not None]
        dress(axes, label, "")
        axes.plot([p for p, _ in points], [y for _, y in points], "o", color=COLOURS[0], alpha=0.6, label="runs")
        places = sorted({p for p, _ in points})
        means = [sum(y for q, y in points if q == p) / sum(1 for q, _ in points if q == p) for p in places]
        axes.plot(places, means, color=COLOURS[0], lw=1.5)
        axes.set_xlabel("p", color=INK)
        axes.set_xticks(places)
        trim(axes)
    panels[1].axhspan(*gates.BAND, color=COLOURS[2], alpha=0.12, lw=0)
    _bound(panels[0], gates.LOSS, f"target {gates.LOSS:g}")
    return figure


def ladder(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss of every step of the roadmap, a point a seed and a bar at the mean, beside its target and the floor.

    `steps`: {step, measured: {loss, floor}, targets: {loss}}.
    """
    figure = Chart(figsize=(9, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    dress(axes, "Loss by step", "nats, mean over sequences")
    for place, step in enumerate(steps):
        losses, target = step["measured"]["loss"], step["targets"]["loss"]
        axes.plot([place] * len(losses), losses, "o", color=COLOURS[0], alpha=0.6, ms=5)
        if losses:
            axes.plot([place - 0.2, place + 0.2], [sum(losses) / len(losses)] * 2, color=COLOURS[0], lw=2)
        axes.plot([place - 0.35, place + 0.35], [target, target], ":", color=INK, lw=1.2)
    floors = [value for step in steps for value in step["measured"]["floor"]]
    if floors:
        axes.axhline(min(floors), color=INK, lw=1, ls="--")
        at = axes.get_yaxis_transform()
        axes.annotate(
            "entropy floor", (0.995, min(floors)), xycoords=at, va="bottom", ha="right", fontsize=9, color=INK
        )
    axes.set_xticks(range(len(steps)), [str(step["step"]) for step in steps], rotation=20, ha="right")
    axes.set_ylim(bottom=0)
    trim(axes)
    return figure


def heat(table: pl.DataFrame, down: str, across: str, measure: str, title: str) -> Figure:
    """A measure as colours, one panel a layer: `down` and `across` are columns of the table."""
    layers = table["layer"].unique().sort().to_list()
    rows, columns = table[down].unique().sort().to_list(), table[across].unique().sort().to_list()
    figure = Chart(figsize=(9, 0.8 + len(layers) * (0.6 + 0.2 * len(rows))), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    high = float(table[measure].max() or 1.0)  # type: ignore[arg-type]
    for layer, axes in zip(layers, panels, strict=True):
        cells = np.full((len(rows), len(columns)), np.nan)
        for y, x, value in table.filter(pl.col("layer") == layer).select(down, across, measure).iter_rows():
            cells[rows.index(y), columns.index(x)] = np.nan if value is None else value
        image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0.0, vmax=high, interpolation="none")
        axes.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=8, parse_math=False)  # names of files
        axes.set_xticks(range(len(columns)), [str(column) for column in columns], fontsize=8)
        axes.set_ylabel(f"block {layer}", color=INK)
    panels[-1].set_xlabel(across, color=INK)
    figure.colorbar(image, ax=panels, shrink=0.8)
    return figure


def saturation(table: pl.DataFrame) -> Figure:
    """How early the choice of experts settled: agreement with the last model over its checkpoints, a line a block.

    `table`: step, layer, agreement, chance, as `specialize.saturation` makes it.
    """
    figure = Chart(figsize=(9, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    dress(axes, "Agreement with the last model's choice of experts; dotted: by chance", "share of a token's experts")
    for order, ((layer,), rows) in enumerate(table.group_by("layer", maintain_order=True)):
        axes.plot(
            rows["step"], rows["agreement"], marker="o", ms=3.5, lw=1.6, color=_colour(order), label=f"block {layer}"
        )
        axes.plot(rows["step"], rows["chance"], ":", lw=1.2, color=_colour(order), label="_chance")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    trim(axes)
    _name_lines(figure, axes)
    return figure


FIGURES = {
    "loss": loss,
    "learning_rate": learning_rate,
    "gradients": gradients,
    "l0": l0,
    "routing": routing,
    "entropy": entropy,
    "utilisation": utilisation,
}
SPARSE = ("routing", "entropy", "utilisation")


def save_all(run: frames.Place) -> list[Path]:
    """Every figure of a run that it has measures for, as plots/*.png in its directory."""
    frame = frames.read_metrics(run)
    if not frame.height:
        raise ValueError(f"the run '{run}' has written no metrics yet")
    sparse = bool(frames.sparse_layers(frame))
    figures = {name: draw(frame) for name, draw in FIGURES.items() if sparse or name not in SPARSE}
    return save(figures, Path(run) / "plots")


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, format="png")
    return paths


def _rows(frame: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """What is drawn and its horizontal axis: epochs, or the single steps of a run that has no two epochs."""
    rows = frames.epochs(frame)
    if rows.height > 1:
        return rows, "index"
    return frame.filter(pl.col("kind").is_in(["train", "eval"])), "step"


def _start(frame: pl.DataFrame, title: str, unit: str) -> tuple[pl.DataFrame, str, Figure, Axes]:
    figure = Chart(figsize=(9, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    dress(axes, title, unit)
    return *_rows(frame), figure, axes


def dress(axes: Axes, title: str, unit: str) -> None:
    """Title and unit of a figure."""
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=18)
    axes.set_ylabel(unit, color=INK)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line(axes: Axes, rows: pl.DataFrame, x: str, name: str, label: str, colour: str, style: Any = "-") -> None:
    """Draws the known points of a measure, one piece a phase; `_finish` writes the label at the end of the last."""
    known = _known(rows, name)
    for (phase,), piece in known.group_by("phase", maintain_order=True):
        last = phase == known["phase"][-1]
        marker = "o" if piece.height < 12 and style in STYLES else ""
        points = piece[x].to_list(), piece[name].to_list()
        named = f"{label}: {points[1][-1]:.3g}" if last else f"_{label}"
        axes.plot(*points, linestyle=style, marker=marker, ms=3.5, color=colour, lw=1.6, label=named)


def _known(rows: pl.DataFrame, name: str) -> pl.DataFrame:
    return rows.filter(_known_mask(rows, name))


def _known_mask(rows: pl.DataFrame, name: str) -> pl.Series:
    return rows[name].is_not_null() if name in rows.columns else pl.Series([False] * rows.height, dtype=pl.Boolean)


def _column(rows: pl.DataFrame, name: str) -> pl.Expr:
    return pl.col(name) if name in rows.columns else pl.lit(None, dtype=pl.Float64)


def _bound(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=INK, lw=1, ls=":")
    place = axes.get_yaxis_transform()
    axes.annotate(label, (0.995, value), xycoords=place, va="bottom", ha="right", fontsize=9, color=INK)


def trim(axes: Axes) -> None:
    """Axes without a box, a faint grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)


def _finish(figure: Figure, axes: Axes, rows: pl.DataFrame, x: str) -> Figure:
    trim(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
    if axes.get_subplotspec() is None or axes.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        axes.set_xlabel("epoch" if x == "index" else "step", color=INK)
    if x == "index":
        _phases(axes, rows, label=True)
    _name_lines(figure, axes)
    return figure


def _phases(axes: Axes, rows: pl.DataFrame, label: bool) -> None:
    """A thin line where the next phase begins, and the phases' names along the top."""
    starts = rows.group_by("phase", maintain_order=True).agg(pl.col("index").min())
    if starts.height < 2:
        return
    for phase, start in starts.iter_rows():
        if start > 1:
            axes.axvline(start - 0.5, color=FAINT, lw=0.8)
        if label:
            place, look = axes.get_xaxis_transform(), _text(FAINT, "bottom")
            axes.annotate(phase, (start, 1.0), xycoords=place, xytext=(3, 2), textcoords="offset points", **look)


def _name_lines(figure: Figure, axes: Axes) -> None:
    """Writes each line's name at its right end, pushed apart where two would overlap."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform(np.asarray(line.get_xydata())[-1])[1]) for line in lines]
    gap = 13 / (72 * axes.get_position().height * figure.get_figheight())
    height = -1.0
    for end, line in sorted(zip(heights, lines, strict=True), key=lambda pair: pair[0]):
        height = max(end, height + gap)
        look = _text(line.get_color(), "center")
        label = f"{DASHES if line.is_dashed() else ''}{line.get_label()}"
        axes.annotate(label, (1.01, height), xycoords="axes fraction", **look)


def _text(colour: Any, align: str) -> dict[str, Any]:
    return {"fontsize": 9, "color": colour, "va": align, "annotation_clip": False}


def _colour(order: int) -> str:
    return COLOURS[order % len(COLOURS)]


def _look(order: int) -> dict[str, Any]:
    """Colour and style of a line: where the colours come again, they are dashed, then dotted."""
    return {"colour": _colour(order), "style": STYLES[order // len(COLOURS) % len(STYLES)]}


def _kinds(count: int) -> list[tuple[str, str]]:
    """Kind and label of the flat layers L0, L1, ...: embedding; attention, norm, feed-forward, norm of every block;
    final norm; output projection.
    """
    block = (("attention", "block"), ("norms", "attention norm"), ("feed-forward", "block"), ("norms", "FFN norm"))
    blocks = max(0, (count - 3) // 4)
    kinds = [("embedding and output", "embedding")]
    kinds += [(kind, f"{label} {index}") for index in range(blocks) for kind, label in block]
    return [*kinds, ("norms", "final norm"), ("embedding and output", "output")][:count]


def _last_loads(rows: pl.DataFrame) -> dict[str, list[float]]:
    """The last known load of every layer."""
    names = [name for name in rows.columns if name.startswith("moe/layer_") and name.endswith("/load")]
    return {name: known[name][-1].to_list() for name in names if (known := _known(rows, name)).height}
