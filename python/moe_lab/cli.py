"""The command line: failures as exit statuses, the verbs that train, and those about data, keys and the machine.

What a verb needs is imported when it is called.
"""

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lab.outcomes import report_roadmap, report_run, report_stage
from moe_lab.terminal import (
    COMMAND,
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    USAGE,
    AnyRunPath,
    Jobs,
    Json,
    Parents,
    Seeds,
    Training,
    app,
    assignment,
    config_app,
    console,
    data_app,
    print_fields,
    print_json,
    print_plans,
    progress,
    trains,
    whole_seed,
)
from moe_lab.text import shown

if TYPE_CHECKING:
    from moe_lab.stages import Plan

# What a person can mend by another path is usage; a full or broken disk is not.
MENDABLE = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


def main() -> int:
    """Runs the command line; every failure becomes one line on stderr and an exit status."""
    try:
        code = app(prog_name=COMMAND, standalone_mode=False)
        sys.stdout.flush()
        return int(code or DONE)
    except typer.TyperException as error:
        return _usage(error)
    except typer.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return _error("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more can be told, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        sentence = error.strerror or str(error)
        code = USAGE if isinstance(error, MENDABLE) or error.errno in (errno.EROFS, errno.EINVAL) else FAILED
        return _error(f"{error.filename}: {sentence}" if error.filename else sentence, code)
    except (ValueError, ImportError) as error:
        return _error(str(error), USAGE)
    except MemoryError:
        return _error("out of memory; lower train.batch_size or the model's sizes", FAILED)
    except SystemExit:
        raise
    except BaseException as error:
        return _error(_cause(error), DIVERGED if type(error).__name__ == "DivergedError" else FAILED)


def _usage(error: typer.TyperException) -> int:
    text = error.format_message()
    if text.startswith("Usage:"):  # a verb without arguments: its help
        print(text, file=sys.stderr)
        return USAGE
    return _error(f"{text.rstrip('.')}; see {COMMAND} --help", USAGE)


def _cause(error: BaseException) -> str:
    if isinstance(error, RuntimeError):
        return str(error)
    return f"this is a fault in moe_lab, please report it: {type(error).__name__}: {error}"


def _error(sentence: str, code: int) -> int:
    print("error: " + shown(" ".join(sentence.split())), file=sys.stderr)
    return code


@app.command()
@trains
def baseline(options: Training) -> int:
    """Train the dense baseline.

    The same run, with the same bytes, as `cargo run --release`.
    """
    return _train("baseline", options)


@app.command()
@trains
def train(
    run: Annotated[str, typer.Argument(metavar="RUN.toml", help="A run file, or the name of a shipped one.")],
    options: Training,
) -> int:
    """Train a run file."""
    return _train(run, options)


@app.command()
@trains
def stage1(
    options: Training,
    p: Annotated[str, typer.Option("--p", metavar="P,...", help="Router mass to exceed, one or several.")] = "0.4",
    seeds: Seeds = 1,
    parent: Parents = None,
    jobs: Jobs = 1,
) -> int:
    """Train and judge top-p adaptive experts.

    Beside them their dense parent and the top-2 control, for every p and seed. Writes stage.json, plots/, report.html.
    """
    from moe_lab import stages

    return _stage(stages.Plan(p=_numbers(p), parents=_paths(parent)), options, seeds, jobs)


Chosen = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME", help="An option, repeatable; all of the stage if absent."),
]


def _option_stage(name: str, title: str, listed: str) -> None:
    """The verb of a stage whose models are named changes to one parent."""

    def verb(options: Training, option: Chosen = None, seeds: Seeds = 1, parent: Parents = None, jobs: Jobs = 1) -> int:
        from moe_lab import stages
        from moe_lab.options import chosen

        names = tuple(each.name for each in chosen(name, option))
        return _stage(stages.Plan(parents=_paths(parent), stage=name, options=names), options, seeds, jobs)

    verb.__name__ = name
    verb.__doc__ = f"""Train and judge {title}.

    {listed}. Each run is its parent with one named change. Writes stage.json, plots/, report.html.
    """
    app.command()(trains(verb))


