"""Runs against a control: paired seeds, intervals, verdicts only above the noise, speed to the control's loss.

Runs whose configurations differ in nothing but the seed form an arm; the first run's arm is the control.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from moe_lab import frames, gates, tables
from moe_lab.statistics import CONFIDENCE, Interval, bootstrap, noise_floor
from moe_lab.text import plain

SAME = {"seed", "name", "threads", "quick"}  # keys in which runs of one arm may differ


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the comparison. `better` is +1 where more is better, -1 where less is, 0 where neither."""

    key: str
    label: str
    better: int


MEASURES = (
    Measure("loss", "loss, nats, last epoch", -1),
    Measure("settled_loss", f"loss, mean of last {frames.SETTLED} epochs", -1),
    Measure("train_loss", "loss after training, causal", -1),
    Measure("eval_loss", "held-out loss", -1),
    Measure("recited", "training answers recited", 1),
    Measure("paraphrase_f1", "held-out paraphrases, F1", 1),
    Measure("paraphrase_loss", "held-out paraphrases, loss", -1),
    Measure("facts_loss_after", "facts loss after chat", -1),
    Measure("epochs_to_target", "epochs to the target loss", -1),
    Measure("experts_per_token", "experts per token", 0),
    Measure("active_params", "active parameters", -1),
    Measure("flops_per_token", "FLOPs per token", -1),
    Measure("flops", "training FLOPs", -1),
    Measure("arena_bytes", "memory of a step, bytes", -1),
    Measure("seconds", "training seconds", -1),
    Measure("l0", "L0", 0),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run measured, and its course: the loss of every epoch beside what training has cost by then."""

    run: str
    seed: int
    measures: dict[str, float]
    course: pl.DataFrame  # loss, seconds, flops, tokens of the last phase, counted from the phase's start


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    config: dict[str, Any]
    samples: dict[int, Sample]  # by seed

    def values(self, key: str) -> list[float]:
        return [sample.measures[key] for sample in self.samples.values() if key in sample.measures]


@dataclass(frozen=True, slots=True)
class Difference:
    """Arm minus control over paired seeds. `noise`: what seeds alone make of it; inside it there is no verdict."""

    measure: Measure
    control: float
    arm: float
    interval: Interval
    noise: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times less of `cost` the arm needs for the control's final loss; None where a seed never has it."""

    cost: str
    reached: int
    seeds: int
    ratio: Interval | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    control: str
    arm: str
    seeds: tuple[int, ...]
    changes: tuple[tuple[str, Any, Any], ...]
    differences: tuple[Difference, ...]
    speedups: tuple[Speedup, ...]


def compare(paths: Iterable[frames.Place], target: float = gates.LOSS) -> list[Comparison]:
    """Every arm against the control. `target` is the loss of "epochs to the target loss".

    Raises ValueError for runs without results, on other data, of other lengths, or with fewer than two common seeds.
    """
    arms = arms_of(paths, target)
    control, *others = arms
    if not others:
        raise ValueError(
            "all these runs have the same configuration up to the seed: name runs of a second one to compare with"
        )
    return [_against(control, arm) for arm in others]


def arms_of(paths: Iterable[frames.Place], target: float = gates.LOSS) -> list[Arm]:
    """Runs grouped by their configuration without the seed, in the order in which they are named."""
    arms: list[Arm] = []
    first: dict[str, Any] | None = None
    quick = False
    for path in dict.fromkeys(str(Path(path)) for path in paths):
        record, config = gates.finished(path, "run"), frames.settings(path)
        if first is None:
            first, quick = record, gates.is_quick(config)
        if gates.measured_on(first) != gates.measured_on(record):
            raise ValueError(f"'{path}' was trained on other data than the first run: their losses cannot be compared")
        flat = {key: value for key, value in frames.flatten(config).items() if key not in SAME}
        arm = next((arm for arm in arms if arm.config == flat), None)
        if arm is None:
            run = Path(path).name.removesuffix(f"-seed{config.get('seed')}")
            arm = Arm(_unused(tables.model_name(config), arms, run), flat, {})
            arms.append(arm)
        sample = sample_of(path, target)
        if sample.seed in arm.samples:
            raise ValueError(
                f"'{path}' and '{arm.samples[sample.seed].run}' are the same run (seed {sample.seed}): name one of them"
            )
        if gates.is_quick(config) != quick:
            raise ValueError(f"'{path}' and the first run must both be --quick or neither: their epochs differ")
        arm.samples[sample.seed] = sample
    if not arms:
        raise ValueError("no runs to compare")
    return arms


def _unused(name: str, arms: Sequence[Arm], run: str) -> str:
    return name if all(arm.name != name for arm in arms) else f"{name} ({run})"


def sample_of(path: frames.Place, target: float = gates.LOSS) -> Sample:
    """What is compared of a run. Raises ValueError in one sentence for a run without results."""
    summary, frame, config = tables.summary(path), frames.read_metrics(path), frames.settings(path)
    results = frames.read_run(path).get("results") or {}
    way, ahead = course(frame, config, results), gates.looks_ahead(config)
    last = frame["phase"].drop_nulls().last() if "phase" in frame.columns else None
    total = training_flops(frame, config, results)
    measured = {
        **{measure.key: summary.get(measure.key) for measure in MEASURES},
        "settled_loss": None if ahead else frames.settled_loss(frame),
        "epochs_to_target": None if ahead else tables.epochs_to(frame, target, str(last)),
        "flops": None if total is None else float(total.last() or 0.0),  # type: ignore[arg-type]
    }
    kept = {key: float(value) for key, value in measured.items() if value is not None and isfinite(float(value))}
    return Sample(str(path), int(config.get("seed", 0)), kept, way)


def training_flops(frame: pl.DataFrame, config: dict[str, Any], results: dict[str, Any]) -> pl.Series | None:
    """FLOPs spent up to each training step: the stream's own `flops`, else 6 · active parameters · tokens.

    Active parameters follow the experts per token of the step, so that a router that grows sparse is paid as it goes.
    """
    steps = frame.filter(pl.col("kind") == "train") if "kind" in frame.columns else frame
    if "flops" in steps.columns:
        return steps["flops"].cast(pl.Float64)
    active = results.get("active_params")
    if active is None or not steps.height:
        return None
    fed = steps["tokens"].diff().fill_null(steps["tokens"].first()).cast(pl.Float64)
    used = pl.Series([float(active)] * steps.height)
    last, router = results.get("experts_per_token"), config.get("model", {}).get("router", {})
    if last is not None and "moe/experts_per_token" in steps.columns:
        layers = len(frames.sparse_layers(frame))
        expert = 3 * config["model"]["hidden_size"] * router["expert_hidden_size"]
        used = used + (steps["moe/experts_per_token"].fill_null(float(last)) - float(last)) * float(layers * expert)
    return (6.0 * used * fed).cum_sum()


def course(frame: pl.DataFrame, config: dict[str, Any], results: dict[str, Any]) -> pl.DataFrame:
    """Loss at the end of every epoch of the last phase beside what the phase has cost by then.

    The phases before it have a fixed length, so they are no part of the race. Seconds are those of the training steps.
    Empty where these losses look ahead: nobody races against them.
    """
    empty = pl.DataFrame(schema=dict.fromkeys(("loss", "seconds", "flops", "tokens"), pl.Float64))
    if gates.looks_ahead(config) or not {"phase", "epoch", "epoch/loss"} <= set(frame.columns):
        return empty
    steps = frame.filter(pl.col("kind") == "train")
    flops = training_flops(frame, config, results)
    paid = steps.select(
        "step",
        "phase",
        pl.col("tokens").cast(pl.Float64),
        (pl.col("train/dt") if "train/dt" in steps.columns else pl.col("ts").diff())
        .fill_null(0.0)
        .cum_sum()
        .alias("seconds"),
        pl.Series("flops", flops if flops is not None else [None] * steps.height, dtype=pl.Float64),
    )
    ends = frame.filter(pl.col("epoch/loss").is_not_null()).select("step", "phase", loss="epoch/loss")
    phase = ends["phase"].last() if ends.height else None
    before = paid.filter(pl.col("phase") != phase).select(pl.col("tokens", "seconds", "flops").max().fill_null(0.0))
    joined = ends.filter(pl.col("phase") == phase).join(paid.drop("phase"), on="step", how="inner")
    return joined.select("loss", *(pl.col(cost) - (before[cost][0] or 0.0) for cost in ("seconds", "flops", "tokens")))


def cost_to(way: pl.DataFrame, loss: float, cost: str) -> float | None:
    """What the course has cost when its loss first is at most `loss`, between epochs on the line through log losses."""
    before: tuple[float, float] | None = None
    for at, spent in way.select("loss", cost).iter_rows():
        if spent is None or at is None:
            return None
        if at <= loss:
            if before is None or before[0] <= at:
                return float(spent)
            share = (log(before[0]) - log(loss)) / (log(before[0]) - log(at))
            return float(before[1] + share * (spent - before[1]))
        before = (at, spent)
    return None


def _against(control: Arm, arm: Arm) -> Comparison:
    seeds = tuple(sorted(set(control.samples) & set(arm.samples)))
    if len(seeds) < 2:
        raise ValueError(
            f"'{control.name}' and '{arm.name}' have {'one seed' if seeds else 'no seed'} in common, "
            "an interval needs two: train both with the same seeds (--seed, or --seeds N of a stage)"
        )
    keys = sorted(control.config.keys() | arm.config.keys())
    pairs = ((key, control.config.get(key), arm.config.get(key)) for key in keys)
    changes = tuple((key, old, new) for key, old, new in pairs if old != new)
    found = (_difference(measure, control, arm, seeds) for measure in MEASURES)
    speedups = (_speedup(cost, control, arm, seeds) for cost in ("seconds", "flops", "tokens"))
    return Comparison(
        control.name,
        arm.name,
        seeds,
        changes,
        tuple(each for each in found if each),
        tuple(each for each in speedups if each),
    )


def _difference(measure: Measure, control: Arm, arm: Arm, seeds: Sequence[int]) -> Difference | None:
    key = measure.key
    old = [control.samples[seed].measures.get(key) for seed in seeds]
    new = [arm.samples[seed].measures.get(key) for seed in seeds]
    if any(value is None for value in (*old, *new)):
        return None
    before, after = [float(v) for v in old if v is not None], [float(v) for v in new if v is not None]
    interval = bootstrap([b - a for a, b in zip(before, after, strict=True)])
    noise = noise_floor([control.values(key), arm.values(key)], len(seeds))
    means = sum(before) / len(before), sum(after) / len(after)
    return Difference(measure, *means, interval, noise, verdict(interval, noise, measure.better))


def verdict(interval: Interval, noise: float | None, better: int) -> str:
    """A word only where the interval leaves zero and the mean leaves the noise of the seeds."""
    outside = interval.low > 0 or interval.high < 0
    if not outside or noise is None or abs(interval.mean) <= noise:
        return "no difference shown"
    more = interval.mean > 0
    if not better:
        return "more" if more else "less"
    return "better" if more == (better > 0) else "worse"


def _speedup(cost: str, control: Arm, arm: Arm, seeds: Sequence[int]) -> Speedup | None:
    ratios = []
    for seed in seeds:
        own, other = control.samples[seed].course, arm.samples[seed].course
        if min(own.height, other.height) < 2 or own[cost].null_count():
            return None
        goal = float(own["loss"][-1])
        theirs = cost_to(other, goal, cost)
        mine = cost_to(own, goal, cost)
        if theirs and mine:
            ratios.append(log(mine / theirs))
    if len(ratios) < len(seeds):
        return Speedup(cost, len(ratios), len(seeds), None, "not reached by every seed")
    logs = bootstrap(ratios)
    ratio = Interval(exp(logs.mean), exp(logs.low), exp(logs.high))
    # Seeds that race themselves: how far the control's own seeds scatter in what they need to reach one another's loss.
    noise = noise_floor([_self_race(control, cost), ratios], len(seeds))
    return Speedup(
        cost,
        len(ratios),
        len(seeds),
        ratio,
        {"better": "faster", "worse": "slower"}.get(v := verdict(logs, noise, 1), v),
    )


def _self_race(control: Arm, cost: str) -> list[float]:
    goal = max(float(sample.course["loss"][-1]) for sample in control.samples.values())
    costs = [cost_to(sample.course, goal, cost) for sample in control.samples.values()]
    return [log(each) for each in costs if each]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """For --json."""

    def interval(found: Interval | None) -> dict[str, float] | None:
        return None if found is None else {"mean": found.mean, "low": found.low, "high": found.high}

    return {
        "control": comparison.control,
        "arm": comparison.arm,
        "seeds": list(comparison.seeds),
        "confidence": CONFIDENCE,
        "changes": [{"key": key, "control": old, "arm": new} for key, old, new in comparison.changes],
        "differences": [
            {
                "measure": each.measure.key,
                "control": each.control,
                "arm": each.arm,
                "difference": interval(each.interval),
                "noise": each.noise,
                "verdict": each.verdict,
            }
            for each in comparison.differences
        ],
        "speedup": [
            {
                "cost": each.cost,
                "reached": each.reached,
                "seeds": each.seeds,
                "ratio": interval(each.ratio),
                "verdict": each.verdict,
            }
            for each in comparison.speedups
        ],
    }


def render(comparison: Comparison, console: Console) -> None:
    """What was changed, a line per measure, the speed to the control's loss, and what the words mean."""
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    title = f"{comparison.arm} against {comparison.control} (control), seeds {seeds}"
    table = Table(title=plain(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("", "control", "arm", "difference", f"{CONFIDENCE:.0%} interval", "noise of seeds", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right")
    for each in comparison.differences:
        noise = "-" if each.noise is None else f"± {number(each.noise)}"
        table.add_row(
            each.measure.label,
            number(each.control),
            number(each.arm),
            number(each.interval.mean, signed=True),
            f"{number(each.interval.low, signed=True)} to {number(each.interval.high, signed=True)}",
            noise,
            COLOURS.get(each.verdict, "{}").format(each.verdict),
        )
    console.print(table)
    for race in comparison.speedups:
        console.print(_race(race), highlight=False)
    changed = "; ".join(f"{key}: {_value(old)} -> {_value(new)}" for key, old, new in comparison.changes)
    console.print(f"changed: {plain(changed)}", highlight=False)
    words = {each.measure.key: each.verdict for each in comparison.differences}
    judged = ("eval_loss", "settled_loss", "loss", gates.CAUSAL)
    word = next((words[key] for key in judged if key in words), "not measured")
    console.print(f"verdict on the loss: {word}\n", highlight=False)


COLOURS = {"better": "[green]{}[/green]", "worse": "[red]{}[/red]"}


def _race(race: Speedup) -> str:
    told = f"  effective speedup in {race.cost}, to the control's loss: "
    if race.ratio is None:
        return f"{told}none ({race.reached} of {race.seeds} seeds reach it)"
    ratio = race.ratio
    return f"{told}{ratio.mean:.3g}x ({ratio.low:.3g} to {ratio.high:.3g}), {race.verdict}"


def _value(value: Any) -> str:
    return "-" if value is None else str(value)


def number(value: float, signed: bool = False) -> str:
    """Four digits; thousands with commas, millions and more with an exponent."""
    if value == 0:
        return "0"
    size, sign = abs(value), "+" if signed else ""
    if size >= 1e9 or size < 1e-4:
        return f"{value:{sign}.2e}"
    return f"{value:{sign},.0f}" if size >= 1000 else f"{value:{sign}.4g}"
