"""Our training step and PyTorch's, side by side: same shapes and threads, alternating in one run. `make bench` runs it.

    compare.py                 the presets with every variant of PyTorch, at most 10 minutes
    compare.py --quick         seed and dense small, the eager variants, 1 to 2 minutes
    compare.py --cases seed    some presets (seed; small; small, dense RoPE; medium)
    compare.py --sweep         24 shapes that cover every pair of width, context, experts and p (--skip 23: the last)
    compare.py --recipe        nanoGPT's CPU recipe on Shakespeare: wall time and held-out loss of both sides
    compare.py --adaptivity    an adaptive model beside its dense twin of equal active FLOPs
    compare.py --memory        our memory estimate beside the measured peak, over shapes

A ratio is ours / PyTorch in tokens per second. The best round of each side makes it; the lowest and highest ratio of
rounds next to each other are its spread. PyTorch out of memory counts as a win, shown as such.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

import memory
import recipe
import sides
from cases import COMPILED_IN_SWEEP, DENSE_SMALL, PRESETS, SEED, SMALL, SWEEP, Case, Variant, sweep_case, variants

GIB = 2**30
console = Console(width=150, highlight=False)


class Clock:
    """The wall time that may still be spent."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def compare(case: Case, kinds: list[Variant], dtypes: list[str], options: argparse.Namespace, clock: Clock) -> dict:
    """Rounds of ours and of each variant in turn."""
    own: dict[str, list[dict]] = {
        dtype: [sides.ours(case.ours(), dtype, options.threads, options.seconds, True)] for dtype in dtypes
    }
    rows = []
    for kind in kinds:
        alike = "bf16" if kind.bf16 else "f32"
        dtype = alike if alike in dtypes else dtypes[0]
        row: dict = {"variant": kind.name, "beside": dtype}
        rows.append(row)
        if clock.left() < 10:
            row["note"] = "left out: no time"
            continue
        try:
            patience = min(clock.left(), options.patience)
            peer = sides.Peer([*case.torch(), *kind.flags()], options.threads, options.limit, patience, options.warm)
        except sides.TooLargeError as error:
            row |= {"note": f"out of memory: {error}", "win": True}
            continue
        except sides.UnfinishedError as error:
            row["note"] = str(error)[:200]
            continue
        try:
            pairs = []
            for _ in range(options.rounds):
                mine = sides.ours(case.ours(), dtype, options.threads, options.seconds)
                theirs = peer.measure(options.seconds)
                own[dtype].append(mine)
                pairs.append((mine, theirs))
                if clock.left() < 0:
                    break
            ratios = sorted(mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in pairs)
            best = [max(pair[i]["tokens_per_second"] for pair in pairs) for i in (0, 1)]
            row |= {
                "tokens_per_second": best[1],
                "ratio": best[0] / best[1],
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
                "peak_memory_bytes": pairs[-1][1]["peak_memory_bytes"],
                "experts_per_token": peer.ready["experts_per_token"],
                "warm_seconds": peer.ready["warm_seconds"],
            }
        except (sides.TooLargeError, sides.UnfinishedError) as error:
            row["note"] = str(error)[:200]
        finally:
            peer.close()
    summary = {dtype: max(reports, key=lambda report: report["tokens_per_second"]) for dtype, reports in own.items()}
    for dtype, report in summary.items():
        shares = own[dtype][0]
        report |= {
            "peak_gflops": shares["peak_gflops"],
            "share_of_peak": report["matmul_gflops"] / shares["peak_gflops"],
        }
    return {"case": case.__dict__, "ours": summary, "torch": rows} | verdict(summary, rows)


