"""Sweeps with a laboratory that writes hand-made runs: every value and seed, what is given up, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_lab import sweep
from moe_lab.terminal import assignment as parse
from test_stages import FakeLab, Outcome
from tiny import TINY, write_data

pytest.importorskip("optuna")


@dataclass
class Lab(FakeLab):
    """The loss is the p of the run: a smaller p is better."""

    def run_training(self, run: Any, out: str | None = None, parent: str | None = None) -> Outcome:
        self.losses[Path(str(out)).name] = float(run.overrides["model.router.p"])
        return super().run_training(run, out, parent)


def silent(text: str) -> None: ...


def make(out: Path, lab: FakeLab, **changes: Any) -> sweep.Sweep:
    plan = sweep.Plan("stage1", {"model.router.p": "0.3,0.4,0.5"}, seeds=(1, 2))
    return sweep.Sweep(replace(plan, **changes), out, lab, parse, silent)


def test_every_value_is_trained_with_every_seed_and_the_best_stands_first(tmp_path: Path) -> None:
    lab = Lab()
    study = make(tmp_path / "s", lab)
    assert sweep.run(study) is None
    assert sorted(lab.trained) == [f"p-{p}-seed{seed}" for p in (0.3, 0.4, 0.5) for seed in (1, 2)]
    rows = sweep.rows(study)
    assert [row["values"] for row in rows] == [{"model.router.p": p} for p in (0.3, 0.4, 0.5)]
    assert rows[0]["measured"] == [0.3, 0.3]
    console = Console(record=True, width=120)
    sweep.render(study, console)
    assert "0.3000 ± 0.0000" in console.export_text()


def test_a_stopped_sweep_goes_on_and_trains_nothing_twice(tmp_path: Path) -> None:
    first = Lab(stop_at="p-0.4-seed2")
    assert sweep.run(make(tmp_path / "s", first)) == 2
    # The process that was stopped is this one, which lives: as if it were gone.
    again = Lab()
    study = make(tmp_path / "s", again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_alive", lambda pid: False)
        assert sweep.run(study) is None
    assert set(first.trained) & set(again.trained) == set()
    assert "resumed p-0.4-seed2" in again.trained
    assert [row["state"] for row in sweep.rows(study)] == ["complete"] * 3
    third = Lab()
    assert sweep.run(make(tmp_path / "s", third)) is None
    assert third.trained == []


def test_a_configuration_that_diverges_is_shown_and_the_others_go_on(tmp_path: Path) -> None:
    lab = Lab(diverge="p-0.3-seed1")
    study = make(tmp_path / "s", lab)
    assert sweep.run(study) is None
    states = {row["values"]["model.router.p"]: row["state"] for row in sweep.rows(study)}
    assert states[0.3].startswith("FAILED (diverged")
    assert (states[0.4], states[0.5]) == ("complete", "complete")
    assert sweep.run(make(tmp_path / "s", (again := Lab()))) is None
    assert again.trained == []


def test_what_is_worse_than_the_median_is_given_up_after_a_seed(tmp_path: Path) -> None:
    lab = Lab()
    study = make(tmp_path / "s", lab, space={"model.router.p": "0.30,0.31,0.32,0.33,0.9"}, prune=True, seeds=(1, 2))
    sweep.run(study)
    rows = sweep.rows(study)
    given_up = [row for row in rows if row["state"] == "given up"]
    assert len([row for row in rows if row["state"] == "complete"]) >= sweep.STARTUP
    assert all(len(row["measured"]) == 1 for row in given_up)
    assert len(lab.trained) == 10 - len(given_up)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_ranges_are_sampled(tmp_path: Path, sampler: str) -> None:
    space = {"model.router.p": "0.2..0.6", "train.learning_rate": "1e-4..1e-2:log"}
    study = make(tmp_path / "s", Lab(), space=space, sampler=sampler, trials=4, seeds=(1,))
    assert sweep.run(study) is None
    rows = sweep.rows(study)
    assert len(rows) == 4
    assert all(0.2 <= row["values"]["model.router.p"] <= 0.6 for row in rows)
    assert len({row["values"]["train.learning_rate"] for row in rows}) == 4


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"space": {}}, "nothing to sweep"),
    ({"sampler": "gird"}, "must be one of grid, random, tpe"),
    ({"metric": "los"}, "must be one of loss"),
    ({"space": {"model.router.p": "0.1..0.5"}}, "a grid has no points"),
    ({"space": {"model.router.p": "0.1..0.5"}, "sampler": "tpe"}, "--trials N"),
    ({"space": {"model.router.p": "0.5..0.1"}, "sampler": "tpe", "trials": 2}, "low < high"),
    ({"space": {"model.router.p": "a..b"}, "sampler": "tpe", "trials": 2}, "is no range"),
    ({"space": {"model.router.p": "0.4,1.5"}}, r"is not in \(0, 1\]"),
    ({"prune": True, "seeds": (1,)}, "--seeds 2"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        sweep.run(make(tmp_path / "s", Lab(), **changes))
    assert not (tmp_path / "s").exists()


def test_another_sweep_is_not_mixed_in(tmp_path: Path) -> None:
    sweep.run(make(tmp_path / "s", Lab(), seeds=(1,)))
    with pytest.raises(ValueError, match="holds another sweep"):
        sweep.run(make(tmp_path / "s", Lab(), seeds=(1, 2)))


def test_values_and_fixed_settings_are_told_apart() -> None:
    texts = [
        "model.router.p=0.3,0.4",
        "train.epochs=5",
        'eval.samples=["a, b", "c"]',
        "train.learning_rate=1e-4..1e-3:log",
    ]
    space, fixed = sweep.split(texts, parse)
    assert set(space) == {"model.router.p", "train.learning_rate"}
    assert fixed == {"train.epochs": 5, "eval.samples": ["a, b", "c"]}
    assert sweep.values_of("k", "0.3,0.4", parse) == (0.3, 0.4)
    assert sweep.values_of("k", "adam,sgd", parse) == ("adam", "sgd")
    assert sweep.values_of("k", "1e-4..1e-3:log", parse) == sweep.Range(1e-4, 1e-3, True)


@pytest.mark.full
def test_a_killed_sweep_of_two_processes_goes_on_and_ends_with_every_run(tmp_path: Path) -> None:
    sets = [text for key, value in write_data(tmp_path).items() for text in ("--set", f'{key}="{value}"')]
    (tmp_path / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "moe_lab", "sweep", "tiny.toml", "--set", "model.router.p=0.3,0.5,0.7", *sets]
    command += ["--seeds", "2", "--jobs", "2", "--set", "train.epochs=60", "--out", "s", "--json"]
    going = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "s").glob("*/run.json"))) < 2:
        time.sleep(0.05)
    children = Path(f"/proc/{going.pid}/task/{going.pid}/children").read_text().split()
    for number in (going.pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    going.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert [(row["state"], len(row["measured"])) for row in rows] == [("complete", 2)] * 3
    assert len(list((tmp_path / "s").glob("*/run.json"))) == 6
