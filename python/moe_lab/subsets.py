"""What a domain loses when only some experts are left: those it uses most, those another uses most, or any as many."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from moe_lab.specialize import Reads, by_phase, collect

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 5
TEXTS = 200

Keep = list[list[int]]


def domains_of(model: Reads, most: int = TEXTS) -> dict[str, list[str]]:
    """Training texts by phase; of a text run its two halves. Every so many where there are more than `most`."""
    found = by_phase(model)
    if list(found) == ["text"]:
        half = len(found["text"]) // 2
        found = {"first half": found["text"][:half], "second half": found["text"][half:]}
    return {name: texts[:: -(-len(texts) // most)] for name, texts in found.items() if texts}


def losses(model: Reads, domains: Mapping[str, Sequence[str]], draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """Loss per domain and number of experts kept in each layer, mean over texts in nats.

    With its own most used ones, with those of the next domain, with random ones (mean and standard deviation over
    draws), and with all.
    """
    usage = {name: _usage(model, texts) for name, texts in domains.items()}
    names = list(domains)
    draw = np.random.default_rng(seed)
    rows: list[tuple[str, int, str, float, float | None]] = []
    for number, (name, texts) in enumerate(domains.items()):
        counts = usage[name]
        experts = min(len(each) for each in counts)
        rows.append((name, experts, "all", _loss(model, texts, None), None))
        for kept in _sizes(experts):
            rows.append((name, kept, "own", _loss(model, texts, _most(counts, kept)), None))
            if len(names) > 1:
                other = usage[names[(number + 1) % len(names)]]
                rows.append((name, kept, "other", _loss(model, texts, _most(other, kept)), None))
            some = [[sorted(draw.permutation(len(each))[:kept].tolist()) for each in counts] for _ in range(draws)]
            found = [_loss(model, texts, keep) for keep in some]
            rows.append(
                (name, kept, "random", float(np.mean(found)), float(np.std(found, ddof=1)) if draws > 1 else None)
            )
    schema = {"domain": pl.String, "kept": pl.Int64, "experts": pl.String, "loss": pl.Float64, "std": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _sizes(experts: int) -> list[int]:
    """1, 2, 4, ... below the number of experts."""
    return [1 << power for power in range(experts.bit_length()) if 1 << power < experts]


def _usage(model: Reads, texts: Sequence[str]) -> "list[NDArray[np.int64]]":
    """Tokens that each expert takes, layer by layer."""
    layers = collect(model, texts).layers
    return [layers[layer].sum(axis=0) for layer in sorted(layers)]


def _most(usage: "list[NDArray[np.int64]]", kept: int) -> Keep:
    return [sorted(np.argsort(-counts, kind="stable")[:kept].tolist()) for counts in usage]


def _loss(model: Reads, texts: Sequence[str], keep: Keep | None) -> float:
    """Mean over texts of the mean over their tokens."""
    return float(np.mean([each.mean() for each in model.token_losses(list(texts), keep)]))
