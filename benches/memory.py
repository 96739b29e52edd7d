"""The memory estimate of `--check` beside the measured peak, over shapes; fails where they differ by more than 15 %."""

import os
from dataclasses import replace

import sides
from cases import DENSE_SMALL, SEED, SMALL, Case

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
]
ALLOWED = 0.15


def main() -> int:
    worst = 0.0
    for case in CASES:
        report = sides.ours(case.ours(), "f32", os.cpu_count() or 1, 0)
        measured, estimated = report["peak_memory_bytes"], report["estimated_memory_bytes"]
        off = estimated / measured - 1
        worst = max(worst, abs(off))
        sizes = f"measured {measured / 2**20:8.1f} MiB  estimated {estimated / 2**20:8.1f} MiB"
        print(f"{case.name:28} {sizes}  {off:+.1%}")
    print(f"worst: {worst:.1%}")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    raise SystemExit(main())
