"""Verbs and flags -> run data -> one call; prints; exit codes. What a verb needs is imported when it is called."""

import errno
import json
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lab.text import shown

if TYPE_CHECKING:
    from rich.console import Console

    from moe_lab.roadmap import Result
    from moe_lab.stages import Stage
    from moe_lab.train import Outcome

DONE, FAILED, USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
# What a person can mend by another path is usage; a full or broken disk is not.
MENDABLE = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
COMMAND = "python -m moe_lab"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="A laboratory for adaptive sparse transformers. Results go to stdout, progress to stderr.",
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the data.")
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What a run file may say.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")


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


def _version(wanted: bool) -> None:
    if wanted:
        import moe_lab

        print(f"moe_lab {moe_lab.__version__}")
        raise typer.Exit(DONE)


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


@app.callback()
def root(version: Version = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Training:
    """The options of every verb that trains."""

    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key of the run file, e.g. train.epochs=20. Repeatable."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The directory to write; runs/<time>-<name> if absent.")
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="10 epochs a phase; gates are then not judged.")] = False
    check: Annotated[bool, typer.Option("--check", help="Validate, read the data, print the plan, train nothing.")] = (
        False
    )
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; 0 takes every core.")] = None
    engine: Annotated[str | None, typer.Option(help="cpu, reference or torch.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, or cuda and cuda:N for the torch engine.")] = None
    dtype: Annotated[str | None, typer.Option(help="Number format of the engine.")] = None
    json: Json = False
    version: Version = False

    def overrides(self) -> dict[str, object]:
        """Flags beat --set, which beats the file."""
        chosen = dict(_assignment(text) for text in self.set_ or [])
        flags = {name: getattr(self, name) for name in ("seed", "threads", "engine", "device", "dtype")}
        return chosen | {name: value for name, value in flags.items() if value is not None}


def _assignment(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value as TOML where it is TOML, else as a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set '{text}' is not KEY=VALUE")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key.strip(), value
    if isinstance(parsed["value"], float) and not isfinite(parsed["value"]):
        raise ValueError(f"{key.strip()} = {value} is not a finite number")
    plain = len(parsed) == 1 and isinstance(parsed["value"], bool | int | float | str | list | dict)
    return key.strip(), parsed["value"] if plain else value


def trains(verb: Callable[..., int]) -> Callable[..., int]:
    """Gives a verb the options of Training, and passes them as one value named `options`."""
    shared = signature(Training).parameters

    def run(**arguments: Any) -> int:
        options = Training(**{name: arguments.pop(name) for name in shared})
        return verb(**arguments, options=options)

    own = [parameter for name, parameter in signature(verb).parameters.items() if name != "options"]
    every = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in (*own, *shared.values())]
    run.__signature__ = signature(verb).replace(parameters=every)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    return run


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
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted on from --seed.")] = 1,
    parent: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN", help="A finished baseline run to compare with, instead of training one. Repeatable."
        ),
    ] = None,
) -> int:
    """Train and judge top-p adaptive experts.

    Beside them their dense parent and the top-2 control, for every p and seed. Writes stage.json and plots/.
    """
    from moe_lab import stages
    from moe_lab import train as lab

    overrides = options.overrides()
    first = int(str(overrides.pop("seed", lab.load_run("stage1").seed)))
    plan = stages.Plan(
        p=_numbers(p),
        seeds=tuple(range(first, first + seeds)),
        parents=tuple(os.path.abspath(path) for path in parent or ()),
        overrides=stages.anchored(overrides),
        quick=options.quick,
    )
    if options.check:
        runs = stages.prepare(plan, lab)
        return _print_plans({cell.name: run.check() for cell, run in runs}, options.json)
    out = Path(options.out) if options.out else lab.default_out("stage1")
    return _report_stage(stages.stage1(plan, out, lab, _progress), options.json)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--p '{text}' is not a number or a list such as 0.3,0.4,0.5") from None
    return values


