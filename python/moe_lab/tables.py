"""The stage table: what each run measured, runs of one model joined over seeds as mean ± standard deviation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_lab import frames, gates
from moe_lab.text import plain, shown


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the table: its key in `summary`, how a number is printed, and the roadmap's target."""

    key: str
    label: str
    number: Callable[[float], str]
    target: str = ""


def _digits(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


MEASURES = (
    Measure("loss", "loss", _digits(4), f"≤ {gates.LOSS:.2f}"),
    Measure("floor", "entropy floor", _digits(4)),
    Measure("excess", "excess over floor", _digits(4)),
    Measure("train_loss", "loss after training, causal", _digits(4)),
    Measure("loss_ahead", "loss in training, looks ahead", _digits(4)),
    Measure("eval_loss", "held-out loss", _digits(4)),
    Measure("epochs_to_target", f"chat epochs to {gates.LOSS:.2f}", _count),
    Measure("recited", "recites", _percent, f"≥ {100 * gates.RECITE:.0f} %"),
    Measure("paraphrase_f1", "held-out paraphrases, F1", _digits(3)),
    Measure("paraphrase_loss", "held-out paraphrases, loss", _digits(3)),
    Measure("facts_loss_before", "facts loss before chat", _digits(4)),
    Measure("facts_loss_after", "facts loss after chat", _digits(4)),
    Measure("experts_per_token", "experts/token", _digits(3), f"{gates.BAND[0]}-{gates.BAND[1]}"),
    Measure("experts_std", "  its spread over tokens", _digits(3), f"> {gates.SPREAD}"),
    Measure("load_p95", "  load of an expert, p95 (1 = fair)", _digits(2)),
    Measure("l0", "L0", _digits(2), f"≤ {gates.L0:g}"),
    Measure("params", "parameters", _count),
    Measure("active_params", "active parameters", _count),
    Measure("flops_per_token", "FLOPs per token", _count),
    Measure("tokens_per_second", "tokens/s", _count),
    Measure("seconds", "seconds", _digits(1)),
    Measure("arena_bytes", "memory of a step, MB", lambda value: f"{value / 1e6:,.1f}"),
    Measure("peak_memory_bytes", "peak memory, MB", lambda value: f"{value / 1e6:,.0f}"),
)


def summary(run: frames.Place, verdict: gates.Verdict | None = None) -> dict[str, Any]:
    """One run as a flat dict: its `results`, what the table derives from them, and the word of its gate.

    Where training steps look ahead, their loss stands under `loss_ahead`, so that nothing is compared with it.
    """
    record, config = frames.read_run(run), frames.settings(run)
    results = record.get("results") or {}
    good, total = results.get("recite"), results.get("recite_total")
    ahead = gates.looks_ahead(config)
    return {
        **results,
        **({"loss_ahead": results.get("loss"), "loss": None, "excess": None} if ahead else {}),
        "run": str(run),
        "name": config.get("name"),
        "model": model_name(config),
        "seed": config.get("seed"),
        "status": record.get("status"),
        "recited": good / total if good is not None and total else None,
        "epochs_to_target": None if ahead else epochs_to(frames.read_metrics(run), gates.LOSS),
        "verdict": word(run) if verdict is None else verdict.word,
    }


def word(run: frames.Place) -> str:
    """Of the run's gate; a run on a plain text has none."""
    try:
        return gates.judge(run).word
    except gates.NoGateError:
        return "no gate"


def model_name(config: dict[str, Any]) -> str:
    """What distinguishes the models of a stage: "dense", "top_p 0.4", "top_k 2"."""
    router = config.get("model", {}).get("router", {})
    kind = router.get("kind", "dense")
    amount = router.get("p") if kind == "top_p" else router.get("k")
    return str(kind) if kind == "dense" or amount is None else f"{kind} {amount}"


def epochs_to(frame: Any, loss: float, phase: str = "chat") -> int | None:
    """The first epoch of a phase whose loss is at most `loss`."""
    rows = frames.epochs(frame)
    if "epoch/loss" not in rows.columns:
        return None
    reached = rows.filter((rows["phase"] == phase) & (rows["epoch/loss"] <= loss))
    return int(reached["epoch"][0]) if reached.height else None


def render(summaries: Iterable[dict[str, Any]], console: Console, title: str = "", by: str = "model") -> None:
    """Measures down, models (or single runs, `by="run"`) across, the roadmap's targets last; as many across as fit."""
    groups = _groups(summaries, by)
    names = list(groups)
    fitting = max(1, (console.width - 42) // 20)
    for start in range(0, len(names), fitting):
        some = {name: groups[name] for name in names[start : start + fitting]}
        table = Table(title=title if start == 0 and title else None, box=box.SIMPLE_HEAD, title_justify="left")
        table.title_style = "bold"
        table.add_column("")
        for name in some:
            table.add_column(plain(name), justify="right", overflow="fold")
        table.add_column("roadmap", justify="right", style="dim")
        for row in _lines(some):
            table.add_row(*map(plain, row))
        console.print(table)


def markdown_of(summaries: Iterable[dict[str, Any]], by: str = "model") -> str:
    """The same table for a page."""
    groups = _groups(summaries, by)
    return markdown(("", *groups, "roadmap"), _lines(groups), ("",))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Rows as a table in Markdown; the columns in `left` are aligned to the left."""
    marks = ["---" if column in left else "---:" for column in head]
    lines = ((shown(cell).replace("|", "\\|").strip() for cell in line) for line in (head, marks, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _groups(summaries: Iterable[dict[str, Any]], by: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in summaries:
        groups.setdefault(str(entry[by]), []).append(entry)
    return groups


def _lines(groups: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Seeds, every measure that some model has, the gate: name, a cell for each model, the roadmap's target.

    The targets are for models that recite, not for those of a plain text.
    """
    recite = any(entry.get("recited") is not None for entries in groups.values() for entry in entries)
    lines = [["seeds", *(", ".join(str(entry["seed"]) for entry in entries) for entries in groups.values()), ""]]
    for measure in MEASURES:
        cells = [_cell(measure, entries) for entries in groups.values()]
        if any(cell != "-" for cell in cells):
            lines.append([measure.label, *cells, measure.target if recite else ""])
    lines.append(["gate of each run", *(_words(entries) for entries in groups.values()), ""])
    over = [
        next((entry["over_seeds"] for entry in entries if entry.get("over_seeds")), "-") for entries in groups.values()
    ]
    return [*lines, ["gate over seeds", *over, ""]] if set(over) - {"-"} else lines


def _cell(measure: Measure, entries: list[dict[str, Any]]) -> str:
    values = [float(value) for entry in entries if (value := entry.get(measure.key)) is not None]
    values = [value for value in values if isfinite(value)]
    if not values:
        return "-"
    middle = measure.number(mean(values))
    return middle if min(values) == max(values) else f"{middle} ± {measure.number(stdev(values))}"


def _words(entries: list[dict[str, Any]]) -> str:
    words = [entry["verdict"] for entry in entries]
    return words[0] if len(set(words)) == 1 else f"{words.count('passed')} of {len(words)} passed"


MARKS = {True: "[green]pass[/green]", False: "[bold red]FAIL[/bold red]"}


def render_verdict(verdict: gates.Verdict, console: Console) -> None:
    """Every criterion with its measure and bound, then the word of the gate."""
    if not verdict.judged:
        console.print(f"{verdict.gate} gate: not judged (quick)  {plain(verdict.run)}", highlight=False)
        return
    table = Table(
        title=f"{verdict.gate} gate  {plain(verdict.run)}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for column in ("", "criterion", "measured", "bound", "what is measured"):
        table.add_column(column, overflow="fold")
    for criterion in verdict.criteria:
        mark = "note" if criterion.note else MARKS[criterion.passed]
        cells = (criterion.name, gates.show(criterion.measured), criterion.bound, criterion.why)
        table.add_row(mark, *map(plain, cells))
    console.print(table)
    console.print(f"{verdict.gate} gate: {verdict.word}", highlight=False)
