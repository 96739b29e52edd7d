"""Specialisation on routing made by hand: what is planted is found, what is random is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moe_lab import specialize, subsets, token_classes


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


def test_tokens_are_classed_by_place_part_and_sentence() -> None:
    tokens = ["User", ":", "Why", "so", "?", "Assistant", ":", "It", "is", ".", "So", ".", "</s>"]
    assert token_classes.places(tokens)[:9] == ["1", "2", "3-4", "3-4", *["5-8"] * 4, "9-16"]
    assert token_classes.parts(tokens)[:4] == ["mark", "question", "question", "question"]
    assert token_classes.parts(tokens)[-3:] == ["answer", "answer", "mark"]
    assert set(token_classes.parts(["Ice", "is", "cold"])) == {"statement"}
    found = token_classes.sentences(tokens)
    assert found == [
        "none",
        "none",
        "first",
        "inside",
        "end",
        "none",
        "none",
        "first",
        "inside",
        "end",
        "first",
        "end",
        "none",
    ]


def test_a_planted_expert_is_found_in_its_layer_alone(routed: specialize.Routed) -> None:
    told = {row["layer"]: row for row in specialize.information(routed).iter_rows(named=True)}
    assert told[0]["p"] < 0.01
    assert told[0]["information"] > 5 * told[0]["shuffled"]
    assert told[1]["p"] > 0.01
    table = specialize.by_class(routed).filter(pl.col("view") == "form")
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
    assert set(used["view"]) == {"form", "place", "part", "sentence"}


def by_hand(layer: list[list[int]], tokens: list[str], losses: list[float] | None = None) -> specialize.Routed:
    """A routing of one layer of four experts, as one text."""

    class Hand:
        def route(self, text: str) -> dict[str, Any]:
            return {
                "tokens": tokens,
                "layers": [{"layer": 0, "experts": layer, "probabilities": np.zeros((len(tokens), 4))}],
            }

    return specialize.collect(Hand(), ["all"], None if losses is None else [np.array(losses)])


def test_words_that_go_to_one_expert_stand_out_against_chance() -> None:
    taken = [[0], [1], [2], [3]] * 10
    routed = by_hand(taken, ["a", "b", "c", "d"] * 10)
    table = specialize.vocabulary(routed)
    assert table.select("word", "count", "expert", "share").rows() == [(w, 10, e, 1.0) for e, w in enumerate("abcd")]
    score = specialize.vocabulary_score(routed).row(0, named=True)
    assert score["words"] == 4
    assert score["score"] == 1.0
    assert 0.3 < score["shuffled"] < 0.6
    assert specialize.vocabulary(by_hand(taken[:36], ["a", "b", "c", "d"] * 9)).height == 0  # nine times is too few


def test_surprising_tokens_are_told_from_the_others() -> None:
    losses = [float(place) for place in range(39)]
    taken = [[0]] * 20 + [[0, 1, 2]] * 20
    table = specialize.surprise(by_hand(taken, ["a"] * 40, losses))
    assert table["tokens"].to_list() == [8, 8, 8, 8, 7]  # the last token of the text has none after it
    assert table["mean"].to_list() == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert table["loss"].is_sorted()
    with pytest.raises(ValueError, match="other texts"):
        by_hand(taken, ["a"] * 40, losses[:-1])


def test_load_and_matrix_products_are_those_of_the_routing() -> None:
    taken = [[0], [0], [0], [1], [1], [2], [0], [3]]
    table = specialize.load(by_hand(taken, ["a"] * 8))
    assert table.filter(pl.col("layer") == "all").row(0)[1:] == (0.5, 0.5, 0.5, 1.0, 2.0, 2.0)
    shapes = specialize.products(by_hand(taken, ["a"] * 8), 1, 128, 64)
    assert shapes["rows_p50"].to_list() == [4, 2, 1, 1]
    assert shapes["in"][0] == "4x128 · 128x128"
    assert shapes["out"][0] == "4x64 · 64x128"
    assert set(shapes["utilisation"]) == {0.5}  # 2 rows on average, 4 at most


def test_saturation_is_one_for_the_last_model_and_chance_for_another() -> None:
    models = [(1, Planted()), (2, Planted()), (3, Planted())]
    models[0][1].draw = np.random.default_rng(7)
    table = specialize.saturation(models, TEXTS)
    last = table.filter(pl.col("step") == 3)
    assert last["agreement"].to_list() == [1.0, 1.0]
    assert table.filter(pl.col("step") == 2)["agreement"].to_list() == [1.0, 1.0]  # drawn by the same seed
    first = table.filter((pl.col("step") == 1) & (pl.col("layer") == 1)).row(0, named=True)
    assert abs(first["agreement"] - 0.5) < 0.08  # two of four at random: |A n B| / 2 = 0.5
    assert abs(first["chance"] - 0.5) < 0.08


class Divided:
    """Expert 0 serves the word of one domain, 2 that of the other; a word without its expert costs 2 nats more."""

    def documents(self) -> list[tuple[str, str, str]]:
        return [(phase, "train", f"{word} {word} {word}") for phase, word in [("facts", "a"), ("chat", "c")] * 4]

    def route(self, text: str) -> dict[str, Any]:
        experts = [[0] if word == "a" else [2] for word in text.split()]
        return {"tokens": text.split(), "layers": [{"layer": 0, "experts": experts, "probabilities": np.zeros((3, 4))}]}

    def token_losses(self, texts: list[str], keep: list[list[int]] | None = None) -> list[Any]:
        need = [0 if text.startswith("a") else 2 for text in texts]
        return [np.full(2, 1.0 if keep is None or expert in keep[0] else 3.0) for expert in need]


def test_a_domain_keeps_its_loss_with_its_own_experts_and_not_with_others() -> None:
    table = subsets.losses(Divided(), subsets.domains_of(Divided()), draws=20)
    found = {(row[0], row[1], row[2]): row[3] for row in table.iter_rows()}
    for domain in ("facts", "chat"):
        assert found[domain, 4, "all"] == found[domain, 1, "own"] == 1.0
        assert found[domain, 1, "other"] == 3.0
        assert found[domain, 1, "own"] < found[domain, 2, "random"] < found[domain, 1, "random"] < 3.0
    assert set(table["kept"]) == {1, 2, 4}


def test_a_text_run_is_divided_into_halves() -> None:
    class Text(Divided):
        def documents(self) -> list[tuple[str, str, str]]:
            return [("text", "validation", str(number)) for number in range(10)]

    assert [len(texts) for texts in subsets.domains_of(Text()).values()] == [5, 5]
    assert [len(texts) for texts in specialize.own_texts(Text(), most=4).values()] == [4]


class ByDomain:
    """Layer 0: the words of facts to expert 0, those of chat at random among 1..3. Layer 1: at random."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(1)

    def route(self, text: str) -> dict[str, Any]:
        tokens = text.split()
        zero = [[0] if tokens[0] == "The" else [1 + int(self.draw.integers(3))] for _ in tokens]
        one = [[int(self.draw.integers(4))] for _ in tokens]
        even = np.full((len(tokens), 4), 0.25)
        layers = [{"layer": layer, "experts": taken, "probabilities": even} for layer, taken in enumerate((zero, one))]
        return {"tokens": tokens, "layers": layers}


