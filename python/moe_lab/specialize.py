"""Which experts take which tokens: by class, domain, word, pair and surprise; their load, and how early it settles.

Definitions: OLMoE (2409.02060), with co-activation over all pairs of a token's experts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl

from moe_lab import plots
from moe_lab.token_classes import VIEWS, class_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Routed", "class_of", "collect", "save"]

PERMUTATIONS = 200
OCCURRENCES = 10  # a word seen once goes to one expert by definition
BINS = 5
TEXTS = 1000

Domains = Mapping[str, Sequence[str]]  # texts by where they came from


class Routes(Protocol):
    """What is needed of a model."""

    def route(self, text: str) -> dict[str, Any]: ...


class Reads(Routes, Protocol):
    """What is needed of a model that is also asked for its own texts and its losses on them."""

    def documents(self) -> list[tuple[str, str, str]]: ...
    def token_losses(self, texts: list[str], keep: list[list[int]] | None = None) -> list["NDArray[np.float64]"]: ...


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens of many texts with their classes, and who took them: layers[l] is [tokens, experts]."""

    tokens: tuple[str, ...]
    layers: dict[int, "NDArray[np.bool_]"]
    views: dict[str, tuple[str, ...]]
    sizes: tuple[int, ...]
    # Loss of the token that follows, nats; NaN after the last of a text.
    surprise: "NDArray[np.float64]" = field(default_factory=lambda: np.empty(0))


def collect(
    model: Routes, texts: Domains | Sequence[str], losses: "Sequence[NDArray[np.float64]] | None" = None
) -> Routed:
    """Routes every text, in the order of `flat`; `losses` are of its tokens after the first.

    Raises ValueError for a model without experts.
    """
    tokens: list[str] = []
    views: dict[str, list[str]] = {name: [] for name in (*VIEWS, "domain")}
    parts: dict[int, list[NDArray[np.bool_]]] = {}
    sizes = []
    domains = texts if isinstance(texts, Mapping) else {"": texts}
    for domain, text in ((domain, text) for domain, own in domains.items() for text in own):
        routed = model.route(text)
        names = [str(token) for token in routed["tokens"]]
        if not routed["layers"]:
            raise ValueError("this run has no experts: nothing to specialise")
        tokens += names
        sizes.append(len(names))
        for name, classes in VIEWS.items():
            views[name] += classes(names)
        views["domain"] += [domain] * len(names)
        for layer in routed["layers"]:
            taken = np.zeros((len(names), np.asarray(layer["probabilities"]).shape[1]), dtype=bool)
            for row, experts in enumerate(layer["experts"]):
                taken[row, list(experts)] = True
            parts.setdefault(int(layer["layer"]), []).append(taken)
    surprise = np.concatenate([np.append(each, np.nan) for each in losses]) if losses else np.empty(0)
    if losses and len(surprise) != len(tokens):
        raise ValueError("the losses are of other texts: one for every token after the first is needed")
    layers = {layer: np.concatenate(part) for layer, part in parts.items()}
    return Routed(tuple(tokens), layers, {name: tuple(v) for name, v in views.items()}, tuple(sizes), surprise)


def flat(texts: Domains) -> list[str]:
    """All texts, domain by domain."""
    return [text for own in texts.values() for text in own]


def by_class(routed: Routed) -> pl.DataFrame:
    """Per view, layer, class and expert: tokens taken, their share of the class, lift = share over that of all."""
    rows = []
    for view, classes in _informative(routed).items():
        labels = np.asarray(classes)
        for layer, taken in routed.layers.items():
            overall = taken.mean(axis=0)
            for name in sorted(set(classes)):
                own = taken[labels == name]
                for expert, share in enumerate(own.mean(axis=0)):
                    lift = float(share / overall[expert]) if overall[expert] else None
                    rows.append((view, layer, name, expert, int(own[:, expert].sum()), len(own), float(share), lift))
    columns = ["view", "layer", "class", "expert", "taken", "tokens", "share", "lift"]
    return pl.DataFrame(rows, schema=columns, orient="row", infer_schema_length=None)


