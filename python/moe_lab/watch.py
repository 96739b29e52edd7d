"""A run in the terminal while it trains: the stream is read as it grows; keys switch panels."""

import json
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moe_lab import frames
from moe_lab.text import shown

POINTS = 1000  # kept of a curve; beyond, every second one is let go
KEPT = ("train/loss", "epoch/loss", "eval/loss", "epoch/floor", "train/learning_rate", "train/grad_norm", "train/l0")
ALERTS = 50
SHOWN = (
    ("loss", "epoch/loss", ".4f"),
    ("floor", "epoch/floor", ".4f"),
    ("lr", "train/learning_rate", ".2e"),
    ("experts", "moe/experts_per_token", ".2f"),
    ("L0", "train/l0", ".2f"),
    ("tokens/s", "train/tok_per_sec", ",.0f"),
)
PANELS = ("loss", "gradients", "routing", "samples", "alerts")
QUIET = {"run_started", "phase_started", "checkpoint", "completed"}


@dataclass(slots=True)
class Curve:
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > POINTS:
            del self.steps[1:-1:2], self.values[1:-1:2]


@dataclass(slots=True)
class State:
    """What is known of a run so far: the newest value of every measure, curves of a few, alerts."""

    latest: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    alerts: list[tuple[int, str]] = field(default_factory=list)
    phase_start: tuple[int, float] = (0, 0.0)  # step and time
    first_epoch: dict[str, int] = field(default_factory=dict)  # phase -> steps of its first epoch

    def take(self, row: dict[str, Any]) -> None:
        step, phase = int(row.get("step") or 0), row.get("phase")
        if phase is not None and phase != self.latest.get("phase"):
            self.phase_start = step, float(row.get("ts") or 0.0)
        if row.get("kind") == "eval" and row.get("epoch") == 1 and phase is not None:
            self.first_epoch.setdefault(str(phase), step - self.phase_start[0])
        if row.get("kind") == "event" and row.get("event") not in QUIET:
            self.alerts = [*self.alerts[-ALERTS:], (step, str(row.get("message") or row.get("event")))]
        self.latest.update((name, value) for name, value in row.items() if value is not None)
        for name in KEPT:
            if isinstance(value := row.get(name), int | float):
                self.curves.setdefault(name, Curve()).add(step, float(value))