def test_an_expert_of_one_domain_is_found_in_its_layer_alone(tmp_path: Path) -> None:
    texts = {"facts": TEXTS[::2], "chat$": TEXTS[1::2]}
    routed = specialize.collect(ByDomain(), texts)
    specialize.save(routed, tmp_path)
    own = pl.read_parquet(tmp_path / "by_class.parquet").filter(pl.col("view") == "domain")
    shares = own.filter((pl.col("layer") == 0) & (pl.col("expert") == 0)).select("class", "share").rows()
    assert shares == [("chat$", 0.0), ("facts", 1.0)]
    used = specialize.experts_per_token(routed).filter(pl.col("view") == "domain")
    assert used["tokens"].to_list() == [270, 420] * 2
    told = pl.read_csv(tmp_path / "information.csv").filter(pl.col("view") == "domain")
    assert told["p"][0] < 0.01
    assert told["p"][1] > 0.01
    assert told["information"][0] == pytest.approx(-sum(x * np.log(x) for x in (270 / 690, 420 / 690)))
    assert (tmp_path / "lift_domain.png").is_file()


def test_texts_of_one_domain_have_no_such_view(routed: specialize.Routed) -> None:
    assert "domain" not in set(specialize.every_information(routed)["view"])
    alone = specialize.collect(Planted(), {"text": TEXTS})
    assert "domain" not in set(specialize.by_class(alone)["view"])


def test_a_run_has_its_phases_as_domains() -> None:
    assert specialize.own_texts(Divided(), most=4) == {"facts": ["a a a"] * 2, "chat": ["c c c"] * 2}


def test_tables_are_written_as_parquet_and_csv_with_heat_maps(routed: specialize.Routed, tmp_path: Path) -> None:
    settled = specialize.saturation([(1, Planted()), (2, Planted())], TEXTS)
    paths = specialize.save(routed, tmp_path, {"saturation": settled})
    names = {"by_class.parquet", "information.csv", "lift.png", "coactivation.png", "saturation.csv", "saturation.png"}
    assert {path.name for path in paths} >= names
    for path in tmp_path.glob("*.parquet"):
        again = pl.read_csv(path.with_suffix(".csv"))
        assert pl.read_parquet(path).shape == again.shape


def test_texts_come_from_files_and_what_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.txt")]
    assert specialize.texts_of(files) == {"a.json": ["one", "two"], "b.txt": ["three", "four"]}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "b.txt").write_text("five")
    assert list(specialize.texts_of([files[1], str(tmp_path / "c" / "b.txt")])) == [
        files[1],
        str(tmp_path / "c" / "b.txt"),
    ]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"no texts in .*empty\.txt"):
        specialize.texts_of([str(tmp_path / "empty.txt")])
    (tmp_path / "c.json").write_text('{"a": 1}')
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"d\.txt is no UTF-8 text"):
        specialize.texts_of([str(tmp_path / "d.txt")])
    with pytest.raises(ValueError, match="neither a JSON list"):
        specialize.texts_of([str(tmp_path / "c.json")])


def test_a_dense_model_is_refused() -> None:
    class Dense:
        def route(self, text: str) -> dict[str, Any]:
            return {"tokens": text.split(), "layers": []}

    with pytest.raises(ValueError, match="has no experts"):
        specialize.collect(Dense(), ["a b"])