_option_stage("stage2", "steadier gradients", "2a activation checkpointing, 2b monitoring and response, 2c warm-up")
_option_stage("stage3", "ways to a lower loss", "3a learning-rate schedule, 3b batch scaling, 3c augmentation")
_option_stage("stage4", "architectures", "4a depth per token, 4b window per token, 4c specialisation")
_option_stage("stage5", "thresholds and lengths", "5a threshold per layer, 5b per token, learned, 5c several lengths")


def _stage(plan: "Plan", options: Training, count: int, jobs: int) -> int:
    from moe_lab import stages
    from moe_lab import train as lab

    seeds, overrides = options.seeds(count, lab.load_run("stage1").seed)
    plan = replace(plan, seeds=seeds, overrides=stages.anchored(overrides), quick=options.quick)
    if options.check:
        return print_plans({cell.name: run.check() for cell, run in stages.prepare(plan, lab)}, options.json)
    out = Path(options.out) if options.out else lab.default_out(plan.stage)
    return report_stage(stages.run(plan, out, lab, progress, jobs), options.json)


def _paths(parents: list[str] | None) -> tuple[str, ...]:
    return tuple(os.path.abspath(path) for path in parents or ())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--p '{text}' is not a number or a list such as 0.3,0.4,0.5") from None
    return values


@app.command()
@trains
def roadmap(options: Training, seeds: Seeds = 1, jobs: Jobs = 1) -> int:
    """Run the roadmap's milestones in order.

    Each is judged; the first failed gate stops it. With --out of an earlier one it goes on; finished runs are kept.
    """
    from moe_lab import roadmap as road
    from moe_lab import stages
    from moe_lab import train as lab

    chosen, overrides = options.seeds(seeds, lab.load_run("baseline").seed)
    plan = road.Plan(chosen, stages.anchored(overrides), options.quick)
    if options.check:
        prepared = road.prepare(plan, lab)
        return print_plans({cell.name: run.check() for step in prepared.values() for cell, run in step}, options.json)
    out = Path(options.out) if options.out else lab.default_out("roadmap")
    return report_roadmap(road.run(plan, out, lab, progress, jobs), options.json)


