"""Comparisons on hand-made runs: A against A shows nothing, a planted difference is found, and races are timed."""

import json
from math import inf
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from moe_lab import comparison, frames
from moe_lab.statistics import Interval, bootstrap, noise_floor, student_t
from runs import DENSE, Story, write


def family(folder: Path, name: str, losses: list[float], router: str = DENSE, **changes: object) -> list[Path]:
    """One run a seed, in a folder of the arm."""
    stories = [
        Story(router, seed, f"{name}-{seed}", epochs=6, trained=6, loss=loss) for seed, loss in enumerate(losses)
    ]
    return [write(folder / name / story.name, story.but(**changes)) for story in stories]


TOP_P = 'kind = "top_p"\np = 0.4\nnum_experts = 8'


def loss_of(found: comparison.Comparison) -> comparison.Difference:
    return next(each for each in found.differences if each.measure.key == "loss")


@pytest.mark.parametrize(("quantile", "freedom", "known"), [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776),
                                                           (0.95, 3, 2.353), (0.975, 30, 2.042)])  # fmt: skip
def test_the_quantiles_of_student_are_those_of_the_tables(quantile: float, freedom: int, known: float) -> None:
    assert student_t(quantile, freedom) == pytest.approx(known, abs=2e-3)
    assert student_t(1 - quantile, freedom) == pytest.approx(-known, abs=2e-3)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(1)
    for n, least in ((4, 0.85), (10, 0.92)):
        found = [bootstrap(draw.normal(0.3, 1.0, n).tolist()) for _ in range(150)]
        assert np.mean([each.low <= 0.3 <= each.high for each in found]) >= least
    with pytest.raises(ValueError, match="at least two"):
        bootstrap([1.0])


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_arms_that_are_the_same_get_a_verdict_in_at_most_one_case_of_twenty(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    wrong, cases = 0, 200
    for _ in range(cases):
        a, b = draw.normal(0.2, 0.01, (2, seeds)).tolist()
        interval = bootstrap([y - x for x, y in zip(a, b, strict=True)])
        wrong += comparison.verdict(interval, noise_floor([a, b], seeds), -1) != "no difference shown"
    assert wrong / cases <= 0.05 + 0.03


def test_a_verdict_needs_an_interval_off_zero_and_a_mean_above_the_noise() -> None:
    lower = Interval(-0.1, -0.12, -0.08)
    assert comparison.verdict(lower, 0.01, -1) == "better"
    assert comparison.verdict(lower, 0.01, 1) == "worse"
    assert comparison.verdict(lower, 0.01, 0) == "less"
    assert comparison.verdict(lower, 0.11, -1) == "no difference shown"
    assert comparison.verdict(lower, None, -1) == "no difference shown"
    assert comparison.verdict(Interval(-0.1, -0.2, 0.01), 0.01, -1) == "no difference shown"


def test_a_planted_difference_is_found_and_the_changed_keys_are_named(tmp_path: Path) -> None:
    control = family(tmp_path, "control", [0.210, 0.212, 0.209])
    arm = family(tmp_path, "arm", [0.190, 0.191, 0.188], TOP_P)
    (found,) = comparison.compare([*control, *arm])
    assert (found.control, found.arm, found.seeds) == ("dense", "top_p 0.4", (0, 1, 2))
    loss = loss_of(found)
    assert loss.interval.mean == pytest.approx(-0.062 / 3)
    assert loss.verdict == "better"
    changed = {key: (old, new) for key, old, new in found.changes}
    assert changed["model.router.kind"] == ("dense", "top_p")
    assert "seed" not in changed


def test_inside_the_noise_of_the_seeds_there_is_no_verdict(tmp_path: Path) -> None:
    control = family(tmp_path, "control", [0.210, 0.250, 0.190])
    arm = family(tmp_path, "arm", [0.209, 0.248, 0.189], TOP_P)  # every pair better, by less than seeds differ
    (found,) = comparison.compare([*control, *arm])
    loss = loss_of(found)
    assert loss.interval.high < 0
    assert loss.verdict == "no difference shown"
    console = Console(record=True, width=140)
    comparison.render(found, console)
    assert "verdict on the loss: no difference shown" in console.export_text()


def test_one_lucky_epoch_makes_no_verdict(tmp_path: Path) -> None:
    """Half an hour of training may end on a low epoch: the verdict stands on the mean of the last ten."""
    losses = [0.210, 0.212, 0.209]
    stories = [Story(TOP_P, seed, f"s{seed}", epochs=30, trained=30, loss=loss) for seed, loss in enumerate(losses)]
    control = [write(tmp_path / "control" / story.name, story.but(router=DENSE)) for story in stories]
    arm = [write(tmp_path / "arm" / story.name, story) for story in stories]
    for run in arm:
        stream = (run / "metrics.jsonl").read_text().splitlines()
        last = max(place for place, line in enumerate(stream) if "epoch/loss" in line)
        stream[last] = json.dumps(json.loads(stream[last]) | {"epoch/loss": 0.18})
        (run / "metrics.jsonl").write_text("\n".join(stream) + "\n")
        record = json.loads((run / "run.json").read_text())
        record["results"]["loss"] = 0.18
        (run / "run.json").write_text(json.dumps(record))
    (found,) = comparison.compare([*control, *arm])
    assert {each.measure.key: each.verdict for each in found.differences}["loss"] == "better"
    console = Console(record=True, width=140)
    comparison.render(found, console)
    assert "verdict on the loss: no difference shown" in console.export_text()


def test_a_race_counts_what_each_needs_for_the_controls_loss(tmp_path: Path) -> None:
    control = family(tmp_path, "control", [0.30, 0.30])
    arm = family(tmp_path, "arm", [0.10, 0.10], TOP_P)  # an exponential course: it meets 0.30 before its end
    races = {race.cost: race for race in comparison.compare([*control, *arm])[0].speedups}
    share = np.log(5 / 0.30) / np.log(5 / 0.10)  # of the course from epoch 1 to epoch 6
    tokens = races["tokens"].ratio
    assert tokens is not None
    assert tokens.mean == pytest.approx(6 / (1 + 5 * share), rel=1e-6)
    back = {race.cost: race for race in comparison.compare([*arm, *control])[0].speedups}
    assert back["tokens"].ratio is None
    assert back["tokens"].reached == 0


def test_flops_follow_the_experts_that_were_used() -> None:
    config = {"model": {"hidden_size": 8, "router": {"expert_hidden_size": 4}}}
    results = {"active_params": 1000, "experts_per_token": 2.0}
    rows = [
        {"kind": "train", "step": step, "tokens": 10 * step, "moe/experts_per_token": k, "moe/layer_00/load": [1.0]}
        for step, k in ((1, 3.0), (2, 2.0))
    ]
    frame = frames.frame_of(rows)
    expert = 3 * 8 * 4
    spent = comparison.training_flops(frame, config, results)
    assert spent is not None
    assert spent.to_list() == [60.0 * (1000 + expert), 60.0 * (1000 + expert) + 60.0 * 1000]
    told = frame.with_columns(pl.Series("flops", [5.0, 9.0]))
    assert comparison.training_flops(told, config, results).to_list() == [5.0, 9.0]  # type: ignore[union-attr]
    assert comparison.training_flops(frame, config, {}) is None


def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path: Path) -> None:
    control = family(tmp_path, "control", [0.2, 0.2])
    with pytest.raises(ValueError, match="an interval needs two"):
        comparison.compare([*control, *family(tmp_path, "one", [0.2], TOP_P)])
    with pytest.raises(ValueError, match="same configuration up to the seed"):
        comparison.compare(control)
    with pytest.raises(ValueError, match="other data"):
        comparison.compare([*control, *family(tmp_path, "data", [0.2, 0.2], TOP_P, data="others")])
    with pytest.raises(ValueError, match="--quick"):
        comparison.compare([*control, *family(tmp_path, "quick", [0.2, 0.2], TOP_P, quick=True)])
    with pytest.raises(ValueError, match="are the same run"):
        comparison.compare([*control, *family(tmp_path, "again", [0.2, 0.2])])
    with pytest.raises(ValueError, match=r"the run '.*' is stopped, not completed: .*resume"):
        comparison.compare([*control, *family(tmp_path, "open", [0.2], status="stopped")])
    with pytest.raises(ValueError, match=r"the run '.*' is diverged: .*rerun"):
        comparison.compare([*control, *family(tmp_path, "bad", [0.2], status="diverged")])


