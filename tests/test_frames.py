"""Reading run directories: whole lines only, exact numbers, one row per epoch."""

import json
import os
import shutil
import time
from pathlib import Path

import polars as pl
import pytest

import moe_lab
from moe_lab import frames
from runs import DENSE, Story, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", Story(epochs=4, trained=4))


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_row_and_every_number_of_the_stream_is_there(run: Path) -> None:
    frame = moe_lab.read_metrics(run)
    rows = lines(run)
    assert frame.height == len(rows)
    for row, read in zip(rows, frame.iter_rows(named=True), strict=True):
        assert {name: read[name] for name in row} == row
        assert all(read[name] is None for name in read.keys() - row.keys())


def test_one_kind_has_only_its_own_columns(run: Path) -> None:
    train = frames.read_metrics(run, "train")
    assert train.height == 16
    assert "train/loss" in train.columns
    assert not [name for name in train.columns if name.startswith(("epoch/", "moe/"))]


def test_a_line_that_was_cut_off_is_left_out(run: Path) -> None:
    whole = frames.read_metrics(run)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 99, "kind": "tr')
    assert frames.read_metrics(run).equals(whole)


def test_a_damaged_line_is_named(run: Path) -> None:
    stream = run / "metrics.jsonl"
    broken = stream.read_text().splitlines()
    broken[2] = broken[2][:10]
    stream.write_text("\n".join(broken) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: "):
        frames.read_metrics(run)


def test_numbers_that_were_not_finite_are_null_in_a_column_of_numbers(run: Path) -> None:
    frame = frames.frame_of([{"step": 1, "kind": "train", "train/loss": None, "nonfinite": ["train/loss"]}])
    assert frame.schema["train/loss"] == pl.Float64
    assert frame["nonfinite"].to_list() == [["train/loss"]]


def test_whole_numbers_among_floats_stay_numbers() -> None:
    rows = [{"step": step, "kind": "train", "train/loss": value} for step, value in enumerate([1, 0.5, 2])]
    assert frames.frame_of(rows)["train/loss"].to_list() == [1.0, 0.5, 2.0]


def test_a_run_without_metrics_gives_an_empty_frame(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    frame = frames.read_metrics(tmp_path)
    assert frame.height == 0
    assert frames.epochs(frame).height == 0
    assert frames.last_epoch(frame) == {}


def test_epochs_have_one_row_each_with_the_mean_of_their_steps(run: Path) -> None:
    rows = frames.epochs(frames.read_metrics(run))
    assert rows["index"].to_list() == list(range(1, 9))
    assert rows["phase"].to_list() == ["facts"] * 4 + ["chat"] * 4
    third = [row for row in lines(run) if (row.get("phase"), row.get("epoch")) == ("chat", 3)]
    steps = [row["train/loss"] for row in third if row["kind"] == "train"]
    assert rows["train/loss"][6] == pytest.approx(sum(steps) / len(steps))
    assert rows["epoch/loss"][6] == next(row["epoch/loss"] for row in third if row["kind"] == "eval")
    assert rows["moe/layer_02/load"][6].to_list() == next(
        row["moe/layer_02/load"] for row in third if row["kind"] == "moe"
    )


def test_the_measure_of_the_epochs_end_beats_the_mean_of_the_same_name() -> None:
    place = {"phase": "chat", "epoch": 1, "step": 1}
    rows = [
        {**place, "kind": "train", "moe/experts_per_token": 3.0},
        {**place, "kind": "moe", "moe/experts_per_token": 2.0},
    ]
    assert frames.last_epoch(frames.frame_of(rows))["moe/experts_per_token"] == 2.0


def test_sparse_layers_come_from_the_columns(tmp_path: Path, run: Path) -> None:
    assert frames.sparse_layers(frames.read_metrics(run)) == [0, 1, 2]
    dense = write(tmp_path / "dense", Story(router=DENSE, epochs=2, trained=2))
    assert frames.sparse_layers(frames.read_metrics(dense)) == []


def test_epochs_of_a_phase_stand_before_the_common_ones() -> None:
    config = {"train": {"epochs": 100}, "phase": {"chat": {"train": {"epochs": 7}}}}
    assert frames.phase_epochs(config) == {"facts": 100, "chat": 7}
    assert frames.phase_epochs({**config, "quick": True}) == {"facts": 10, "chat": 7}
    assert frames.text_updates(config) is None
    text = {"data": {"text": "t"}, "train": {"max_steps": 15}}
    assert [frames.text_updates({**text, "quick": quick}) for quick in (False, True)] == [15, 2]


def test_what_is_no_run_is_said_in_one_sentence(tmp_path: Path) -> None:
    for read in (frames.read_metrics, frames.read_run, frames.settings):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read(tmp_path / "nothing")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is no JSON"):
        frames.read_run(tmp_path)
    (tmp_path / "run.toml").write_text("a = ")
    with pytest.raises(ValueError, match=r"run\.toml is no TOML"):
        frames.settings(tmp_path)


def test_what_a_newer_program_wrote_is_refused_and_what_has_no_format_is_read(tmp_path: Path) -> None:
    run = write(tmp_path / "run", Story(epochs=1, trained=1))
    record = frames.read_run(run)
    assert "format" not in record
    (run / "run.json").write_text(json.dumps({**record, "format": frames.FORMAT}))
    assert frames.read_run(run)["id"] == record["id"]
    (run / "run.json").write_text(json.dumps({"format": 2}))
    for read in (frames.read_run, frames.status):
        with pytest.raises(
            ValueError, match=r"run\.json was written by a newer moe_lab \(format 2, this one reads 1\)"
        ):
            read(run)


def test_a_replaced_file_says_its_format(tmp_path: Path) -> None:
    frames.replace_json(tmp_path / "stage.json", {"stage": "stage1"})
    assert frames.json_object(tmp_path / "stage.json") == {"format": 1, "stage": "stage1"}
    frames.replace_json(tmp_path / "stage.json", {"format": 2})
    with pytest.raises(frames.NewerFormatError, match=r"stage\.json was written by a newer moe_lab"):
        frames.json_object(tmp_path / "stage.json")


def test_runs_are_found_in_a_folder_and_in_its_stages(tmp_path: Path) -> None:
    alone = write(tmp_path / "a", Story(epochs=1, trained=1))
    staged = write(tmp_path / "stage" / "b", Story(epochs=1, trained=1))
    assert frames.find_runs(tmp_path) == [alone, staged]
    assert frames.find_runs(alone) == [alone]


def test_steps_with_names_of_their_own_lose_none(run: Path) -> None:
    """Most steps are read by the names of the first; one that has another name must still be read whole."""
    rows = lines(run)
    steps = [row for row in rows if row["kind"] == "train"]
    steps[5]["train/spike"] = 1.5
    steps[6]["train/loss"] = None
    steps[6]["nonfinite"] = ["train/loss"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame = frames.read_metrics(run)
    for row, read in zip(rows, frame.iter_rows(named=True), strict=True):
        assert {name: read[name] for name in row} == row


def test_the_fast_reader_and_the_plain_one_agree(run: Path) -> None:
    fast = frames.read_metrics(run)
    plain = frames.frame_of(lines(run))
    assert fast.equals(plain.select(fast.columns))
    assert fast.schema == {name: plain.schema[name] for name in fast.columns}


@pytest.mark.full
def test_a_hundred_thousand_steps_are_read_in_a_second(tmp_path: Path) -> None:
    """62 measures a step, 2 kB a line, 200 MB, and an epoch's end every 60 steps. The best of five: other programs may
    be at work.
    """
    names = [f"grad/layer_{layer:02}/{norm}" for layer in range(15) for norm in ("param_norm", "activation_norm")]
    names += [f"update/layer_{layer:02}/ratio" for layer in range(15)] + [f"losses/some_{i}" for i in range(11)]
    place = {"step": 1, "ts": 1795259707.067972, "tokens": 95}
    row = {**place, "kind": "train", "phase": "text", "epoch": 1}
    row |= {name: 0.0123456 * (index + 1) for index, name in enumerate(names)}
    end = {**place, "kind": "moe", "phase": "text", "epoch": 1, "moe/layer_00/load": [0.0625] * 16}
    step, last = (json.dumps(line, separators=(",", ":")) + "\n" for line in (row, end))
    (tmp_path / "metrics.jsonl").write_text((step * 60 + last) * 1667)
    seconds = []
    for _ in range(5):
        frames._frame.cache_clear()
        start = time.perf_counter()
        assert frames.read_metrics(tmp_path).height == 61 * 1667
        seconds.append(time.perf_counter() - start)
    print(f"100,000 steps: {min(seconds):.2f} s")
    assert min(seconds) < 1.0


def test_of_a_stage_the_run_that_wrote_last_is_watched_and_the_others_are_named(tmp_path: Path) -> None:
    out = tmp_path / "stage"
    runs = [write(out / f"run-seed{seed}", Story(seed=seed)) for seed in (1, 2)]
    assert frames.newest_run(out) == out  # a folder of runs is no stage
    (out / "stage.json").write_text("{}")
    os.utime(runs[0] / "metrics.jsonl")
    os.utime(runs[1] / "metrics.jsonl", (1.0, 1.0))
    assert frames.newest_run(out) == runs[0]
    assert frames.newest_run(runs[1]) == runs[1]
    with pytest.raises(ValueError, match=rf"'{out}' holds many runs: name one of them, {runs[0]} say"):
        frames.read_run(out)
    shutil.rmtree(out)
    with pytest.raises(FileNotFoundError, match=r"is '.*' the directory of a run"):
        frames.read_run(frames.newest_run(out))


def test_a_stream_that_has_grown_is_read_anew(run: Path) -> None:
    before = frames.read_metrics(run).height
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 99, "kind": "event", "event": "spike"}\n')
    assert frames.read_metrics(run).height == before + 1


def test_compact_lines_of_the_engine_are_read_by_columns_and_odd_ones_singly(run: Path) -> None:
    rows = lines(run)
    steps = [row for row in rows if row["kind"] == "train"]
    steps[3]["train/loss"] = None
    steps[4]["phase"] = 'a "quoted", odd\\ phase'
    steps[5] = {**steps[5], "train/l0": 3}
    rows.insert(0, {"step": 0, "kind": "train"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    frame = frames.read_metrics(run)
    assert frame.height == len(rows)
    for row, read in zip(rows, frame.iter_rows(named=True), strict=True):
        assert {name: read[name] for name in row} == row
