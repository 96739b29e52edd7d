"""Verbs over many runs, and over runs already trained: compare, roadmap, rerun, sweep, lr-find, watch, report, ..."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_lab.cli import (
    DONE,
    FAILED,
    Checkpoint,
    Json,
    RunPath,
    Training,
    _assignment,
    _console,
    _print_json,
    _print_plans,
    _progress,
    _report_roadmap,
    _report_run,
    app,
    trains,
)

if TYPE_CHECKING:
    import polars as pl


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, stages or folders of runs; the control first.")
    ],
    target: Annotated[float, typer.Option(help='The loss of "epochs to the target loss".')] = 0.40,
    as_json: Json = False,
) -> int:
    """Differences from a control over paired seeds.

    Mean difference with its bootstrap interval, noise floor, verdict, and speed to the control's loss.
    """
    from moe_lab import comparison, frames

    paths = [path for run in runs for path in (frames.find_runs(run) if os.path.isdir(run) else [Path(run)])]
    if not paths:
        raise ValueError(f"there are no runs in {', '.join(runs)}")
    found = comparison.compare(paths, target)
    if as_json:
        _print_json({"comparisons": [comparison.as_dict(each) for each in found]})
    else:
        for each in found:
            comparison.render(each, _console())
    return DONE


@app.command()
@trains
def roadmap(
    options: Training,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted on from --seed.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each if more than one.")] = 1,
) -> int:
    """Run the roadmap's milestones in order.

    Each is judged; the first failed gate stops it. With --out of an earlier one it goes on; finished runs are kept.
    """
    from moe_lab import roadmap as road
    from moe_lab import stages
    from moe_lab import train as lab

    overrides = options.overrides()
    first = int(str(overrides.pop("seed", lab.load_run("baseline").seed)))
    plan = road.Plan(tuple(range(first, first + seeds)), stages.anchored(overrides), options.quick)
    if options.check:
        prepared = road.prepare(plan, lab)
        return _print_plans({cell.name: run.check() for step in prepared.values() for cell, run in step}, options.json)
    out = Path(options.out) if options.out else lab.default_out("roadmap")
    return _report_roadmap(road.run(plan, out, lab, _progress, jobs), options.json)


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
        _progress(road.explain(run))
        if not overrides:
            raise ValueError("the same run fails the same way: change something with --set KEY=VALUE")
    source = str(Path(run) / "run.toml")
    loaded = lab.load_run(source, overrides, options.quick)
    if options.check:
        return _print_plans({loaded.name: loaded.check()}, options.json)
    parent = record.get("parent")
    return _report_run(lab.run_training(loaded, options.out, parent if isinstance(parent, str) else None), options.json)


@app.command()
@trains
def sweep(
    options: Training,
    run: Annotated[
        str, typer.Argument(metavar="RUN.toml", help="A run file, or the name of a shipped one.")
    ] = "stage1",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds a configuration is trained with.")] = 1,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe.")] = "grid",
    trials: Annotated[int | None, typer.Option(min=1, help="How many configurations at most.")] = None,
    metric: Annotated[str, typer.Option(help="The result to make small (or large, as recite).")] = "loss",
    prune: Annotated[bool, typer.Option("--prune", help="Give up what is worse than the median after a seed.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work, one thread each.")] = 1,
) -> int:
    """Train a run file with many values of its keys.

    --set KEY=A,B,C lists values, --set KEY=LOW..HIGH[:log] gives a range. With --out of an earlier one it goes on.
    """
    from moe_lab import stages
    from moe_lab import sweep as study
    from moe_lab import train as lab

    space, fixed = study.split(options.set_ or [], _assignment)
    flags = replace(options, set_=None).overrides()
    first = int(str(flags.pop("seed", lab.load_run(run).seed)))
    source = str(Path(run).resolve()) if Path(run).is_file() else run
    fixed = stages.anchored({**fixed, **flags})
    plan = study.Plan(
        source, space, fixed, tuple(range(first, first + seeds)), sampler, trials, metric, prune, options.quick
    )
    out = Path(options.out) if options.out else lab.default_out("sweep")
    wanted = study.Sweep(plan, out, lab, _assignment, _progress)
    if options.check:
        wanted.check()
        return _print_plans({"sweep": {"configurations": wanted.total(), "seeds": seeds}}, options.json)
    stopped = study.run(wanted, jobs)
    if stopped is not None:
        _progress(f"stopped, everything is saved; go on with the same command and --out {out}")
        return 128 + stopped
    rows = study.rows(wanted)
    if options.json:
        _print_json({"sweep": str(out), "rows": rows})
    else:
        study.render(wanted, _console())
        print(f"sweep directory: {out}")
    return DONE if any(row["state"] == "complete" for row in rows) else FAILED


@app.command("lr-find")
@trains
def lr_find(
    options: Training,
    run: Annotated[
        str, typer.Argument(metavar="RUN.toml", help="A run file, or the name of a shipped one.")
    ] = "baseline",
) -> int:
    """Find a learning rate: a range test on the first phase.

    100 updates from 1e-7 to 1, stopped at 5 times the lowest loss; a table, a picture, a suggestion put to the test.
    """
    from moe_lab import lr_find as study
    from moe_lab import train as lab

    loaded = lab.load_run(run, options.overrides(), options.quick)
    if options.check:
        return _print_plans({loaded.name: loaded.check()}, options.json)
    out = Path(options.out) if options.out else lab.default_out(f"{loaded.name}-lr-find")
    study.refuse_occupied(out)
    found = lab.lr_find(loaded)
    paths = study.save(found, out)
    if options.json:
        _print_json({**found, "files": [str(path) for path in paths]})
    else:
        study.render(found, _console())
        print("\n".join(str(path) for path in paths))
    return DONE


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or stage directory.")], as_json: Json = False
) -> int:
    """Write report.html into a run or stage directory.

    One page that holds all it shows: results, gates, curves, samples, configuration, provenance.
    """
    from moe_lab import report as page

    path = page.write(run)
    if as_json:
        _print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)
    return DONE


@app.command()
def watch(
    run: RunPath,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the stream.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Draw one picture and end.")] = False,
) -> int:
    """Watch a run while it trains.

    Loss with its floor, gradients, routing, samples, alerts; keys 1 to 5 and tab switch, q ends. Lines in a pipe.
    """
    from moe_lab.watch import watch as show

    show(run, _console(), interval, once)
    return DONE


@app.command()
def specialize(
    run: RunPath,
    texts: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A JSON list of texts, or a text a line; the run's own without. Repeatable."),
    ] = None,
    subsets: Annotated[
        bool, typer.Option("--subsets", help="Also the loss of each domain with some of the experts alone.")
    ] = False,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> int:
    """Which experts take which tokens.

    Shares by class of token, words, pairs, load, surprise, information with a permutation test, and how early the
    choice settled: parquet, CSV, heat maps.
    """
    from moe_lab import frames
    from moe_lab import specialize as study
    from moe_lab import subsets as some
    from moe_lab.train import Model

    model = Model.load(run, checkpoint)
    listed = study.texts_of(texts) if texts else study.own_texts(model)
    routed = study.collect(model, listed, model.token_losses(listed))
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
    told = study.information(routed).to_dicts()
    busy = more["products"].group_by("layer", maintain_order=True).first().select("layer", "utilisation")
    if as_json:
        tables = {name: table.to_dicts() for name, table in more.items() if name != "products"}
        files = [str(path) for path in paths]
        utilisation = dict(busy.iter_rows())
        _print_json(
            {"tokens": len(routed.tokens), "information": told, "utilisation": utilisation, **tables, "files": files}
        )
        return DONE
    print(f"{len(routed.tokens):,} tokens of {len(listed)} texts")
    for row in told:
        print(
            f"block {row['layer']}: {row['information']:.4f} nats about the class of a token, "
            f"{row['shuffled']:.4f} by chance, p = {row['p']:.3f}"
        )
    for layer, utilisation in busy.iter_rows():
        print(f"block {layer}: utilisation {utilisation:.3f} (mean rows of an expert over the most of one)")
    for name in ("saturation", "subsets"):
        if name in more:
            _console().print(_table(name, more[name]))
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
    from moe_lab.tensorboard import export

    folder, count = export(run)
    if as_json:
        _print_json({"tensorboard": str(folder), "values": count})
    else:
        print(f"{folder}: {count:,} values")
    return DONE
