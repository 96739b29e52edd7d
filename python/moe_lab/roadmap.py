"""The roadmap: every milestone's runs in order, judged as they end; stops at the first failed gate, goes on.

A step of milestones 2 to 4 is the configuration of the step it names as parent with the switches of one run file more.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_lab import frames, gates, stages, tables
from moe_lab.jobs import Say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_lab.train import Run


@dataclass(frozen=True, slots=True)
class Step:
    """One model, trained for every seed. A control is trained and shown; its gate stops nothing.

    A study has no runs of its own: it looks at its parent's.
    """

    name: str  # of a shipped run file
    role: str  # "parent", "top_p" or "control", as in stages: which router keys of --set it takes; or "study"
    parent: str | None = None  # the step whose loss it must keep
    option: str = ""  # the option of a stage that it is
    changes: bool = False  # the switches of its run file are laid over its parent's configuration

    @property
    def judged(self) -> bool:
        return self.role != "control"

    @property
    def runs(self) -> str:
        """Name of its runs."""
        return self.parent or self.name if self.role == "study" else self.name


@dataclass(frozen=True, slots=True)
class Milestone:
    number: int
    name: str
    steps: tuple[Step, ...]
    bounds: gates.Bounds


def _option(option: str, name: str, parent: str) -> Step:
    return Step(name, "top_p", parent, option, changes=True)


BASELINE = Step("baseline", "parent")
STAGE1 = Step("stage1", "top_p", "baseline")
CONTROL = Step("stage1_top2", "control", "baseline")
# 5a and 5b are two answers to one question, so that both change the last configuration before them.
STABLE = (
    _option("2b", "stage2b", "stage1"),
    _option("2c", "stage2c", "stage2b"),
    _option("3a", "stage3a_peak", "stage2c"),
)
BUILT = (Step("stage4c", "study", "stage3a_peak", "4c"), _option("4b", "stage4b_documents", "stage3a_peak"))
ADVANCED = (_option("5a", "stage5a", "stage4b_documents"), _option("5b", "stage5b", "stage4b_documents"))

MILESTONES = (
    Milestone(0, "baseline", (BASELINE,), gates.Bounds(loss=0.40)),
    Milestone(1, "adaptive experts", (STAGE1, CONTROL), gates.Bounds(loss=0.40, l0=15, band=(1.5, 2.0))),
    Milestone(2, "stability and loss", STABLE, gates.Bounds(loss=0.35, l0=12, band=(1.5, 2.0))),
    Milestone(3, "architecture", BUILT, gates.Bounds(loss=0.30, l0=12, band=(1.5, 2.0))),
    Milestone(4, "advanced", ADVANCED, gates.Bounds(loss=0.25, l0=12, band=(1.3, 1.8))),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for; roadmap.json keeps it, so that `resume` needs no flag."""

    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, object] = field(default_factory=dict)
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How far it came: a verdict per step that was judged, the step that failed, the signal that stopped it."""

    out: str
    verdicts: dict[str, gates.Verdict]
    failed: str | None = None
    why: str | None = None
    diverged: bool = False
    signal: int | None = None


def steps() -> dict[str, Step]:
    return {step.name: step for milestone in MILESTONES for step in milestone.steps}


def prepare(plan: Plan, lab: stages.Lab) -> dict[str, list[tuple[stages.Cell, "Run"]]]:
    """Every run of every step, validated before anything is written. Raises ValueError with the dotted key."""
    trained = [step for step in steps().values() if step.role != "study"]
    return {step.name: [_prepared(step, seed, plan, lab) for seed in plan.seeds] for step in trained}


def _prepared(step: Step, seed: int, plan: Plan, lab: stages.Lab) -> tuple[stages.Cell, "Run"]:
    name = f"{step.name}-seed{seed}"
    root, changes = configuration(step, lab)
    overrides = {**stages.overrides_of(plan.overrides, step.role), **changes, "seed": seed, "name": name}
    parent = None if step.parent is None else f"{step.parent}-seed{seed}"
    cell = stages.Cell(step.role, name, seed, root, overrides, option=step.option or None, parent=parent)
    return cell, lab.load_run(root, overrides, plan.quick)


def configuration(step: Step, lab: stages.Lab) -> tuple[str, dict[str, object]]:
    """The run file a step goes back to, and all switches laid over it on the way, the latest last."""
    if not step.changes or step.parent is None:
        return step.name, {}
    root, changes = configuration(steps()[step.parent], lab)
    return root, changes | lab.switches(step.name, root)


def run(plan: Plan, out: Path, lab: stages.Lab, say: Say, at_once: int = 1) -> Result:
    """Trains what is missing in `out`, step by step, and judges each; finished runs are kept as they are.

    `at_once` > 1 trains that many side by side, each with one thread: the bytes are the same.
    """
    start = time.monotonic()
    prepared = prepare(plan, lab)
    _open(out, plan)
    verdicts: dict[str, gates.Verdict] = {}
    for milestone in MILESTONES:
        for batch in batches(milestone, at_once):
            say(f"milestone {milestone.number}, {milestone.name}: {', '.join(step.name for step in batch)}")
            cells = [pair for step in batch for pair in prepared.get(step.name, [])]
            stopped = stages.train_all(cells, plan.quick, out, lab, lambda text: say(f"  {text}"), at_once)
            if stopped is not None:
                return _conclude(plan, Result(str(out), verdicts, signal=stopped))
            for step in batch:
                if step.role == "study":
                    for path in runs_of(step, plan, out):
                        stages.specialize(path, out, lab, say)
                failed = _settle(step, milestone, plan, out, verdicts)
                if failed is not None:
                    return _conclude(plan, failed)
                say(f"  gate of {step.name}: {verdicts[step.name].word}")
    say(f"all milestones in {timedelta(seconds=round(time.monotonic() - start))}, without what was there before")
    return _conclude(plan, Result(str(out), verdicts))


def batches(milestone: Milestone, at_once: int) -> Iterator[list[Step]]:
    """The milestone's steps in order; those that wait for no other of the batch together, if several run at once."""
    batch: list[Step] = []
    for step in milestone.steps:
        if batch and (at_once == 1 or step.parent in {each.name for each in batch}):
            yield batch
            batch = []
        batch.append(step)
    if batch:
        yield batch


