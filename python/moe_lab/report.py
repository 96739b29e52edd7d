"""A run, a stage or the roadmap as one HTML page that holds all it shows: results, gates, curves, samples,
configuration, provenance.

Everything that came out of a run directory is escaped; the page has no script and loads nothing.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from moe_lab import frames, gates, plots, roadmap, stages, tables

PROMPTS, TEXTS = 4, 4  # how many prompts are shown, and how many of each one's texts
EVENTS = 40
STUDIES, MAPS = 2, 4  # of how many runs the maps of specialisation are shown, and how many of each
OWN = {"id", "argv", "cwd", "parent", "started", "finished", "seed"}  # of every run its own
SVG_BYTES = 250_000  # a larger drawing is embedded as a picture
SECTIONS = (
    ("Loss", ("loss",)),
    ("Routing", ("routing", "utilisation", "entropy")),
    ("Gradients and learning rate", ("learning_rate", "l0", "gradients")),
)
# Colours of the figures -> those of the page, light or dark.
INKS = {plots.INK: "currentColor", "#000000": "currentColor", plots.FAINT: "var(--soft)", "#e6e6e6": "var(--line)"}
QUIET = {"run_started", "phase_started", "checkpoint"}  # events that say that all is as it should be


def write(run: frames.Place) -> Path:
    """Writes report.html into the directory of a run, stage or roadmap, in one step. Returns its path."""
    if frames.is_stage(run):
        page = of_stage(Path(run))
    else:
        page = of_roadmap(Path(run)) if frames.is_roadmap(run) else of_run(run)
    path = Path(run) / "report.html"
    half = path.with_suffix(".tmp")
    half.write_text(page, encoding="utf-8")
    half.replace(path)
    return path


def of_run(run: frames.Place) -> str:
    """The page of a run."""
    record, config, frame = frames.read_run(run), frames.settings(run), frames.read_metrics(run)
    try:
        verdicts = [gates.judge(run)]
    except ValueError:  # a plain text, an unfinished parent: a page without a gate is still a page
        verdicts = []
    sparse = bool(frames.sparse_layers(frame))
    drawn = {name: draw for name, draw in plots.FIGURES.items() if sparse or name not in plots.SPARSE}
    sections = [
        (heading, [embed(name, drawn[name](frame)) for name in names if name in drawn])
        for heading, names in SECTIONS
        if frame.height
    ]
    told = _pictures(Path(run) / "specialization")
    return _page(
        title=str(config.get("name", Path(run).name)),
        lead=_lead(record, config),
        failure=frames.failure(run) if record.get("status") in ("failed", "diverged") else None,
        numbers=_numbers(run, verdicts[0] if verdicts else None),
        verdicts=verdicts,
        sections=[each for each in [*sections, ("Specialisation", told)] if each[1]],
        samples=_samples(run),
        events=_events(frame),
        changes=_changes(config),
        toml=(Path(run) / "run.toml").read_text(errors="replace"),
        provenance=_provenance(record),
    )


MEASURED = (
    "loss",
    "train_loss",
    "floor",
    "excess",
    "recited",
    "facts_loss_after",
    "experts_per_token",
    "l0",
    "active_params",
)


def of_stage(out: Path) -> str:
    """The page of a stage."""
    stage = stages.so_far(out)
    models = stages.by_model(stage.rows)
    paths = {row["name"]: row["run"] for row in stage.rows}
    parents = {name: _parent_of(stage.rows, name, paths) for name in models}
    head = ("run", *(key.replace("_", " ") for key in MEASURED), "gate")
    listed = [[str(row["name"]), *(_number(row.get(key)) for key in MEASURED), row["verdict"]] for row in stage.rows]
    return _page(
        title=stage.title[0].upper() + stage.title[1:],
        lead=f"{out.name} · {len(stage.rows)} runs · gate: {stage.word}",
        tables=[("Runs", head, listed, ()), _differences(models, parents)],
        verdicts=stage.verdicts,
        sections=_sections(stages.comparisons(stage), models, out),
        samples=_last_samples(models),
        provenance=_shared_provenance(models),
    )


def _parent_of(rows: Sequence[Mapping[str, Any]], name: str, paths: Mapping[str, str]) -> str | None:
    """The first run that the model is compared with."""
    kept = next((row["parent"] for row in rows if stages.model_of(str(row["name"])) == name), None)
    return None if kept is None else paths.get(kept)


def of_roadmap(out: Path) -> str:
    """The page of a roadmap."""
    plan, listed = roadmap.plan_of(out), roadmap.rows(out)
    record = frames.json_object(out / "roadmap.json")
    every = [(milestone, step) for milestone in roadmap.MILESTONES for step in milestone.steps]
    there = {
        step.name: runs for _, step in every if step.role != "study" and (runs := roadmap.runs_of(step, plan, out))
    }
    parents = {step.name: there[step.parent][0] if step.parent in there else None for _, step in every}
    curves = roadmap.figures(out) if there else {}
    steps = [row for row in listed if row["step"] in there]
    why = f" at {record['failed']}: {record.get('why')}" if record.get("failed") else ""
    return _page(
        title="The roadmap",
        lead=f"{out.name} · seeds {', '.join(map(str, plan.seeds))} · {record.get('status')}{why}",
        tables=[
            ("Milestones", roadmap.HEAD, roadmap.cells(listed), roadmap.notes(listed)),
            _differences(there, parents),
        ],
        verdicts=list(roadmap.verdicts(out).values()),
        sections=_sections(({"ladder": plots.ladder(steps)} if steps else {}) | curves, there, out),
        samples=_last_samples(there),
        provenance=_shared_provenance(there),
    )


def _differences(
    models: Mapping[str, Sequence[str]], parents: Mapping[str, str | None]
) -> tuple[str, tuple[str, ...], list[list[str]], tuple[str, ...]]:
    """What each model's configuration changes in its parent's, by the first seed's run.toml."""
    rows = []
    for name, runs in models.items():
        parent = parents.get(name)
        if parent is None:
            continue
        new, old = (frames.flatten(frames.settings(run)) for run in (runs[0], parent))
        keys = sorted((new.keys() | old.keys()) - {"name", "seed", "threads"})
        told = [[key, _number(old.get(key)), _number(new.get(key))] for key in keys if new.get(key) != old.get(key)]
        rows += [[name if number == 0 else "", *row] for number, row in enumerate(told)]
    return "What was changed", ("model", "key", "parent", "model's"), rows, ()


