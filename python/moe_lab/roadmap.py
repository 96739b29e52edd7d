"""The roadmap: every milestone's runs in order, judged as they end; stops at the first failed gate, goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_lab import frames, gates, jobs, stages, tables

if TYPE_CHECKING:
    from moe_lab.train import Run

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One run file, trained for every seed. A control is trained and shown; its gate stops nothing."""

    name: str  # of a shipped run file
    role: str  # "parent", "top_p" or "control", as in stages: which router keys of --set it takes
    parent: str | None = None  # the step whose loss it must keep

    @property
    def judged(self) -> bool:
        return self.role != "control"


@dataclass(frozen=True, slots=True)
class Milestone:
    number: int
    name: str
    steps: tuple[Step, ...]
    bounds: gates.Bounds


BASELINE = Step("baseline", "parent")
STAGE1 = Step("stage1", "top_p", "baseline")
CONTROL = Step("stage1_top2", "control", "baseline")

# A milestone without steps has no run files yet: it is shown with its targets and not run.
MILESTONES = (
    Milestone(0, "baseline", (BASELINE,), gates.Bounds(loss=0.40)),
    Milestone(1, "adaptive experts", (STAGE1, CONTROL), gates.Bounds(loss=0.40, l0=15, band=(1.5, 2.0))),
    Milestone(2, "stability and loss", (), gates.Bounds(loss=0.35, l0=12, band=(1.5, 2.0))),
    Milestone(3, "architecture", (), gates.Bounds(loss=0.30, l0=12, band=(1.5, 2.0))),
    Milestone(4, "advanced", (), gates.Bounds(loss=0.25, l0=12, band=(1.3, 1.8))),
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


def prepare(plan: Plan, lab: stages.Lab) -> dict[str, list[tuple[stages.Cell, "Run"]]]:
    """Every run of every step, validated before anything is written. Raises ValueError with the dotted key."""
    steps = [step for milestone in MILESTONES for step in milestone.steps]
    return {step.name: [_prepared(step, seed, plan, lab) for seed in plan.seeds] for step in steps}


def _prepared(step: Step, seed: int, plan: Plan, lab: stages.Lab) -> tuple[stages.Cell, "Run"]:
    name = f"{step.name}-seed{seed}"
    overrides = {**stages.overrides_of(plan.overrides, step.role), "seed": seed, "name": name}
    return stages.Cell(step.role, name, seed, step.name, overrides), lab.load_run(step.name, overrides, plan.quick)


def run(plan: Plan, out: Path, lab: stages.Lab, say: Say, at_once: int = 1) -> Result:
    """Trains what is missing in `out`, step by step, and judges each; finished runs are kept as they are.

    `at_once` > 1 trains that many seeds side by side, each with one thread: the bytes are the same.
    """
    prepared = prepare(plan, lab)
    _open(out, plan)
    verdicts: dict[str, gates.Verdict] = {}
    for milestone in MILESTONES:
        for step in milestone.steps:
            say(f"milestone {milestone.number}, {milestone.name}: {step.name}")
            stopped = _train(step, prepared[step.name], plan, out, lab, say, at_once)
            if stopped is not None:
                return _conclude(plan, Result(str(out), verdicts, signal=stopped))
            broken = _broken(step, plan, out)
            if broken is not None:
                diverged = frames.read_run(broken).get("status") == "diverged"
                return _conclude(plan, Result(str(out), verdicts, step.name, explain(broken), diverged))
            verdicts[step.name] = verdict = judge(step, milestone.bounds, plan, out)
            say(f"  {verdict.gate} gate of {step.name}: {verdict.word}")
            if step.judged and verdict.judged and not verdict.passed:
                missed = "; ".join(
                    f"{each.name} is {gates.show(each.measured)}, must be {each.bound}"
                    for each in verdict.criteria
                    if not each.passed
                )
                return _conclude(plan, Result(str(out), verdicts, step.name, missed))
    return _conclude(plan, Result(str(out), verdicts))


def resume(out: Path, lab: stages.Lab, say: Say) -> Result:
    """Goes on with the roadmap in `out`."""
    return run(plan_of(out), out, lab, say)


def plan_of(out: Path) -> Plan:
    told = _record(out).get("plan", {})
    return Plan(tuple(told.get("seeds", (0,))), told.get("overrides", {}), bool(told.get("quick", False)))


def judge(step: Step, bounds: gates.Bounds, plan: Plan, out: Path) -> gates.Verdict:
    """The step's gate over all seeds, with its parent's loss paired by seed."""
    own = [stages.own_verdict(_path(out, step.name, seed), bounds) for seed in plan.seeds]
    pairs = [(_path(out, step.name, seed), _path(out, step.parent, seed)) for seed in plan.seeds if step.parent]
    return stages.verdict_over_seeds(own[0].gate, step.name, own, pairs)


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
    paths = [_path(out, step.name, seed) for seed in plan.seeds]
    return next((path for path in paths if frames.read_run(path).get("status") != "completed"), None)


def _train(
    step: Step, cells: list[tuple[stages.Cell, "Run"]], plan: Plan, out: Path, lab: stages.Lab, say: Say, at_once: int
) -> int | None:
    """The signal that stopped it."""
    parents = {cell.seed: _path(out, step.parent, cell.seed) if step.parent else None for cell, _ in cells}
    if at_once == 1 or len(cells) == 1:
        for cell, run in cells:
            say(f"  {cell.name}")
            _, stopped = stages.train_cell(cell, run, out, parents[cell.seed], lab, say)
            if stopped is not None:
                return stopped
        return None
    todo = [
        jobs.Job(cell.name, train_alone, (cell, plan.quick, out, parents[cell.seed]), out / "logs" / f"{cell.name}.log")
        for cell, _ in cells
    ]
    return jobs.run(todo, at_once, lambda text: say(f"  {text}"))[1]


def train_alone(cell: stages.Cell, quick: bool, out: Path, parent: str | None) -> int:
    """One cell on one thread, in a process of its own."""
    from moe_lab import train as lab

    loaded = lab.load_run(cell.source, {**cell.overrides, "threads": 1}, quick)
    _, stopped = stages.train_cell(cell, loaded, out, parent, lab, jobs.note)
    return 0 if stopped is None else 128 + stopped


def _open(out: Path, plan: Plan) -> None:
    if out.exists() and not frames.is_roadmap(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"'{out}' exists and holds no roadmap; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write(out, {"roadmap": 1, "status": "running", "plan": asdict(plan)})


def _conclude(plan: Plan, result: Result) -> Result:
    status = "stopped" if result.signal is not None else "failed" if result.failed else "completed"
    told = {"roadmap": 1, "status": status, "plan": asdict(plan), "failed": result.failed, "why": result.why}
    _write(Path(result.out), {**told, "gates": [verdict.as_dict() for verdict in result.verdicts.values()]})
    return result


def _record(out: Path) -> dict[str, Any]:
    path = out / "roadmap.json"
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no JSON object")
    return record


def _write(out: Path, record: dict[str, Any]) -> None:
    half = out / "roadmap.json.tmp"
    half.write_text(json.dumps(record, indent=1) + "\n")
    half.replace(out / "roadmap.json")


def rows(out: Path) -> list[dict[str, Any]]:
    """The roadmap's table: a row per milestone and step with its targets and, over the seeds that are there, what was
    measured (values by measure); a milestone without runs has targets alone."""
    plan = plan_of(out)
    found = []
    for milestone in MILESTONES:
        for step in milestone.steps or (None,):
            there = (
                []
                if step is None
                else [path for seed in plan.seeds if frames.is_run(path := _path(out, step.name, seed))]
            )
            summaries = [tables.summary(path) for path in there]
            values = {
                measure.key: [float(value) for each in summaries if (value := each.get(measure.key)) is not None]
                for measure in tables.MEASURES
            }
            verdict = "not run"
            if step is not None and len(there) == len(plan.seeds) and _broken(step, plan, out) is None:
                verdict = judge(step, milestone.bounds, plan, out).word
            elif there:
                verdict = "unfinished"
            found.append(
                {
                    "milestone": milestone.number,
                    "name": milestone.name,
                    "step": None if step is None else step.name,
                    "judged": step is not None and step.judged,
                    "targets": asdict(milestone.bounds),
                    "seeds": len(there),
                    "measured": values,
                    "gate": verdict,
                }
            )
    return found


WIDTH = 180
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


def render(out: Path, console: Console) -> None:
    """The tracking table: targets beside what was measured, mean ± standard deviation over the seeds."""
    listed = rows(out)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)  # a file has room for a row on one line
    table = Table(title="roadmap", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("milestone", "runs", "targets", "n", *(label for _, label, _ in COLUMNS), "gate"):
        table.add_column(column, justify="left" if column in ("milestone", "runs", "targets", "gate") else "right")
    for row in listed:
        cells = (_cell(row["measured"].get(key, []), digits) for key, _, digits in COLUMNS)
        step = row["step"] or "no run file yet"
        name = f"{row['milestone']} {row['name']}"
        table.add_row(
            name,
            step,
            _targets(row),
            str(row["seeds"] or "-"),
            *cells,
            row["gate"] if row["judged"] or not row["step"] else f"{row['gate']} (control)",
        )
    console.print(table)
    base: list[float] = next(
        (row["measured"]["loss"] for row in listed if row["step"] == BASELINE.name and row["seeds"]), []
    )
    met = [row for row in listed if row["milestone"] > 0 and base and mean(base) <= row["targets"]["loss"]]
    for number in dict.fromkeys(row["milestone"] for row in met):
        console.print(f"the dense baseline alone meets the loss of milestone {number}: that number ranks nothing")


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
