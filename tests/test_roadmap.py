"""The roadmap with a laboratory that writes hand-made runs: order, gates, where it stops, how it goes on."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from moe_lab import gates, jobs, roadmap, stages, tables, verbs
from runs import Story, write
from sleeper import note
from test_stages import FakeLab

PLAN = roadmap.Plan(seeds=(1, 2), overrides={"model.router.p": 0.4})
TRAINED = [step.name for step in roadmap.steps().values() if step.role != "study"]
ORDER = [f"{step}-seed{seed}" for step in TRAINED for seed in (1, 2)]


def silent(text: str) -> None: ...


def test_every_milestone_that_has_runs_is_trained_in_order_and_judged(tmp_path: Path) -> None:
    lab = FakeLab()
    result = roadmap.run(PLAN, tmp_path / "road", lab, silent)
    assert lab.trained == ORDER
    assert lab.parents["stage1-seed2"] == "baseline-seed2"
    assert result.failed is None
    words = {name: verdict.word for name, verdict in result.verdicts.items()}
    assert words == dict.fromkeys(roadmap.steps(), "passed")
    parent = next(each for each in result.verdicts["stage1"].criteria if each.name == gates.PARENT)
    assert parent.why.endswith("+0.0000, +0.0000")
    assert json.loads((tmp_path / "road" / "roadmap.json").read_text())["status"] == "completed"


def test_it_stops_at_the_first_gate_that_fails_and_says_what_failed(tmp_path: Path) -> None:
    lab = FakeLab(losses={"baseline-seed2": 0.55})
    result = roadmap.run(PLAN, tmp_path / "road", lab, silent)
    assert lab.trained == ORDER[:2]
    assert result.failed == "baseline"
    assert result.why == "loss is 0.21, 0.55, must be ≤ 0.4"


def test_a_failed_gate_of_a_control_stops_nothing(tmp_path: Path) -> None:
    lab = FakeLab(losses={"stage1_top2-seed1": 0.9})
    result = roadmap.run(PLAN, tmp_path / "road", lab, silent)
    assert result.failed is None
    assert result.verdicts["stage1_top2"].word == "FAILED"


def test_what_an_option_asks_beyond_the_milestones_numbers_is_a_note(tmp_path: Path) -> None:
    """5a at unequal mean experts: its stage fails it, the roadmap tells it."""
    names = [f"stage5a-seed{seed}" for seed in (1, 2)]
    out = tmp_path / "road"
    result = roadmap.run(PLAN, out, FakeLab(results={name: {"experts_per_token": 1.4} for name in names}), silent)
    assert result.failed is None
    note = result.verdicts["stage5a"].criteria[-1]
    assert (note.name, note.passed, note.note) == ("equal mean experts", False, True)
    console = Console(record=True, width=200)
    tables.render_verdict(result.verdicts["stage5a"], console)
    assert "note" in console.export_text()
    stage = stages.asked_by("5a", [(str(out / name), str(out / f"stage4b_documents-seed{name[-1]}")) for name in names])
    assert [(each.passed, each.note) for each in stage] == [(False, False)]


def test_a_second_start_trains_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "road"
    first = FakeLab(stop_at="stage1-seed1")
    assert roadmap.run(PLAN, out, first, silent).signal == 2
    again = FakeLab()
    assert roadmap.resume(out, again, silent).failed is None
    assert again.trained == ["resumed stage1-seed1", *ORDER[3:]]
    assert roadmap.resume(out, (third := FakeLab()), silent).failed is None
    assert third.trained == []


def test_a_run_that_diverged_stops_it_with_the_reason(tmp_path: Path) -> None:
    out = tmp_path / "road"
    result = roadmap.run(PLAN, out, FakeLab(diverge="stage1-seed1"), silent)
    assert (result.failed, result.diverged) == ("stage1", True)
    run = out / "stage1-seed1"
    (run / "failure.json").write_text(json.dumps({"step": 7, "reason": "the loss is NaN", "remedy": "lower the rate"}))
    told = roadmap.explain(run)
    assert told == f"{run} diverged at step 7: the loss is NaN; lower the rate (rerun {run} --set KEY=VALUE)"


def test_other_settings_than_those_that_lie_there_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "road"
    roadmap.run(PLAN, out, FakeLab(), silent)
    other = roadmap.Plan(PLAN.seeds, {"model.router.p": 0.5})
    with pytest.raises(ValueError, match="was trained with"):
        roadmap.run(other, out, FakeLab(), silent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="holds no roadmap"):
        roadmap.run(PLAN, tmp_path / "full", FakeLab(), silent)


def test_the_table_has_the_roadmaps_targets_beside_means_over_seeds(tmp_path: Path) -> None:
    out = tmp_path / "road"
    roadmap.run(PLAN, out, FakeLab(losses={"stage1-seed1": 0.20, "stage1-seed2": 0.22}), silent)
    assert "| 1 adaptive experts | stage1 | loss ≤ 0.40, L0 ≤ 15, 1.5-2.0 | 2 | 0.210 ± 0.014 |" in roadmap.markdown(
        out
    )
    rows = roadmap.rows(out)
    assert [row["milestone"] for row in rows][:3] == [0, 1, 1]
    assert [row["step"] for row in rows] == list(roadmap.steps())
    assert rows[1]["measured"]["loss"] == [0.20, 0.22]
    assert rows[-1]["targets"] == {"loss": 0.25, "l0": 12, "band": (1.3, 1.8)}
    assert rows[-1]["gate"] == "passed"
    console = Console(record=True, width=200)
    roadmap.render(out, console)
    text = console.export_text()
    assert "0.210 ± 0.014" in text
    assert "the dense baseline alone meets the loss of milestone 4" in text


def test_bounds_of_a_milestone_are_those_that_judge(tmp_path: Path) -> None:
    run = write(tmp_path / "run", Story(loss=0.30))
    assert gates.judge(run).passed
    strict = gates.judge(run, bounds=gates.Bounds(loss=0.25, l0=0.1, band=(1.3, 1.6)))
    assert {each.name for each in strict.criteria if not each.passed} == {"loss", "L0", "experts per token"}


def test_the_gate_of_a_roadmap_is_that_of_every_step_but_the_controls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(out: Path, lab: FakeLab) -> tuple[int, list[str]]:
        roadmap.run(PLAN, out, lab, silent)
        capsys.readouterr()
        code = verbs.gate(str(out), as_json=True)
        return code, [each["run"] for each in json.loads(capsys.readouterr().out)["gates"]]

    assert judged(tmp_path / "good", FakeLab()) == (0, list(roadmap.steps()))
    assert judged(tmp_path / "control", FakeLab(losses={"stage1_top2-seed1": 0.9}))[0] == 0
    assert judged(tmp_path / "bad", FakeLab(losses={"baseline-seed2": 0.55})) == (1, ["baseline"])
    with pytest.raises(ValueError, match="has parents of its own"):
        verbs.gate(str(tmp_path / "good"), "parent")
    with pytest.raises(ValueError, match=r"no step of the roadmap '.*' is complete: go on with .*resume"):
        judged(tmp_path / "open", FakeLab(stop_at="baseline-seed1"))


def test_jobs_run_side_by_side_and_a_signal_reaches_each(tmp_path: Path) -> None:
    def job(name: str, seconds: float) -> jobs.Job:
        return jobs.Job(name, note, (str(tmp_path), seconds), tmp_path / f"{name}.log")

    codes, stopped = jobs.run([job("a", 0), job("b", 0), job("c", 0)], 2, silent)
    assert (codes, stopped) == ({"a": 0, "b": 0, "c": 0}, None)
    assert jobs.run([job("bad", -1)], 2, silent) == ({"bad": 1}, None)
    assert (tmp_path / "bad.log").read_text() == "error: no such time\n"
    for old in tmp_path.glob("begun-*"):
        old.unlink()

    def interrupt() -> None:
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    codes, stopped = jobs.run([job("d", 60), job("e", 60), job("f", 0)], 2, silent)
    assert (codes, stopped) == ({"d": 130, "e": 130}, signal.SIGINT)


def test_a_step_is_the_one_before_with_one_switch_more() -> None:
    """A lab whose switches are the names of the run files: what is laid over what shows in the keys."""

    class Named(FakeLab):
        def switches(self, source: str, parent: str) -> dict[str, object]:
            assert parent == "stage1"
            return {source: True}

    for name, step in roadmap.steps().items():
        root, changes = roadmap.configuration(step, Named())
        if step.changes:
            above = roadmap.configuration(roadmap.steps()[str(step.parent)], Named())[1]
            assert (root, changes) == ("stage1", {**above, name: True})
        else:
            assert (root, changes) == (name, {})


def test_steps_that_wait_for_no_other_are_trained_together() -> None:
    first, last = roadmap.MILESTONES[1], roadmap.MILESTONES[4]
    assert [[step.name for step in batch] for batch in roadmap.batches(first, 1)] == [["stage1"], ["stage1_top2"]]
    assert [[step.name for step in batch] for batch in roadmap.batches(first, 2)] == [["stage1", "stage1_top2"]]
    assert [[step.name for step in batch] for batch in roadmap.batches(last, 2)] == [["stage5a", "stage5b"]]
    chained = roadmap.MILESTONES[2]
    assert all(len(batch) == 1 for batch in roadmap.batches(chained, 2))