@app.command()
def resume(
    run: RunPath,
    engine: Annotated[str | None, typer.Option(help="Go on with cpu, reference or torch (device cpu).")] = None,
    device: Annotated[str | None, typer.Option(help="Go on on another device of the engine.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Go on with products in f32 or bf16.")] = None,
    as_json: Json = False,
) -> int:
    """Go on where a run or a stage stopped.

    No flag of the first command is needed; a single run may go on with another engine, device or dtype.
    """
    place = {"engine": engine, "device": device or (engine and "cpu"), "dtype": dtype}
    chosen = {key: value for key, value in place.items() if value is not None}
    from moe_lab import frames
    from moe_lab import train as lab

    if chosen and (frames.is_stage(run) or frames.is_roadmap(run)):
        raise ValueError(f"{run} holds many runs, which go on as they began; resume one of them to change its engine")
    if frames.is_stage(run):
        from moe_lab import stages

        return _report_stage(stages.resume(Path(run), lab, _progress), as_json)
    if frames.is_roadmap(run):
        from moe_lab import roadmap

        return _report_roadmap(roadmap.resume(Path(run), lab, _progress), as_json)
    outcome = lab.resume_training(run, chosen)
    if outcome.already_done:
        _progress(f"the run is complete already: {run}")
    return _report_run(outcome, as_json)


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
        return _interrupted(outcome.out, outcome.signal)
    report, text = lab.compare_runs(run, outcome.out)
    if as_json:
        _print_json(report)
    else:
        print(shown(text))
    return DONE if report["identical"] else FAILED


@app.command()
def gate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or stage directory.")],
    parent: Annotated[str | None, typer.Option(metavar="RUN", help="The run whose loss must be kept.")] = None,
    as_json: Json = False,
) -> int:
    """Judge a run or a stage, criterion by criterion.

    Exit status 1 when one fails.
    """
    from moe_lab import frames, gates, stages, tables

    if frames.is_stage(run):
        if parent is not None:
            raise ValueError("a stage has parents of its own; --parent is for the gate of a single run")
        verdicts = stages.rejudge(Path(run)).verdicts
    else:
        verdicts = (gates.judge(run, parent),)
    if as_json:
        _print_json({"run": run, "gates": [verdict.as_dict() for verdict in verdicts]})
    else:
        for verdict in verdicts:
            tables.render_verdict(verdict, _console())
    return DONE if any(verdict.passed or not verdict.judged for verdict in verdicts) else FAILED


@app.command()
def table(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run, stage or roadmap directories.")],
    as_json: Json = False,
) -> int:
    """Runs side by side, with the roadmap's targets.

    Loss, entropy floor, recitation, experts per token, forgetting, speed; mean ± sd over the seeds of a stage.
    """
    from moe_lab import frames, roadmap, tables

    if len(runs) == 1 and frames.is_roadmap(runs[0]):
        if as_json:
            _print_json({"rows": roadmap.rows(Path(runs[0]))})
        else:
            roadmap.render(Path(runs[0]), _console())
        return DONE
    paths = [path for run in runs for path in _runs_of(run)]
    for path in paths:
        frames.read_run(path)  # a run that is not there is named before anything is printed
    summaries = [tables.summary(path) for path in paths]
    names = [os.path.relpath(path) for path in paths]
    rows = [{**entry, "run": name} for entry, name in zip(summaries, names, strict=True)]
    if as_json:
        _print_json({"runs": rows})
    else:
        tables.render(rows, _console(), by="model" if any(map(_holds_seeds, runs)) else "run")
    return DONE


def _runs_of(path: str) -> list[Path]:
    from moe_lab import frames

    return frames.find_runs(path) if _holds_seeds(path) else [Path(path)]


def _holds_seeds(path: str) -> bool:
    from moe_lab import frames

    return frames.is_stage(path) or frames.is_roadmap(path)


@app.command()
def plot(run: RunPath, as_json: Json = False) -> int:
    """Draw a run or a stage into its plots/."""
    from moe_lab import frames, plots, stages

    paths = stages.save_plots(stages.rejudge(Path(run))) if frames.is_stage(run) else plots.save_all(run)
    if as_json:
        _print_json({"plots": [str(path) for path in paths]})
    else:
        print("\n".join(str(path) for path in paths))
    return DONE


Checkpoint = Annotated[str | None, typer.Option(metavar="NAME", help="checkpoint-N instead of the newest.")]


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
        _print_json({"prompt": prompt, "text": text})
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
        _print_json(results)
    else:
        _print_fields(results)
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
        _print_json(json.loads(as_data))
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
        _print_json({"changes": [{"key": key, "a": old, "b": new} for key, old, new in changes]})
    else:
        print(shown("\n".join(f"{key}: {old} -> {new}" for key, old, new in changes) or "no difference"))
    return DONE


def _source(path: str) -> str:
    return str(Path(path) / "run.toml") if Path(path).is_dir() else path


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
        _print_json({"runs": listed})
    else:
        _print_listed(listed)
    return DONE