def experts_per_token(routed: Routed) -> pl.DataFrame:
    """Per view, layer and class: mean and standard deviation of the experts that a token uses."""
    rows = []
    for view, classes in _informative(routed).items():
        labels = np.asarray(classes)
        for layer, taken in routed.layers.items():
            used = taken.sum(axis=1)
            for name in sorted(set(classes)):
                own = used[labels == name]
                rows.append((view, layer, name, len(own), float(own.mean()), float(own.std())))
    return pl.DataFrame(rows, schema=["view", "layer", "class", "tokens", "mean", "std"], orient="row")


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


def information(routed: Routed, permutations: int = PERMUTATIONS, views: Sequence[str] = ("form",)) -> pl.DataFrame:
    """Per view and layer: mutual information of expert and class, nats; mean and 95th percentile of shuffles; p.

    p = (1 + shuffles at least as informative) / (1 + shuffles); tokens keep their experts.
    """
    draw = np.random.default_rng(0)
    rows = []
    for view in views:
        names = sorted(set(routed.views[view]))
        codes = np.searchsorted(names, routed.views[view])
        for layer, taken in routed.layers.items():
            found = _mutual(codes, len(names), taken)
            shuffled = np.array([_mutual(draw.permutation(codes), len(names), taken) for _ in range(permutations)])
            p = (1 + int((shuffled >= found).sum())) / (1 + permutations)
            rows.append((view, layer, found, float(shuffled.mean()), float(np.quantile(shuffled, 0.95)), p))
    columns = ["view", "layer", "information", "shuffled", "shuffled_p95", "p"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def _informative(routed: Routed) -> dict[str, tuple[str, ...]]:
    """Views that tell tokens apart at all: characters have no sentence, facts no question."""
    return {name: classes for name, classes in routed.views.items() if len(set(classes)) > 1}


def _mutual(codes: "NDArray[np.intp]", classes: int, taken: "NDArray[np.bool_]") -> float:
    """Plug-in mutual information of class and expert over all assignments of tokens to experts."""
    experts = taken.shape[1]
    rows, columns = np.nonzero(taken)
    counts = np.bincount(codes[rows] * experts + columns, minlength=classes * experts).reshape(classes, experts)
    joint = counts / counts.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / apart[there])).sum())


def vocabulary(routed: Routed) -> pl.DataFrame:
    """Per layer and word seen ten times or more: how often, its commonest expert, the share of it that goes there."""
    ids, counts, codes = _words(routed)
    rows = []
    for layer, taken in routed.layers.items():
        shares = _shares(codes, len(ids), taken)
        for word in np.flatnonzero(counts >= OCCURRENCES):
            expert = int(shares[word].argmax())
            rows.append((layer, str(ids[word]), int(counts[word]), expert, float(shares[word, expert])))
    table = pl.DataFrame(rows, schema=["layer", "word", "count", "expert", "share"], orient="row")
    return table.sort("layer", "share", "count", "word", descending=[False, True, True, False])


def vocabulary_score(routed: Routed, permutations: int = 20) -> pl.DataFrame:
    """Per layer: the unweighted mean of those shares over words, beside the mean of shuffled tokens."""
    ids, counts, codes = _words(routed)
    often = counts >= OCCURRENCES
    draw = np.random.default_rng(0)
    rows = []
    for layer, taken in routed.layers.items():

        def score(order: "NDArray[np.intp]", taken: "NDArray[np.bool_]" = taken) -> float:
            found = _shares(codes[order], len(ids), taken)[often].max(axis=1)
            return float(found.mean()) if len(found) else 0.0

        shuffled = [score(draw.permutation(len(codes))) for _ in range(permutations)]
        rows.append((layer, int(often.sum()), score(np.arange(len(codes))), float(np.mean(shuffled))))
    return pl.DataFrame(rows, schema=["layer", "words", "score", "shuffled"], orient="row")