def _sections(
    curves: Mapping[str, Figure], models: Mapping[str, Sequence[str]], out: Path
) -> list[tuple[str, list[Markup]]]:
    """Curves over all seeds, the experts' use by the first seed of every sparse model, the studies of experts."""
    streams = {name: frames.read_metrics(runs[0]) for name, runs in models.items()}
    use = [
        _titled(embed(f"{name} {figure}", plots.FIGURES[figure](frame)), name)
        for name, frame in streams.items()
        if frames.sparse_layers(frame)
        for figure in ("routing", "utilisation")
    ]
    maps = [
        _titled(picture, folder.name)
        for folder in sorted((out / "specialization").glob("*"))[:STUDIES]
        for picture in _pictures(folder)[:MAPS]
    ]
    sections = [("Curves", [embed(name, figure) for name, figure in curves.items()])]
    return [each for each in [*sections, ("Routing, first seed", use), ("Specialisation", maps)] if each[1]]


def _titled(figure: Markup, title: str) -> Markup:
    return Markup("<figcaption>{}</figcaption>{}").format(title, figure)


def _last_samples(models: Mapping[str, Sequence[str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first prompts, and what the first seed of every model makes of them at its end."""
    by_prompt: dict[str, dict[str, str]] = {}
    for name, runs in models.items():
        for row in frames.samples(runs[0]):
            by_prompt.setdefault(str(row.get("prompt")), {})[name] = str(row.get("text"))
    return [(prompt, list(texts.items())) for prompt, texts in list(by_prompt.items())[:PROMPTS]]


def _shared_provenance(models: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """What all runs have in common; where runs differ, that they do."""
    every = [dict(_provenance(frames.read_run(run))) for runs in models.values() for run in runs]
    keys = dict.fromkeys(key for told in every for key in told if key not in OWN)
    found = []
    for key in keys:
        values = list(dict.fromkeys(told.get(key, "-") for told in every))
        found.append((key, values[0] if len(values) == 1 else f"{len(values)} values: {', '.join(values[:3])}"))
    return found


def _page(**values: Any) -> str:
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["number"] = _number
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).render(**values)


def embed(name: str, figure: Figure) -> Markup:
    """A figure as SVG whose ink follows the page's colours; as a picture where the drawing is large."""
    drawing = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawing.getvalue()
    if len(svg) > SVG_BYTES:
        picture = BytesIO()
        figure.savefig(picture, format="png")
        return _image(picture.getvalue(), name)
    for colour, follows in INKS.items():
        svg = svg.replace(colour, follows)
    return Markup(svg[svg.index("<svg") :])  # matplotlib escapes what it writes


def _image(data: bytes, name: str) -> Markup:
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(name, b64encode(data).decode())


def _pictures(folder: Path) -> list[Markup]:
    return [_image(path.read_bytes(), path.stem) for path in sorted(folder.glob("*.png"))]


def _lead(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    quick = ", quick (10 epochs a phase)" if gates.is_quick(dict(config)) else ""
    parts = (
        tables.model_name(dict(config)),
        f"seed {config.get('seed')}",
        f"{record.get('status')}{quick}",
        record.get("started"),
    )
    return " · ".join(str(part) for part in parts if part)


def _numbers(run: frames.Place, verdict: gates.Verdict | None) -> list[tuple[str, str]]:
    found = tables.summary(run, verdict or gates.Verdict("none", str(run), False, ()))
    known = ((measure, found.get(measure.key)) for measure in tables.MEASURES)
    return [(measure.label.strip(), measure.number(float(value))) for measure, value in known if value is not None]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _samples(run: frames.Place) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first prompts with some of their texts, from the first to the last."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for row in frames.samples(run):
        place = f"{row.get('phase')} epoch {row.get('epoch')}, step {row.get('step')}"
        by_prompt.setdefault(str(row.get("prompt")), []).append((place, str(row.get("text"))))
    return [(prompt, _spread(texts)) for prompt, texts in list(by_prompt.items())[:PROMPTS]]


def _spread(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    chosen = sorted({round(index * (len(texts) - 1) / (TEXTS - 1)) for index in range(TEXTS)})
    return [texts[index] for index in chosen]


def _events(frame: pl.DataFrame) -> list[tuple[int, str]]:
    if "event" not in frame.columns:
        return []
    told = pl.col("event").is_not_null() & ~pl.col("event").is_in(QUIET)
    rows = frame.filter(told).tail(EVENTS).iter_rows(named=True)
    return [(int(row["step"]), str(row.get("message") or row["event"])) for row in rows]


def _changes(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Against the defaults, by the engine; nothing where this build does not know the run's keys."""
    from moe_lab import train as lab

    try:
        toml = {key: value for key, value in config.items() if key not in ("name", "quick")}
        return lab.Run.parse("").diff(lab.Run.parse("", frames.flatten(toml)))
    except ValueError:
        return []


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    kept = {key: value for key, value in record.items() if key not in ("results", "status")}
    return [
        (key, value if isinstance(value, str) else json.dumps(value)) for key, value in frames.flatten(kept).items()
    ]
