"""The gates: criteria over a run's files, pass or fail, each with what was measured, the bound and the reason.

Pure functions over frames and dicts. The bounds are the roadmap's, except where a line says otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab import frames

VERSION = 4  # of the criteria and bounds below; written beside every verdict

EPOCHS = 100
LOSS = 0.40
RECITE = 0.95
BAND = (1.5, 2.0)
SPREAD = 0.1
FAIR_SHARE = 0.1  # of the fair load 1/E; below it an expert counts as dead
INFORMATION = 0.05  # nats above the shuffled baseline; a router that ignores its token has none
MOVEMENT = 0.01  # experts or nats; what a router that learns passes within its first epochs
L0 = 15.0
CAUSAL = "train_loss"  # the result that is measured after training, token by token without a look ahead
Pairs = Sequence[tuple[dict[str, Any], dict[str, Any]]]  # run.json of a run and of its parent, a pair a seed
BESIDE = {"paraphrases", "augment", "augmented"}  # files of a run whose documents its loss is not of
PARENT = "no worse than parent"  # the criterion that compares two runs
TOLERANCE = 0.013  # how much the roadmap lets a stage lose: 0.40 "maintains" 0.387
TEXT_LOSS = 2.0  # nats a character of the shipped text: a bigram model has about 2.5
OPTION = "option"  # the gate of every option of stages 2 to 5
SAME_EXPERTS = 0.15  # about a tenth: mean experts per token may differ by so much where two thresholds are compared
CHANCE = 0.05  # largest p of the permutation test that counts as knowledge


@dataclass(frozen=True, slots=True)
class Bounds:
    """The roadmap's numbers for one milestone; those of milestone 1 if nothing else is said."""

    loss: float = LOSS
    l0: float = L0
    band: tuple[float, float] = BAND


class NoGateError(ValueError):
    """The run is of a kind that no gate is about."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a gate: what was measured, what it must be, and why it is asked."""

    name: str
    measured: float | str | None  # None: the run did not measure it, which fails
    bound: str
    passed: bool
    why: str
    note: bool = False  # it is shown and decides nothing


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says of a run."""

    gate: str
    run: str
    judged: bool
    criteria: tuple[Criterion, ...]

    @property
    def missed(self) -> tuple[Criterion, ...]:
        """The criteria that fail it."""
        return tuple(criterion for criterion in self.criteria if not (criterion.passed or criterion.note))

    @property
    def passed(self) -> bool:
        return self.judged and not self.missed

    @property
    def word(self) -> str:
        if not self.judged:
            return "not judged (quick)"
        return "passed" if self.passed else "FAILED"

    def as_dict(self) -> dict[str, Any]:
        criteria = [asdict(criterion) for criterion in self.criteria]
        passed = self.passed if self.judged else None
        return {"gate": self.gate, "version": VERSION, "run": self.run, "passed": passed, "criteria": criteria}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a gate looks at: the files of one run, and the loss of its parent where there is one."""

    run: dict[str, Any]
    config: dict[str, Any]
    frame: pl.DataFrame
    parent_loss: float | None = None
    bounds: Bounds = Bounds()
    by: str = "loss"  # the result that is compared with the parent's

    def result(self, name: str) -> float | None:
        return result(self.run, name)

    @property
    def on_text(self) -> bool:
        return on_text(self.config)

    def layers(self) -> list[int]:
        return frames.sparse_layers(self.frame)

    def last(self) -> dict[str, Any]:
        return frames.last_epoch(self.frame)


def judge(
    run: frames.Place,
    parent: frames.Place | None = None,
    bounds: Bounds | None = None,
    gate: str | None = None,
) -> Verdict:
    """The gate of a run, chosen by its router if not named: dense -> baseline, top_k -> control, else stage1.

    `parent` is the run whose loss must be kept; without it the parent that run.json names, if it is still there.
    Raises NoGateError for a run on a plain text where no gate is named, ValueError for a parent that is unfinished or
    has other data.
    """
    record, config = frames.read_run(run), frames.settings(run)
    gate = gate or gate_of(config)
    if is_quick(config):
        return Verdict(gate, str(run), judged=False, criteria=())
    named = parent or named_parent(run, record)
    by = loss_key(config) if named is None else loss_key(config, frames.settings(named))
    kept = None if named is None else result(parent_record(record, named), by)
    evidence = Evidence(record, config, frames.read_metrics(run), kept, bounds or Bounds(), by)
    return Verdict(gate, str(run), judged=True, criteria=criteria(gate, evidence))