def _words(routed: Routed) -> "tuple[NDArray[np.str_], NDArray[np.intp], NDArray[np.intp]]":
    ids, codes, counts = np.unique(np.asarray(routed.tokens), return_inverse=True, return_counts=True)
    return ids, counts, codes


def _shares(codes: "NDArray[np.intp]", ids: int, taken: "NDArray[np.bool_]") -> "NDArray[np.float64]":
    """Share of the occurrences of each id that each expert takes."""
    experts = taken.shape[1]
    rows, columns = np.nonzero(taken)
    counts = np.bincount(codes[rows] * experts + columns, minlength=ids * experts).reshape(ids, experts)
    return counts / np.maximum(1, np.bincount(codes, minlength=ids))[:, None]


def surprise(routed: Routed) -> pl.DataFrame:
    """Per layer and fifth of the tokens by the loss of what follows them: tokens, mean loss, experts used."""
    known = np.flatnonzero(~np.isnan(routed.surprise))
    order = known[np.argsort(routed.surprise[known], kind="stable")]
    rows = []
    for layer, taken in routed.layers.items():
        used = taken.sum(axis=1)
        for fifth, part in enumerate(np.array_split(order, BINS), start=1):
            if len(part):
                loss = float(routed.surprise[part].mean())
                rows.append((layer, fifth, len(part), loss, float(used[part].mean()), float(used[part].std())))
    columns = {"layer": pl.Int64, "fifth": pl.Int64, "tokens": pl.Int64, "loss": pl.Float64}
    return pl.DataFrame(rows, schema={**columns, "mean": pl.Float64, "std": pl.Float64}, orient="row")


def load(routed: Routed) -> pl.DataFrame:
    """Per layer, and over all layers: percentiles over experts of the load as a multiple of the fair one."""
    loads = {
        str(layer): taken.sum(axis=0) / max(1, taken.sum()) * taken.shape[1] for layer, taken in routed.layers.items()
    }
    loads["all"] = np.concatenate(list(loads.values()))
    percents = (5, 25, 50, 75, 95)
    rows = [
        (layer, *(float(x) for x in np.percentile(each, percents, method="inverted_cdf")), float(each.max()))
        for layer, each in loads.items()
    ]
    return pl.DataFrame(rows, schema=["layer", *(f"p{percent}" for percent in percents), "max"], orient="row")


