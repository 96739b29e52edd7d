"""The stages: which runs answer a stage's question, trained in a stage directory, judged and tabulated.

A stage is data: cells (one run each). Stage 1 has a dense parent, a top-p model for every p, and a top-2 control; the
others have a parent and the run files of their options (options.py). Every seed has all of them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_lab import frames, gates, jobs, tables
from moe_lab.jobs import Say
from moe_lab.options import Option, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_lab.specialize import Reads
    from moe_lab.train import Outcome, Run


ROUTER = "model.router."
TEXT = "text"  # the shipped run file of options that need long documents
OF_DOCUMENTS = (
    "data.facts",
    "data.chat",
    "data.paraphrases",
    "data.shuffle",
    "data.augment",
    "train.epochs",
    "train.warmup_epochs",
    "phase.",
)
IRRELEVANT = {"threads"}  # the same bytes come out for any number of threads


class Lab(Protocol):
    """What a stage needs of moe_lab.train."""

    @property
    def DivergedError(self) -> type[Exception]: ...  # noqa: N802 (a class of that module)
    def load_run(self, source: str, overrides: dict[str, object] | None = None, quick: bool = False) -> "Run": ...
    def run_training(self, run: "Run", out: str | None = None, parent: str | None = None) -> "Outcome": ...
    def resume_training(self, out: str) -> "Outcome": ...
    def switches(self, source: str, parent: str) -> dict[str, object]: ...
    def load_model(self, run: str) -> "Reads": ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that was asked for; stage.json keeps it, so that `resume` needs no flag."""

    p: tuple[float, ...] = (0.4,)  # of stage 1
    seeds: tuple[int, ...] = (1,)
    parents: tuple[str, ...] = ()
    overrides: dict[str, object] = field(default_factory=dict)
    quick: bool = False
    stage: str = "stage1"
    options: tuple[str, ...] = ()  # names, of the other stages


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a stage. `run` is set where a finished run serves instead of a new one."""

    role: str  # "parent", "top_p", "control" or "option"
    name: str
    seed: int
    source: str
    overrides: dict[str, object]
    p: float | None = None
    run: str | None = None
    option: str | None = None
    arm: str | None = None  # what is judged over the seeds; None: this run is only compared with
    parent: str | None = None  # name of the cell whose loss must be kept


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished (or stopped) stage: where it lies, a row per run, the verdict of each arm, and of the stage."""

    out: str
    rows: tuple[dict[str, Any], ...] = ()
    verdicts: tuple[gates.Verdict, ...] = ()
    signal: int | None = None
    stage: str = "stage1"

    @property
    def passed(self) -> bool:
        """Of every option (of stage 1: of all p) one arm passes."""
        questions = {verdict.gate for verdict in self.verdicts}
        passed = {verdict.gate for verdict in self.verdicts if verdict.passed}
        return bool(questions) and passed == questions

    @property
    def judged(self) -> bool:
        return any(verdict.judged for verdict in self.verdicts)

    @property
    def word(self) -> str:
        """What is said of the whole of it."""
        if not self.judged:
            return "not judged (quick)" if self.verdicts else "not judged yet, some runs are missing"
        return "passed" if self.passed else "FAILED"

    @property
    def diverged(self) -> bool:
        return any(row["status"] == "diverged" for row in self.rows)

    @property
    def title(self) -> str:
        if self.stage == "stage1":
            return "stage 1: top-p adaptive experts"
        asked = dict.fromkeys(name for row in self.rows if (name := row.get("option")))
        told = "; ".join(f"{name} {named(name).title}" for name in asked)
        return f"stage {self.stage.removeprefix('stage')}" + (f": {told}" if told else "")


