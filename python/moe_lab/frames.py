"""Run directories -> Python: metrics.jsonl as polars frames, run.json and run.toml as dicts; nothing compiled here."""

import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

Place = str | Path

_LAYER = re.compile(r"moe/layer_(\d+)/")


def read_metrics(run: Place, kind: str | None = None) -> pl.DataFrame:
    """The stream of a run, one row per line of metrics.jsonl, columns of all kinds joined; `kind` keeps one kind.

    A last line that was cut off (a running or killed run) is left out.
    Raises FileNotFoundError without a stream, ValueError naming the line that is no JSON object.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is '{run}' the directory of a run?")
    frame = frame_of(_rows(path))
    return frame if kind is None else of_kind(frame, kind)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: this is no JSON object; the file was damaged or edited")
        rows.append(row)
    return rows


def frame_of(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """Metric rows (as a Trainer yields them) -> one frame with the union of their columns, absent values null."""
    by_kind: dict[Any, list[dict[str, Any]]] = {}
    listed = [{**row, "row": index} for index, row in enumerate(rows)]
    for row in listed:
        by_kind.setdefault(row.get("kind"), []).append(row)
    if not by_kind:
        return pl.DataFrame(schema={"step": pl.Int64, "kind": pl.String, "phase": pl.String, "epoch": pl.Int64})
    parts = [_numbers(pl.DataFrame(part, infer_schema_length=None, strict=False)) for part in by_kind.values()]
    return pl.concat(parts, how="diagonal_relaxed").sort("row").drop("row")


def _numbers(frame: pl.DataFrame) -> pl.DataFrame:
    """A measure that was never finite is a column of nulls: it stays a column of numbers."""
    return frame.with_columns(pl.col(pl.Null).cast(pl.Float64))


def of_kind(frame: pl.DataFrame, kind: str) -> pl.DataFrame:
    """The rows of one kind ("train", "eval", "moe", "system", "event") without the columns of the others."""
    rows = frame.filter(pl.col("kind") == kind)
    return rows.select(column for column in rows if column.null_count() < rows.height)


def read_run(run: Place) -> dict[str, Any]:
    """run.json. Raises FileNotFoundError or ValueError in one sentence."""
    path = Path(run) / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is '{run}' the directory of a run?")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def settings(run: Place) -> dict[str, Any]:
    """run.toml: the resolved configuration of a run."""
    path = Path(run) / "run.toml"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is '{run}' the directory of a run?")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML ({error})") from error


def phase_epochs(config: dict[str, Any]) -> dict[str, int]:
    """Epochs per phase of a two-phase run: `[phase.X.train] epochs` before `[train] epochs`."""
    common = config.get("train", {}).get("epochs", 0)
    return {
        phase: int(config.get("phase", {}).get(phase, {}).get("train", {}).get("epochs", common))
        for phase in ("facts", "chat")
    }


def sparse_layers(frame: pl.DataFrame) -> list[int]:
    """Indices of the blocks with experts, from the column names."""
    return sorted({int(match[1]) for name in frame.columns if (match := _LAYER.match(name))})


def epochs(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per epoch in the order they were trained: the epoch-end measures (kinds eval and moe) as they stand in
    the stream, and the mean over the epoch's steps of the numbers of kind train. `index` counts on across phases.
    """
    keys = ["phase", "epoch"]
    if "phase" not in frame.columns:
        return pl.DataFrame(schema={"index": pl.Int64, "phase": pl.String, "epoch": pl.Int64})
    rows = frame.filter(pl.col("phase").is_not_null() & pl.col("epoch").is_not_null())
    parts = [rows.group_by(keys, maintain_order=True).agg(pl.col("step").max())]
    for kind in ("train", "eval", "moe"):
        part = of_kind(rows, kind)
        names = [name for name in part.columns if "/" in name]
        if kind == "train":
            names = [name for name in names if part.schema[name].is_numeric()]
            measures = [pl.col(name).mean() for name in names]
        else:
            measures = [pl.col(name).drop_nulls().last() for name in names]
        if names:
            parts.append(part.group_by(keys, maintain_order=True).agg(measures))
    joined = parts[0]
    for part in parts[1:]:
        new = [name for name in part.columns if name in keys or name not in joined.columns]
        old = [name for name in part.columns if name not in new]
        # A measure of the epoch's end (moe/experts_per_token) stands before the mean of the same name over the steps.
        joined = joined.drop(old).join(part, on=keys, how="left", maintain_order="left")
    return joined.with_row_index("index", offset=1)


def last_epoch(frame: pl.DataFrame, phase: str = "chat") -> dict[str, Any]:
    """The measures of the last epoch of a phase; empty when it has none."""
    rows = epochs(frame).filter(pl.col("phase") == phase)
    return rows.row(-1, named=True) if rows.height else {}


def is_run(path: Place) -> bool:
    return (Path(path) / "run.json").is_file()


def is_stage(path: Place) -> bool:
    return (Path(path) / "stage.json").is_file()


def find_runs(folder: Place) -> list[Path]:
    """Run directories in a folder or in the stage directories in it, oldest name first."""
    root = Path(folder)
    if is_run(root):
        return [root]
    found = {path.parent for pattern in ("*/run.json", "*/*/run.json") for path in root.glob(pattern)}
    return sorted(found)


def last_sample(run: Place) -> tuple[str, str] | None:
    """Prompt and text of the first prompt in its newest sample (samples.jsonl), None where there is none."""
    path = Path(run) / "samples.jsonl"
    if not path.exists():
        return None
    samples = _rows(path)
    newest = [row for row in samples if row["prompt"] == samples[0]["prompt"]]
    return (newest[-1]["prompt"], newest[-1]["text"]) if newest else None