def products(routed: Routed, batch: int, width: int, hidden: int) -> pl.DataFrame:
    """Per layer and expert: rows of its matrix products over batches of `batch` texts, their shapes, and utilisation.

    Utilisation is that of a layer: mean rows of its experts over the most rows of one, 1 where the load is even.
    """
    ends = np.cumsum(routed.sizes)
    cuts = [0, *(int(ends[min(last, len(ends)) - 1]) for last in range(batch, len(ends) + batch, batch))]
    rows = []
    for layer, taken in routed.layers.items():
        counts = np.stack([taken[a:b].sum(axis=0) for a, b in pairwise(cuts)])
        busy = float(np.mean(counts.mean(axis=1) / np.maximum(1, counts.max(axis=1))))
        for expert in range(counts.shape[1]):
            own = counts[:, expert]
            typical = int(np.median(own))
            shapes = (f"{typical}x{width} · {width}x{2 * hidden}", f"{typical}x{hidden} · {hidden}x{width}")
            rows.append(
                (layer, expert, float(own.mean()), typical, int(own.max()), int((own == 0).sum()), *shapes, busy)
            )
    columns = ["layer", "expert", "rows_mean", "rows_p50", "rows_max", "idle_batches", "in", "out", "utilisation"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def saturation(models: Sequence[tuple[int, Routes]], texts: Domains | Sequence[str]) -> pl.DataFrame:
    """Per step and layer: how many of a token's experts are those of the last model; chance shuffles tokens.

    |A ∩ B| / |A ∪ B| where the number of experts varies, |A ∩ B| / k where it does not.
    """
    routed = [(step, collect(model, texts)) for step, model in models]
    draw = np.random.default_rng(0)
    rows = []
    for step, then in routed:
        for layer, now in routed[-1][1].layers.items():
            shuffled = draw.permutation(len(now))
            before = then.layers[layer]
            rows.append((step, layer, _agreement(before, now), _agreement(before[shuffled], now)))
    return pl.DataFrame(rows, schema=["step", "layer", "agreement", "chance"], orient="row")


def _agreement(a: "NDArray[np.bool_]", b: "NDArray[np.bool_]") -> float:
    both, either = (a & b).sum(axis=1), (a | b).sum(axis=1)
    sizes = np.unique(np.concatenate([a.sum(axis=1), b.sum(axis=1)]))
    whole = np.full(len(a), sizes[0]) if len(sizes) == 1 else either
    return float(np.mean(np.where(whole > 0, both / np.maximum(1, whole), 1.0)))


def every_information(routed: Routed) -> pl.DataFrame:
    """The information in all views that tell tokens apart."""
    return information(routed, views=tuple(_informative(routed)))


TABLES: dict[str, Callable[[Routed], pl.DataFrame]] = {
    "by_class": by_class,
    "experts_per_token": experts_per_token,
    "coactivation": coactivation,
    "information": every_information,
    "vocabulary": vocabulary,
    "vocabulary_score": vocabulary_score,
    "surprise": surprise,
    "load": load,
}


def texts_of(files: Sequence[str]) -> dict[str, list[str]]:
    """Documents of JSON lists of strings, or of text files, one a line; by file, named in full where names meet."""
    names = [Path(file).name for file in files]
    texts = {file if names.count(name) > 1 else name: _documents(file) for file, name in zip(files, names, strict=True)}
    if not any(texts.values()):
        raise ValueError(f"there are no texts in {', '.join(files)}")
    return texts


def _documents(file: str) -> list[str]:
    try:
        content = Path(file).read_text(encoding="utf-8")
        listed = json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
    except ValueError:
        listed = [line for line in content.splitlines() if line.strip()]
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{file} is neither a JSON list of strings nor a text file")
    return listed


def by_phase(model: Reads) -> dict[str, list[str]]:
    """The texts that a run was trained on, by phase; of a text run the windows of its text."""
    found: dict[str, list[str]] = {}
    for phase, part, text in model.documents():
        if part == "train" or phase == "text":
            found.setdefault(phase, []).append(text)
    return found


def own_texts(model: Reads, most: int = TEXTS) -> dict[str, list[str]]:
    """The texts of a run by phase; every so many where there are more than `most` in all."""
    texts = by_phase(model)
    every = max(1, -(-len(flat(texts)) // most))
    return {phase: own[::every] for phase, own in texts.items()}


def checkpoints(run: str | Path) -> list[tuple[int, str]]:
    """Steps and names of the whole checkpoints of a run, oldest first."""
    found = (path.parent.name for path in Path(run).glob("checkpoints/checkpoint-*/MANIFEST.json"))
    return sorted((int(name.rpartition("-")[2]), name) for name in found if name.rpartition("-")[2].isdigit())


def save(routed: Routed, folder: Path, more: dict[str, pl.DataFrame] | None = None) -> list[Path]:
    """Writes every table as parquet and CSV, and the heat maps. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    tables = {name: make(routed) for name, make in TABLES.items()} | (more or {})
    for name, table in tables.items():
        paths += [folder / f"{name}.parquet", folder / f"{name}.csv"]
        table.write_parquet(paths[-2])
        table.write_csv(paths[-1])
    figures = {
        "coactivation": plots.heat(tables["coactivation"], "a", "b", "share", "Share of a's tokens that b takes too")
    }
    for view, table in tables["by_class"].group_by("view", maintain_order=True):
        title = f"Share of a class over that of all tokens, by {view[0]}"
        name = "lift" if view[0] == "form" else f"lift_{view[0]}"
        figures[name] = plots.heat(table, "class", "expert", "lift", title)
    if "saturation" in tables:
        figures["saturation"] = plots.saturation(tables["saturation"])
    return [*paths, *plots.save(figures, folder)]