def criteria(gate: str, evidence: Evidence) -> tuple[Criterion, ...]:
    """Every criterion of a gate; the comparison with a parent only where a parent is known."""
    alone = evidence.parent_loss is None
    return tuple(check(evidence) for check in GATES[gate] if not (alone and check is keeps_parent_loss))


def gate_of(config: dict[str, Any]) -> str:
    """The gate that judges runs of this configuration. Raises NoGateError where there is none."""
    if on_text(config):
        raise NoGateError("this run trains on a text (data.text); the gates judge runs on facts and chat")
    kind = config.get("model", {}).get("router", {}).get("kind", "dense")
    return {"dense": "baseline", "top_k": "control"}.get(kind, "stage1")


def is_quick(config: dict[str, Any]) -> bool:
    return bool(config.get("quick", False))


def named_parent(run: frames.Place, record: dict[str, Any]) -> Path | None:
    """The run whose id run.json names as parent, where it lies beside this one and is finished."""
    named = record.get("parent")
    beside = Path(run).resolve().parent / str(named)
    return beside if named and frames.is_run(beside) and unfinished(beside) is None else None


def parent_record(record: dict[str, Any], parent: frames.Place) -> dict[str, Any]:
    """run.json of the parent. Raises ValueError when it is unfinished or was trained on other data."""
    before = finished(parent)
    if measured_on(before) != measured_on(record):
        raise ValueError(f"the parent '{parent}' was trained on other data: the losses cannot be compared")
    return before


def measured_on(record: dict[str, Any]) -> dict[str, str]:
    """Hash of every file that a loss is of: neither held-out paraphrases nor the variants that augmentation adds."""
    return {role: file["sha256"] for role, file in record.get("data", {}).items() if role not in BESIDE}


def finished(run: frames.Place, role: str = "parent") -> dict[str, Any]:
    """run.json of a completed run that has a loss. Raises ValueError with the remedy for any other."""
    why = unfinished(run)
    if why is not None:
        raise ValueError(f"the {role} '{run}' {why}")
    return frames.read_run(run)


def unfinished(run: frames.Place) -> str | None:
    """Why a run cannot be compared, and what to do about it; None for a completed one that has a loss.

    The status decides: a run that ended in its chat phase has the loss of its facts phase in run.json already.
    """
    status = frames.status(run)
    if status in ("failed", "diverged"):
        return f"is {status}: train it once more with a change (python -m moe_lab rerun {run} --set KEY=VALUE)"
    if status != "completed":
        return f"is {status}, not completed: go on with it first (python -m moe_lab resume {run})"
    if result(frames.read_run(run), loss_key(frames.settings(run))) is None:
        return "measured no loss: only runs with chat data, or a text with a held-out part (data.val_fraction), compare"
    return None


def result(record: dict[str, Any], name: str) -> float | None:
    value = (record.get("results") or {}).get(name)
    return None if value is None else float(value)


def on_text(config: dict[str, Any]) -> bool:
    return bool(config.get("data", {}).get("text"))


def looks_ahead(config: dict[str, Any]) -> bool:
    """Whether the loss of training steps saw later tokens.

    A mixture of depths may take the best tokens of a whole document, and experts choose theirs among all of it.
    """
    model = config.get("model", {})
    depths = model.get("depths", {})
    best = float(depths.get("capacity", 1.0)) < 1.0 and depths.get("choice", "best") == "best"
    return best or bool(model.get("router", {}).get("kind") == "expert_choice")


def loss_key(*configs: dict[str, Any]) -> str:
    """The result by which runs are compared: on the chat training set, on a text the held-out one.

    Where the training steps of one of them look ahead, that of all after the last update, which is causal.
    """
    if any(map(on_text, configs)):
        return "eval_loss"
    return CAUSAL if any(map(looks_ahead, configs)) else "loss"


