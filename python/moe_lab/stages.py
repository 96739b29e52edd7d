"""The stages: which runs answer a stage's question, trained one by one in a stage directory, judged and tabulated.

A stage is data: cells (one run each) of a parent, the model under study and its control, for every p and seed.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_lab import frames, gates, tables

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from moe_lab.train import Outcome, Run

Say = Callable[[str], None]

ROUTER = "model.router."
IRRELEVANT = {"threads"}  # the same bytes come out for any number of threads


class Lab(Protocol):
    """What a stage needs of moe_lab.train."""

    @property
    def DivergedError(self) -> type[Exception]: ...  # noqa: N802 (a class of that module)
    def load_run(self, source: str, overrides: dict[str, object] | None = None, quick: bool = False) -> "Run": ...
    def run_training(self, run: "Run", out: str | None = None, parent: str | None = None) -> "Outcome": ...
    def resume_training(self, out: str) -> "Outcome": ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that was asked for; stage.json keeps it, so that `resume` needs no flag."""

    p: tuple[float, ...] = (0.4,)
    seeds: tuple[int, ...] = (1,)
    parents: tuple[str, ...] = ()
    overrides: dict[str, object] = field(default_factory=dict)
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a stage. `run` is set where a finished run serves instead of a new one."""

    role: str  # "parent", "top_p" or "control"
    name: str
    seed: int
    source: str
    overrides: dict[str, object]
    p: float | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished (or stopped) stage: where it lies, a row per run, the verdict of each p, and of the stage."""

    out: str
    rows: tuple[dict[str, Any], ...] = ()
    verdicts: tuple[gates.Verdict, ...] = ()
    signal: int | None = None

    @property
    def passed(self) -> bool:
        return any(verdict.passed for verdict in self.verdicts)

    @property
    def judged(self) -> bool:
        return any(verdict.judged for verdict in self.verdicts)

    @property
    def diverged(self) -> bool:
        return any(row["status"] == "diverged" for row in self.rows)


def cells(plan: Plan) -> list[Cell]:
    """The runs of stage 1: per seed a dense parent, the top-p model for every p, and the top-2 control."""
    given = {int(frames.settings(parent).get("seed", 0)): parent for parent in plan.parents}
    for seed in sorted(set(given) - set(plan.seeds)):
        wanted = ", ".join(str(seed) for seed in plan.seeds)
        raise ValueError(f"--parent {given[seed]} has seed {seed}, but the stage runs seed {wanted}")
    return [cell for seed in plan.seeds for cell in _cells_of_seed(plan, seed, given.get(seed))]


def _cells_of_seed(plan: Plan, seed: int, parent: str | None) -> list[Cell]:
    def cell(role: str, name: str, source: str, p: float | None = None) -> Cell:
        overrides = overrides_of(plan.overrides, role) | ({} if p is None else {"model.router.p": p})
        full = f"{name}-seed{seed}"
        return Cell(role, full, seed, source, {**overrides, "seed": seed, "name": full}, p)

    first = cell("parent", "parent", "baseline")
    studied = [cell("top_p", f"top_p-{p:g}", "stage1", p) for p in plan.p]
    control = cell("control", f"top_k-{plan.overrides.get('model.router.k', 2)}", "stage1_top2")
    return [first if parent is None else replace(first, run=parent), *studied, control]


def overrides_of(wanted: dict[str, object], role: str) -> dict[str, object]:
    """A key of the router goes to the models that have it: none to the dense parent, p to top-p, k to the control."""
    foreign = {"top_p": {"k"}, "control": {"p"}}
    return {
        key: value
        for key, value in wanted.items()
        if not key.startswith(ROUTER) or (role in foreign and key.removeprefix(ROUTER) not in foreign[role])
    }


def anchored(overrides: dict[str, object]) -> dict[str, object]:
    """Relative file names from the command line made absolute, so that the stage can be resumed from any folder."""
    files = {"data.facts", "data.chat", "data.paraphrases", "data.text", "data.tokenizer"}
    return {
        key: os.path.abspath(value) if key in files and isinstance(value, str) and os.path.exists(value) else value
        for key, value in overrides.items()
    }


def prepare(plan: Plan, lab: Lab) -> list[tuple[Cell, "Run"]]:
    """Every run of the plan, validated before any directory is made. Raises ValueError with the dotted key."""
    if (ROUTER + "p") in plan.overrides:
        raise ValueError("give p with --p instead of --set model.router.p: the stage names its runs by it")
    for parent in plan.parents:
        gates.finished(parent)
        if gates.is_quick(frames.settings(parent)) != plan.quick:
            raise ValueError(f"--parent {parent} and this stage must both be --quick or neither: their epochs differ")
    return [(cell, lab.load_run(cell.source, cell.overrides, plan.quick)) for cell in cells(plan)]


