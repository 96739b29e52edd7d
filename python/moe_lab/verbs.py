"""Verbs over runs already trained: judge, tabulate, compare, draw, watch, use them, and train one once more."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_lab.outcomes import report_run
from moe_lab.terminal import (
    DONE,
    FAILED,
    AnyRunPath,
    Checkpoint,
    Json,
    RunPath,
    Training,
    app,
    console,
    interrupted,
    print_fields,
    print_json,
    print_plans,
    progress,
    trains,
)
from moe_lab.text import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl


@app.command()
def gate(
    run: AnyRunPath,
    parent: Annotated[str | None, typer.Option(metavar="RUN", help="The run whose loss must be kept.")] = None,
    as_json: Json = False,
) -> int:
    """Judge a run, a stage or what there is of a roadmap, criterion by criterion.

    Exit status 1 when one fails.
    """
    from moe_lab import frames, gates, roadmap, stages, tables

    if parent is not None and frames.holds_seeds(run):
        raise ValueError("a stage or roadmap has parents of its own; --parent is for the gate of a single run")
    verdicts: Sequence[gates.Verdict]
    if frames.is_stage(run):
        stage = stages.rejudge(Path(run))
        verdicts, good = stage.verdicts, stage.passed or not stage.judged
    elif frames.is_roadmap(run):
        found = roadmap.verdicts(Path(run))
        verdicts = tuple(found.values())
        good = all(verdict.passed or not (step.judged and verdict.judged) for step, verdict in found.items())
        if not verdicts:
            raise ValueError(f"no step of the roadmap '{run}' is complete: go on with python -m moe_lab resume {run}")
    else:
        verdicts = (gates.judge(run, parent),)
        good = verdicts[0].passed or not verdicts[0].judged
    if as_json:
        print_json({"run": run, "gates": [verdict.as_dict() for verdict in verdicts]})
    else:
        for verdict in verdicts:
            tables.render_verdict(verdict, console())
    return DONE if good else FAILED


@app.command()
def table(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, stages, roadmaps or folders of runs.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it for a Markdown page.")] = False,
    as_json: Json = False,
) -> int:
    """Runs side by side, with the roadmap's targets.

    Loss, entropy floor, recitation, experts per token, forgetting, speed; mean ± sd over the seeds of a stage.
    """
    from moe_lab import frames, roadmap, tables

    if len(runs) == 1 and frames.is_roadmap(runs[0]):
        if as_json:
            print_json({"rows": roadmap.rows(Path(runs[0]))})
        elif markdown:
            print(roadmap.markdown(Path(runs[0])))
        else:
            roadmap.render(Path(runs[0]), console())
        return DONE
    rows = [row for run in runs for row in _summaries(run)]
    by = "model" if any(map(frames.holds_seeds, runs)) else "run"
    if as_json:
        print_json({"runs": rows})
    elif markdown:
        print(tables.markdown_of(rows, by))
    else:
        tables.render(rows, console(), by=by)
    return DONE


def _summaries(path: str) -> list[dict[str, Any]]:
    """A row for a run, or for each run of a stage, a roadmap or a folder."""
    from moe_lab import frames, stages, tables

    if frames.is_stage(path):
        rows = stages.so_far(Path(path)).rows
    else:
        runs = frames.find_runs(path) or [Path(path)]
        for run in runs:
            frames.read_run(run)  # a run that is not there is named before anything is printed
        rows = tuple(tables.summary(run) for run in runs)
    return [{**row, "run": os.path.relpath(row["run"])} for row in rows]


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, stages or folders of runs; the control first.")
    ],
    target: Annotated[float, typer.Option(help='The loss of "epochs to the target loss".')] = 0.40,
    as_json: Json = False,
) -> int:
    """Differences from a control over paired seeds; a stage alone: of every run from its parent.

    Mean difference with its bootstrap interval, noise floor, verdict, and speed to the control's loss.
    """
    from moe_lab import comparison

    found = [each for family in _families(runs) for each in comparison.compare(family, target)]
    if as_json:
        print_json({"comparisons": [comparison.as_dict(each) for each in found]})
    else:
        for each in found:
            comparison.render(each, console())
    return DONE


def _families(runs: list[str]) -> "Sequence[Sequence[str | Path]]":
    """What is compared together, the control first: the runs as they are named, those of a stage with their parents."""
    from moe_lab import frames, stages

    if len(runs) == 1 and frames.is_stage(runs[0]):
        return stages.families(Path(runs[0]))
    paths = [path for run in runs for path in (frames.find_runs(run) if os.path.isdir(run) else [Path(run)])]
    if not paths:
        raise ValueError(f"there are no runs in {', '.join(runs)}")
    return [paths]


@app.command()
def reproduce(
    run: RunPath,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The directory of the new run; runs/<time>-<name> if absent.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Train a completed run again and compare every byte.

    Exit status 1 where a byte differs; then the inputs that differ are named.
    """
    from moe_lab import train as lab

    outcome = lab.run_training(lab.reproduction(run), out)
    if outcome.signal is not None:
        return interrupted(outcome.out, outcome.signal)
    report, text = lab.compare_runs(run, outcome.out)
    if as_json:
        print_json(report)
    else:
        print(shown(text))
    return DONE if report["identical"] else FAILED