def test_no_loss_that_looks_ahead_is_compared(tmp_path: Path) -> None:
    """A mixture of depths is compared by its causal loss, and runs in no race; FLOPs per token are shown."""
    control = family(tmp_path, "control", [0.21, 0.22, 0.21], TOP_P)
    causal = {"train_loss": 0.4, "flops_per_token": 2.5e6, "eval_loss": None}
    arm = family(tmp_path, "arm", [0.1, 0.1, 0.1], TOP_P, capacity=0.5, results=causal)
    (found,) = comparison.compare([*control, *arm])
    verdicts = {each.measure.key: each.verdict for each in found.differences}
    assert not {"loss", "epochs_to_target"} & set(verdicts)
    assert (verdicts["train_loss"], verdicts["flops_per_token"]) == ("worse", "better")
    assert found.speedups == ()
    console = Console(record=True, width=140)
    comparison.render(found, console)
    assert "verdict on the loss: worse" in console.export_text()


def test_variants_of_the_documents_are_no_other_data(tmp_path: Path) -> None:
    control, arm = family(tmp_path, "control", [0.2, 0.2], TOP_P), family(tmp_path, "arm", [0.2, 0.2], TOP_P, copies=1)
    assert ("data.augment.copies", 0, 1) in comparison.compare([*control, *arm])[0].changes


def test_what_is_shown_is_valid_json_too(tmp_path: Path) -> None:
    runs = [*family(tmp_path, "control", [0.21, 0.22]), *family(tmp_path, "arm", [0.2, 0.2], TOP_P)]
    told = json.loads(json.dumps(comparison.as_dict(comparison.compare(runs)[0]), allow_nan=False))
    assert told["arm"] == "top_p 0.4"
    assert {each["measure"] for each in told["differences"]} >= {
        "loss",
        "recited",
        "paraphrase_loss",
        "active_params",
        "flops",
    }


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0123456, "0.01235"), (123456.0, "123,456"), (3e12, "3.00e+12")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert comparison.number(value) == text
    assert comparison.number(inf) == "inf"
