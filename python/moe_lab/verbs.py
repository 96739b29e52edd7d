"""Verbs over many runs, and over runs already trained: compare, roadmap, rerun, sweep, watch, report, specialize."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moe_lab.cli import DONE, Json, _console, _print_json, app


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, stages or folders of runs; the control first.")
    ],
    target: Annotated[float, typer.Option(help='The loss of "epochs to the target loss".')] = 0.40,
    as_json: Json = False,
) -> int:
    """Differences from a control over paired seeds.

    Mean difference with its bootstrap interval, noise floor, verdict, and speed to the control's loss.
    """
    from moe_lab import comparison, frames

    paths = [path for run in runs for path in (frames.find_runs(run) if os.path.isdir(run) else [Path(run)])]
    if not paths:
        raise ValueError(f"there are no runs in {', '.join(runs)}")
    found = comparison.compare(paths, target)
    if as_json:
        _print_json({"comparisons": [comparison.as_dict(each) for each in found]})
    else:
        for each in found:
            comparison.render(each, _console())
    return DONE