def cells(plan: Plan, lab: Lab) -> list[Cell]:
    """The runs of a stage, seed by seed, the parent before those that are compared with it."""
    given: dict[int, str] = {}
    for parent in plan.parents:
        seed = int(frames.settings(parent).get("seed", 0))
        if seed in given:
            raise ValueError(f"--parent {given[seed]} and {parent} both have seed {seed}: give one; name the --option")
        given[seed] = parent
    for seed in sorted(set(given) - set(plan.seeds)):
        wanted = ", ".join(str(seed) for seed in plan.seeds)
        raise ValueError(f"--parent {given[seed]} has seed {seed}, but the stage runs seed {wanted}")
    if plan.stage == "stage1":
        return [cell for seed in plan.seeds for cell in _adaptive_cells(plan, seed, given.get(seed))]
    return [cell for seed in plan.seeds for cell in _option_cells(plan, seed, given.get(seed), lab)]


def _adaptive_cells(plan: Plan, seed: int, parent: str | None) -> list[Cell]:
    first = f"parent-seed{seed}"

    def cell(role: str, name: str, source: str, p: float | None = None) -> Cell:
        overrides = overrides_of(plan.overrides, role) | ({} if p is None else {"model.router.p": p})
        full = f"{name}-seed{seed}"
        arm = None if p is None else f"top_p {p:g}"
        kept = None if full == first else first
        return Cell(role, full, seed, source, {**overrides, "seed": seed, "name": full}, p, arm=arm, parent=kept)

    studied = [cell("top_p", f"top_p-{p:g}", "stage1", p) for p in plan.p]
    control = cell("control", f"top_k-{plan.overrides.get('model.router.k', 2)}", "stage1_top2")
    return [replace(cell("parent", "parent", "baseline"), run=parent), *studied, control]


def _option_cells(plan: Plan, seed: int, given: str | None, lab: Lab) -> list[Cell]:
    """Parents, then the runs of the options: each is its parent with the switches of one run file."""

    def cell(role: str, name: str, source: str, parent: str, changes: dict[str, object]) -> Cell:
        full = f"{name}-seed{seed}"
        overrides = {**_known_to(parent, plan.overrides), **changes}
        return Cell(role, full, seed, source, {**overrides, "seed": seed, "name": full})

    asked = [named(name) for name in plan.options]
    of_text = given is not None and bool(frames.settings(given).get("data", {}).get("text"))
    served = {parent: given if (parent == TEXT) == of_text else None for parent in (o.parent for o in asked)}
    parents = [replace(cell("parent", name, name, name, {}), run=run) for name, run in served.items()]
    runs = []
    for option in asked:
        run = served[option.parent]
        source = str(Path(run) / "run.toml") if run else option.parent
        for name in option.runs:
            made = cell("option", name, source, option.parent, lab.switches(name, option.parent))
            runs.append(replace(made, option=option.name, arm=name, parent=f"{option.parent}-seed{seed}"))
    return [*parents, *runs]


def _known_to(parent: str, wanted: dict[str, object]) -> dict[str, object]:
    """Without the keys of documents where the parent is trained on a text."""
    return {key: value for key, value in wanted.items() if parent != TEXT or not key.startswith(OF_DOCUMENTS)}


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
    if plan.stage == "stage1" and (ROUTER + "p") in plan.overrides:
        raise ValueError("give p with --p instead of --set model.router.p: the stage names its runs by it")
    for parent in plan.parents:
        gates.finished(parent)
        if gates.is_quick(frames.settings(parent)) != plan.quick:
            raise ValueError(f"--parent {parent} and this stage must both be --quick or neither: their epochs differ")
        if plan.stage != "stage1":  # the options alone may differ from their parent
            wanted = lab.load_run(str(Path(parent) / "run.toml"), plan.overrides)
            must_match(Path(parent), wanted, lab, "leave out --set or --parent")
    return [(cell, lab.load_run(cell.source, cell.overrides, plan.quick)) for cell in cells(plan, lab)]


def run(plan: Plan, out: Path, lab: Lab, say: Say, at_once: int = 1) -> Stage:
    """Trains what is missing in `out`, judges it and writes stage.json and plots/.

    `at_once` > 1 trains that many side by side: the bytes are the same. Stops early when a signal came.
    """
    prepared = prepare(plan, lab)
    _open(out, plan)
    stopped = train_all(prepared, plan.quick, out, lab, say, at_once)
    if stopped is not None:
        frames.replace_json(out / "stage.json", {"stage": plan.stage, "status": "stopped", "plan": asdict(plan)})
        return Stage(str(out), signal=stopped, stage=plan.stage)
    runs = [(cell, str(place(cell, out))) for cell, _ in prepared]
    for option in map(named, plan.options):
        for path in studied(option, runs):
            specialize(path, out, lab, say)
    return _conclude(plan, out, runs)