@app.command()
@trains
def rerun(run: RunPath, options: Training) -> int:
    """Train a run once more with changes.

    For a run that failed or diverged: what is known of the failure is shown first.
    """
    from moe_lab import frames
    from moe_lab import roadmap as road
    from moe_lab import train as lab

    record = frames.read_run(run)
    overrides = options.overrides()
    if frames.failure(run):
        progress(road.explain(run))
        if not overrides:
            raise ValueError("the same run fails the same way: change something with --set KEY=VALUE")
    source = str(Path(run) / "run.toml")
    loaded = lab.load_run(source, overrides, options.quick)
    if options.check:
        return print_plans({loaded.name: loaded.check()}, options.json)
    parent = record.get("parent")
    return report_run(lab.run_training(loaded, options.out, parent if isinstance(parent, str) else None), options.json)


@app.command()
def plot(
    run: AnyRunPath,
    as_json: Json = False,
) -> int:
    """Draw a run, a stage or a roadmap into its plots/."""
    from moe_lab import frames, plots, roadmap, stages

    if frames.is_stage(run):
        paths = stages.save_plots(stages.so_far(Path(run)))
    elif frames.is_roadmap(run):
        paths = plots.save(roadmap.figures(Path(run)), Path(run) / "plots")
    else:
        frames.read_run(run)  # names what is no run
        paths = plots.save_all(run)
    if as_json:
        print_json({"plots": [str(path) for path in paths]})
    else:
        print("\n".join(str(path) for path in paths))
    return DONE


@app.command()
def report(
    run: AnyRunPath,
    as_json: Json = False,
) -> int:
    """Write report.html into a run, stage or roadmap directory.

    One page that holds all it shows: results, gates, curves, samples, configuration, provenance.
    """
    from moe_lab import report as page

    path = page.write(run)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)
    return DONE


@app.command()
def watch(
    run: AnyRunPath,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the stream.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Draw one picture and end.")] = False,
) -> int:
    """Watch a run while it trains; of a stage or roadmap the run that wrote last.

    Loss with its floor, gradients, routing, samples, alerts; keys 1 to 5 and tab switch, q ends. Lines in a pipe.
    """
    from moe_lab import frames
    from moe_lab.watch import watch as show

    show(frames.newest_run(run), console(), interval, once)
    return DONE


