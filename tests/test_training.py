"""Real training of a tiny model through the bindings: it learns, resumes and repeats to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab import frames, gates, plots
from tiny import TINY, write_data

TIMES = {"ts", "train/dt", "train/tok_per_sec"}


def trained(folder: Path, stop_after: int | None = None, **overrides: Any) -> Path:
    """Trains TINY with overrides (`train__epochs=3`) into `folder`; stops after a number of steps."""
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    run = moe_lab.Run.parse(TINY, write_data(folder.parent / "data") | keys)
    trainer = moe_lab.Trainer(run, out=str(folder))
    for row in trainer:
        if row["kind"] == "train" and row["step"] == stop_after:
            trainer.stop()
            break
    return folder


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "latest" / "model.safetensors").read_bytes()


def stream(run: Path) -> list[dict[str, Any]]:
    """The rows without times and without the events of stopping and resuming."""
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row.keys() - TIMES} for row in rows if row["kind"] not in ("event", "system")]


def losses(run: Path, phase: str = "chat") -> list[float]:
    rows = frames.epochs(frames.read_metrics(run))
    return rows.filter(rows["phase"] == phase)["epoch/loss"].to_list()


def test_twenty_lines_are_learnt_in_a_few_epochs(tmp_path: Path) -> None:
    for phase in ("facts", "chat"):
        curve = losses(trained(tmp_path / phase), phase)
        assert len(curve) == 5
        assert curve[-1] < 0.7 * curve[0]


def test_nothing_is_learnt_at_rate_zero(tmp_path: Path) -> None:
    curve = losses(trained(tmp_path / "run", train__learning_rate=0.0))
    assert curve == pytest.approx([curve[0]] * 5, rel=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert weights(first) == weights(second)
    assert stream(first) == stream(second)
    assert weights(trained(tmp_path / "c", seed=2)) != weights(first)


def test_one_and_two_threads_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = trained(tmp_path / "one", threads=1), trained(tmp_path / "two", threads=2)
    assert weights(one) == weights(two)
    assert stream(one) == stream(two)


@pytest.mark.parametrize("step", [3, 25, 33])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, step: int) -> None:
    whole = trained(tmp_path / "whole")
    parts = trained(tmp_path / "parts", stop_after=step)
    assert frames.read_run(parts)["status"] == "stopped"
    trainer = moe_lab.Trainer.resume(str(parts))
    assert trainer.step == step
    for _ in trainer:
        pass
    assert frames.read_run(parts)["status"] == "completed"
    assert weights(parts) == weights(whole)
    assert stream(parts) == stream(whole)


def test_resuming_a_complete_run_changes_nothing(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    trainer = moe_lab.Trainer.resume(str(run))
    assert trainer.done
    assert list(trainer) == []
    del trainer
    assert {path: path.read_bytes() for path in before} == before


def test_rows_from_the_iterator_are_those_of_the_file(tmp_path: Path) -> None:
    run = moe_lab.Run.parse(TINY, write_data(tmp_path))
    rows = list(moe_lab.Trainer(run, out=str(tmp_path / "run")))
    assert rows == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_stream_and_the_record_are_complete(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    frame = moe_lab.read_metrics(run)
    assert {"train", "eval", "moe", "event"} <= set(frame["kind"].unique())
    assert frames.sparse_layers(frame) == [0, 1]
    last = frames.last_epoch(frame)
    for layer in (0, 1):
        assert sum(last[f"moe/layer_{layer:02}/load"]) == pytest.approx(1.0)
        assert 1.0 <= last[f"moe/layer_{layer:02}/experts_per_token"] <= 4.0
    results = frames.read_run(run)["results"]
    assert results["loss"] == pytest.approx(losses(run)[-1])
    assert results["excess"] == pytest.approx(results["loss"] - results["floor"])
    assert results["experts_per_token"] == pytest.approx(last["moe/experts_per_token"])
    assert results["recite_total"] == 20


def test_a_short_run_fails_its_gate_and_can_be_drawn(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    verdict = gates.judge(run)
    assert verdict.gate == "stage1"
    assert "completes" in {each.name for each in verdict.criteria if not each.passed}
    assert all(each.measured is not None for each in verdict.criteria)
    assert len(plots.save_all(run)) == len(plots.FIGURES)


def missed(run: Path) -> set[str]:
    return {each.name for each in gates.judge(run).criteria if not each.passed}


def test_a_frozen_router_is_caught_on_a_real_run(tmp_path: Path) -> None:
    assert "router learns" in missed(trained(tmp_path / "run", model__router__frozen=True))


def test_a_dead_uniform_router_is_caught_on_a_real_run_although_its_mean_is_two(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", model__router__frozen=True, model__router__init_std=0.0)
    assert frames.read_run(run)["results"]["experts_per_token"] == 2.0
    found = missed(run)
    assert found >= {"spread of experts per token", "every expert used", "experts informative", "router learns"}
    assert "experts per token" not in found


def test_a_router_collapsed_onto_one_expert_is_caught_on_a_real_run(tmp_path: Path) -> None:
    """A pressure towards certainty without balance: every token ends with one expert."""
    keys = {"losses__entropy": 20.0, "losses__balance": 0.0, "train__epochs": 15}
    found = missed(trained(tmp_path / "run", **keys))
    assert found >= {"experts per token", "spread of experts per token", "every expert used"}
