"""Writes golden.json: losses and gradients of a few small models by the f64 oracle, for machines without torch.

    python tests/make_golden.py

The weights come from `formula_weights`, so that the file holds numbers only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from oracle_case import Case, formula_weights, make_case

GOLDEN = Path(__file__).with_name("golden.json")


def golden_cases() -> list[Case]:
    """One of each router, position and head mixture; the last but one has experts without tokens."""
    return [
        make_case("dense", "cope", "shared2"),
        make_case("top_p", "cope", "shared2"),
        make_case("top_p_layers", "cope", "routed", kv=3, tied=True),
        make_case("top_p_renormalised", "rope", "shared1", kv=6, window=3),
        make_case("top_k", "none", "shared2", kv=1),
        make_case("expert_choice", "learned", "plain"),
        make_case("top_k_raw", "cope", "shared2", window=5, documents=[[5, 16], [2, 13, 17]], k=1),
        make_case("top_k_shared", "cope", "shared2"),
    ]


def expected(case: Case, phase: int) -> dict[str, Any] | None:
    """The oracle's numbers, or None where these weights come too near to a jump of routing or of a gradient."""
    import torch

    import oracle

    torch.set_num_threads(1)  # the same last digits everywhere
    weights = oracle.as_tensors(formula_weights(case, phase))
    outcome = oracle.evaluate(weights, case.model, case.losses, case.documents)
    if not outcome.margins.safe():
        return None
    gradients = {}
    for name, gradient in oracle.gradients(outcome, weights).items():
        flat = gradient.flatten()
        picks = sorted({0, len(flat) // 3, len(flat) - 1, int(flat.abs().argmax())})
        gradients[name] = {"norm": float(flat.norm()), "entries": {str(i): float(flat[i]) for i in picks}}
    return {
        "cross_entropy": outcome.cross_entropy.item(),
        "losses": {name: value.item() for name, value in outcome.losses.items()},
        "total": outcome.total.item(),
        "last_logits": outcome.logits[-1][-1].tolist(),
        "experts": [[sorted(token) for token in layer] for layer in outcome.experts],
        "gradients": gradients,
    }


def golden(case: Case) -> dict[str, Any]:
    """The entry of a case, by the first phase that keeps its distance from jumps."""
    for phase in range(300):
        if (numbers := expected(case, phase)) is not None:
            given = {"model": case.model, "losses": case.losses, "vocab_size": case.vocab_size}
            return {"name": case.name, **given, "documents": case.documents, "phase": phase, "expected": numbers}
    raise SystemExit(f"{case.name}: every phase comes too near to a jump")


def main() -> None:
    entries = [golden(case) for case in golden_cases()]
    assert all(math.isfinite(entry["expected"]["total"]) for entry in entries)
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    GOLDEN.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