@app.command()
def specialize(
    run: RunPath,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A JSON list of texts, or a text a line; the run's own without. Repeatable, each file a domain.",
        ),
    ] = None,
    subsets: Annotated[
        bool, typer.Option("--subsets", help="Also the loss of each domain with some of the experts alone.")
    ] = False,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> int:
    """Which experts take which tokens.

    Shares by class and domain of a token, words, pairs, load, surprise, information with a permutation test, and how
    early the choice settled: parquet, CSV, heat maps.
    """
    from moe_lab import frames
    from moe_lab import specialize as study
    from moe_lab import subsets as some
    from moe_lab.train import Model

    model = Model.load(run, checkpoint)
    domains = study.texts_of(texts) if texts else study.own_texts(model)
    listed = study.flat(domains)
    routed = study.collect(model, domains, model.token_losses(listed))
    settings = frames.settings(run)
    shape = settings["model"]
    width, hidden = int(shape["hidden_size"]), int(shape["router"]["expert_hidden_size"])
    more = {"products": study.products(routed, int(settings["train"]["batch_size"]), width, hidden)}
    steps = study.checkpoints(run)
    if checkpoint is None and len(steps) > 1:
        models = [(step, Model.load(run, name)) for step, name in steps]
        more["saturation"] = study.saturation(models, listed[:: -(-len(listed) // some.TEXTS)])
    if subsets:
        more["subsets"] = some.losses(model, some.domains_of(model))
    paths = study.save(routed, Path(run) / "specialization", more)
    told = study.every_information(routed).to_dicts()
    busy = more["products"].group_by("layer", maintain_order=True).first().select("layer", "utilisation")
    if as_json:
        tables = {name: table.to_dicts() for name, table in more.items() if name != "products"}
        files = [str(path) for path in paths]
        utilisation = dict(busy.iter_rows())
        print_json(
            {"tokens": len(routed.tokens), "information": told, "utilisation": utilisation, **tables, "files": files}
        )
        return DONE
    print(f"{len(routed.tokens):,} tokens of {len(listed)} texts")
    for row in told:
        if row["view"] in ("form", "domain"):
            print(
                f"block {row['layer']}: {row['information']:.4f} nats about the {row['view']} of a token, "
                f"{row['shuffled']:.4f} by chance, p = {row['p']:.3f}"
            )
    for layer, utilisation in busy.iter_rows():
        print(f"block {layer}: utilisation {utilisation:.3f} (mean rows of an expert over the most of one)")
    for name in ("saturation", "subsets"):
        if name in more:
            console().print(_table(name, more[name]))
    print("\n".join(str(path) for path in paths))
    return DONE


def _table(title: str, rows: "pl.DataFrame") -> Table:
    """A frame for the terminal."""
    table = Table(*rows.columns, title=title)
    for row in rows.iter_rows():
        table.add_row(
            *("" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    return table


@app.command()
def tensorboard(run: RunPath, as_json: Json = False) -> int:
    """Write a run's metrics as TensorBoard event files, into its tb/."""
    from moe_lab import frames
    from moe_lab.tensorboard import export

    frames.read_run(run)  # names what is no run, or of a newer program
    folder, count = export(run)
    if as_json:
        print_json({"tensorboard": str(folder), "values": count})
    else:
        print(f"{folder}: {count:,} values")
    return DONE


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='As in the data: "User: ... Assistant:".')],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 80,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 from all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> int:
    """Continue a prompt."""
    from moe_lab.train import Model

    text = Model.load(run, checkpoint).generate(
        prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        print(shown(text))
    return DONE


@app.command("eval")
def evaluate(
    run: RunPath,
    checkpoint: Checkpoint = None,
    record: Annotated[str | None, typer.Option(metavar="FILE", help="Write the routing of every document.")] = None,
    replay: Annotated[
        str | None, typer.Option(metavar="FILE", help="Route as a recorded file says; losses alone.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Evaluate a run on its data.

    Losses, recitation of the training questions, held-out paraphrases.
    """
    from moe_lab.train import Model

    results = Model.load(run, checkpoint).evaluate(record, replay)
    if as_json:
        print_json(results)
    else:
        print_fields(results)
    return DONE


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A run file, a shipped name or a run directory.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, to compare with.")],
    as_json: Json = False,
) -> int:
    """The keys in which two runs differ."""
    from moe_lab import train as lab

    first, second = (lab.load_run(_source(path)) for path in (a, b))
    changes = first.diff(second)
    if as_json:
        print_json({"changes": [{"key": key, "a": old, "b": new} for key, old, new in changes]})
    else:
        print(shown("\n".join(f"{key}: {old} -> {new}" for key, old, new in changes) or "no difference"))
    return DONE


def _source(path: str) -> str:
    from moe_lab import frames

    if not Path(path).is_dir():
        return path
    frames.read_run(path)  # names what is no run, or of a newer program
    return str(Path(path) / "run.toml")


@app.command()
def runs(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where the run directories lie.")] = "runs",
    as_json: Json = False,
) -> int:
    """List the runs in a folder, those of stages too."""
    from moe_lab import frames

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder: train a run first, or name the folder that holds them")
    listed = [_listed(path) for path in frames.find_runs(folder)]
    if as_json:
        print_json({"runs": listed})
    else:
        _print_listed(listed)
    return DONE


def _listed(path: Path) -> dict[str, Any]:
    from moe_lab import frames

    try:
        record, status = frames.read_run(path), frames.status(path)
    except frames.NewerFormatError:
        record, status = {}, "of a newer moe_lab"
    except ValueError:
        record, status = {}, "damaged run.json"
    results = record.get("results") or {}
    shown = {key: results.get(key) for key in ("loss", "excess", "experts_per_token", "seconds")}
    return {"run": str(path), "id": record.get("id"), "status": status, **shown}


def _print_listed(listed: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from moe_lab.gates import show

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("run", "status", "loss", "excess", "experts/token", "seconds"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right", overflow="fold")
    for entry in listed:
        numbers = (entry[key] for key in ("loss", "excess", "experts_per_token", "seconds"))
        table.add_row(entry["run"], str(entry["status"]), *("-" if value is None else show(value) for value in numbers))
    console().print(table)
