"""The memory estimate of `--check` beside the measured peak, over shapes."""

import argparse
from dataclasses import replace
from itertools import product

from rich.console import Console

import sides
from cases import DENSE_SMALL, SEED, SMALL, Case, sweep_case

CASES: list[Case] = [
    SEED,
    replace(SEED, name="seed, dense", dense=True),
    replace(SEED, name="seed, 64 documents", batch=64),
    SMALL,
    DENSE_SMALL,
    replace(SMALL, name="small, dense CoPE", dense=True),
    replace(SMALL, name="small, p 0.9", p=0.9, batch=4),
    replace(SMALL, name="small, 32 experts of 128", experts=32, hidden=128, batch=8),
    replace(SMALL, name="small, context 2048", seq=2048, batch=1),
    replace(SMALL, name="small, vocabulary 16384", vocab=16384, batch=4),
    replace(SEED, name="one short document", batch=1, seq=16),
    sweep_case(256, 4096, 4, 0.2),
    sweep_case(384, 1024, 4, 0.9),
    sweep_case(1024, 4096, 4, 0.6),
]
ALLOWED = 0.15


def measure(options: argparse.Namespace, console: Console) -> list[dict]:
    """A row a shape and dtype; the heap grows a little after the first steps, so that there are some."""
    rows = []
    for case, dtype in product(CASES, options.dtypes):
        report = sides.ours(case.ours(), dtype, options.threads, options.seconds)
        measured, estimated = report["peak_memory_bytes"], report["estimated_memory_bytes"]
        off = estimated / measured - 1
        rows.append({"case": case.name, "dtype": dtype, "measured": measured, "estimated": estimated, "off": off})
        sizes = f"measured {measured / 2**20:8.1f} MiB  estimated {estimated / 2**20:8.1f} MiB"
        console.print(f"{case.name:44} {dtype:4}  {sizes}  {off:+.1%}")
    worst = max(abs(row["off"]) for row in rows)
    console.print(f"worst: {worst:.1%}, allowed: {ALLOWED:.0%}")
    return rows
