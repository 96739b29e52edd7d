"""Run directories -> Python: metrics.jsonl as polars frames, run.json and run.toml as dicts."""

import json
import platform
import re
import tomllib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from numpy.typing import NDArray

Place = str | Path

MAX_BYTES = 16 << 20  # of run.json, run.toml and stage.json
SETTLED = 10  # epochs of the mean that stands for a loss: one epoch alone is high or low by chance
QUICK = 10  # epochs that a quick run leaves of each phase
FORMAT = 1  # of run.json, stage.json and roadmap.json; a file without one is of the first

_LAYER = re.compile(r"moe/layer_(\d+)/")


class NewerFormatError(ValueError):
    """A file of a program that writes another layout than this one knows."""


def read_metrics(run: Place, kind: str | None = None) -> pl.DataFrame:
    """The stream of a run, one row per line of metrics.jsonl, columns of all kinds joined; `kind` keeps one kind.

    A last line that was cut off (a running or killed run) is left out.
    Raises FileNotFoundError without a stream, ValueError naming the line that is no JSON object.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is '{run}' the directory of a run?")
    told = path.stat()
    frame = _frame(path.resolve(), told.st_size, told.st_mtime_ns)
    return frame.clone() if kind is None else of_kind(frame, kind)


@lru_cache(maxsize=8)
def _frame(path: Path, _size: int, _changed: int) -> pl.DataFrame:
    """Steps are nearly all lines: the engine reads them into columns; every other line is parsed singly."""
    from moe_lab import _native  # here, so that figures of a frame need no compiled module

    pieces = _native.read_steps(str(path))
    others = [other for _, _, others in pieces for other in others]
    rows = [_row(path, place + 1, line) for place, line in others]
    steps = [_steps(places, columns) for places, columns, _ in pieces if places.size]
    return _join(rows, [place for place, _ in others], steps)


def _steps(places: "NDArray[np.uint64]", columns: dict[str, Any]) -> pl.DataFrame:
    series = [_series(name, *column) for name, column in columns.items()]
    return pl.DataFrame(series).with_columns(pl.Series("row", places.astype(np.int64)))


def _series(name: str, values: "NDArray[Any]", told: bool | list[str]) -> pl.Series:
    """A column of steps: numbers (NaN: none) with whether they are integers, or codes with their texts."""
    if isinstance(told, list):
        texts = pl.Series(name, [*told, None], dtype=pl.String)
        return texts.gather(np.minimum(values, len(told)))
    numbers = pl.Series(name, values, nan_to_null=True)
    return numbers.cast(pl.Int64) if told and numbers.null_count() < len(numbers) else numbers


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    return [_row(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: this is no JSON object; the file was damaged or edited")
    return row


def frame_of(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """Metric rows (as a Trainer yields them) -> one frame with the union of their columns, absent values null."""
    listed = list(rows)
    return _join(listed, range(len(listed)), [])


def _join(rows: Iterable[dict[str, Any]], places: Iterable[int], steps: list[pl.DataFrame]) -> pl.DataFrame:
    """Rows with their places in the stream, and frames of its steps (with a column "row") -> one frame in order."""
    by_kind: dict[Any, list[dict[str, Any]]] = {}
    for place, row in zip(places, rows, strict=True):
        by_kind.setdefault(row.get("kind"), []).append({**row, "row": place})
    parts = [_numbers(pl.DataFrame(part, infer_schema_length=None, strict=False)) for part in by_kind.values()]
    parts += steps
    if not parts:
        return pl.DataFrame(schema={"step": pl.Int64, "kind": pl.String, "phase": pl.String, "epoch": pl.Int64})
    if len(parts) == 1:
        return parts[0].drop("row")
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
    if not path.exists() and (runs := find_runs(run)):
        raise ValueError(f"'{run}' holds many runs: name one of them, {runs[0]} say")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is '{run}' the directory of a run?")
    return json_object(path)


def status(run: Place) -> str:
    """What run.json says, or "killed" where it says running and the process that trained it is gone."""
    said = str(read_run(run).get("status"))
    return "killed" if said == "running" and _is_gone(Path(run) / "run.lock") else said


def _is_gone(lock: Path) -> bool:
    """Whether the owner that a run.lock names was a process of this machine and is no more; an owner who ended as he
    should leaves it empty."""
    try:
        with lock.open("rb") as file:
            owner = file.read(300).decode(errors="replace")
    except OSError:
        return False
    found = re.match(r"(\d+) on (\S+) since \S+ \(boot (\S+)\)", owner)
    if found is None or found[2] != platform.node():
        return False
    boot = Path("/proc/sys/kernel/random/boot_id")
    return not Path("/proc", found[1]).exists() or (boot.exists() and boot.read_text().strip() != found[3])


def json_object(path: Path) -> dict[str, Any]:
    """A small JSON file of a run or stage directory, which may be a stranger's. Raises ValueError in one sentence."""
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    found = data.get("format")
    if isinstance(found, int) and found > FORMAT:
        written = f"written by a newer moe_lab (format {found}, this one reads {FORMAT})"
        raise NewerFormatError(f"{path} was {written}: update moe_lab")
    return data