def resume(out: Path, lab: Lab, say: Say, at_once: int = 1) -> Stage:
    """Goes on with the stage in `out`."""
    return run(_plan(out), out, lab, say, at_once)


def so_far(out: Path) -> Stage:
    """The stage in `out`, judged where it has been run to its end; else the runs that have begun, without its verdict.

    Raises ValueError where there is none.
    """
    if is_complete(out):
        return rejudge(out)
    plan = _plan(out)
    runs = [(f"parent-seed{frames.settings(path).get('seed', 0)}", path) for path in plan.parents]
    runs += [(path.name, str(path)) for path in frames.find_runs(out) if frames.has_begun(path)]
    if not runs:
        raise ValueError(f"no run of the stage '{out}' has begun yet: go on with python -m moe_lab resume {out}")
    return Stage(str(out), tuple(_row_so_far(plan, name, path) for name, path in runs), stage=plan.stage)


def _row_so_far(plan: Plan, name: str, path: str) -> dict[str, Any]:
    row, status = _row(plan, name, path, own_verdict(path, gate=_gate_of(plan))), frames.status(path)
    return row if status == "completed" else {**row, "verdict": status}


def is_complete(out: Path) -> bool:
    return bool(_record(out).get("runs"))


def rejudge(out: Path) -> Stage:
    """The stage's gate once more, from the files of its runs."""
    return _judge(_plan(out), out, _runs(out))


def families(out: Path) -> list[list[str]]:
    """The runs of every parent before those of the models that change it: what is compared with one another.

    A given parent lies elsewhere, and parents of one stage may have different data.
    """
    found: dict[str, list[str]] = {}
    for cell, path in _runs(out):
        found.setdefault(model_of(cell.parent or cell.name), []).append(path)
    return list(found.values())


def _runs(out: Path) -> list[tuple[Cell, str]]:
    """The runs that stage.json names. Raises ValueError where the stage has not been run to its end."""
    entries = _record(out).get("runs")
    if not entries:
        raise ValueError(f"the stage '{out}' is not complete: go on with python -m moe_lab resume {out}")
    return [(_cell_of(entry), str(_there(out, entry["run"]))) for entry in entries]


def _cell_of(entry: dict[str, Any]) -> Cell:
    p, role, seed = entry["p"], entry["role"], entry["seed"]
    arm = entry.get("arm", None if p is None else f"top_p {p:g}")  # stages of version 1 named their arms by p
    parent = entry.get("parent", None if role == "parent" else f"parent-seed{seed}")
    return Cell(role, entry["name"], seed, "", {}, p, option=entry.get("option"), arm=arm, parent=parent)


def _there(out: Path, run: str) -> Path:
    """Runs of the stage are named relative to it, so that its directory can be moved; a given parent is absolute."""
    return Path(run) if os.path.isabs(run) else out / run


def place(cell: Cell, out: Path) -> Path:
    return Path(cell.run) if cell.run else out / cell.name