def stage1(plan: Plan, out: Path, lab: Lab, say: Say) -> Stage:
    """Trains what is missing in `out`, judges it and writes stage.json and plots/. Stops early when a signal came."""
    prepared = prepare(plan, lab)
    _open(out, plan)
    runs: list[tuple[Cell, str]] = []
    parents: dict[int, str] = {}
    for number, (cell, run) in enumerate(prepared, start=1):
        say(f"[{number}/{len(prepared)}] {cell.name}")
        path, stopped = train_cell(cell, run, out, parents.get(cell.seed), lab, say)
        if stopped is not None:
            _write(out, {"stage": "stage1", "status": "stopped", "plan": asdict(plan)})
            return Stage(str(out), signal=stopped)
        runs.append((cell, path))
        if cell.role == "parent":
            parents[cell.seed] = path
    return _conclude(plan, out, runs)


def resume(out: Path, lab: Lab, say: Say) -> Stage:
    """Goes on with the stage in `out`."""
    return stage1(_plan(out), out, lab, say)


def rejudge(out: Path) -> Stage:
    """The stage's gate once more, from the files of its runs."""
    record = _record(out)
    entries = record.get("runs")
    if not entries:
        raise ValueError(f"the stage '{out}' is not complete: go on with python -m moe_lab resume {out}")
    runs = [(_cell_of(entry), str(_place(out, entry["run"]))) for entry in entries]
    return _judge(_plan(out), out, runs)


def _cell_of(entry: dict[str, Any]) -> Cell:
    return Cell(entry["role"], entry["name"], entry["seed"], "", {}, entry["p"])


def _place(out: Path, run: str) -> Path:
    """Runs of the stage are named relative to it, so that its directory can be moved; a given parent is absolute."""
    return Path(run) if os.path.isabs(run) else out / run


