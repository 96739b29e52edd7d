"""Which experts take which tokens: shares by class of token, pairs of experts, experts per token, information.

Definitions: OLMoE (2409.02060), with co-activation over all pairs of a token's experts.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl

from moe_lab import frames, plots

if TYPE_CHECKING:
    from numpy.typing import NDArray

PERMUTATIONS = 200
WORDS = """
a an the this that these those and or but nor so yet if because as than when while where why how what who which
of in on at by for with from to into out up down over under about between through is are was were be been being am
do does did has have had can could will would shall should may might must not no it its he she they we you i him
her them us me my your his our their there here all each every some any more most many much very too also
"""
FUNCTION_WORDS = frozenset(WORDS.split())


class Routes(Protocol):
    """What is needed of a model."""

    def route(self, text: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens of many texts with their classes, and who took them: layers[l] is [tokens, experts]."""

    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    layers: dict[int, "NDArray[np.bool_]"]


def class_of(token: str, position: int) -> str:
    """The class of a token by its form; `position` 0 begins a text."""
    if token.startswith("<") and token.endswith(">"):
        return "special"
    if token in ("User", "Assistant"):
        return "role"
    if not any(letter.isalnum() for letter in token):
        return "punctuation"
    if any(letter.isdigit() for letter in token):
        return "digit"
    if token.lower() in FUNCTION_WORDS:
        return "function word"
    return "name" if token[0].isupper() and position else "content word"


def collect(model: Routes, texts: Sequence[str]) -> Routed:
    """Routes every text. Raises ValueError for a model without experts."""
    tokens: list[str] = []
    classes: list[str] = []
    parts: dict[int, list[NDArray[np.bool_]]] = {}
    for text in texts:
        routed = model.route(text)
        names = [str(token) for token in routed["tokens"]]
        if not routed["layers"]:
            raise ValueError("this run has no experts: nothing to specialise")
        tokens += names
        classes += [class_of(name, position) for position, name in enumerate(names)]
        for layer in routed["layers"]:
            taken = np.zeros((len(names), np.asarray(layer["probabilities"]).shape[1]), dtype=bool)
            for row, experts in enumerate(layer["experts"]):
                taken[row, list(experts)] = True
            parts.setdefault(int(layer["layer"]), []).append(taken)
    return Routed(tuple(tokens), tuple(classes), {layer: np.concatenate(part) for layer, part in parts.items()})


def by_class(routed: Routed) -> pl.DataFrame:
    """Per layer, class and expert: tokens taken, their share of the class, lift = share over that of all."""
    rows = []
    labels = np.asarray(routed.classes)
    for layer, taken in routed.layers.items():
        overall = taken.mean(axis=0)
        for name in sorted(set(routed.classes)):
            own = taken[labels == name]
            for expert, share in enumerate(own.mean(axis=0)):
                lift = float(share / overall[expert]) if overall[expert] else None
                rows.append((layer, name, expert, int(own[:, expert].sum()), len(own), float(share), lift))
    columns = ["layer", "class", "expert", "taken", "tokens", "share", "lift"]
    return pl.DataFrame(rows, schema=columns, orient="row", infer_schema_length=None)


def experts_per_token(routed: Routed) -> pl.DataFrame:
    """Per layer and class: mean and standard deviation of the experts that a token uses."""
    labels = np.asarray(routed.classes)
    rows = [
        (
            layer,
            name,
            int((labels == name).sum()),
            float(used[labels == name].mean()),
            float(used[labels == name].std()),
        )
        for layer, taken in routed.layers.items()
        for used in (taken.sum(axis=1),)
        for name in sorted(set(routed.classes))
        for own in (used[labels == name],)
    ]
    return pl.DataFrame(rows, schema=["layer", "class", "tokens", "mean", "std"], orient="row")


def coactivation(routed: Routed) -> pl.DataFrame:
    """Per layer and pair (a, b): the share of the tokens of a that b takes too, N_ab / N_a, over all pairs."""
    rows = []
    for layer, taken in routed.layers.items():
        counts = taken.astype(np.int64).T @ taken.astype(np.int64)
        for a in range(len(counts)):
            for b in range(len(counts)):
                if a != b:
                    rows.append((layer, a, b, int(counts[a, b]), float(counts[a, b] / max(1, counts[a, a]))))
    return pl.DataFrame(rows, schema=["layer", "a", "b", "both", "share"], orient="row")


def information(routed: Routed, permutations: int = PERMUTATIONS) -> pl.DataFrame:
    """Per layer: mutual information of expert and class, nats; its mean and 95th percentile with shuffled classes; p.

    p = (1 + shuffles at least as informative) / (1 + shuffles); tokens keep their experts.
    """
    names = sorted(set(routed.classes))
    codes = np.searchsorted(names, routed.classes)
    draw = np.random.default_rng(0)
    rows = []
    for layer, taken in routed.layers.items():
        found = _mutual(codes, len(names), taken)
        shuffled = np.array([_mutual(draw.permutation(codes), len(names), taken) for _ in range(permutations)])
        p = (1 + int((shuffled >= found).sum())) / (1 + permutations)
        rows.append((layer, found, float(shuffled.mean()), float(np.quantile(shuffled, 0.95)), p))
    return pl.DataFrame(rows, schema=["layer", "information", "shuffled", "shuffled_p95", "p"], orient="row")


def _mutual(codes: "NDArray[np.intp]", classes: int, taken: "NDArray[np.bool_]") -> float:
    """Plug-in mutual information of class and expert over all assignments of tokens to experts."""
    counts = np.stack([taken[codes == code].sum(axis=0) for code in range(classes)]).astype(float)
    joint = counts / counts.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / apart[there])).sum())


TABLES: dict[str, Callable[[Routed], pl.DataFrame]] = {
    "by_class": by_class,
    "experts_per_token": experts_per_token,
    "coactivation": coactivation,
    "information": information,
}


def texts_of(run: frames.Place, files: Sequence[str]) -> list[str]:
    """Documents of JSON lists of strings, or of text files, one a line; the run's own files where none are named."""
    data = frames.settings(run).get("data", {})
    named = list(files) or [str(data[role]) for role in ("facts", "chat") if data.get(role)]
    if not named:
        raise ValueError(f"'{run}' was trained on shipped data: name the texts to route with --texts FILE")
    texts: list[str] = []
    for name in named:
        content = Path(name).read_text()
        try:
            listed = json.loads(content)
        except ValueError:
            listed = [line for line in content.splitlines() if line.strip()]
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise ValueError(f"{name} is neither a JSON list of strings nor a text file")
        texts += listed
    if not texts:
        raise ValueError(f"there are no texts in {', '.join(named)}")
    return texts


def save(routed: Routed, folder: Path) -> list[Path]:
    """Writes every table as parquet and CSV, and the heat maps. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    tables = {name: make(routed) for name, make in TABLES.items()}
    for name, table in tables.items():
        paths += [folder / f"{name}.parquet", folder / f"{name}.csv"]
        table.write_parquet(paths[-2])
        table.write_csv(paths[-1])
    figures = {
        "lift": plots.heat(tables["by_class"], "class", "expert", "lift", "Share of a class over that of all tokens"),
        "coactivation": plots.heat(tables["coactivation"], "a", "b", "share", "Share of a's tokens that b takes too"),
    }
    return [*paths, *plots.save(figures, folder)]
