"""What every verb shares: the command line's root, its options, exit statuses, and how things are printed.

Results go to stdout, progress to stderr. Nothing heavy is imported before it is used.
"""

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lab.text import shown

if TYPE_CHECKING:
    from rich.console import Console

DONE, FAILED, USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
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


def _version(wanted: bool) -> None:
    if wanted:
        import moe_lab

        print(f"moe_lab {moe_lab.__version__}")
        raise typer.Exit(DONE)


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
AnyRunPath = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, stage or roadmap directory.", show_default=False)
]
Checkpoint = Annotated[str | None, typer.Option(metavar="NAME", help="checkpoint-N instead of the newest.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, counted on from --seed.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Runs side by side, one thread each if more than one.")]
Parents = Annotated[
    list[str] | None,
    typer.Option(
        "--parent", metavar="RUN", help="A finished parent run to compare with, instead of training one. Repeatable."
    ),
]


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
        chosen = dict(assignment(text) for text in self.set_ or [])
        flags = {name: getattr(self, name) for name in ("seed", "threads", "engine", "device", "dtype")}
        return chosen | {name: value for name, value in flags.items() if value is not None}

    def seeds(self, count: int, first: int) -> tuple[tuple[int, ...], dict[str, object]]:
        """The seeds, counted on from --seed or else from `first`, and the overrides without the seed."""
        overrides = self.overrides()
        start = whole_seed(overrides.pop("seed", first))
        return tuple(range(start, start + count)), overrides


def whole_seed(value: object) -> int:
    """A seed from --seed or --set. Raises ValueError in one sentence."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"seed = {str(value).lower()} is not a whole number")
    return value


def assignment(text: str) -> tuple[str, object]:
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


def print_json(value: object) -> None:
    print(json.dumps(value, allow_nan=False))


def print_fields(fields: dict[str, Any], indent: str = "") -> None:
    """Dotted names and values in two columns."""
    flat = dict(_flat(fields))
    width = max((len(name) for name in flat), default=0)
    for name, value in flat.items():
        print(f"{indent}{name:{width}}  {_shown(value)}")


def print_plans(plans: dict[str, dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print_json(plans if len(plans) > 1 else next(iter(plans.values())))
        return DONE
    for name, plan in plans.items():
        print(name)
        print_fields(plan, "  ")
    return DONE


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


def progress(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def interrupted(out: str, number: int) -> int:
    progress(f"stopped, everything is saved; go on with: {COMMAND} resume {out}")
    return 128 + number


def console() -> "Console":
    """stdout; wide enough for a table where it is a file or a pipe."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)