def verdict(summary: dict, rows: list[dict]) -> dict:
    """Our best against PyTorch's best: any dtype, f32 alone, and memory against the fastest variant."""
    done = [row for row in rows if "tokens_per_second" in row]
    if not done:
        return {}
    fastest = max(done, key=lambda row: row["tokens_per_second"])
    ours_best = max(summary.values(), key=lambda report: report["tokens_per_second"])
    result = {
        "fastest_torch": fastest["variant"],
        "ratio": ours_best["tokens_per_second"] / fastest["tokens_per_second"],
        "memory_ratio": ours_best["peak_memory_bytes"] / fastest["peak_memory_bytes"],
    }
    single = [row["tokens_per_second"] for row in done if row["variant"].endswith("f32")]
    if single and "f32" in summary:
        result["ratio_f32"] = summary["f32"]["tokens_per_second"] / max(single)
    return result


def show(result: dict) -> None:
    table = Table(
        title=f"{result['case']['name']}: {result['case']['batch']} x {result['case']['seq']} tokens",
        title_justify="left",
    )
    for column in ("", "tokens/s", "ours / it", "spread", "memory MiB", "experts", "of peak", "warm s"):
        table.add_column(column, justify="left" if not column else "right")
    for dtype, report in result["ours"].items():
        experts = report["experts_per_token"]
        table.add_row(
            f"moe_lab {dtype}",
            f"{report['tokens_per_second']:,.0f}",
            "",
            "",
            f"{report['peak_memory_bytes'] / 2**20:,.0f}",
            f"{experts:.2f}" if experts else "",
            f"{100 * report['share_of_peak']:.1f} %",
            f"{report['warm_seconds']:.1f}",
        )
    for row in result["torch"]:
        if "tokens_per_second" not in row:
            table.add_row(f"PyTorch {row['variant']}", row["note"])
            continue
        table.add_row(
            f"PyTorch {row['variant']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}x ({row['beside']})",
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['experts_per_token']:.2f}" if row["experts_per_token"] else "",
            "",
            f"{row['warm_seconds']:.1f}",
        )
    console.print(table)
    if "ratio" in result:
        line = f"against PyTorch's fastest ({result['fastest_torch']}): {result['ratio']:.2f}x"
        line += f", memory {result['memory_ratio']:.2f}x"
        single = f"; f32 against f32: {result['ratio_f32']:.2f}x" if "ratio_f32" in result else ""
        console.print(line + single + "\n")


def dtypes() -> list[str]:
    """The dtypes that this build trains in."""
    found = []
    for dtype in ("f32", "bf16"):
        try:
            sides.ours(SEED.ours(), dtype, 1, 0)
            found.append(dtype)
        except sides.UnfinishedError as error:
            console.print(f"{dtype}: {error}")
    return found


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*: (.*)$", info, re.MULTILINE)
        return found.group(1) if found else ""

    model = field("model name") or platform.processor()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    sets = [name for name in wanted if name in field("flags").split()]
    family = f"family {field('cpu family')} model {field('model')}"
    return {"cpu": model, "family": family, "cores": os.cpu_count(), "instruction_sets": sets}


def multiplies_bf16() -> bool:
    """Whether an instruction here multiplies bf16: without one both sides only lose by it."""
    return any(name in machine()["instruction_sets"] for name in ("avx512_bf16", "amx_bf16"))


def slug(kind: dict) -> str:
    words = f"{kind['cpu']} {kind['family']} {kind['cores']} cores".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def results_file(options: argparse.Namespace) -> Path:
    return options.out or sides.HERE / "results" / f"{slug(machine())}.json"