def replace_json(path: Path, record: dict[str, Any]) -> None:
    """Replaces a JSON file in one step, so that a reader or a kill never sees half of it."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n")
    half.replace(path)


def settings(run: Place) -> dict[str, Any]:
    """run.toml: the resolved configuration of a run."""
    path = Path(run) / "run.toml"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is '{run}' the directory of a run?")
    try:
        return tomllib.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML ({error})") from error


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _text(path: Path) -> str:
    """The text of a file; never more than the largest size of such a file is read."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    return data.decode()


def phase_epochs(config: dict[str, Any]) -> dict[str, int]:
    """Epochs per phase of a two-phase run: `[phase.X.train] epochs` before `[train] epochs`, fewer in a quick run."""
    common, phases = config.get("train", {}).get("epochs", 0), config.get("phase", {})
    whole = {phase: int(phases.get(phase, {}).get("train", {}).get("epochs", common)) for phase in ("facts", "chat")}
    return {phase: min(epochs, QUICK) for phase, epochs in whole.items()} if config.get("quick") else whole


def text_updates(config: dict[str, Any]) -> int | None:
    """Updates of a run on a plain text, a tenth of them in a quick one; None for one on documents."""
    if not config.get("data", {}).get("text"):
        return None
    whole = int(config.get("train", {}).get("max_steps", 0))
    return -(-whole // 10) if config.get("quick") else whole


def sparse_layers(frame: pl.DataFrame) -> list[int]:
    """Indices of the blocks with experts, from the column names."""
    return sorted({int(match[1]) for name in frame.columns if (match := _LAYER.match(name))})


def is_of_text(frame: pl.DataFrame) -> bool:
    """Whether a stream is of a run on a plain text."""
    return "phase" in frame.columns and "text" in frame["phase"]


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


def settled_loss(frame: pl.DataFrame) -> float | None:
    """Mean loss of the last SETTLED epochs of the last phase; None where it has less than twice as many."""
    if not {"phase", "epoch/loss"} <= set(frame.columns):
        return None
    ends = frame.filter(pl.col("epoch/loss").is_not_null())
    losses = ends.filter(pl.col("phase") == pl.col("phase").last())["epoch/loss"].cast(pl.Float64)
    return losses.tail(SETTLED).mean() if len(losses) >= 2 * SETTLED else None  # type: ignore[return-value]


def failure(run: Place) -> dict[str, Any] | None:
    """failure.json: step, reason and remedy of a run that ended before its time; None for a healthy one."""
    path = Path(run) / "failure.json"
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def is_run(path: Place) -> bool:
    return (Path(path) / "run.json").is_file()


def has_begun(run: Place) -> bool:
    """Whether a run has trained a step."""
    stream = Path(run) / "metrics.jsonl"
    return stream.exists() and "kind" in (rows := read_metrics(run)).columns and "train" in rows["kind"]


def is_stage(path: Place) -> bool:
    return (Path(path) / "stage.json").is_file()


def is_roadmap(path: Place) -> bool:
    return (Path(path) / "roadmap.json").is_file()


def holds_seeds(path: Place) -> bool:
    """Whether a directory holds runs of one model with several seeds."""
    return is_stage(path) or is_roadmap(path)


def find_runs(folder: Place) -> list[Path]:
    """Run directories in a folder or in the stage directories in it, oldest name first."""
    root = Path(folder)
    if is_run(root):
        return [root]
    found = {path.parent for pattern in ("*/run.json", "*/*/run.json") for path in root.glob(pattern)}
    return sorted(found)


def newest_run(place: Place) -> Path:
    """A run directory itself; in a stage or roadmap the run whose stream grew last."""
    root = Path(place)
    streams = [path / "metrics.jsonl" for path in find_runs(root)] if holds_seeds(root) else []
    written = [stream for stream in streams if stream.exists()]
    return max(written, key=lambda stream: stream.stat().st_mtime_ns).parent if written else root


def samples(run: Place) -> list[dict[str, Any]]:
    """The rows of samples.jsonl: step, phase, epoch, prompt, text; none where there is no such file."""
    path = Path(run) / "samples.jsonl"
    return _rows(path) if path.exists() else []


def last_sample(run: Place) -> tuple[str, str] | None:
    """Prompt and text of the first prompt in its newest sample (samples.jsonl), None where there is none."""
    rows = samples(run)
    newest = [row for row in rows if row["prompt"] == rows[0]["prompt"]]
    return (newest[-1]["prompt"], newest[-1]["text"]) if newest else None
