"""Specialisation on routing made by hand: what is planted is found, what is random is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moe_lab import specialize
from runs import Story, write


class Planted:
    """Layer 0: punctuation to expert 3, the rest at random among 0..2. Layer 1: at random."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(1)

    def route(self, text: str) -> dict[str, Any]:
        tokens = text.split()
        zero = [[3] if token in ".,?:" else [int(self.draw.integers(3))] for token in tokens]
        one = [sorted(self.draw.choice(4, 2, replace=False).tolist()) for _ in tokens]
        even = np.full((len(tokens), 4), 0.25)
        layers = [{"layer": layer, "experts": taken, "probabilities": even} for layer, taken in enumerate((zero, one))]
        return {"tokens": tokens, "layers": layers}


TEXTS = ["The river flows to 3 seas , and Rome stands by it . </s>", "User : Why ? Assistant : Because . </s>"] * 30


@pytest.fixture(scope="module")
def routed() -> specialize.Routed:
    return specialize.collect(Planted(), TEXTS)


@pytest.mark.parametrize(
    ("token", "position", "name"),
    [(".", 1, "punctuation"), ("42", 1, "digit"), ("the", 1, "function word"), ("The", 0, "function word"),
     ("Rome", 3, "name"), ("River", 0, "content word"), ("river", 2, "content word"), ("</s>", 9, "special"),
     ("User", 0, "role")],
)  # fmt: skip
def test_tokens_are_classed_by_their_form(token: str, position: int, name: str) -> None:
    assert specialize.class_of(token, position) == name


def test_a_planted_expert_is_found_in_its_layer_alone(routed: specialize.Routed) -> None:
    told = {row["layer"]: row for row in specialize.information(routed).iter_rows(named=True)}
    assert told[0]["p"] < 0.01
    assert told[0]["information"] > 5 * told[0]["shuffled"]
    assert told[1]["p"] > 0.01
    table = specialize.by_class(routed)
    own = table.filter((pl.col("layer") == 0) & (pl.col("class") == "punctuation") & (pl.col("expert") == 3))
    assert own["share"].to_list() == [1.0]
    assert own["lift"][0] > 2


def test_pairs_and_experts_per_token_are_counted(routed: specialize.Routed) -> None:
    pairs = specialize.coactivation(routed)
    assert pairs.filter(pl.col("layer") == 0)["both"].sum() == 0
    both = pairs.filter(pl.col("layer") == 1)["both"].sum()
    assert both == 2 * len(routed.tokens)  # every token has one pair, which stands there in both orders
    used = specialize.experts_per_token(routed)
    assert set(used.filter(pl.col("layer") == 1)["mean"]) == {2.0}


def test_tables_are_written_as_parquet_and_csv_with_heat_maps(routed: specialize.Routed, tmp_path: Path) -> None:
    paths = specialize.save(routed, tmp_path)
    assert {path.name for path in paths} >= {"by_class.parquet", "information.csv", "lift.png", "coactivation.png"}
    for path in tmp_path.glob("*.parquet"):
        again = pl.read_csv(path.with_suffix(".csv"))
        assert pl.read_parquet(path).shape == again.shape


def test_texts_come_from_files_and_what_is_none_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", Story(epochs=1, trained=1))
    (tmp_path / "a.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.txt")]
    assert specialize.texts_of(run, files) == ["one", "two", "three", "four"]
    with pytest.raises(ValueError, match="--texts FILE"):
        specialize.texts_of(run, [])
    (tmp_path / "c.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="neither a JSON list"):
        specialize.texts_of(run, [str(tmp_path / "c.json")])


def test_a_dense_model_is_refused() -> None:
    class Dense:
        def route(self, text: str) -> dict[str, Any]:
            return {"tokens": text.split(), "layers": []}

    with pytest.raises(ValueError, match="has no experts"):
        specialize.collect(Dense(), ["a b"])