@app.command()
def resume(
    run: AnyRunPath,
    engine: Annotated[str | None, typer.Option(help="Go on with cpu, reference or torch (device cpu).")] = None,
    device: Annotated[str | None, typer.Option(help="Go on on another device of the engine.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Go on with products in f32 or bf16.")] = None,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> int:
    """Go on where a run, a stage or the roadmap stopped.

    No flag of the first command is needed. A single run may go on with another engine, device or dtype, many runs side
    by side.
    """
    place = {"engine": engine, "device": device or (engine and "cpu"), "dtype": dtype}
    chosen = {key: value for key, value in place.items() if value is not None}
    from moe_lab import frames
    from moe_lab import train as lab

    if chosen and (frames.is_stage(run) or frames.is_roadmap(run)):
        raise ValueError(f"{run} holds many runs, which go on as they began; resume one of them to change its engine")
    if jobs > 1 and frames.is_run(run):
        raise ValueError(f"{run} is one run: --jobs is for a stage or a roadmap; leave it out")
    if frames.is_stage(run):
        from moe_lab import stages

        return report_stage(stages.resume(Path(run), lab, progress, jobs), as_json)
    if frames.is_roadmap(run):
        from moe_lab import roadmap

        return report_roadmap(roadmap.resume(Path(run), lab, progress, jobs), as_json)
    outcome = lab.resume_training(run, chosen)
    if outcome.already_done:
        progress(f"the run is complete already: {run}")
    return report_run(outcome, as_json)


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

    space, fixed = study.split(options.set_ or [], assignment)
    flags = replace(options, set_=None).overrides()
    first = whole_seed(flags.pop("seed", lab.load_run(run).seed))
    source = str(Path(run).resolve()) if Path(run).is_file() else run
    fixed = stages.anchored({**fixed, **flags})
    plan = study.Plan(
        source, space, fixed, tuple(range(first, first + seeds)), sampler, trials, metric, prune, options.quick
    )
    out = Path(options.out) if options.out else lab.default_out("sweep")
    wanted = study.Sweep(plan, out, lab, assignment, progress)
    if options.check:
        wanted.check()
        return print_plans({"sweep": {"configurations": wanted.total(), "seeds": seeds}}, options.json)
    stopped = study.run(wanted, jobs)
    if stopped is not None:
        progress(f"stopped, everything is saved; go on with the same command and --out {out}")
        return 128 + stopped
    rows = study.rows(wanted)
    if options.json:
        print_json({"sweep": str(out), "rows": rows})
    else:
        study.render(wanted, console())
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
        return print_plans({loaded.name: loaded.check()}, options.json)
    out = Path(options.out) if options.out else lab.default_out(f"{loaded.name}-lr-find")
    study.refuse_occupied(out)
    found = lab.lr_find(loaded)
    paths = study.save(found, out)
    if options.json:
        print_json({**found, "files": [str(path) for path in paths]})
    else:
        study.render(found, console())
        print("\n".join(str(path) for path in paths))
    return DONE


@data_app.command("stats")
def data_stats(
    facts: Annotated[str | None, typer.Option(metavar="FILE", help="Facts; the shipped file if absent.")] = None,
    chat: Annotated[str | None, typer.Option(metavar="FILE", help="Dialogues; the shipped file if absent.")] = None,
    paraphrases: Annotated[str | None, typer.Option(metavar="FILE", help="Held-out questions.")] = None,
    as_json: Json = False,
) -> int:
    """Sizes, vocabulary, lengths and entropy floors of the data."""
    from moe_lab import train as lab

    as_data, as_text = lab.data_stats(facts, chat, paraphrases)
    if as_json:
        print_json(json.loads(as_data))
    else:
        print(shown(as_text.rstrip("\n")))
    return DONE


@config_app.command("schema")
def config_schema() -> int:
    """The JSON Schema of a run file."""
    from moe_lab import train as lab

    print(lab.config_schema())
    return DONE


@config_app.command("docs")
def config_docs() -> int:
    """Every key of a run file: type, default, meaning."""
    from moe_lab import train as lab

    print(lab.config_docs().rstrip("\n"))
    return DONE


@app.command()
def doctor(as_json: Json = False) -> int:
    """What this machine and this build have."""
    from moe_lab import train as lab

    report = lab.doctor()
    if as_json:
        print_json(report)
    else:
        print_fields(report)
    return DONE


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help="Shapes: seed, small or medium.")] = "small",
    pos: Annotated[str, typer.Option(help="Positions: cope or rope.")] = "cope",
    dense: Annotated[bool, typer.Option("--dense", help="A dense SwiGLU in place of top-p experts.")] = False,
    no_moh: Annotated[bool, typer.Option("--no-moh", help="Plain attention in place of the mixture of heads.")] = False,
    dtype: Annotated[str | None, typer.Option(help="How products multiply.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; 0 takes every core.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to time.")] = 5.0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key. Repeatable.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show the time op by op; write the spans as a Chrome trace.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Time training steps on one random batch.

    Tokens per second, memory, and the share of what this machine can do.
    """
    from moe_lab import train as lab

    flags = {"threads": threads, "dtype": json.dumps(dtype) if dtype else None}
    sets = [*(set_ or []), *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    report, table = lab.bench(preset, pos, dense, no_moh, sets, seconds, profile)
    if as_json:
        print_json(report)
        return DONE
    if table:
        print(f"{table}trace: {profile}\n")
    print_fields({name: value for name, value in report.items() if name != "profile"})
    return DONE


def _train(source: str, options: Training) -> int:
    from moe_lab import train as lab

    run = lab.load_run(source, options.overrides(), options.quick)
    if options.check:
        return print_plans({run.name: run.check()}, options.json)
    return report_run(lab.run_training(run, options.out), options.json)
