"""The only importer of the compiled engine: runs, trainers, models, and a training with progress for people."""

import mmap
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_lab.text import shown

TORCH = "2.11.0"  # the only release whose libraries a torch build of the engine may meet


def _import_torch() -> None:
    """A torch build of the engine lives on the libraries of the installed torch, which must be loaded before it."""
    spec = find_spec("moe_lab._native")
    if spec is None or spec.origin is None:
        return
    with open(spec.origin, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        if library.find(b"\0libtorch_cpu.so\0") < 0:
            return
    remedy = f"pip install torch=={TORCH}, or build without the torch engine: make build"
    try:
        found = version("torch")
    except PackageNotFoundError:
        raise ImportError(f"this build of moe_lab needs torch {TORCH}, which is not installed; {remedy}") from None
    if found.partition("+")[0] != TORCH:
        raise ImportError(f"this build of moe_lab needs torch {TORCH} but found {found}; {remedy}")
    import_module("torch")


_import_torch()

from moe_lab._native import (  # noqa: E402
    DivergedError,
    Model,
    Run,
    Trainer,
    __version__,
    bench,
    compare_runs,
    config_docs,
    config_schema,
    data_stats,
    doctor,
    loss_and_gradients,
    lr_find,
    reproduction,
)

__all__ = [
    "DivergedError",
    "Model",
    "Outcome",
    "Run",
    "Trainer",
    "__version__",
    "bench",
    "compare_runs",
    "config_docs",
    "config_schema",
    "data_stats",
    "doctor",
    "load_model",
    "load_run",
    "loss_and_gradients",
    "lr_find",
    "reproduction",
    "resume_training",
    "run_training",
    "switches",
]

# Events that a person should see.
ALERTS = {
    "alert", "collapse", "checkpoint_failed", "slow_save", "disk", "fault", "spike", "skipped", "rolled_back",
    "early_stop", "low_rate",
}  # fmt: skip
PLAIN_SECONDS = 2.0  # at least so long between two lines where no terminal shows a live bar


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended: its run directory, and the signal that stopped it (None: it is complete)."""

    out: str
    signal: int | None = None
    already_done: bool = False


def load_run(source: str, overrides: dict[str, object] | None = None, quick: bool = False) -> Run:
    run = Run.load(source, overrides)
    return run.quick() if quick else run


def switches(source: str, parent: str) -> dict[str, object]:
    """The values in which a run file differs from its parent, by dotted key; None where it has no such key."""
    changes = load_run(parent).diff(load_run(source))
    values = {key: None if new == "absent" else tomllib.loads(f"value = {new}")["value"] for key, _, new in changes}
    return {key: value for key, value in values.items() if key != "name"}


def load_model(run: str) -> Model:
    return Model.load(run)


def run_training(run: Run, out: str | None = None, parent: str | None = None) -> Outcome:
    """Trains a run into its directory. Raises what the engine raises; a signal ends it after a full checkpoint."""
    with _signals() as caught:
        return _train(Trainer(run, out, parent), caught)


def resume_training(out: str, place: dict[str, str] | None = None) -> Outcome:
    """Goes on where the run in `out` stopped, `place` naming another engine, device or dtype."""
    with _signals() as caught:
        trainer = Trainer.resume(out, place)
        if trainer.done:
            return Outcome(trainer.out, already_done=True)
        return _train(trainer, caught)


def _train(trainer: Trainer, caught: "_Caught") -> Outcome:
    with _watcher(trainer) as watcher:
        for note in trainer.notes:
            watcher.say(note)
        try:
            for row in trainer:
                if row.get("event") in ALERTS:
                    watcher.say(f"warning: {row.get('message')}")
                watcher.see(row)
                if caught.save:
                    caught.save = False
                    trainer.save()
                if caught.number is not None:
                    trainer.stop()
                    return Outcome(trainer.out, signal=caught.number)
        except OSError as error:
            # The configuration was fine and training had begun: this is a failure, not bad usage.
            raise RuntimeError(f"{error.strerror or error}; the run directory is {trainer.out}") from error
    return Outcome(trainer.out)


@dataclass(slots=True)
class _Caught:
    number: int | None = None
    save: bool = False


@contextmanager
def _signals() -> Iterator[_Caught]:
    """SIGINT and SIGTERM are remembered once, so that the step is finished and saved; the second ends the process.

    SIGUSR1 asks for a checkpoint.
    """
    caught = _Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def remember(number: int, _frame: FrameType | None) -> None:
        caught.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def save(_number: int, _frame: FrameType | None) -> None:
        caught.save = True

    handlers = {signal.SIGINT: remember, signal.SIGTERM: remember, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watcher(Protocol):
    """Shows progress on stderr."""

    def see(self, row: dict[str, Any]) -> None: ...
    def say(self, note: str) -> None: ...


@contextmanager
def _watcher(trainer: Trainer) -> Iterator[_Watcher]:
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[latest]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            yield _Live(progress, trainer)
    else:
        yield _Plain(trainer.total_steps, trainer.step)


@dataclass(slots=True)
class _Latest:
    """The newest value of each measure that is shown, whatever row it stood in."""

    values: dict[str, Any] = field(default_factory=dict)

    def take(self, row: dict[str, Any]) -> None:
        self.values.update((key, value) for key, value in row.items() if value is not None)

    def place(self) -> str:
        return f"{self.values.get('phase', '')} epoch {self.values.get('epoch', '-')}"

    def measures(self) -> str:
        shown = (("loss", "epoch/loss", ".4f"), ("floor", "epoch/floor", ".4f"), ("lr", "train/learning_rate", ".2e"),
                 ("experts", "moe/experts_per_token", ".2f"), ("L0", "train/l0", ".2f"))  # fmt: skip
        values = {**self.values, "epoch/loss": self.values.get("epoch/loss", self.values.get("train/loss"))}
        return "  ".join(f"{name} {values[key]:{form}}" for name, key, form in shown if values.get(key) is not None)


class _Live:
    """A bar with the newest measures, on a terminal."""

    def __init__(self, progress: Progress, trainer: Trainer) -> None:
        self.progress, self.latest = progress, _Latest()
        self.task = progress.add_task("starting", total=trainer.total_steps, completed=trainer.step, latest="")

    def see(self, row: dict[str, Any]) -> None:
        self.latest.take(row)
        step = int(self.latest.values.get("step", 0))
        self.progress.update(self.task, completed=step, description=self.latest.place(), latest=self.latest.measures())

    def say(self, note: str) -> None:
        self.progress.console.print(shown(note), highlight=False, markup=False)


class _Plain:
    """One line for an epoch, but not more often than every two seconds."""

    def __init__(self, total: int, first: int) -> None:
        self.total, self.first, self.latest = total, first, _Latest()
        self.start = self.spoken = time.monotonic()

    def see(self, row: dict[str, Any]) -> None:
        self.latest.take(row)
        now, step = time.monotonic(), int(self.latest.values.get("step", 0))
        last = step >= self.total
        if row.get("epoch/loss") is None or (now - self.spoken < PLAIN_SECONDS and not last):
            return
        self.spoken = now
        left = (now - self.start) / max(1, step - self.first) * (self.total - step)
        ending = "" if last else f"  {left:.0f} s left"
        self.say(f"{self.latest.place()}  step {step}/{self.total}  {self.latest.measures()}{ending}")

    def say(self, note: str) -> None:
        print(shown(note), file=sys.stderr, flush=True)


def default_out(name: str) -> Path:
    """runs/<time>-<name>, as the engine names the directory of a single run."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{name}"