@dataclass(slots=True)
class Follower:
    """Reads what was appended to a stream since the last look; a line that is not whole yet waits for its end."""

    path: Path
    state: State = field(default_factory=State)
    offset: int = 0

    def look(self) -> bool:
        """Whether there was anything new. A stream that was cut back (a resume) is read from its beginning."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self.offset:
            self.offset, self.state = 0, State()
        if size == self.offset:
            return False
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(size - self.offset)
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                self.state.take(row)
        return bool(whole)


@dataclass(slots=True)
class View:
    """A run directory as renderables."""

    run: Path
    follower: Follower
    epochs: dict[str, int]
    max_steps: int | None
    panel: int = 0

    @classmethod
    def of(cls, run: frames.Place) -> "View":
        frames.read_run(run)  # names what is no run
        config = frames.settings(run)
        follower = Follower(Path(run) / "metrics.jsonl")
        return cls(Path(run), follower, frames.phase_epochs(config), frames.text_updates(config))

    @property
    def status(self) -> str:
        return frames.status(self.run)

    def render(self, width: int, height: int) -> RenderableType:
        draw: tuple[Callable[[int, int], RenderableType], ...] = (
            self._loss,
            self._gradients,
            self._routing,
            self._samples,
            self._alerts,
        )
        names = (f"<{i} {name}>" if i - 1 == self.panel else f" {i} {name} " for i, name in enumerate(PANELS, 1))
        keys = Text(f"{' '.join(names)}  tab next  q quit", style="dim", overflow="crop", no_wrap=True)
        return Group(self._head(), draw[self.panel](width, max(6, height - 6)), keys)

    def _head(self) -> Text:
        latest = self.follower.state.latest
        phase, epoch = latest.get("phase", "-"), latest.get("epoch", "-")
        place = f"{phase} epoch {epoch}/{self.epochs.get(str(phase), '-')}"
        parts = [f"{self.run.name}  {self.status}  {place}  step {latest.get('step', 0):,}"]
        values = {**latest, "epoch/loss": latest.get("epoch/loss", latest.get("train/loss"))}
        known = [(name, values.get(key), form) for name, key, form in SHOWN]
        measures = [f"{name} {value:{form}}" for name, value, form in known if isinstance(value, int | float)]
        left = self.left()
        parts += ["  ".join(measures), "" if left is None else f"about {_clock(left)} left in this phase"]
        if self.follower.state.alerts:
            step, text = self.follower.state.alerts[-1]
            parts.append(f"! step {step}: {text}")
        return Text(shown("\n".join(part for part in parts if part)), overflow="ellipsis", no_wrap=True)

    def left(self) -> float | None:
        """Seconds to the end of the phase, from its pace so far; None before its first epoch has ended."""
        state, latest = self.follower.state, self.follower.state.latest
        phase, step, now = str(latest.get("phase")), int(latest.get("step", 0)), float(latest.get("ts") or 0.0)
        begun, since = state.phase_start
        epoch_steps = state.first_epoch.get(phase)
        end = self.max_steps or (epoch_steps and begun + epoch_steps * self.epochs.get(phase, 0))
        if not end or step <= begun or step >= end or self.status != "running":
            return None
        return (now - since) / (step - begun) * (end - step)

    def _loss(self, width: int, height: int) -> RenderableType:
        curves = self.follower.state.curves
        curve = curves.get("epoch/loss") or curves.get("train/loss")
        if curve is None or len(curve.values) < 2:
            curve = curves.get("train/loss")
        if curve is None:
            return Text("nothing has been trained yet")
        floor = curves.get("epoch/floor")
        return chart(curve, width, height, None if floor is None else floor.values[-1])

    def _gradients(self, width: int, height: int) -> RenderableType:
        table = Table("layer", "parameter gradient", "", "input gradient", "update / weight", box=None, pad_edge=False)
        latest = self.follower.state.latest
        names = sorted(name for name in latest if name.startswith("grad/") and name.endswith("/param_norm"))
        most = max((float(latest[name]) for name in names), default=0.0) or 1.0
        for name in names[: height - 1]:
            layer = name.split("/")[1]
            own, given, ratio = (
                latest.get(key) for key in (name, f"grad/{layer}/activation_norm", f"update/{layer}/ratio")
            )
            table.add_row(layer, _number(own), bar(float(own or 0) / most), _number(given), _number(ratio))
        return table if names else Text("no gradient norms yet")

    def _routing(self, width: int, height: int) -> RenderableType:
        latest = self.follower.state.latest
        layers = sorted({name.split("/")[1] for name in latest if name.startswith("moe/layer_")})
        if not layers:
            return Text("this run has no experts" if latest else "no routing yet")
        load_is = "load of the experts (full block: twice the fair share)"
        table = Table("layer", "experts/token", "spread", "entropy", load_is, box=None, pad_edge=False)
        for layer in layers[: height - 1]:
            load = latest.get(f"moe/{layer}/load") or []
            bars = "".join(BLOCKS[min(8, round(4 * share * len(load)))] for share in load)
            measured = (
                latest.get(f"moe/{layer}/{key}") for key in ("experts_per_token", "experts_std", "router_entropy")
            )
            table.add_row(layer, *map(_number, measured), bars)
        return table

    def _samples(self, width: int, height: int) -> RenderableType:
        rows = frames.samples(self.run)[-max(1, height // 3) :]
        lines = [f"step {row.get('step')}  {row.get('prompt')}\n  {row.get('text')}" for row in rows]
        return Text(shown("\n".join(lines)) or "no samples yet (eval.samples)")

    def _alerts(self, width: int, height: int) -> RenderableType:
        failure = frames.failure(self.run)
        told = (
            [f"failed at step {failure.get('step')}: {failure.get('reason')}; {failure.get('remedy')}"]
            if failure
            else []
        )
        told += [f"step {step}: {text}" for step, text in reversed(self.follower.state.alerts)]
        return Text(shown("\n".join(told[:height])) or "no alerts")

    def line(self) -> str:
        """One line, for a pipe."""
        return shown(str(self._head()).replace("\n", "  "))


BLOCKS = " ▁▂▃▄▅▆▇█"
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: two columns of four


def bar(share: float, width: int = 20) -> str:
    return "█" * round(width * min(1.0, max(0.0, share)))


def chart(curve: Curve, width: int, height: int, floor: float | None) -> Text:
    """Values over steps in braille dots on a logarithmic scale, and the floor as a broken line; labels on the left."""
    positive = [value for value in curve.values if value > 0]
    if not positive:
        return Text("no positive values")
    low, high = min([*positive, *([floor] if floor else [])]), max(positive)
    top, bottom = log10(high), log10(low)
    scale = (top - bottom) or 1.0
    columns, lines = max(10, width - 10), max(3, height - 2)
    cells = [[0] * columns for _ in range(lines)]
    span = max(1, curve.steps[-1] - curve.steps[0])

    def dot(x: int, value: float) -> None:
        y = round((top - log10(value)) / scale * (4 * lines - 1))
        cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]

    if floor:
        for x in range(0, 2 * columns, 4):
            dot(x, floor)
    for step, value in zip(curve.steps, curve.values, strict=True):
        if value > 0:
            dot(round((step - curve.steps[0]) / span * (2 * columns - 1)), value)
    rows = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    labels = {0: f"{high:.3g}", lines - 1: f"{low:.3g}"}
    drawn = [f"{labels.get(index, ''):>8} ┤{row}" for index, row in enumerate(rows)]
    ends = f"{curve.steps[0]:,}"
    return Text(
        "\n".join([*drawn, f"{'':>10}{ends}{curve.steps[-1]:>{columns - len(ends)},}"]), no_wrap=True, overflow="crop"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes}:{rest:02}"


def watch(run: frames.Place, console: Console, interval: float = 2.0, once: bool = False) -> None:
    """Shows a run until `q`; where no terminal is, a line whenever there is news, until the run ends."""
    view = View.of(run)
    view.follower.look()
    if once:
        console.print(view.render(console.width, 24))
    elif console.is_terminal and sys.stdin.isatty():
        _on_terminal(view, console, interval)
    else:
        _in_pipe(view, interval)


def _in_pipe(view: View, interval: float) -> None:
    print(view.line(), flush=True)
    while (status := view.status) == "running":
        time.sleep(interval)
        if view.follower.look():
            print(view.line(), flush=True)
    if status == "killed":
        print(f"its process is gone: go on with python -m moe_lab resume {view.run}", flush=True)


def _on_terminal(view: View, console: Console, interval: float) -> None:
    def picture() -> RenderableType:
        return view.render(console.width, console.height)

    with _keys() as read, Live(picture(), console=console, screen=True, auto_refresh=False) as live:
        size = console.size
        while True:
            key = read(interval)
            if key in ("q", "\x03", "\x04"):
                return
            view.panel = turned(view.panel, key)
            if view.follower.look() or key or console.size != size:
                size = console.size
                live.update(picture(), refresh=True)


def turned(panel: int, key: str) -> int:
    """The panel after a key: its number, or the next one by tab."""
    if key.isdigit() and 1 <= int(key) <= len(PANELS):
        return int(key) - 1
    return (panel + 1) % len(PANELS) if key in ("\t", "n") else panel


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A reader of single keys with a time to wait; the terminal is given back as it was."""
    import termios
    import tty

    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)

    def read(seconds: float) -> str:
        ready, _, _ = select.select([place], [], [], seconds)
        return sys.stdin.read(1) if ready else ""

    tty.setcbreak(place)
    try:
        yield read
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)
