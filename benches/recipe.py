"""Whole trainings: nanoGPT's CPU recipe beside PyTorch, and an adaptive model beside its dense twin."""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import sides
from cases import Case

FOLDER = sides.HERE.parent / "experiments" / "shakespeare"


def train(run: Path, out: Path, sets: dict[str, object]) -> dict:
    """Trains a run file with the binary: results, wall seconds of its updates, evaluations as (step, seconds, loss)."""
    flags = [f"--set={key}={json.dumps(value)}" for key, value in sets.items()]
    command = [str(sides.BINARY), str(run), f"--out={out}", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run}: {done.stderr.strip()}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    spent = {row["step"]: row["train/dt"] for row in steps}
    evals = [(row["step"], row["eval/loss"]) for row in rows if row["kind"] == "eval" and "eval/loss" in row]
    curve = [(step, sum(dt for at, dt in spent.items() if at <= step), loss) for step, loss in evals]
    return json.loads(done.stdout.splitlines()[-1]) | {
        "wall_seconds": steps[-1]["ts"] - steps[0]["ts"] + steps[0]["train/dt"],
        "update_seconds": sum(spent.values()),
        "curve": curve,
    }


def shakespeare(options: argparse.Namespace, console: Console, narrow: bool) -> list[dict]:
    """2,000 updates on both sides, without PyTorch's compile time and any evaluation; bf16 only where `narrow`. Every
    training of PyTorch follows one of ours in the same precision; the fastest of two on each side are compared."""
    rows = []
    for dtype, precision in [("f32", []), ("bf16", ["--bf16"])]:
        for flags in (precision, ["--compile", *precision]):
            if dtype in options.dtypes and (narrow or dtype == "f32"):
                rows += beside(options, console, dtype, flags)
    title = "nanoGPT's CPU recipe: 4 layers, width 128, context 64, batch 12, 2,000 updates"
    table = Table(title=title, title_justify="left")
    for column in ("", "seconds", "loss", "moe_lab, seconds", "loss", "faster by", "spread", "cores apart, ns"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        cells = [f"{row['seconds']:.1f}", f"{row['loss']:.4f}", f"{row['ours']:.1f}", f"{row['ours_loss']:.4f}"]
        spread = sorted(theirs / ours for ours, theirs in row["rounds"])
        apart = ", ".join(f"{ns:.0f}" for ns in row["core_round_trips_ns"] if ns)
        table.add_row(row["side"], *cells, f"{row['ratio']:.2f}x", f"{spread[0]:.2f}-{spread[-1]:.2f}", apart)
    console.print(table)
    return rows


def beside(options: argparse.Namespace, console: Console, dtype: str, flags: list[str]) -> list[dict]:
    """Trainings of ours and of a variant of PyTorch in turn; nothing where it fails. Before each pair it is measured
    how far the cores are from each other: on a virtual machine that may change within minutes, and our step with it."""
    command = [sys.executable, str(sides.HERE / "shakespeare_torch.py"), f"--threads={options.threads}", *flags]
    rounds, apart, row = [], [], {}
    for _ in range(min(options.rounds, 2)):
        machine = sides.ours(["--preset=seed"], dtype, options.threads, 0, peak=True)
        apart.append(machine["core_round_trip_ns"])
        with tempfile.TemporaryDirectory() as folder:
            sets = {"dtype": dtype, "threads": options.threads}
            ours = train(FOLDER / "nanogpt.toml", Path(folder) / "run", sets)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            console.print(f"PyTorch {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
            return []
        row = json.loads(done.stdout.splitlines()[-1])
        rounds.append((ours["wall_seconds"], row["seconds"]))
        row["ours_loss"] = ours["eval_loss"]
    best = [min(pair[i] for pair in rounds) for i in (0, 1)]
    found = {"rounds": rounds, "core_round_trips_ns": apart, "ours": best[0], "seconds": best[1]}
    return [row | found | {"dtype": dtype, "ratio": best[1] / best[0]}]


def adaptivity(options: argparse.Namespace, console: Console, case: Case) -> dict:
    """The price of choosing: step time beside a dense model of as many active FLOPs, and time to the same loss."""
    steps = step_times(options, case)
    for dtype, row in steps.items():
        console.print(
            f"{case.name} {dtype}: adaptive step {row['ratio']:.3f}x its dense twin (SwiGLU {row['twin_width']}), "
            f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
        )
    return {"steps": steps, "training": training(options, console)}


def twin_width(report: dict, experts: int, hidden: int) -> int:
    """Of a dense SwiGLU with the FLOPs of a token's experts and router together."""
    return round(report["experts_per_token"] * hidden + experts / 3)


def step_times(options: argparse.Namespace, case: Case) -> dict:
    results = {}
    for dtype in options.dtypes:
        first = sides.ours(case.ours(), dtype, options.threads, options.seconds)
        width = twin_width(first, case.experts, case.hidden)
        twin = replace(case, dense=True, ff=width)
        pairs = []
        for _ in range(options.rounds):
            reports = [sides.ours(c.ours(), dtype, options.threads, options.seconds) for c in (case, twin)]
            pairs.append([report["ms_per_step"] for report in reports])
        ratios = sorted(a / b for a, b in pairs)
        best = [min(pair[i] for pair in pairs) for i in (0, 1)]
        results[dtype] = {
            "adaptive_ms": best[0],
            "twin_ms": best[1],
            "twin_width": width,
            "experts_per_token": first["experts_per_token"],
            "ratio": best[0] / best[1],
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
        }
    return results


def training(options: argparse.Namespace, console: Console) -> dict:
    """Both on Shakespeare, the twin as wide as what a token of the adaptive model used; the target is the higher of the
    two lowest losses, the time that of the updates up to it."""
    sets: dict[str, object] = {"threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        adaptive = train(FOLDER / "adaptive.toml", Path(folder) / "adaptive", sets)
        shape = tomllib.loads((Path(folder) / "adaptive" / "run.toml").read_text())["model"]["router"]
        sets["model.intermediate_size"] = twin_width(adaptive, shape["num_experts"], shape["expert_hidden_size"])
        runs = {"adaptive": adaptive, "twin": train(FOLDER / "twin.toml", Path(folder) / "twin", sets)}
    target = max(min(loss for _, _, loss in run["curve"]) for run in runs.values())
    results: dict = {"target_loss": target}
    for name, run in runs.items():
        step, seconds, _ = next(point for point in run["curve"] if point[2] <= target)
        results[name] = {
            "seconds_to_target": seconds,
            "step_of_target": step,
            "lowest_loss": min(loss for _, _, loss in run["curve"]),
            "seconds": run["update_seconds"],
            "params": run["params"],
            "active_params": run["active_params"],
            "experts_per_token": run["experts_per_token"],
        }
        console.print(
            f"{name}: held-out loss {target:.4f} after {seconds:.1f} s (step {step}); "
            f"lowest {results[name]['lowest_loss']:.4f}; "
            f"{run['active_params']:,.0f} of {run['params']:,} parameters active"
        )
    return results
