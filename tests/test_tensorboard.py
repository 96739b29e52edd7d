"""Event files are read back by the format's own reader: one value a step and measure, those of the stream."""

import struct
from pathlib import Path

import polars as pl
import pytest

from moe_lab import frames, tensorboard
from runs import Story, write

pytest.importorskip("tensorboardX")


def read(folder: Path) -> list[tuple[str, int, float]]:
    """The scalars of the event files in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_value_of_the_stream_is_there_once(tmp_path: Path) -> None:
    run = write(tmp_path / "run", Story(epochs=2, trained=2))
    tensorboard.export(run)
    folder, count = tensorboard.export(run)  # a second time: nothing stands there twice
    scalars = read(folder)
    assert len(scalars) == count
    assert len({(tag, step) for tag, step, _ in scalars}) == count
    frame = frames.read_metrics(run, "train")
    wanted = dict(frame.select("step", "train/loss").iter_rows())
    assert {step: value for tag, step, value in scalars if tag == "train/loss"} == pytest.approx(wanted)
    layers = frames.read_metrics(run).filter(pl.col("moe/layer_00/experts_per_token").is_not_null()).height
    assert len([tag for tag, _, _ in scalars if tag == "moe/layer_00/experts_per_token"]) == layers


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics yet"):
        tensorboard.export(tmp_path)