def _settle(
    step: Step, milestone: Milestone, plan: Plan, out: Path, verdicts: dict[str, gates.Verdict]
) -> Result | None:
    """Judges a step that was trained, into `verdicts`; the result where the roadmap ends with it."""
    broken = _broken(step, plan, out)
    if broken is not None:
        diverged = frames.read_run(broken).get("status") == "diverged"
        return Result(str(out), verdicts, step.name, explain(broken), diverged)
    verdicts[step.name] = verdict = judge(step, milestone.bounds, plan, out)
    if not step.judged or not verdict.judged or verdict.passed:
        return None
    missed = (f"{each.name} is {gates.show(each.measured)}, must be {each.bound}" for each in verdict.missed)
    return Result(str(out), verdicts, step.name, "; ".join(missed))


def resume(out: Path, lab: stages.Lab, say: Say, at_once: int = 1) -> Result:
    """Goes on with the roadmap in `out`."""
    return run(plan_of(out), out, lab, say, at_once)


def plan_of(out: Path) -> Plan:
    told = frames.json_object(out / "roadmap.json").get("plan", {})
    return Plan(tuple(told.get("seeds", (0,))), told.get("overrides", {}), bool(told.get("quick", False)))


def judge(step: Step, bounds: gates.Bounds, plan: Plan, out: Path) -> gates.Verdict:
    """The step's gate over all seeds, with its parent's loss paired by seed.

    A milestone's gate is the roadmap's numbers alone: what an option asks beyond them in its stage is a note here.
    """
    runs = [_path(out, step.runs, seed) for seed in plan.seeds]
    own = [stages.own_verdict(run, bounds) for run in runs]
    if step.role == "study":
        studies = [stages.study_of(out, run) for run in runs]
        return stages.verdict_of_study(own[0].gate, step.name, own, studies)
    pairs = [(_path(out, step.name, seed), _path(out, step.parent, seed)) for seed in plan.seeds if step.parent]
    notes = [replace(criterion, note=True) for criterion in stages.asked_by(step.option, pairs)]
    return stages.verdict_over_seeds(own[0].gate, step.name, own, pairs, notes)


def explain(run: frames.Place) -> str:
    """Why a run ended before its time, and what to do about it."""
    told, status = frames.failure(run) or {}, frames.read_run(run).get("status")
    reason = told.get("reason") or f"its status is {status}"
    remedy = told.get("remedy") or "train it again"
    return f"{run} {status} at step {told.get('step', '?')}: {reason}; {remedy} (rerun {run} --set KEY=VALUE)"


def _path(out: Path, step: str | None, seed: int) -> str:
    return str(out / f"{step}-seed{seed}")


def _broken(step: Step, plan: Plan, out: Path) -> str | None:
    """The first run of a step that has not been completed."""
    paths = [_path(out, step.runs, seed) for seed in plan.seeds]
    return next((path for path in paths if frames.read_run(path).get("status") != "completed"), None)