def save(name: str, results: object, options: argparse.Namespace) -> None:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    path = results_file(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {
        "machine": machine() | {"threads": options.threads},
        "torch": torch.__version__,
        "commit": commit,
        "seconds_per_round": options.seconds,
        "rounds": options.rounds,
        "results": results,
    }
    path.write_text(json.dumps(known, indent=1) + "\n")


def run_sweep(options: argparse.Namespace, clock: Clock) -> None:
    results = []
    narrow = multiplies_bf16()
    # Short contexts first: there PyTorch is nearest, and a step of its long ones takes many seconds.
    order = sorted(enumerate(SWEEP), key=lambda numbered: numbered[1][1])[options.skip :]
    for i, row in order:
        if clock.left() < 10:
            console.print(f"{sweep_case(*row).name}: left out: no time")
            continue
        case = sweep_case(*row)
        kinds = [kind for kind in variants(case, compiled=i in COMPILED_IN_SWEEP) if narrow or not kind.bf16]
        result = compare(case, kinds, options.dtypes, options, clock)
        results.append(result)
        single = f", f32 against f32 {result['ratio_f32']:.2f}x" if "ratio_f32" in result else ""
        wins = [entry["variant"] for entry in result["torch"] if entry.get("win")]
        lost = f"; PyTorch out of memory: {', '.join(wins)}" if wins else ""
        best = f"{result['ratio']:.2f}x of {result['fastest_torch']}" if "ratio" in result else "no variant finished"
        console.print(f"{case.name}: {best}{single}{lost}")
        save(f"sweep after {options.skip} shapes" if options.skip else "sweep", results, options)
    slower = [result["case"]["name"] for result in results if result.get("ratio", 2.0) < 1.0]
    console.print(
        f"{len(results) - len(slower)} of {len(results)} shapes at least as fast as PyTorch's best, of {len(order)}"
    )


def run_presets(options: argparse.Namespace, clock: Clock) -> None:
    results = []
    cases = [PRESETS[name] for name in options.cases] if options.cases else [SEED, DENSE_SMALL, SMALL]
    if options.quick:
        cases = [SEED, DENSE_SMALL]
    for i, case in enumerate(cases):
        kinds = sorted(variants(case, compiled=not options.quick), key=lambda kind: kind.bf16)
        if options.quick:
            kinds = [kind for kind in kinds if kind.moe != "dense"]
        share = Clock(clock.left() * (0.4 if len(cases) - i == 3 else 0.5 if len(cases) - i == 2 else 1.0))
        results.append(compare(case, kinds, options.dtypes, options, share))
        show(results[-1])
    save("quick" if options.quick else "presets", results, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("quick", "sweep", "recipe", "adaptivity", "memory"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--cases", nargs="*", choices=list(PRESETS))
    parser.add_argument(
        "--dtypes", nargs="*", choices=["f32", "bf16"], help="ours; both where the machine has an instruction for bf16"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3, help="warm-up steps of PyTorch")
    parser.add_argument("--minutes", type=float, help="wall time at most (10; quick 2; sweep 60)")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds that a variant may take to be warm")
    parser.add_argument("--skip", type=int, default=0, help="the first shapes of --sweep, left out")
    parser.add_argument("--out", type=Path, help="JSON file (benches/results/<machine>.json)")
    options = parser.parse_args()
    if not 0 <= options.skip < len(SWEEP):
        parser.error(f"--skip {options.skip}: a sweep has {len(SWEEP)} shapes")
    options.limit = int(0.85 * psutil.virtual_memory().available)
    options.dtypes = options.dtypes or (dtypes() if multiplies_bf16() else ["f32"])
    if options.quick:
        options.rounds, options.seconds = min(options.rounds, 2), min(options.seconds, 1.0)
    if options.sweep:
        options.rounds, options.seconds, options.warm = min(options.rounds, 2), min(options.seconds, 1.0), 1
    clock = Clock(60 * (options.minutes or (2 if options.quick else 60 if options.sweep else 10)))
    kind = machine()
    console.print(f"{kind['cpu']} ({kind['family']}), {', '.join(kind['instruction_sets'])}, {options.threads} threads")
    if not multiplies_bf16():
        console.print("no instruction here multiplies bf16: ours runs in f32, PyTorch's bf16 comes last or is left out")
    if options.sweep:
        run_sweep(options, clock)
    elif options.recipe:
        save("recipe", recipe.shakespeare(options, console, multiplies_bf16()), options)
    elif options.adaptivity:
        save("adaptivity", recipe.adaptivity(options, console, SMALL), options)
    elif options.memory:
        save("memory", memory.measure(options, console), options)
    else:
        run_presets(options, clock)
    console.print(f"written: {results_file(options)}")


if __name__ == "__main__":
    main()