def _open(out: Path, plan: Plan) -> None:
    if out.exists() and not frames.is_stage(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"'{out}' exists and holds no stage; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    frames.replace_json(out / "stage.json", {"stage": plan.stage, "status": "running", "plan": asdict(plan)})


def train_all(
    prepared: Sequence[tuple[Cell, "Run"]], quick: bool, out: Path, lab: Lab, say: Say, at_once: int = 1
) -> int | None:
    """Trains the cells in their order, or `at_once` side by side and parents first. The signal that stopped it."""
    places = {cell.name: str(place(cell, out)) for cell, _ in prepared}

    def parent_of(cell: Cell) -> str | None:
        return None if cell.parent is None else places.get(cell.parent, str(out / cell.parent))

    if at_once == 1:
        for number, (cell, run) in enumerate(prepared, start=1):
            say(f"[{number}/{len(prepared)}] {cell.name}")
            _, stopped = train_cell(cell, run, out, parent_of(cell), lab, say)
            if stopped is not None:
                return stopped
        return None
    first = [pair for pair in prepared if pair[0].parent not in places]
    for batch in (first, [pair for pair in prepared if pair not in first]):
        todo = [cell for cell, run in batch if not _ended(place(cell, out), cell, run, lab)]
        alone = len(todo) % at_once == 1  # the last one has every thread to itself
        work = [
            jobs.Job(
                cell.name,
                train_alone,
                (cell, quick, out, parent_of(cell), at_once if alone and number == len(todo) else 1),
                out / "logs" / f"{cell.name}.log",
            )
            for number, cell in enumerate(todo, start=1)
        ]
        codes, stopped = jobs.run(work, at_once, say)
        if stopped is not None:
            return stopped
        broken = next((name for name, code in codes.items() if code), None)
        if broken is not None:
            raise RuntimeError(f"{broken} ended with exit status {codes[broken]}: see {out}/logs/{broken}.log")
    return None


def train_alone(cell: Cell, quick: bool, out: Path, parent: str | None, threads: int) -> int:
    """One cell in a process of its own."""
    from moe_lab import train as lab

    loaded = lab.load_run(cell.source, {**cell.overrides, "threads": threads}, quick)
    _, stopped = train_cell(cell, loaded, out, parent, lab, jobs.note)
    return 0 if stopped is None else 128 + stopped


def train_cell(cell: Cell, run: "Run", out: Path, parent: str | None, lab: Lab, say: Say) -> tuple[str, int | None]:
    """Path of the run, and the signal that stopped it."""
    path = place(cell, out)
    if _ended(path, cell, run, lab):
        say(f"  given: {path}" if cell.run else f"  {frames.read_run(path).get('status')} already: {path}")
        return str(path), None
    try:
        if frames.is_run(path):
            outcome = lab.resume_training(str(path))
        else:
            outcome = lab.run_training(run, str(path), None if parent is None else frames.read_run(parent).get("id"))
    except lab.DivergedError as error:
        say(f"  diverged: {error}")  # the stage goes on: a diverged run is a result, and fails its gate
        return str(path), None
    return str(path), outcome.signal


def _ended(path: Path, cell: Cell, run: "Run", lab: Lab) -> bool:
    """Whether the run lies there whole. Raises ValueError where another one does."""
    if cell.run or not frames.is_run(path):
        return bool(cell.run)
    must_match(path, run, lab)
    return frames.read_run(path).get("status") in ("completed", "diverged")


def must_match(path: Path, run: "Run", lab: Lab, remedy: str = "choose another --out") -> None:
    """A run that lies there already must be the one that is wanted."""
    there = lab.load_run(str(path / "run.toml"))
    wrong = [change for change in there.diff(run) if change[0] not in IRRELEVANT | {"name"}]
    if wrong:
        key, old, new = wrong[0]
        raise ValueError(f"'{path}' was trained with {key} = {old}, now {new} is asked for; {remedy}")


def specialize(run: frames.Place, out: Path, lab: Lab, say: Say) -> None:
    """Studies a run's experts on the documents it was trained on, into `out`/specialization, once."""
    from moe_lab import specialize as study

    folder = study_of(out, run)
    if (folder / "information.csv").exists() or frames.read_run(run).get("status") != "completed":
        return
    say(f"  which experts take which tokens: {folder}")
    model = lab.load_model(str(run))
    study.save(study.collect(model, study.own_texts(model)), folder)


def studied(option: Option, runs: Sequence[tuple[Cell, str]]) -> list[str]:
    """The runs whose experts an option studies: those of its own parent, and not of another option's."""
    return [path for cell, path in runs if option.specializes and cell.name == f"{option.parent}-seed{cell.seed}"]


def study_of(out: Path, run: frames.Place) -> Path:
    return out / "specialization" / Path(run).name


def _conclude(plan: Plan, out: Path, runs: list[tuple[Cell, str]]) -> Stage:
    stage = _judge(plan, out, runs)
    entries = [{**row, "run": _relative(out, row["run"])} for row in stage.rows]
    verdicts = [verdict.as_dict() for verdict in stage.verdicts]
    passed = stage.passed if stage.judged else None
    done = {"stage": plan.stage, "status": "completed", "passed": passed, "plan": asdict(plan)}
    frames.replace_json(out / "stage.json", {**done, "gates": verdicts, "runs": entries})
    save_plots(stage)
    return stage


def _relative(out: Path, run: str) -> str:
    path, root = Path(run).resolve(), out.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _judge(plan: Plan, out: Path, runs: list[tuple[Cell, str]]) -> Stage:
    """A row per run with its own verdict, and a verdict per arm over all its seeds."""
    rows, verdicts = [], {}
    for cell, path in runs:
        verdicts[cell.name] = verdict = own_verdict(path, gate=_gate_of(plan))
        told = {"role": cell.role, "p": cell.p, "option": cell.option, "arm": cell.arm, "parent": cell.parent}
        rows.append(_row(plan, cell.name, path, verdict) | told | {"gate": verdict.as_dict()})
    arms = dict.fromkeys(row["arm"] for row in rows if row["arm"] is not None)
    found = [_verdict_of_arm([row for row in rows if row["arm"] == arm], rows, verdicts) for arm in arms]
    for arm, verdict in zip(arms, found, strict=True):
        _tell([row for row in rows if row["arm"] == arm], verdict)
    for option in (option for option in map(named, plan.options) if option.specializes):
        found.append(_verdict_of_study(option, runs, out))
        _tell([row for row in rows if row["run"] in studied(option, runs)], found[-1])
    return Stage(str(out), tuple(rows), tuple(found), stage=plan.stage)


def _gate_of(plan: Plan) -> str | None:
    """The gate of its runs; None: by the router of each."""
    return None if plan.stage == "stage1" else gates.OPTION


def _row(plan: Plan, name: str, path: str, verdict: gates.Verdict) -> dict[str, Any]:
    row = {**tables.summary(path, verdict), "name": name, "role": None, "p": None, "option": None, "parent": None}
    return row if plan.stage == "stage1" else {**row, "model": model_of(name)}


def _tell(rows: list[dict[str, Any]], verdict: gates.Verdict) -> None:
    """Writes what was judged over all seeds beside the runs that were."""
    for row in rows if verdict.judged else ():
        row["over_seeds"] = f"{verdict.gate}: {verdict.word}"


def own_verdict(path: str, bounds: gates.Bounds | None = None, gate: str | None = None) -> gates.Verdict:
    """Of one run alone; its parent is compared over all seeds together."""
    verdict = gates.judge(path, bounds=bounds, gate=gate)
    return replace(verdict, criteria=tuple(each for each in verdict.criteria if each.name != gates.PARENT))


def _verdict_of_arm(
    own: list[dict[str, Any]], rows: list[dict[str, Any]], verdicts: dict[str, gates.Verdict]
) -> gates.Verdict:
    paths = {row["name"]: row["run"] for row in rows}
    pairs = [(row["run"], paths[row["parent"]]) for row in own]
    name = own[0]["option"]
    return verdict_over_seeds(
        "stage1" if name is None else f"option {name}",
        own[0]["arm"],
        [verdicts[row["name"]] for row in own],
        pairs,
        asked_by(name, pairs),
    )


def asked_by(option: str | None, pairs: Sequence[tuple[str, str]]) -> list[gates.Criterion]:
    """What an option asks of its runs and their parents beyond the gate of every option."""
    records = [(frames.read_run(run), frames.read_run(parent)) for run, parent in pairs]
    return [ask(records) for ask in named(option).asks] if option else []


def _verdict_of_study(option: Option, runs: list[tuple[Cell, str]], out: Path) -> gates.Verdict:
    parents = studied(option, runs)
    own = [own_verdict(run, gate=gates.OPTION) for run in parents]
    return verdict_of_study(f"option {option.name}", "parent's experts", own, [study_of(out, run) for run in parents])


def verdict_of_study(gate: str, label: str, own: list[gates.Verdict], studies: list[Path]) -> gates.Verdict:
    """The verdicts of runs as one, and whether the experts of every block know the class of a token."""
    return verdict_over_seeds(gate, label, own, [], [gates.knows_classes(studies)])


def verdict_over_seeds(
    gate: str,
    label: str,
    own: list[gates.Verdict],
    pairs: list[tuple[str, str]],
    more: Sequence[gates.Criterion] = (),
) -> gates.Verdict:
    """The verdicts of a model's runs as one; `pairs` of run and parent decide whether the parent's loss is kept."""
    if not all(verdict.judged for verdict in own):
        return gates.Verdict(gate, label, False, ())
    criteria = [_over_seeds(same) for same in zip(*(v.criteria for v in own), strict=True)]
    if pairs:
        by = gates.loss_key(*(frames.settings(run) for pair in pairs for run in pair))
        criteria.append(gates.paired([_losses(run, parent, by) for run, parent in pairs], by))
        if by == "loss":
            criteria.append(gates.settled([(_settled(run), _settled(parent)) for run, parent in pairs]))
    return gates.Verdict(gate, label, True, (*criteria, *more))


def _losses(run: str, parent: str, by: str) -> tuple[float | None, float | None]:
    """Of a run and of its parent; refuses a parent with other data. One that diverged in this stage has none."""
    record = frames.read_run(run)
    own = None if record.get("status") == "diverged" else gates.result(record, by)
    if frames.read_run(parent).get("status") == "diverged":
        return own, None
    return own, gates.result(gates.parent_record(record, parent), by)


def _settled(run: str) -> float | None:
    return frames.settled_loss(frames.read_metrics(run))


def _over_seeds(same: tuple[gates.Criterion, ...]) -> gates.Criterion:
    """One criterion over seeds holds when it holds for every seed; the first seed that misses it is shown."""
    shown = next((criterion for criterion in same if not criterion.passed), same[0])
    if len(same) == 1:
        return shown
    return replace(shown, measured=", ".join(gates.show(criterion.measured) for criterion in same))


def is_own(stage: Stage, run: str) -> bool:
    """Whether a run lies in the stage's directory; a given parent does not, and is left as it is."""
    return not os.path.isabs(_relative(Path(stage.out), run))


def model_of(name: str) -> str:
    """What the runs of all seeds have in common in their names."""
    return name.rpartition("-seed")[0]


def by_model(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Runs of the same model (of all seeds), in the order of the stage."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(model_of(str(row["name"])), []).append(str(row["run"]))
    return found


def save_plots(stage: Stage) -> list[Path]:
    """The figures of each run of the stage in its own directory, the comparisons in the stage's."""
    from moe_lab import plots

    for row in stage.rows:
        if is_own(stage, row["run"]):
            plots.save_all(row["run"])
    return plots.save(comparisons(stage), Path(stage.out) / "plots")


def comparisons(stage: Stage) -> "dict[str, Figure]":
    """The models of a stage in one figure a measure, and p against what it does where there are several."""
    from moe_lab import plots

    models = by_model(stage.rows)
    figures = plots.comparisons(
        {_drawn(name, runs): [*map(frames.read_metrics, runs)] for name, runs in models.items()}
    )
    studied = [row for row in stage.rows if row["role"] == "top_p"]
    return figures | ({"sweep": plots.sweep(studied)} if len({row["p"] for row in studied}) > 1 else {})


def _drawn(model: str, runs: Sequence[str]) -> str:
    """Its name in figures, which draw losses of training steps: no other loss is told epoch by epoch."""
    return f"{model} (looks ahead)" if gates.looks_ahead(frames.settings(runs[0])) else model


def _plan(out: Path) -> Plan:
    record = _record(out)
    data = record.get("plan", {})
    lists = {key: tuple(data[key]) for key in ("p", "seeds", "parents", "options") if key in data}
    stage = str(data.get("stage", "stage1"))
    return Plan(**lists, overrides=data.get("overrides", {}), quick=data.get("quick", False), stage=stage)


def _record(out: Path) -> dict[str, Any]:
    return frames.json_object(out / "stage.json")
