"""A run's metrics as TensorBoard event files, through tensorboardX (which needs neither TensorFlow nor torch)."""

from math import isfinite
from pathlib import Path
from shutil import rmtree

from moe_lab import frames


def export(run: frames.Place) -> tuple[Path, int]:
    """Writes every number of the stream into RUN/tb, one value a step and measure. Returns the folder and how many.

    What lay there is replaced, so that a resumed run shows no two values at a step.
    """
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("TensorBoard files need tensorboardX: pip install 'tensorboardX>=2.6'") from None
    frame = frames.read_metrics(run)
    if not frame.height:
        raise ValueError(f"the run '{run}' has written no metrics yet")
    folder, count = Path(run) / "tb", 0
    rmtree(folder, ignore_errors=True)
    names = [name for name in frame.columns if "/" in name and frame.schema[name].is_numeric()]
    with SummaryWriter(str(folder)) as writer:
        for name in names:
            known = frame.filter(frame[name].is_not_null()).select("step", "ts", name).unique("step", keep="last")
            for step, ts, value in known.sort("step").iter_rows():
                if isfinite(value):
                    writer.add_scalar(name, value, step, walltime=ts)
                    count += 1
    return folder, count
