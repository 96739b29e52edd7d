"""moe_lab against the numbers in golden.json, which the f64 PyTorch oracle wrote (make_golden.py). Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle_case import ENGINES, LOSSES, Case, difference, expert_sets, formula_weights, run_moe_lab

ENTRIES = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize(("engine", "dtype", "bar"), ENGINES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_golden(entry: dict[str, Any], engine: str, dtype: str, bar: float, tmp_path: Path) -> None:
    case = Case(*(entry[key] for key in ("name", "model", "losses", "vocab_size", "documents")))
    theirs = entry["expected"]
    ours = run_moe_lab(case, formula_weights(case, entry["phase"]), engine, dtype, tmp_path)

    assert difference(ours["cross_entropy"], theirs["cross_entropy"]) < bar
    for name in LOSSES:
        assert difference(ours["losses"].get(name) or 0.0, theirs["losses"].get(name, 0.0)) < bar, name
    assert difference(ours["total"], theirs["total"]) < bar
    assert difference(np.asarray(ours["logits"])[-1], theirs["last_logits"]) < bar
    assert expert_sets(ours["experts"]) == theirs["experts"]

    assert set(ours["gradients"]) == set(theirs["gradients"])
    for name, gradient in theirs["gradients"].items():
        flat = np.asarray(ours["gradients"][name], dtype=np.float64).ravel()
        assert difference(np.linalg.norm(flat), gradient["norm"]) < bar, name
        picked = [flat[int(i)] for i in gradient["entries"]]
        assert difference(picked, list(gradient["entries"].values())) < bar, name
