"""Sweeps through Optuna: values of any keys, several seeds each; a kill loses nothing, several processes share it.

The study is a journal file in the sweep's directory, the runs lie beside it, named by their values.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_lab import frames, jobs, stages
from moe_lab.jobs import Say
from moe_lab.text import shown

if TYPE_CHECKING:
    import optuna

Parse = Callable[[str], tuple[str, object]]  # KEY=VALUE -> key and value, as --set reads them

LESS = ("loss", "excess", "eval_loss", "facts_loss_after", "paraphrase_loss", "seconds", "l0")
MORE = ("recite", "token_f1", "paraphrase_f1", "tokens_per_second")
SAMPLERS = ("grid", "random", "tpe")
STARTUP = 3  # configurations that pruning lets pass before it judges by their median


@dataclass(frozen=True, slots=True)
class Range:
    """low..high, or low..high:log."""

    low: float
    high: float
    log: bool = False


Choices = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for; sweep.json keeps it."""

    source: str
    space: dict[str, str]  # key -> the text of --set: "0.3,0.4,0.5" or "1e-4..1e-3:log"
    fixed: dict[str, object] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    sampler: str = "grid"
    trials: int | None = None
    metric: str = "loss"
    prune: bool = False
    quick: bool = False


class _StopError(BaseException):  # no Exception: Optuna must leave the trial open
    """A signal stopped a run: the trial stays open and the next start takes it up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _FailedError(RuntimeError):
    """A run of the configuration diverged or failed."""


def split(assignments: Iterable[str], parse: Parse) -> tuple[dict[str, str], dict[str, object]]:
    """--set texts -> those with several values or a range, and the fixed ones."""
    space, fixed = {}, {}
    for text in assignments:
        key, _, value = text.partition("=")
        if value and not value.lstrip().startswith(("[", "{", '"', "'")) and ("," in value or ".." in value):
            space[key.strip()] = value.strip()
        else:
            name, parsed = parse(text)
            fixed[name] = parsed
    return space, fixed


def values_of(key: str, text: str, parse: Parse) -> Choices | Range:
    """The text behind KEY= as a list A,B,C or a range LOW..HIGH[:log]. Raises ValueError in one sentence."""
    found = re.fullmatch(r"([^,]+?)\.\.([^,:]+)(:log)?", text)
    if not found:
        return tuple(dict.fromkeys(parse(f"{key}={part.strip()}")[1] for part in text.split(",") if part.strip()))
    try:
        low, high = float(found[1]), float(found[2])
    except ValueError:
        raise ValueError(f"{key}={text} is no range: write low..high or low..high:log with numbers") from None
    if not low < high or (found[3] and low <= 0):
        raise ValueError(f"{key}={text}: a range needs low < high, and low > 0 with :log")
    return Range(low, high, bool(found[3]))


@dataclass(slots=True)
class Sweep:
    plan: Plan
    out: Path
    lab: stages.Lab
    parse: Parse
    say: Say
    overrides: dict[str, object] = field(default_factory=dict)  # of this process alone: threads

    def space(self) -> dict[str, Choices | Range]:
        return {key: values_of(key, text, self.parse) for key, text in self.plan.space.items()}

    def check(self) -> None:
        """Refuses what cannot be run before anything is written. Raises ValueError in one sentence."""
        plan, space = self.plan, self.space()
        if not space:
            raise ValueError("nothing to sweep: give --set KEY=A,B,C or --set KEY=LOW..HIGH")
        if plan.sampler not in SAMPLERS:
            raise ValueError(f"--sampler {plan.sampler}: must be one of {', '.join(SAMPLERS)}")
        if plan.metric not in (*LESS, *MORE):
            raise ValueError(f"--metric {plan.metric}: must be one of {', '.join((*LESS, *MORE))}")
        ranges = [key for key, values in space.items() if isinstance(values, Range)]
        if plan.sampler == "grid" and ranges:
            raise ValueError(
                f"a grid has no points on the range of {ranges[0]}: list values, or use --sampler random or tpe"
            )
        if plan.sampler != "grid" and plan.trials is None:
            raise ValueError(f"--sampler {plan.sampler} does not end by itself: say how many with --trials N")
        if plan.prune and len(plan.seeds) < 2:
            raise ValueError("--prune gives a configuration up between its seeds: it needs --seeds 2 or more")
        for key, values in space.items():
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                others = {k: (v.low if isinstance(v, Range) else v[0]) for k, v in space.items() if k != key}
                self.lab.load_run(plan.source, {**plan.fixed, **others, key: value}, plan.quick)

    def total(self) -> int:
        return len(self._grid()) if self.plan.sampler == "grid" else int(self.plan.trials or 0)

    def open(self) -> None:
        """Makes the directory, or takes up the sweep that lies there."""
        if is_sweep(self.out):
            there = plan_of(self.out)
            if there != self.plan:
                raise ValueError(f"'{self.out}' holds another sweep ({', '.join(there.space)}); choose another --out")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"'{self.out}' exists and holds no sweep; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "sweep.json.tmp").write_text(json.dumps(asdict(self.plan), indent=1) + "\n")
        (self.out / "sweep.json.tmp").replace(self.out / "sweep.json")
        study = self.study()
        for chosen in self._grid() if self.plan.sampler == "grid" else ():
            study.enqueue_trial(chosen, {"queued": True}, skip_if_exists=True)
        self._take_up(study)

    def _grid(self) -> list[dict[str, Any]]:
        values = {key: each for key, each in self.space().items() if not isinstance(each, Range)}
        return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())][: self.plan.trials]

    def study(self) -> "optuna.Study":
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise ValueError("a sweep needs Optuna: pip install 'optuna>=4.4'") from None

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        backend = JournalFileBackend(str(self.out / "study.journal"))
        tpe = optuna.samplers.TPESampler(seed=os.getpid(), constant_liar=True)
        median = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="sweep",
            load_if_exists=True,
            sampler=tpe if self.plan.sampler == "tpe" else optuna.samplers.RandomSampler(seed=os.getpid()),
            pruner=median if self.plan.prune else optuna.pruners.NopPruner(),
            direction="minimize" if self.plan.metric in LESS else "maximize",
        )

    def _take_up(self, study: "optuna.Study") -> None:
        """Queues again what a dead process of this machine left open; its runs go on where they stopped."""
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get("owner", [None, None])
            if owner[0] not in (None, socket.gethostname()) or (owner[1] and _alive(int(owner[1]))):
                continue
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:
                continue  # another process was faster
            if trial.params:
                study.enqueue_trial(trial.params, {"queued": True})

    def work(self) -> int | None:
        """Takes configurations until none is left; the signal that stopped it."""
        study = self.study()
        try:
            while self._left(study):
                study.optimize(self._objective, n_trials=1, catch=(_FailedError,))
        except _StopError as stopped:
            return stopped.number
        return None

    def _left(self, study: "optuna.Study") -> bool:
        from optuna.trial import TrialState

        trials = study.get_trials(deepcopy=False)
        if self.plan.sampler == "grid":
            return any(trial.state == TrialState.WAITING for trial in trials)
        begun = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return sum(trial.state in begun or "failed" in trial.user_attrs for trial in trials) < self.total()

    def _objective(self, trial: "optuna.Trial") -> float:
        import optuna

        if self.plan.sampler == "grid" and not trial.user_attrs.get("queued"):
            raise _FailedError("another process took the last configuration of the grid")
        trial.set_user_attr("owner", [socket.gethostname(), os.getpid()])
        chosen = {key: _suggest(trial, key, values) for key, values in self.space().items()}
        found: list[float] = []
        for index, seed in enumerate(self.plan.seeds):
            found.append(self._run(chosen, seed, trial))
            trial.report(mean(found), index)
            if index + 1 < len(self.plan.seeds) and trial.should_prune():
                self.say(f"{label(chosen)}: given up after {index + 1} of {len(self.plan.seeds)} seeds")
                raise optuna.TrialPruned
        return mean(found)

    def _run(self, chosen: dict[str, Any], seed: int, trial: "optuna.Trial") -> float:
        name = f"{_slug(chosen)}-seed{seed}"
        overrides = {**self.plan.fixed, **chosen, "seed": seed, "name": name, **self.overrides}
        cell = stages.Cell("sweep", name, seed, self.plan.source, overrides)
        self.say(f"{label(chosen)}, seed {seed}")
        run = self.lab.load_run(self.plan.source, overrides, self.plan.quick)
        path, stopped = stages.train_cell(cell, run, self.out, None, self.lab, self.say)
        if stopped is not None:
            raise _StopError(stopped)
        value, status = self.measured(path), frames.read_run(path).get("status")
        if value is None or status != "completed":
            why = f"{status}, {self.plan.metric} {'not measured' if value is None else value}"
            trial.set_user_attr("failed", why)
            raise _FailedError(f"{path}: {why}")
        return value

    def measured(self, path: frames.Place) -> float | None:
        value = (frames.read_run(path).get("results") or {}).get(self.plan.metric)
        return None if value is None else float(value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _suggest(trial: "optuna.Trial", key: str, values: Choices | Range) -> Any:
    if isinstance(values, Range):
        return trial.suggest_float(key, values.low, values.high, log=values.log)
    return trial.suggest_categorical(key, values)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else shown(str(value))


def label(chosen: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in chosen.items()
    )


def _slug(chosen: dict[str, Any]) -> str:
    """A directory's name for a configuration: last parts of the keys with their values, at full precision."""
    parts = (f"{key.rpartition('.')[2]}-{value!r}" if isinstance(value, float) else f"{key.rpartition('.')[2]}-{value}"
             for key, value in chosen.items())  # fmt: skip
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", "_".join(parts))