def _listed(path: Path) -> dict[str, Any]:
    from moe_lab import frames

    record = frames.read_run(path)
    results = record.get("results") or {}
    shown = {key: results.get(key) for key in ("loss", "excess", "experts_per_token", "seconds")}
    return {"run": str(path), "id": record.get("id"), "status": record.get("status"), **shown}


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
    _console().print(table)


@app.command()
def doctor(as_json: Json = False) -> int:
    """What this machine and this build have."""
    from moe_lab import train as lab

    report = lab.doctor()
    if as_json:
        _print_json(report)
    else:
        _print_fields(report)
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
        _print_json(report)
        return DONE
    if table:
        print(f"{table}trace: {profile}\n")
    _print_fields({name: value for name, value in report.items() if name != "profile"})
    return DONE


def _train(source: str, options: Training) -> int:
    from moe_lab import train as lab

    run = lab.load_run(source, options.overrides(), options.quick)
    if options.check:
        return _print_plans({run.name: run.check()}, options.json)
    return _report_run(lab.run_training(run, options.out), options.json)


def _report_run(outcome: "Outcome", as_json: bool) -> int:
    from moe_lab import frames, tables

    if outcome.signal is not None:
        return _interrupted(outcome.out, outcome.signal)
    record = frames.read_run(outcome.out)
    if as_json:
        # The results stand at the top, as the binary prints them.
        _print_json({"run": outcome.out, "status": record.get("status"), **(record.get("results") or {})})
        return DONE
    tables.render([tables.summary(outcome.out)], _console())
    _print_answer(outcome.out)
    print(f"run directory: {outcome.out}")
    return DONE


def _print_answer(out: str) -> None:
    """The greedy answer to one training question: the last of the samples that the engine wrote."""
    from moe_lab import frames

    sample = frames.last_sample(out)
    if sample is not None:
        print(f"{sample[0]}\n  {sample[1]}")


def _report_stage(stage: "Stage", as_json: bool) -> int:
    from moe_lab import tables

    if stage.signal is not None:
        return _interrupted(stage.out, stage.signal)
    if as_json:
        verdicts = [verdict.as_dict() for verdict in stage.verdicts]
        passed = stage.passed if stage.judged else None
        _print_json({"stage": stage.out, "passed": passed, "gates": verdicts, "runs": list(stage.rows)})
    else:
        console = _console()
        tables.render(stage.rows, console, title="stage 1: top-p adaptive experts")
        for verdict in stage.verdicts:
            tables.render_verdict(verdict, console)
        print(f"stage directory: {stage.out}")
    if stage.diverged:
        return DIVERGED
    return DONE if stage.passed or not stage.judged else FAILED


def _report_roadmap(result: "Result", as_json: bool) -> int:
    from moe_lab import roadmap, tables

    if result.signal is not None:
        return _interrupted(result.out, result.signal)
    if as_json:
        told = {
            "roadmap": result.out,
            "failed": result.failed,
            "why": result.why,
            "rows": roadmap.rows(Path(result.out)),
        }
        _print_json({**told, "gates": [verdict.as_dict() for verdict in result.verdicts.values()]})
    else:
        console = _console()
        for verdict in result.verdicts.values():
            tables.render_verdict(verdict, console)
        roadmap.render(Path(result.out), console)
        print(f"roadmap directory: {result.out}")
        if result.failed:
            print(f"stopped at {result.failed}: {result.why}")
    if result.diverged:
        return DIVERGED
    return FAILED if result.failed else DONE


def _interrupted(out: str, number: int) -> int:
    _progress(f"stopped, everything is saved; go on with: {COMMAND} resume {out}")
    return 128 + number


def _print_plans(plans: dict[str, dict[str, Any]], as_json: bool) -> int:
    if as_json:
        _print_json(plans if len(plans) > 1 else next(iter(plans.values())))
        return DONE
    for name, plan in plans.items():
        print(name)
        _print_fields(plan, "  ")
    return DONE


def _print_fields(fields: dict[str, Any], indent: str = "") -> None:
    flat = dict(_flat(fields))
    width = max((len(name) for name in flat), default=0)
    for name, value in flat.items():
        print(f"{indent}{name:{width}}  {_shown(value)}")


def _flat(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in fields.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(_shown(each) for each in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(str(value))


def _print_json(value: object) -> None:
    print(json.dumps(value, allow_nan=False))


def _progress(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def _console() -> "Console":
    """stdout; wide enough for a table where it is a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)