def completes(evidence: Evidence) -> Criterion:
    if evidence.on_text:
        return _completes_text(evidence)
    rows = frames.epochs(evidence.frame)
    wanted = frames.phase_epochs(evidence.config)
    done = {phase: rows.filter(pl.col("phase") == phase).height for phase in wanted}
    status, least = evidence.run.get("status"), least_epochs(evidence.config)
    counts = ", ".join(f"{phase} {done[phase]}/{wanted[phase]}" for phase in wanted)
    passed = status == "completed" and all(done[phase] >= max(wanted[phase], least) for phase in wanted)
    why = "a run that stopped early, or that was given fewer epochs, has not met the protocol"
    return Criterion("completes", f"{status}, {counts}", f"completed, {least} epochs a phase", passed, why)


def least_epochs(config: dict[str, Any]) -> int:
    """Epochs a phase that the protocol asks for: with variants beside the documents as many fewer as one is longer."""
    copies = int(config.get("data", {}).get("augment", {}).get("copies", 0))
    return -(-EPOCHS // (1 + copies))


def _completes_text(evidence: Evidence) -> Criterion:
    wanted = frames.text_updates(evidence.config) or 0
    done = int(evidence.frame["step"].max() or 0) if evidence.frame.height else 0  # type: ignore[arg-type]
    status = evidence.run.get("status")
    why = "a run that stopped early has not met the protocol"
    passed = status == "completed" and done >= wanted
    return Criterion("completes", f"{status}, {done} of {wanted} updates", "completed", passed, why)


def stays_finite(evidence: Evidence) -> Criterion:
    frame, bad = evidence.frame, 0.0
    if "nonfinite" in frame.columns:
        bad += int(frame["nonfinite"].is_not_null().sum())
    if "event" in frame.columns:
        bad += int(frame["event"].is_in(["diverged", "failure"]).sum())
    why = "no loss, gradient or weight may become infinite or NaN"
    return Criterion("stays finite", bad, "0 rows with non-finite numbers or failures", bad == 0, why)


def reaches_loss(evidence: Evidence) -> Criterion:
    floor, key = evidence.result("floor"), loss_key(evidence.config)
    beside = "" if floor is None else f"; the entropy floor of this data is {floor:.4f}"
    when = "after the last update, causal" if key == CAUSAL else "last chat epoch"
    late = None if key == CAUSAL else frames.settled_loss(evidence.frame)
    mean = "" if late is None else f", mean of the last {frames.SETTLED} epochs {late:.4f}"
    why = f"mean over sequences, {when}, nats{mean}{beside}"
    return at_most("loss", evidence.result(key), evidence.bounds.loss, why)


def coherent(evidence: Evidence) -> Criterion:
    """What a run of documents recites; a run on a text has no answers, and is judged by its held-out loss."""
    if not evidence.on_text:
        return recites(evidence)
    why = "held-out loss, nats a token; a bigram model of the shipped text has about 2.5, so below it are words"
    return at_most("coherent", evidence.result("eval_loss"), TEXT_LOSS, why)


def recites(evidence: Evidence) -> Criterion:
    good, total = evidence.result("recite"), evidence.result("recite_total")
    share = good / total if good is not None and total else None
    counts = "" if good is None or total is None else f" ({good:.0f} of {total:.0f})"
    why = f"answers to all training questions, greedy, token for token up to and including </s>{counts}"
    return at_least("recites", share, RECITE, why)


def keeps_l0(evidence: Evidence) -> Criterion:
    why = "gradient norm at the embedding output, mean of the last chat epoch; an upper bound only"
    return at_most("L0", evidence.result("l0"), evidence.bounds.l0, why)


def keeps_parent_loss(evidence: Evidence) -> Criterion:
    loss, parent = evidence.result(evidence.by), evidence.parent_loss
    difference = None if loss is None or parent is None else loss - parent
    return at_most(PARENT, difference, TOLERANCE, f"{_named(evidence.by)} minus the parent's {show(parent)}")


def _named(key: str) -> str:
    """A loss that is compared, for people."""
    return "causal loss after the last update (training steps look ahead)" if key == CAUSAL else "loss"


def stays_in_band(evidence: Evidence) -> Criterion:
    mean, (low, high) = evidence.result("experts_per_token"), evidence.bounds.band
    passed = mean is not None and low <= mean <= high
    why = "alone it proves nothing: a dead uniform router of four experts scores exactly 2.0 at p = 0.4"
    return Criterion("experts per token", mean, f"{low} to {high}", passed, why)


def spreads(evidence: Evidence) -> Criterion:
    overall = evidence.result("experts_std")
    last = evidence.last()
    stds = [std for layer in evidence.layers() if (std := last.get(f"moe/layer_{layer:02}/experts_std")) is not None]
    widest = max(stds, default=None)
    measured = None if overall is None or widest is None else min(overall, widest)
    why = f"standard deviation over tokens, overall {show(overall)}, widest layer {show(widest)}: tokens must differ"
    return more_than("spread of experts per token", measured, SPREAD, why)


def uses_every_expert(evidence: Evidence) -> Criterion:
    last = evidence.last()
    shares: dict[tuple[int, int], float] = {}
    for layer in evidence.layers():
        load = last.get(f"moe/layer_{layer:02}/load") or []
        shares |= {(layer, expert): share * len(load) for expert, share in enumerate(load)}
    worst = min(shares, key=lambda place: shares[place], default=None)
    least = None if worst is None else shares[worst]
    named = "" if worst is None else f"; the least used is expert {worst[1]} of layer {worst[0]}"
    return at_least("every expert used", least, FAIR_SHARE, f"load over the fair load, last chat epoch{named}")


def informs(evidence: Evidence) -> Criterion:
    last = evidence.last()
    values = [last.get(f"moe/layer_{layer:02}/information") for layer in evidence.layers()]
    known = [value for value in values if value is not None]
    least = min(known) if known and len(known) == len(values) else None
    listed = ", ".join(show(value) for value in values)
    why = f"mutual information of expert and token minus its shuffled baseline, nats, by layer: {listed}"
    return at_least("experts informative", least, INFORMATION, why)


def learns_to_route(evidence: Evidence) -> Criterion:
    if evidence.config.get("model", {}).get("router", {}).get("frozen"):
        return Criterion("router learns", "frozen", "not frozen", False, "model.router.frozen is true")
    rows = frames.epochs(evidence.frame)
    moved = [
        abs(series[-1] - series[0])
        for layer in evidence.layers()
        for measure in ("experts_per_token", "router_entropy")
        for phase in ("facts", "chat")
        if len(series := _series(rows, phase, f"moe/layer_{layer:02}/{measure}")) > 1
    ]
    why = "largest change of a layer's experts per token or router entropy from the first to the last epoch of a phase"
    return at_least("router learns", max(moved, default=None), MOVEMENT, why)


def _series(rows: pl.DataFrame, phase: str, name: str) -> list[float]:
    if name not in rows.columns:
        return []
    return rows.filter(pl.col("phase") == phase)[name].drop_nulls().to_list()


GATES: dict[str, tuple[Callable[[Evidence], Criterion], ...]] = {
    "baseline": (completes, stays_finite, reaches_loss, recites),
    "control": (completes, stays_finite, reaches_loss, recites, keeps_l0, keeps_parent_loss),
    OPTION: (completes, stays_finite, keeps_parent_loss, coherent, keeps_l0),
    "stage1": (
        completes,
        stays_finite,
        reaches_loss,
        keeps_parent_loss,
        stays_in_band,
        spreads,
        uses_every_expert,
        informs,
        learns_to_route,
        keeps_l0,
        recites,
    ),
}


def at_most(name: str, measured: float | None, bound: float, why: str) -> Criterion:
    return Criterion(name, measured, f"≤ {bound:g}", measured is not None and measured <= bound, why)


def at_least(name: str, measured: float | None, bound: float, why: str) -> Criterion:
    return Criterion(name, measured, f"≥ {bound:g}", measured is not None and measured >= bound, why)


def more_than(name: str, measured: float | None, bound: float, why: str) -> Criterion:
    return Criterion(name, measured, f"> {bound:g}", measured is not None and measured > bound, why)


def less(name: str, difference: float | None, why: str) -> Criterion:
    """A run that must have less of something than its parent."""
    return Criterion(name, difference, "< 0", difference is not None and difference < 0, why)


def show(value: float | str | None) -> str:
    """A measured value for people."""
    if value is None:
        return "not measured"
    return value if isinstance(value, str) else f"{value:.4g}"


def paired(losses: list[tuple[float | None, float | None]], by: str = "loss") -> Criterion:
    """The parent criterion of a stage: the mean over seeds of (loss minus the parent's loss of the same seed).

    `by` is the result that is compared. A pair with an unknown loss (a run diverged) leaves the mean unknown: it fails.
    """
    mean, each = _mean_difference(losses, "+.4f")
    return at_most(PARENT, mean, TOLERANCE, f"mean over seeds of {_named(by)} minus the parent's: {each}")


def settled(losses: Sequence[tuple[float | None, float | None]]) -> Criterion:
    """A note beside `paired`, by the loss that `compare` judges: that of one epoch alone is high or low by chance."""
    mean, each = _mean_difference(losses, "+.4f")
    why = f"mean over seeds of the last {frames.SETTLED} epochs' mean loss minus the parent's: {each}"
    return replace(at_most(f"{PARENT}, {frames.SETTLED} epochs", mean, TOLERANCE, why), note=True)


def _mean_difference(pairs: Sequence[tuple[float | None, float | None]], form: str) -> tuple[float | None, str]:
    """Mean over seeds of a run's number minus its parent's, None where one is unknown; each difference for people."""
    known = [own - parent for own, parent in pairs if own is not None and parent is not None]
    mean = sum(known) / len(known) if known and len(known) == len(pairs) else None
    return mean, ", ".join(f"{difference:{form}}" for difference in known)


def _numbers(pairs: Pairs, name: str) -> list[tuple[float | None, float | None]]:
    return [(result(own, name), result(parent, name)) for own, parent in pairs]


def same_experts(pairs: Pairs) -> Criterion:
    """Whether runs use as many experts per token as their parents, mean over seeds: else the losses do not compare."""
    mean, each = _mean_difference(_numbers(pairs, "experts_per_token"), "+.3f")
    passed = mean is not None and abs(mean) <= SAME_EXPERTS
    why = f"mean over seeds of experts per token minus the parent's: {each}; thresholds compare at equal mean experts"
    return Criterion("equal mean experts", mean, f"-{SAME_EXPERTS} to {SAME_EXPERTS}", passed, why)


def understands_paraphrases(pairs: Pairs) -> Criterion:
    """Whether what was never seen is met with less loss than the parent has on it, mean over seeds."""
    mean, each = _mean_difference(_numbers(pairs, "paraphrase_loss"), "+.4f")
    return less("held-out paraphrases", mean, f"mean over seeds of their loss minus the parent's, nats: {each}")


def takes_fewer_flops(pairs: Pairs) -> Criterion:
    """Whether a token costs less than in the parent, mean over seeds."""
    mean, each = _mean_difference(_numbers(pairs, "flops_per_token"), "+,.0f")
    return less("FLOPs per token", mean, f"mean over seeds of them minus the parent's: {each}")


def takes_less_memory(pairs: Pairs) -> Criterion:
    """Whether a step holds fewer bytes of activations and gradients than the parent's, mean over seeds.

    The process's peak is no measure: runs of one process inherit it. A note where a build did not count the bytes.
    """
    name, held = "memory of a step", _numbers(pairs, "arena_bytes")
    mean, each = _mean_difference(held, "+,.0f")
    if any(None in pair for pair in held):
        why = "arena_bytes is not in the results of every run and parent: train them again with a build that counts it"
        return Criterion(name, None, "< 0", False, why, note=True)
    return less(name, mean, f"most bytes of activations and gradients, mean over seeds minus the parent's: {each}")


def same_bits(pairs: Pairs) -> Criterion:
    """Whether every run has the very loss of its parent."""
    losses = _numbers(pairs, "loss")
    _, each = _mean_difference(losses, "+.3g")
    passed = bool(losses) and all(own is not None and own == parent for own, parent in losses)
    return Criterion("same loss to the bit", each or None, "0 for every seed", passed, "loss minus the parent's")


def knows_classes(studies: Sequence[Path]) -> Criterion:
    """The permutation test of `specialize` in every block of every run: experts tell about the class of a token."""
    tables = [pl.read_csv(study / "information.csv") for study in studies if (study / "information.csv").exists()]
    rows = pl.concat(tables).filter(pl.col("view") == "form") if tables and len(tables) == len(studies) else None
    worst = None if rows is None or not rows.height else float(rows["p"].max())  # type: ignore[arg-type]
    least = "" if rows is None else f"; least: {show(float((rows['information'] - rows['shuffled']).min()))} nats"  # type: ignore[arg-type]
    why = f"largest p over blocks and seeds, experts against shuffled classes of tokens{least} above chance"
    return at_most("experts know classes", worst, CHANCE, why)
