"""The stages with a laboratory that writes hand-made runs: which runs are trained, skipped, judged and shown."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_lab import gates, options, report, stages, tables, verbs
from runs import DENSE, Story, write


@dataclass
class FakeRun:
    source: str
    overrides: dict[str, Any]

    def diff(self, other: "FakeRun") -> list[tuple[str, str, str]]:
        keys = sorted(self.overrides.keys() | other.overrides.keys())
        pairs = ((key, self.overrides.get(key), other.overrides.get(key)) for key in keys)
        return [(key, str(old), str(new)) for key, old, new in pairs if old != new]


@dataclass
class Outcome:
    out: str
    signal: int | None = None


class FakeDivergedError(RuntimeError):
    pass


@dataclass
class FakeLab:
    """Writes the run a story tells; `stop_at` names the run that a signal stops, `diverge` the one that diverges."""

    losses: dict[str, float | None] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # further ones of a run
    stop_at: str | None = None
    diverge: str | None = None
    trained: list[str] = field(default_factory=list)
    parents: dict[str, str | None] = field(default_factory=dict)
    DivergedError = FakeDivergedError

    def load_run(self, source: str, overrides: dict[str, Any] | None = None, quick: bool = False) -> FakeRun:
        if source.endswith("run.toml"):
            there = json.loads(Path(source).with_name("overrides.json").read_text())
            return FakeRun(source, {**there, **(overrides or {})})
        if (overrides or {}).get("model.router.p", 0.5) > 1:
            raise ValueError("model.router.p = 1.5 is not in (0, 1]")
        return FakeRun(source, {**(overrides or {}), **({"quick": True} if quick else {})})

    def run_training(self, run: FakeRun, out: str | None = None, parent: str | None = None) -> Outcome:
        assert out is not None
        wanted, name = run.overrides, Path(out).name
        self.trained.append(name)
        self.parents[name] = parent
        routers = {"baseline": DENSE, "stage1_top2": 'kind = "top_k"\nk = 2'}
        top_p = f'kind = "top_p"\np = {wanted.get("model.router.p", 0.4)}\nswitch = "{wanted.get("switch", "")}"'
        status = "stopped" if name == self.stop_at else "diverged" if name == self.diverge else "completed"
        epochs = 10 if wanted.get("quick") else 100
        story = Story(
            routers.get(run.source, top_p),
            wanted["seed"],
            name,
            epochs,
            epochs,
            status,
            bool(wanted.get("quick")),
            parent,
            data=run.source if run.source == "text" else "documents",
            text=run.source == "text",
            capacity=0.5 if wanted.get("switch") == "stage4a" else 1.0,
            results=self.results.get(name, {}),
        )
        loss = self.losses.get(name, 0.21)
        write(Path(out), story.but(results={"loss": None}) if loss is None else story.but(loss=loss))
        (Path(out) / "overrides.json").write_text(json.dumps(wanted))
        if status == "diverged":
            raise FakeDivergedError("the loss is not finite")
        return Outcome(out, 2 if status == "stopped" else None)

    def resume_training(self, out: str) -> Outcome:
        self.trained.append(f"resumed {Path(out).name}")
        record = json.loads((Path(out) / "run.json").read_text())
        (Path(out) / "run.json").write_text(json.dumps({**record, "status": "completed"}))
        return Outcome(out)

    def switches(self, source: str, parent: str) -> dict[str, object]:
        return {"switch": source}

    def load_model(self, run: str) -> "Tells":
        return Tells()


class Tells:
    """A model whose first expert takes punctuation and whose second takes everything else."""

    def documents(self) -> list[tuple[str, str, str]]:
        return [("facts", "train", "The Sun is a star.")] * 60

    def route(self, text: str) -> dict[str, Any]:
        tokens = [*text[:-1].split(), text[-1]]
        experts = [[0] if token == "." else [1] for token in tokens]
        return {"tokens": tokens, "layers": [{"layer": 0, "experts": experts, "probabilities": [[0.5, 0.5]]}]}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(stages, "save_plots", lambda stage: [])


@pytest.fixture
def figures() -> None:
    """A test that asks for this draws."""


def stage(plan: stages.Plan, out: Path, lab: FakeLab) -> stages.Stage:
    return stages.run(plan, out, lab, lambda text: None)


def test_a_stage_trains_parent_model_and_control_of_every_p_and_seed(tmp_path: Path) -> None:
    lab = FakeLab()
    result = stage(stages.Plan(p=(0.3, 0.4), seeds=(1, 2)), tmp_path / "s", lab)
    models = ["parent", "top_p-0.3", "top_p-0.4", "top_k-2"]
    assert lab.trained == [f"{model}-seed{seed}" for seed in (1, 2) for model in models]
    assert lab.parents["top_p-0.3-seed2"] == "parent-seed2"
    assert lab.parents["parent-seed1"] is None
    assert result.passed
    record = json.loads((tmp_path / "s" / "stage.json").read_text())
    assert record["status"] == "completed"
    assert record["passed"] is True
    assert [gate["run"] for gate in record["gates"]] == ["top_p 0.3", "top_p 0.4"]
    assert {each["name"] for each in record["gates"][0]["criteria"]} >= {
        "loss",
        "no worse than parent",
        "router learns",
    }
    assert [entry["run"] for entry in record["runs"]] == lab.trained


def test_figures_are_drawn_for_every_run_and_for_the_stage(tmp_path: Path, figures: None) -> None:
    stage(stages.Plan(p=(0.3, 0.4), quick=True), tmp_path / "s", FakeLab())
    assert {path.stem for path in (tmp_path / "s" / "plots").iterdir()} == {"loss", "experts", "l0", "sweep"}
    assert (tmp_path / "s" / "top_p-0.3-seed1" / "plots" / "routing.png").exists()


def test_a_stage_that_misses_its_gate_fails(tmp_path: Path) -> None:
    lab = FakeLab(losses={"parent-seed1": 0.2, "top_p-0.4-seed1": 0.25})
    result = stage(stages.Plan(), tmp_path / "s", lab)
    assert not result.passed
    assert [each.name for each in result.verdicts[0].missed] == ["no worse than parent"]


def test_the_parent_is_compared_over_all_seeds_together(tmp_path: Path) -> None:
    lab = FakeLab(losses={"top_p-0.4-seed1": 0.23, "top_p-0.4-seed2": 0.20})
    assert stage(stages.Plan(seeds=(1, 2)), tmp_path / "s", lab).passed


def test_one_p_that_passes_is_enough(tmp_path: Path) -> None:
    lab = FakeLab(losses={"top_p-0.3-seed1": 0.5})
    result = stage(stages.Plan(p=(0.3, 0.4)), tmp_path / "s", lab)
    assert [verdict.passed for verdict in result.verdicts] == [False, True]
    assert result.passed


def test_finished_runs_are_skipped_and_a_stopped_one_goes_on(tmp_path: Path) -> None:
    first = FakeLab(stop_at="top_p-0.4-seed1")
    stopped = stage(stages.Plan(), tmp_path / "s", first)
    assert stopped.signal == 2
    assert json.loads((tmp_path / "s" / "stage.json").read_text())["status"] == "stopped"
    second = FakeLab()
    assert stages.resume(tmp_path / "s", second, lambda text: None).passed
    assert second.trained == ["resumed top_p-0.4-seed1", "top_k-2-seed1"]


def test_a_run_with_other_settings_is_not_taken_for_the_wanted_one(tmp_path: Path) -> None:
    stage(stages.Plan(), tmp_path / "s", FakeLab())
    with pytest.raises(ValueError, match=r"was trained with train\.epochs = None, now 5 is asked for"):
        stage(stages.Plan(overrides={"train.epochs": 5}), tmp_path / "s", FakeLab())
    again = FakeLab()
    stage(stages.Plan(overrides={"threads": 2}), tmp_path / "s", again)
    assert again.trained == []


def test_a_finished_parent_serves_instead_of_a_new_one(tmp_path: Path) -> None:
    parent = write(tmp_path / "base", Story(router=DENSE, loss=0.1, data="documents"))
    lab = FakeLab()
    result = stage(stages.Plan(parents=(str(parent),)), tmp_path / "s", lab)
    assert lab.trained == ["top_p-0.4-seed1", "top_k-2-seed1"]
    assert not result.passed
    assert stages.rejudge(tmp_path / "s").verdicts == result.verdicts
    twin = write(tmp_path / "twin", Story(router=DENSE, loss=0.1, data="documents"))
    with pytest.raises(ValueError, match="both have seed 1"):
        stage(stages.Plan(parents=(str(parent), str(twin))), tmp_path / "t", FakeLab())


@pytest.mark.parametrize(
    ("story", "sentence"),
    [
        (Story(router=DENSE, seed=7), "has seed 7, but the stage runs seed 1"),
        (Story(router=DENSE, quick=True), "must both be --quick or neither"),
        (Story(router=DENSE, results={"loss": None}), "measured no loss"),
        (Story(router=DENSE, status="stopped"), "is stopped, not completed: .*resume"),
        (Story(router=DENSE, status="diverged"), "is diverged: .*rerun"),
    ],
)
def test_a_parent_that_cannot_be_compared_is_refused(tmp_path: Path, story: Story, sentence: str) -> None:
    parent = write(tmp_path / "base", story)
    with pytest.raises(ValueError, match=sentence):
        stage(stages.Plan(parents=(str(parent),)), tmp_path / "s", FakeLab())
    assert not (tmp_path / "s").exists()


def test_a_bad_value_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.router\.p"):
        stage(stages.Plan(p=(0.4, 1.5)), tmp_path / "s", FakeLab())
    with pytest.raises(ValueError, match="--p"):
        stage(stages.Plan(overrides={"model.router.p": 0.3}), tmp_path / "s", FakeLab())
    assert not (tmp_path / "s").exists()


def test_a_folder_with_something_else_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no stage"):
        stage(stages.Plan(), tmp_path, FakeLab())


def test_router_keys_go_to_the_models_that_have_them() -> None:
    wanted = {"model.router.num_experts": 4, "model.router.k": 1, "train.epochs": 5}
    parent, studied, control = stages.cells(stages.Plan(overrides=wanted), FakeLab())
    assert parent.overrides == {"train.epochs": 5, "seed": 1, "name": "parent-seed1"}
    assert studied.overrides.items() >= {"model.router.num_experts": 4, "model.router.p": 0.4}.items()
    assert "model.router.k" not in studied.overrides
    assert control.overrides["model.router.k"] == 1
    assert control.name == "top_k-1-seed1"


def test_a_quick_stage_is_not_judged(tmp_path: Path) -> None:
    result = stage(stages.Plan(quick=True), tmp_path / "s", FakeLab())
    assert not result.judged
    assert json.loads((tmp_path / "s" / "stage.json").read_text())["passed"] is None


def test_a_diverged_run_is_a_result_that_fails(tmp_path: Path) -> None:
    lab = FakeLab(diverge="top_p-0.3-seed1")
    result = stage(stages.Plan(p=(0.3, 0.4)), tmp_path / "s", lab)
    assert result.diverged
    assert "top_k-2-seed1" in lab.trained
    assert [verdict.passed for verdict in result.verdicts] == [False, True]


@pytest.mark.parametrize("loss", [None, 0.9])  # in its facts phase; in its chat phase, with the loss of the facts
def test_a_diverged_parent_fails_the_comparison_and_not_the_program(tmp_path: Path, loss: float | None) -> None:
    result = stage(stages.Plan(), tmp_path / "s", FakeLab(diverge="parent-seed1", losses={"parent-seed1": loss}))
    assert [each.name for each in result.verdicts[0].missed] == ["no worse than parent"]


def test_a_parent_with_other_data_is_refused_at_the_latest_when_it_is_compared(tmp_path: Path) -> None:
    parent = write(tmp_path / "base", Story(router=DENSE, data="another hash"))
    with pytest.raises(ValueError, match="other data"):
        stage(stages.Plan(parents=(str(parent),)), tmp_path / "s", FakeLab())


def test_the_table_joins_seeds_as_mean_and_deviation(tmp_path: Path) -> None:
    lab = FakeLab(losses={"top_p-0.4-seed1": 0.20, "top_p-0.4-seed2": 0.22})
    result = stage(stages.Plan(seeds=(1, 2)), tmp_path / "s", lab)
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    tables.render(result.rows, console)
    text = console.export_text()
    assert "0.2100 ± 0.0141" in text
    assert "top_p 0.4" in text
    assert "passed" in text
    console.file.close()


WARMUP = stages.Plan(stage="stage2", options=("2c",), seeds=(1, 2))


def test_an_option_is_its_parent_with_the_switches_of_each_of_its_run_files(tmp_path: Path) -> None:
    lab = FakeLab()
    result = stage(WARMUP, tmp_path / "s", lab)
    models = ["stage1", "stage2c", "stage2c_exponential"]
    assert lab.trained == [f"{model}-seed{seed}" for seed in (1, 2) for model in models]
    assert lab.parents["stage2c-seed2"] == "stage1-seed2"
    wanted = json.loads((tmp_path / "s" / "stage2c-seed1" / "overrides.json").read_text())
    assert wanted == {"switch": "stage2c", "seed": 1, "name": "stage2c-seed1"}
    assert result.passed
    assert [(each.gate, each.run) for each in result.verdicts] == [("option 2c", name) for name in models[1:]]
    assert [each.name for each in result.verdicts[0].criteria] == [
        "completes",
        "stays finite",
        "recites",
        "L0",
        "no worse than parent",
        "no worse than parent, 10 epochs",
    ]
    assert result.title == "stage 2: 2c warm-up length and shape"
    assert stages.rejudge(tmp_path / "s") == result


def test_one_arm_of_every_option_must_pass(tmp_path: Path) -> None:
    worse = {f"stage2c-seed{seed}": 0.25 for seed in (1, 2)}
    assert stage(WARMUP, tmp_path / "one", FakeLab(losses=worse)).passed
    both = {**worse, "stage2c_exponential-seed1": 0.23, "stage2c_exponential-seed2": 0.22}
    result = stage(WARMUP, tmp_path / "none", FakeLab(losses=both))
    assert not result.passed
    missed = [[each.name for each in verdict.missed] for verdict in result.verdicts]
    assert missed == [["no worse than parent"]] * 2
    plan = stages.Plan(stage="stage5", options=("5a", "5b"))
    assert not stage(plan, tmp_path / "half", FakeLab(losses={"stage5b-seed1": 0.3})).passed


def pairs(name: str, *values: tuple[float | None, float | None]) -> gates.Pairs:
    """run.json of runs and parents as far as it tells one result."""
    return [({"results": {name: own}}, {"results": {name: parent}}) for own, parent in values]


def test_thresholds_are_compared_at_equal_mean_experts(tmp_path: Path) -> None:
    plan = stages.Plan(stage="stage5", options=("5a",))
    result = stage(plan, tmp_path / "s", FakeLab())
    same = result.verdicts[0].criteria[-1]
    assert (same.name, same.passed) == ("equal mean experts", True)
    assert not gates.same_experts(pairs("experts_per_token", (2.0, 1.7), (1.8, 1.7))).passed
    assert not gates.same_experts(pairs("experts_per_token", (1.7, 1.7), (None, 1.7))).passed


def test_a_given_parent_is_what_the_options_change(tmp_path: Path) -> None:
    parent = write(tmp_path / "mine", Story(loss=0.2, data="documents"))
    (parent / "overrides.json").write_text(json.dumps({"train.epochs": 100}))
    lab = FakeLab()
    plan = stages.Plan(stage="stage2", options=("2c",), parents=(str(parent),))
    assert stage(plan, tmp_path / "s", lab).passed
    assert lab.trained == ["stage2c-seed1", "stage2c_exponential-seed1"]
    there = json.loads((tmp_path / "s" / "stage2c-seed1" / "overrides.json").read_text())
    assert there["train.epochs"] == 100
    other = stages.Plan(stage="stage2", options=("2c",), parents=(str(parent),), overrides={"train.clip": 1.0})
    with pytest.raises(ValueError, match=r"trained with train\.clip = None, now 1\.0 is asked for; leave out"):
        stage(other, tmp_path / "t", FakeLab())


def compared(out: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Control and arm of everything that `compare` shows of a stage."""
    capsys.readouterr()
    assert verbs.compare([str(out)], as_json=True) == 0
    told = json.loads(capsys.readouterr().out)["comparisons"]
    return [(each["control"], each["arm"]) for each in told]