def is_sweep(path: frames.Place) -> bool:
    return (Path(path) / "sweep.json").is_file()


def plan_of(out: Path) -> Plan:
    try:
        told = json.loads((out / "sweep.json").read_text())
        return Plan(**{**told, "seeds": tuple(told["seeds"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out / 'sweep.json'} is not the plan of a sweep ({error})") from error


def run(sweep: Sweep, at_once: int = 1) -> int | None:
    """The whole sweep; the signal that stopped it. More than one at once: so many processes share the study."""
    sweep.check()
    sweep.open()
    if at_once == 1:
        return sweep.work()
    todo = [
        jobs.Job(
            f"worker {n}", work_alone, (sweep.plan, sweep.out, sweep.parse), sweep.out / "logs" / f"worker-{n}.log"
        )
        for n in range(1, at_once + 1)
    ]
    codes, stopped = jobs.run(todo, at_once, sweep.say)
    broken = next((job for job in todo if codes.get(job.name)), None)
    if stopped is None and broken is not None:
        raise RuntimeError(f"{broken.name} ended with exit status {codes[broken.name]}: see {broken.log}")
    return stopped


def work_alone(plan: Plan, out: Path, parse: Parse) -> int:
    """One of several workers, on one thread, in a process of its own."""
    from moe_lab import train as lab

    stopped = Sweep(plan, out, lab, parse, jobs.note, {"threads": 1}).work()
    return 0 if stopped is None else 128 + stopped


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """A row per configuration: its values, the metric of every seed that is there, its state; best first."""
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "given up", TrialState.RUNNING: "running"}
    found: dict[str, dict[str, Any]] = {}
    for trial in sweep.study().get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING or (trial.state == TrialState.FAIL and "failed" not in trial.user_attrs):
            continue
        places = [sweep.out / f"{_slug(trial.params)}-seed{seed}" for seed in sweep.plan.seeds]
        known = [value for place in places if frames.is_run(place) and (value := sweep.measured(place)) is not None]
        state = states.get(trial.state) or f"FAILED ({trial.user_attrs['failed']})"
        found[label(trial.params)] = {"values": trial.params, "measured": known, "state": state}
    sign = 1 if sweep.plan.metric in LESS else -1
    return sorted(found.values(), key=lambda row: (row["state"] != "complete", sign * mean(row["measured"] or [0.0])))


def render(sweep: Sweep, console: Console) -> None:
    table = Table(title=f"sweep of {sweep.plan.source}", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for key in (*sweep.plan.space, sweep.plan.metric, "seeds", "state"):
        table.add_column(key, justify="left" if key == "state" else "right")
    for row in rows(sweep):
        got = row["measured"]
        value = "-" if not got else f"{mean(got):.4f}" + (f" ± {stdev(got):.4f}" if len(got) > 1 else "")
        table.add_row(*map(_short, row["values"].values()), value, str(len(got)), row["state"])
    console.print(table)