def _open(out: Path, plan: Plan) -> None:
    if out.exists() and not frames.is_stage(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"'{out}' exists and holds no stage; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write(out, {"stage": "stage1", "status": "running", "plan": asdict(plan)})


def train_cell(cell: Cell, run: "Run", out: Path, parent: str | None, lab: Lab, say: Say) -> tuple[str, int | None]:
    """Path of the run, and the signal that stopped it."""
    path = Path(cell.run) if cell.run else out / cell.name
    try:
        if cell.run:
            say(f"  given: {path}")
            return str(path), None
        if not frames.is_run(path):
            outcome = lab.run_training(run, str(path), None if parent is None else frames.read_run(parent).get("id"))
        else:
            must_match(path, run, lab)
            status = frames.read_run(path).get("status")
            if status in ("completed", "diverged"):
                say(f"  {status} already: {path}")
                return str(path), None
            outcome = lab.resume_training(str(path))
    except lab.DivergedError as error:
        say(f"  diverged: {error}")  # the stage goes on: a diverged run is a result, and fails its gate
        return str(path), None
    return str(path), outcome.signal


def must_match(path: Path, run: "Run", lab: Lab) -> None:
    """A run that lies there already must be the one that is wanted."""
    there = lab.load_run(str(path / "run.toml"))
    wrong = [change for change in there.diff(run) if change[0] not in IRRELEVANT | {"name"}]
    if wrong:
        key, old, new = wrong[0]
        raise ValueError(f"'{path}' was trained with {key} = {old}, now {new} is asked for; choose another --out")


def _conclude(plan: Plan, out: Path, runs: list[tuple[Cell, str]]) -> Stage:
    stage = _judge(plan, out, runs)
    entries = [{**row, "run": _relative(out, row["run"])} for row in stage.rows]
    verdicts = [verdict.as_dict() for verdict in stage.verdicts]
    passed = stage.passed if stage.judged else None
    done = {"stage": "stage1", "status": "completed", "passed": passed, "plan": asdict(plan)}
    _write(out, {**done, "gates": verdicts, "runs": entries})
    save_plots(stage)
    return stage


def _relative(out: Path, run: str) -> str:
    path, root = Path(run).resolve(), out.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _judge(plan: Plan, out: Path, runs: list[tuple[Cell, str]]) -> Stage:
    """A row per run with its own verdict, and a verdict per p over all its seeds."""
    parents = {cell.seed: path for cell, path in runs if cell.role == "parent"}
    rows, verdicts = [], {}
    for cell, path in runs:
        verdicts[cell.name] = verdict = own_verdict(path)
        row = tables.summary(path, verdict)
        rows.append({**row, "role": cell.role, "name": cell.name, "p": cell.p, "gate": verdict.as_dict()})
    by_p = [_verdict_of_p(p, [row for row in rows if row["p"] == p], verdicts, parents) for p in plan.p]
    return Stage(str(out), tuple(rows), tuple(by_p))


def own_verdict(path: str, bounds: gates.Bounds | None = None) -> gates.Verdict:
    """Of one run alone; its parent is compared over all seeds together."""
    verdict = gates.judge(path, bounds=bounds)
    return replace(verdict, criteria=tuple(each for each in verdict.criteria if each.name != gates.PARENT))


def _verdict_of_p(
    p: float, rows: list[dict[str, Any]], verdicts: dict[str, gates.Verdict], parents: dict[int, str]
) -> gates.Verdict:
    own = [verdicts[row["name"]] for row in rows]
    return verdict_over_seeds("stage1", f"top_p {p:g}", own, [(row["run"], parents[row["seed"]]) for row in rows])


def verdict_over_seeds(gate: str, label: str, own: list[gates.Verdict], pairs: list[tuple[str, str]]) -> gates.Verdict:
    """The verdicts of a model's runs as one; `pairs` of run and parent decide whether the parent's loss is kept."""
    judged = all(verdict.judged for verdict in own)
    criteria = [] if not judged else [_over_seeds(same) for same in zip(*(v.criteria for v in own), strict=True)]
    if judged and pairs:
        criteria.append(gates.paired([_losses(run, parent) for run, parent in pairs]))
    return gates.Verdict(gate, label, judged, tuple(criteria))


def _losses(run: str, parent: str) -> tuple[float | None, float | None]:
    """Of a run and of its parent; refuses a parent with other data. A parent that diverged in this stage has none."""
    record, before = frames.read_run(run), frames.read_run(parent)
    if before.get("status") != "diverged":
        before = gates.parent_record(record, parent)
    return gates.loss_of(record), gates.loss_of(before)


def _over_seeds(same: tuple[gates.Criterion, ...]) -> gates.Criterion:
    """One criterion over seeds holds when it holds for every seed; the first seed that misses it is shown."""
    shown = next((criterion for criterion in same if not criterion.passed), same[0])
    if len(same) == 1:
        return shown
    return replace(shown, measured=", ".join(gates.show(criterion.measured) for criterion in same))


def save_plots(stage: Stage) -> list[Path]:
    """The figures of each run of the stage in its own directory, the comparisons in the stage's."""
    from moe_lab import plots

    streams = {row["name"]: frames.read_metrics(row["run"]) for row in stage.rows}
    for row in stage.rows:
        if not os.path.isabs(_relative(Path(stage.out), row["run"])):  # a given parent is left as it is
            plots.save_all(row["run"])
    return plots.save(comparisons(stage, streams), Path(stage.out) / "plots")


def comparisons(stage: Stage, streams: Mapping[str, "pl.DataFrame"]) -> dict[str, "Figure"]:
    """The runs of a stage in one figure a measure; `streams` are their metrics by name."""
    from moe_lab import plots

    sparse = {name: frame for name, frame in streams.items() if frames.sparse_layers(frame)}
    figures = {
        "loss": plots.compare(
            streams,
            "epoch/loss",
            "Training loss",
            "nats, mean over sequences",
            log_scale=True,
            floor="epoch/floor",
            target=gates.LOSS,
        ),
        "experts": plots.compare(sparse, "moe/experts_per_token", "Experts per token", "mean over tokens and layers"),
    }
    studied = [row for row in stage.rows if row["role"] == "top_p"]
    if len({row["p"] for row in studied}) > 1:
        figures["sweep"] = plots.sweep(studied)
    return figures


def _plan(out: Path) -> Plan:
    data = _record(out).get("plan", {})
    lists = {key: tuple(data[key]) for key in ("p", "seeds", "parents") if key in data}
    return Plan(**lists, overrides=data.get("overrides", {}), quick=data.get("quick", False))


def _record(out: Path) -> dict[str, Any]:
    return frames.json_object(out / "stage.json")


def _write(out: Path, record: dict[str, Any]) -> None:
    """Replaces stage.json in one step, so that a reader or a kill never sees half of it."""
    half = out / "stage.json.tmp"
    half.write_text(json.dumps(record, indent=1) + "\n")
    half.replace(out / "stage.json")