def test_every_run_of_a_stage_is_compared_with_its_own_parent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4a and 4b have parents on different data; no parent comes first in the alphabet."""
    plan = stages.Plan(stage="stage4", options=("4a", "4b", "4c"), seeds=(1, 2))
    stage(plan, tmp_path / "s", FakeLab())
    assert [[Path(run).name for run in family] for family in stages.families(tmp_path / "s")] == [
        [f"{name}-seed{seed}" for seed in (1, 2) for name in ("stage1", "stage4a", "stage4a_causal")],
        ["text-seed1", "stage4b-seed1", "text-seed2", "stage4b-seed2"],
    ]
    arms = [("top_p 0.4", f"top_p 0.4 ({name})") for name in ("stage4a", "stage4a_causal", "stage4b")]
    assert compared(tmp_path / "s", capsys) == arms


def test_a_given_parent_is_the_control_of_its_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = [write(tmp_path / f"mine-{seed}", Story(seed=seed, name="mine", data="documents")) for seed in (1, 2)]
    for parent in parents:
        (parent / "overrides.json").write_text("{}")
    plan = stages.Plan(stage="stage2", options=("2c",), seeds=(1, 2), parents=tuple(map(str, parents)))
    stage(plan, tmp_path / "s", FakeLab())
    arms = [("top_p 0.4", f"top_p 0.4 ({name})") for name in ("stage2c", "stage2c_exponential")]
    assert compared(tmp_path / "s", capsys) == arms
    assert stages.families(tmp_path / "s")[0][0] == str(parents[0])


def test_a_stage_that_is_not_complete_is_not_compared(tmp_path: Path) -> None:
    stage(WARMUP, tmp_path / "s", FakeLab(stop_at="stage2c-seed2"))
    with pytest.raises(ValueError, match=r"is not complete: go on with python -m moe_lab resume"):
        verbs.compare([str(tmp_path / "s")])


def test_a_stage_on_its_way_is_drawn_and_tabulated_without_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: None
) -> None:
    out = tmp_path / "s"
    stage(WARMUP, out, FakeLab(stop_at="stage2c_exponential-seed1"))
    assert verbs.plot(str(out)) == 0
    assert {"loss", "experts", "l0"} <= {path.stem for path in (out / "plots").iterdir()}
    assert (out / "stage2c-seed1" / "plots" / "loss.png").exists()
    capsys.readouterr()
    assert verbs.table([str(out)], markdown=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | stage1 | stage2c | stage2c_exponential | roadmap |"
    assert lines[-1] == "| gate of each run | passed | passed | stopped |  |"
    assert "gate: not judged yet, some runs are missing" in report.of_stage(out)
    with pytest.raises(ValueError, match=r"is not complete: go on with python -m moe_lab resume"):
        verbs.gate(str(out))


def test_a_folder_of_runs_has_a_column_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        write(tmp_path / "sweep" / f"run-{seed}", Story(seed=seed))
    assert verbs.table([str(tmp_path / "sweep")], markdown=True) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert [Path(cell.strip()).name for cell in head.split("|")[2:4]] == ["run-1", "run-2"]
    with pytest.raises(ValueError, match=r"holds many runs: name one of them, .*run-1 say"):
        verbs.plot(str(tmp_path / "sweep"))


@pytest.mark.parametrize("stream", [None, "", '{"step": 0, "kind": "event", "event": "run_started", "ts": 0.0}\n'])
def test_a_stage_whose_first_run_has_not_begun_is_no_fault(tmp_path: Path, stream: str | None) -> None:
    out = tmp_path / "s"
    stage(WARMUP, out, FakeLab(stop_at="stage1-seed1"))
    metrics = out / "stage1-seed1" / "metrics.jsonl"
    metrics.unlink() if stream is None else metrics.write_text(stream)
    for verb in (verbs.plot, verbs.report, lambda path: verbs.table([path])):
        with pytest.raises(ValueError, match=r"no run of the stage '.*' has begun yet: go on with .*resume"):
            verb(str(out))


def test_the_table_ends_with_what_was_judged_over_all_seeds(tmp_path: Path) -> None:
    """Each run of 4a passes by itself; its option fails by the loss of its parent."""
    worse = {f"stage4a-seed{seed}": {"train_loss": 0.3, "flops_per_token": 2e6} for seed in (1, 2)}
    worse |= {f"stage4a_causal-seed{seed}": {"flops_per_token": 2e6} for seed in (1, 2)}
    plan = stages.Plan(stage="stage4", options=("4a", "4c"), seeds=(1, 2))
    rows = stage(plan, tmp_path / "s", FakeLab(results=worse)).rows
    assert tables.markdown_of(rows).splitlines()[-2:] == [
        "| gate of each run | passed | passed | passed |  |",
        "| gate over seeds | option 4c: passed | option 4a: FAILED | option 4a: passed |  |",
    ]


def test_the_last_ten_epochs_stand_beside_the_last_one_and_decide_nothing(tmp_path: Path) -> None:
    """A last epoch that is high by chance fails the gate; the note says that the ten were not."""
    out = tmp_path / "s"
    stage(WARMUP, out, FakeLab())
    for seed in (1, 2):
        run = out / f"stage2c-seed{seed}"
        record = json.loads((run / "run.json").read_text())
        record["results"]["loss"] = 0.25
        (run / "run.json").write_text(json.dumps(record))
    own = stages.rejudge(out).verdicts[0]
    told = [(each.measured, each.passed, each.note) for each in own.criteria if each.name.startswith(gates.PARENT)]
    assert told == [(pytest.approx(0.04), False, False), (0.0, True, True)]
    assert [each.name for each in own.missed] == [gates.PARENT]


def test_augmentation_is_judged_on_held_out_paraphrases(tmp_path: Path) -> None:
    plan = stages.Plan(stage="stage3", options=("3c",), seeds=(1, 2))
    heard = {"stage3c_updates-seed1": {"paraphrase_loss": 6.0}, "stage3c_updates-seed2": {"paraphrase_loss": 6.8}}
    result = stage(plan, tmp_path / "s", FakeLab(results=heard))
    told = [(verdict.run, verdict.criteria[-1].name, verdict.passed) for verdict in result.verdicts]
    assert told == [("stage3c", "held-out paraphrases", False), ("stage3c_updates", "held-out paraphrases", True)]
    assert result.verdicts[1].criteria[-1].measured == pytest.approx(-0.3)
    assert result.passed
    assert not gates.understands_paraphrases(pairs("paraphrase_loss", (6.0, None))).passed


def told_by_2a(out: Path, results: dict[str, dict[str, Any]]) -> tuple[bool, list[tuple[str, bool, bool]]]:
    """Whether the stage passes, and name, pass and note of what 2a asks beside the common gate."""
    plan = stages.Plan(stage="stage2", options=("2a",), seeds=(1, 2))
    result = stage(plan, out, FakeLab(results=results))
    return result.passed, [(each.name, each.passed, each.note) for each in result.verdicts[0].criteria[-2:]]


def test_checkpointing_must_save_memory_and_change_no_bit(tmp_path: Path) -> None:
    held = {f"stage1-seed{seed}": {"arena_bytes": 3e6} for seed in (1, 2)}
    less = held | {f"stage2a-seed{seed}": {"arena_bytes": 2e6} for seed in (1, 2)}
    memory, bits = "memory of a step", "same loss to the bit"
    assert told_by_2a(tmp_path / "good", less) == (True, [(memory, True, False), (bits, True, False)])
    more = held | {f"stage2a-seed{seed}": {"arena_bytes": 3e6, "loss": 0.2100000001} for seed in (1, 2)}
    assert told_by_2a(tmp_path / "bad", more) == (False, [(memory, False, False), (bits, False, False)])
    assert told_by_2a(tmp_path / "old", held) == (True, [(memory, False, True), (bits, True, False)])
    rows = stages.rejudge(tmp_path / "good").rows
    assert "| memory of a step, MB | 3.0 | 2.0 |" in tables.markdown_of(rows)


def test_the_roadmaps_targets_stand_beside_models_that_recite() -> None:
    row = {"model": "a", "seed": 0, "loss": 0.3, "verdict": "passed"}
    assert "| loss | 0.3000 | ≤ 0.40 |" in tables.markdown_of([row | {"recited": 0.97}])
    assert "| loss | 0.3000 |  |" in tables.markdown_of([row])


def test_a_token_of_a_mixture_of_depths_must_cost_less(tmp_path: Path) -> None:
    plan = stages.Plan(stage="stage4", options=("4a",))
    assert not stage(plan, tmp_path / "same", FakeLab()).passed
    lab = FakeLab(results={"stage4a-seed1": {"flops_per_token": 2.6e6}})
    result = stage(plan, tmp_path / "less", lab)
    assert result.passed
    assert result.verdicts[0].criteria[-1].why.endswith("-400,000")


def test_depths_and_their_parent_are_compared_by_the_causal_loss(tmp_path: Path) -> None:
    plan = stages.Plan(stage="stage4", options=("4a",), seeds=(1, 2))
    flattered = {f"stage4a-seed{seed}": {"train_loss": 0.3} for seed in (1, 2)}
    lab = FakeLab(losses=dict.fromkeys(flattered, 0.1), results=flattered)
    kept = next(each for each in stage(plan, tmp_path / "s", lab).verdicts[0].criteria if each.name == gates.PARENT)
    assert (kept.measured, kept.passed) == (pytest.approx(0.09), False)
    assert "causal" in kept.why


def test_a_figure_says_whose_loss_looks_ahead(tmp_path: Path, figures: None) -> None:
    result = stage(stages.Plan(stage="stage4", options=("4a",)), tmp_path / "s", FakeLab())
    told = {text.get_text().split(":")[0] for text in stages.comparisons(result)["loss"].axes[0].texts}
    assert {"stage1", "stage4a (looks ahead)", "stage4a_causal"} <= told


def test_a_loss_that_looks_ahead_stands_in_a_line_of_its_own(tmp_path: Path) -> None:
    story = Story(capacity=0.5, loss=0.1, results={"train_loss": 0.3, "flops_per_token": 2.5e6})
    rows = [tables.summary(write(tmp_path / name, each)) for name, each in (("whole", Story()), ("half", story))]
    lines = {line.split("|")[1].strip(): line.split("|")[2:4] for line in tables.markdown_of(rows, "run").splitlines()}
    shown = {name: [cell.strip() for cell in cells] for name, cells in lines.items()}
    assert shown["loss"] == ["0.2100", "-"]
    assert shown["excess over floor"][1] == "-"
    assert shown["chat epochs to 0.40"][1] == "-"
    assert shown["loss after training, causal"] == ["0.2100", "0.3000"]
    assert shown["loss in training, looks ahead"] == ["-", "0.1000"]
    assert shown["FLOPs per token"] == ["3,000,000", "2,500,000"]


def test_keys_of_documents_stay_away_from_the_parent_that_reads_a_text() -> None:
    plan = stages.Plan(stage="stage5", options=("5b", "5c"), overrides={"train.epochs": 5, "threads": 1})
    found = {cell.name: cell for cell in stages.cells(plan, FakeLab())}
    assert list(found) == [f"{name}-seed1" for name in ("stage1", "text", "stage5b", "stage5c")]
    assert found["stage5b-seed1"].overrides["train.epochs"] == 5
    assert found["stage5c-seed1"].overrides == {
        "threads": 1,
        "switch": "stage5c",
        "seed": 1,
        "name": "stage5c-seed1",
    }
    assert found["stage5c-seed1"].parent == "text-seed1"


def test_a_study_looks_at_the_parents_experts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, plan = tmp_path / "s", stages.Plan(stage="stage4", options=("4c",))
    lab = FakeLab()
    result = stage(plan, out, lab)
    assert lab.trained == ["stage1-seed1"]
    last = result.verdicts[0].criteria[-1]
    assert (last.name, last.passed) == ("experts know classes", True)
    assert (out / "specialization" / "stage1-seed1" / "lift.png").exists()
    monkeypatch.setattr(FakeLab, "load_model", lambda lab, run: pytest.fail("a study is made once"))
    assert stage(plan, out, FakeLab()).passed
    (out / "specialization" / "stage1-seed1" / "information.csv").unlink()
    assert not stages.rejudge(out).passed


def test_a_study_leaves_the_parent_of_another_option_alone(tmp_path: Path) -> None:
    """4b has a parent that reads a text; 4c is about the experts of stage 1."""
    out, plan = tmp_path / "s", stages.Plan(stage="stage4", options=("4b", "4c"), seeds=(1, 2))
    result = stage(plan, out, FakeLab())
    assert [path.name for path in sorted((out / "specialization").iterdir())] == ["stage1-seed1", "stage1-seed2"]
    study = next(verdict for verdict in result.verdicts if verdict.gate == "option 4c")
    assert study.passed
    assert study.criteria[0].measured == ", ".join(["completed, facts 100/100, chat 100/100"] * 2)
    assert stages.rejudge(out).verdicts == result.verdicts


def test_options_are_named_or_all_that_are_there() -> None:
    assert [option.name for option in options.chosen("stage5", None)][:2] == ["5a", "5b"]
    assert [option.name for option in options.chosen("stage3", ["3c", "3a"])] == ["3a", "3c"]
    assert options.chosen("stage2", ["2C"])[0].runs == ("stage2c", "stage2c_exponential")
    with pytest.raises(ValueError, match=r"--option '3a' is none of stage2; it has .*2c"):
        options.chosen("stage2", ["2a", "3a"])


def test_a_stage_written_before_there_were_options_is_judged_as_it_was(tmp_path: Path) -> None:
    result = stage(stages.Plan(), tmp_path / "s", FakeLab())
    file = tmp_path / "s" / "stage.json"
    record = json.loads(file.read_text())
    for key in ("stage", "options"):
        del record["plan"][key]
    for entry in record["runs"]:
        for key in ("arm", "option", "parent"):
            del entry[key]
    file.write_text(json.dumps(record))
    assert stages.rejudge(tmp_path / "s").verdicts == result.verdicts