def _open(out: Path, plan: Plan) -> None:
    if out.exists() and not frames.is_roadmap(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"'{out}' exists and holds no roadmap; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    frames.replace_json(out / "roadmap.json", {"roadmap": 1, "status": "running", "plan": asdict(plan)})


def _conclude(plan: Plan, result: Result) -> Result:
    status = "stopped" if result.signal is not None else "failed" if result.failed else "completed"
    told = {"roadmap": 1, "status": status, "plan": asdict(plan), "failed": result.failed, "why": result.why}
    verdicts = [verdict.as_dict() for verdict in result.verdicts.values()]
    frames.replace_json(Path(result.out) / "roadmap.json", {**told, "gates": verdicts})
    return result


def runs_of(step: Step, plan: Plan, out: Path) -> list[str]:
    """The runs of a step that are there."""
    return [path for seed in plan.seeds if frames.is_run(path := _path(out, step.runs, seed))]


def verdict_of(step: Step, milestone: Milestone, plan: Plan, out: Path) -> gates.Verdict | None:
    """The verdict of a step from its files; None where it has not been run, or not to the end."""
    there = runs_of(step, plan, out)
    if len(there) < len(plan.seeds) or _broken(step, plan, out) is not None:
        return None
    if step.role == "study" and not all(stages.study_of(out, run).is_dir() for run in there):
        return None
    return judge(step, milestone.bounds, plan, out)


def verdicts(out: Path) -> dict[Step, gates.Verdict]:
    """The steps that have been run to their end, judged once more from the files of their runs."""
    plan = plan_of(out)
    every = ((step, verdict_of(step, milestone, plan, out)) for milestone in MILESTONES for step in milestone.steps)
    return {step: verdict for step, verdict in every if verdict is not None}


def rows(out: Path) -> list[dict[str, Any]]:
    """The roadmap's table: a row per milestone and step with its targets and, over the seeds that are there, what was
    measured (values by measure)."""
    plan = plan_of(out)
    return [_row(milestone, step, plan, out) for milestone in MILESTONES for step in milestone.steps]


def _row(milestone: Milestone, step: Step, plan: Plan, out: Path) -> dict[str, Any]:
    there = runs_of(step, plan, out)
    summaries = [tables.summary(path, gates.Verdict("none", path, False, ())) for path in there]
    verdict = verdict_of(step, milestone, plan, out)
    values = {
        measure.key: [float(value) for each in summaries if (value := each.get(measure.key)) is not None]
        for measure in tables.MEASURES
    }
    return {
        "milestone": milestone.number,
        "name": milestone.name,
        "step": step.name,
        "option": step.option or None,
        "parent": step.parent,
        "judged": step.judged,
        "targets": asdict(milestone.bounds),
        "seeds": len(there),
        "measured": values,
        "gate": verdict.word if verdict else "unfinished" if there and step.role != "study" else "not run",
    }


def figures(out: Path) -> "dict[str, Figure]":
    """The models of the roadmap in one figure a measure, means over the seeds."""
    from moe_lab import plots

    plan = plan_of(out)
    there = {step.name: runs_of(step, plan, out) for step in steps().values() if step.role != "study"}
    return plots.comparisons({name: [*map(frames.read_metrics, runs)] for name, runs in there.items() if runs})


WIDTH = 190
COLUMNS = (
    ("loss", "loss", 3),
    ("floor", "floor", 3),
    ("excess", "excess", 3),
    ("l0", "L0", 1),
    ("experts_per_token", "experts", 2),
    ("recited", "recites", 3),
    ("facts_loss_after", "facts after", 2),
    ("epochs_to_target", f"epochs to {gates.LOSS:g}", 0),
)
HEAD = ("milestone", "runs", "targets", "n", *(label for _, label, _ in COLUMNS), "gate")
LEFT = ("milestone", "runs", "targets", "gate")


def cells(listed: list[dict[str, Any]]) -> list[list[str]]:
    """The tracking table below HEAD: targets beside what was measured, mean ± standard deviation over the seeds."""
    return [
        [
            f"{row['milestone']} {row['name']}",
            " ".join(part for part in (row["option"], row["step"]) if part),
            _targets(row),
            str(row["seeds"] or "-"),
            *(_cell(row["measured"].get(key, []), digits) for key, _, digits in COLUMNS),
            row["gate"] if row["judged"] else f"{row['gate']} (control)",
        ]
        for row in listed
    ]


def notes(listed: list[dict[str, Any]]) -> list[str]:
    """Which of the roadmap's numbers the control meets too, so that they rank nothing."""
    base: list[float] = next(
        (row["measured"]["loss"] for row in listed if row["step"] == BASELINE.name and row["seeds"]), []
    )
    met = [row for row in listed if row["milestone"] > 0 and base and mean(base) <= row["targets"]["loss"]]
    return [
        f"the dense baseline alone meets the loss of milestone {number}: that number ranks nothing"
        for number in dict.fromkeys(row["milestone"] for row in met)
    ]


def render(out: Path, console: Console) -> None:
    listed = rows(out)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)  # a file has room for a row on one line
    table = Table(title="roadmap", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in HEAD:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for row in cells(listed):
        table.add_row(*row)
    console.print(table)
    for note in notes(listed):
        console.print(note)


def markdown(out: Path) -> str:
    """The tracking table and its notes for a page."""
    listed = rows(out)
    return "\n".join([tables.markdown(HEAD, cells(listed), LEFT), "", *(f"- {note}" for note in notes(listed))])


def _targets(row: dict[str, Any]) -> str:
    bounds = row["targets"]
    if row["milestone"] == 0:
        return f"loss ≤ {bounds['loss']:.2f}"
    return f"loss ≤ {bounds['loss']:.2f}, L0 ≤ {bounds['l0']:g}, {bounds['band'][0]}-{bounds['band'][1]}"


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f"{stdev(values):.{digits}f}" if len(values) > 1 else "0"
    return f"{mean(values):.{digits}f}" + (f" ± {spread}" if float(spread) else "")
