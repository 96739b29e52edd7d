"""The learning-rate range test: what the engine measured, as a table, a picture and a JSON file."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from moe_lab import plots

LINES = 20  # of the table; the JSON file has every point


def refuse_occupied(out: Path) -> None:
    """Only a new or an empty folder is taken, and that is known before anything is computed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; choose another --out")


def save(report: dict[str, Any], out: Path) -> list[Path]:
    """lr_find.json and lr_find.png in a folder that appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
        whole = Path(place) / "whole"
        plots.save({"lr_find": figure(report)}, whole)
        (whole / "lr_find.json").write_text(json.dumps(report, allow_nan=False, indent=1) + "\n")
        os.replace(whole, out)
    return [out / "lr_find.json", out / "lr_find.png"]


def figure(report: dict[str, Any]) -> Figure:
    """Loss over the rate: every batch, the running mean, the suggestion and the run's own rate."""
    found = plots.Chart(figsize=(9, 4.6), dpi=120, layout="constrained")
    axes = found.subplots()
    plots.dress(axes, f"Learning-rate range test: {report['name']}, {report['phase']}", "nats per token")
    rates = [point["learning_rate"] for point in report["points"]]
    axes.plot(rates, [point["loss"] for point in report["points"]], ".", ms=5, color=plots.FAINT, label="batch")
    axes.plot(rates, [point["smoothed"] for point in report["points"]], color=plots.COLOURS[0], lw=1.8, label="mean")
    marks = (("suggestion", "suggestion", plots.COLOURS[1], "-"), ("own_rate", "the run's own rate", plots.INK, ":"))
    for key, label, colour, style in marks:
        if report[key]:
            axes.axvline(report[key], color=colour, lw=1.4, ls=style, label=f"{label}: {report[key]:.2e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=plots.INK)
    plots.trim(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor=plots.INK)
    return found


def render(report: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("rate", "loss", "running mean"):
        table.add_column(name, justify="right")
    points = report["points"]
    step = max(1, -(-len(points) // LINES))
    for point in [*points[:-1:step], *points[-1:]]:
        table.add_row(f"{point['learning_rate']:.2e}", f"{point['loss']:.4f}", f"{point['smoothed']:.4f}")
    console.print(table)
    console.print(f"the test ended because {report['ended']}", markup=False)
    if report["suggestion"] is None:
        console.print(report["verdict"], markup=False)
        return
    updates = report["updates_compared"]
    lines = [
        ("lowest mean loss", f"{report['lowest_loss']:.4f} at {report['lowest_rate']:.2e}"),
        ("steepest fall", "-" if report["steepest_rate"] is None else f"at {report['steepest_rate']:.2e}"),
    ]
    *tried, own = report["probes"]
    for probe in tried:
        mark = "  <- suggestion" if probe["learning_rate"] == report["suggestion"] else ""
        lines.append((f"at {probe['learning_rate']:.2e}", f"loss {_loss(probe)} after {updates} updates{mark}"))
    lines.append((f"at {own['learning_rate']:.2e}", f"loss {_loss(own)} after {updates} updates, the run's own rate"))
    for name, text in lines:
        console.print(f"{name:18}  {text}", markup=False)
    console.print(report["verdict"], markup=False)


def _loss(probe: dict[str, Any]) -> str:
    return "diverged" if probe["loss"] is None else f"{probe['loss']:.4f}"
