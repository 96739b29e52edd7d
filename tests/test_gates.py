"""Each gate passes a healthy run and fails the run that misses one criterion, by that criterion."""

from pathlib import Path
from typing import Any

import pytest

from moe_lab import gates
from runs import DENSE, Layer, Story, healthy, write


def failed(folder: Path, **parent: Any) -> set[str]:
    verdict = gates.judge(folder, **parent)
    assert verdict.judged
    assert verdict.passed == all(criterion.passed for criterion in verdict.criteria)
    return {criterion.name for criterion in verdict.criteria if not criterion.passed}


def test_a_healthy_run_passes_stage_1(tmp_path: Path) -> None:
    verdict = gates.judge(write(tmp_path / "run", Story()))
    assert verdict.gate == "stage1"
    assert verdict.passed
    assert verdict.word == "passed"


def test_a_healthy_dense_run_passes_the_baseline_gate(tmp_path: Path) -> None:
    verdict = gates.judge(write(tmp_path / "run", Story(router=DENSE)))
    assert verdict.gate == "baseline"
    assert verdict.passed


def test_the_top_2_control_is_not_asked_for_spread(tmp_path: Path) -> None:
    verdict = gates.judge(write(tmp_path / "run", Story(router='kind = "top_k"\nk = 2', results={"experts_std": 0.0})))
    assert verdict.gate == "control"
    assert verdict.passed


MISSES = {
    "completes": Story(status="stopped"),
    "loss": Story(loss=0.41),
    "stays finite": Story(rows=({"step": 400, "kind": "train", "train/loss": None, "nonfinite": ["train/loss"]},)),
    "experts per token": Story(results={"experts_per_token": 1.49}),
    "L0": Story(results={"l0": 15.1}),
    "recites": Story(results={"recite": 56}),
}


@pytest.mark.parametrize("name", MISSES)
def test_a_run_that_misses_one_criterion_fails_by_it(tmp_path: Path, name: str) -> None:
    assert failed(write(tmp_path / "run", MISSES[name])) == {name}


@pytest.mark.parametrize("name", ["completes", "loss", "stays finite", "recites"])
def test_the_baseline_gate_fails_by_the_same_criteria(tmp_path: Path, name: str) -> None:
    assert failed(write(tmp_path / "run", MISSES[name].but(router=DENSE))) == {name}


def test_bounds_are_inclusive(tmp_path: Path) -> None:
    edge = {"experts_per_token": 2.0, "l0": 15.0, "recite": 57}
    assert failed(write(tmp_path / "run", Story(loss=0.40, results=edge))) == set()


def test_fewer_epochs_do_not_complete(tmp_path: Path) -> None:
    assert failed(write(tmp_path / "killed", Story(trained=99))) == {"completes"}
    assert failed(write(tmp_path / "short", Story(epochs=50, trained=50))) == {"completes"}


def dead_uniform(block: int, progress: float) -> Layer:
    """Four scores that never differ: p = 0.4 takes the first two experts for every token, a mean of exactly 2."""
    return {
        "experts_per_token": 2.0,
        "experts_std": 0.0,
        "router_entropy": 1.3862943611198906,
        "load": [0.5, 0.5, 0.0, 0.0],
        "information": 0.0,
    }


def test_a_dead_uniform_router_fails_although_its_mean_is_in_the_band(tmp_path: Path) -> None:
    story = Story(layer=dead_uniform, results={"experts_per_token": 2.0, "experts_std": 0.0})
    missed = failed(write(tmp_path / "run", story))
    assert missed == {"spread of experts per token", "every expert used", "experts informative", "router learns"}


def nearly_uniform(block: int, progress: float) -> Layer:
    """Noise decides between equal experts: the loads are fair, but nothing is learned about the token."""
    return dead_uniform(block, progress) | {"load": [0.25] * 4, "information": 0.001}


def test_a_dead_router_with_fair_loads_fails(tmp_path: Path) -> None:
    story = Story(layer=nearly_uniform, results={"experts_per_token": 2.0, "experts_std": 0.02})
    missed = failed(write(tmp_path / "run", story))
    assert missed == {"spread of experts per token", "experts informative", "router learns"}


def collapsed(block: int, progress: float) -> Layer:
    """The router ends with all tokens on one expert."""
    load = [1 - 0.75 * (1 - progress), *([0.25 * (1 - progress)] * 3)]
    return {
        "experts_per_token": 2.0 - progress,
        "experts_std": 0.5 * (1 - progress),
        "router_entropy": 1.38 * (1 - progress),
        "load": load,
        "information": 0.0,
    }


def test_a_collapsed_router_fails(tmp_path: Path) -> None:
    story = Story(layer=collapsed, results={"experts_per_token": 1.0, "experts_std": 0.0})
    missed = failed(write(tmp_path / "run", story))
    assert missed == {"experts per token", "spread of experts per token", "every expert used", "experts informative"}


def test_one_unused_expert_in_one_layer_fails_and_is_named(tmp_path: Path) -> None:
    def story(block: int, progress: float) -> Layer:
        load = [0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.0]
        return healthy(block, progress) | ({"load": load} if block == 1 else {})

    folder = write(tmp_path / "run", Story(layer=story))
    assert failed(folder) == {"every expert used"}
    missed = next(criterion for criterion in gates.judge(folder).criteria if not criterion.passed)
    assert "expert 7 of layer 1" in missed.why


def test_experts_that_know_nothing_in_one_layer_fail(tmp_path: Path) -> None:
    def story(block: int, progress: float) -> Layer:
        return healthy(block, progress) | ({"information": 0.01} if block == 2 else {})

    assert failed(write(tmp_path / "run", Story(layer=story))) == {"experts informative"}


def test_a_frozen_router_fails(tmp_path: Path) -> None:
    still = Story(layer=lambda block, progress: healthy(block, 1.0))
    assert failed(write(tmp_path / "still", still)) == {"router learns"}
    frozen = Story(router='kind = "top_p"\np = 0.4\nfrozen = true')
    assert failed(write(tmp_path / "frozen", frozen)) == {"router learns"}


def test_what_was_not_measured_fails(tmp_path: Path) -> None:
    unknown = dict.fromkeys(["loss", "l0", "recite", "experts_per_token", "experts_std"])
    missed = failed(write(tmp_path / "run", Story(results=unknown)))
    assert missed == {"loss", "L0", "recites", "experts per token", "spread of experts per token"}


def test_the_parents_loss_is_kept_within_the_tolerance(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent", Story(router=DENSE, loss=0.2))
    assert failed(write(tmp_path / "less", Story(loss=0.2129)), parent=parent) == set()
    worse = write(tmp_path / "more", Story(loss=0.2131))
    assert failed(worse, parent=parent) == {"no worse than parent"}
    assert failed(worse) == set()


def test_a_mixture_of_depths_is_judged_by_its_causal_loss(tmp_path: Path) -> None:
    """Its training steps take the best tokens of the whole document, so that their loss flatters."""
    parent = write(tmp_path / "parent", Story(loss=0.3, results={"train_loss": 0.2}))
    assert not gates.looks_ahead({"model": {"depths": {"capacity": 0.5, "choice": "causal"}}})
    assert gates.looks_ahead({"model": {"router": {"kind": "expert_choice"}}})
    good = Story(capacity=0.5, loss=0.5, results={"train_loss": 0.21})
    assert failed(write(tmp_path / "good", good), parent=parent) == set()
    flattered = write(tmp_path / "bad", Story(capacity=0.5, loss=0.1, results={"train_loss": 0.42}))
    assert failed(flattered, parent=parent) == {"loss", gates.PARENT}
    told = {each.name: each.why for each in gates.judge(flattered, parent).criteria}
    assert "after the last update, causal" in told["loss"]
    assert "causal loss after the last update (training steps look ahead) minus" in told[gates.PARENT]
    assert "last chat epoch" in gates.judge(parent).criteria[2].why


def test_the_parent_that_the_run_names_is_compared(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent", Story(router=DENSE, loss=0.1))
    assert parent.name == "parent"
    assert failed(write(tmp_path / "run", Story(parent="parent"))) == {"no worse than parent"}
    assert failed(write(tmp_path / "orphan", Story(parent="gone"))) == set()


UNFINISHED = {
    "stopped": r"is stopped, not completed: go on with it first \(python -m moe_lab resume .*parent\)",
    "running": r"is running, not completed: .*resume",
    "killed": r"is killed, not completed: .*resume",
    "failed": r"is failed: .*\(python -m moe_lab rerun .*parent --set KEY=VALUE\)",
    "diverged": r"is diverged: .*rerun .* --set KEY=VALUE",
}


@pytest.mark.parametrize("status", UNFINISHED)
def test_an_unfinished_parent_is_refused_although_its_facts_phase_left_a_loss(tmp_path: Path, status: str) -> None:
    parent = write(tmp_path / "parent", Story(router=DENSE, status=status, trained=40, loss=0.1))
    run = write(tmp_path / "run", Story(parent="parent"))
    with pytest.raises(ValueError, match=f"the parent '.*parent' {UNFINISHED[status]}"):
        gates.judge(run, parent)
    assert failed(run) == set()  # nor is it taken where run.json alone names it


def test_a_parent_without_a_loss_is_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent", Story(router=DENSE, results={"loss": None}))
    with pytest.raises(ValueError, match="measured no loss"):
        gates.judge(write(tmp_path / "run", Story()), parent)


def test_a_parent_with_other_data_is_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent", Story(router=DENSE, data="another hash"))
    with pytest.raises(ValueError, match="other data"):
        gates.judge(write(tmp_path / "run", Story()), parent)


def test_variants_beside_the_documents_change_neither_their_loss_nor_the_protocol(tmp_path: Path) -> None:
    """An epoch with them is up to twice as long, so that half as many are as much training."""
    parent = write(tmp_path / "parent", Story())
    varied = Story(copies=1, epochs=50, trained=50)
    assert failed(write(tmp_path / "run", varied), parent=parent) == set()
    assert failed(write(tmp_path / "short", varied.but(epochs=49, trained=49)), parent=parent) == {"completes"}
    assert failed(write(tmp_path / "cut", varied.but(trained=49)), parent=parent) == {"completes"}
    assert "50 epochs a phase" in gates.judge(tmp_path / "run").criteria[0].bound


def test_a_run_on_a_text_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", Story())
    (run / "run.toml").write_text('[data]\ntext = "book.txt"\n')
    with pytest.raises(ValueError, match="trains on a text"):
        gates.judge(run)


def test_quick_runs_are_not_judged(tmp_path: Path) -> None:
    verdict = gates.judge(write(tmp_path / "run", Story(quick=True, epochs=10, trained=10)))
    assert not verdict.judged
    assert verdict.word == "not judged (quick)"
    assert verdict.as_dict()["passed"] is None


def test_the_paired_criterion_takes_the_mean_over_seeds() -> None:
    assert gates.paired([(0.22, 0.2), (0.2, 0.2)]).passed
    assert not gates.paired([(0.22, 0.2), (0.21, 0.2)]).passed
    assert not gates.paired([]).passed
    assert not gates.paired([(0.2, 0.2), (None, 0.2)]).passed


def test_the_first_and_the_last_word_need_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gates.judge(tmp_path / "nothing")


def test_an_option_is_judged_by_its_parent_and_not_by_its_routing(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent", Story())
    many = Story(results={"experts_per_token": 3.0, "experts_std": 0.0}, loss=0.45)
    assert failed(write(tmp_path / "many", many), parent=parent, gate=gates.OPTION) == {gates.PARENT}
    assert not failed(write(tmp_path / "same", many.but(loss=0.22)), parent=parent, gate=gates.OPTION)
    assert failed(write(tmp_path / "mute", Story(results={"recite": 0})), gate=gates.OPTION) == {"recites"}


def on_text(folder: Path, eval_loss: float, **changes: Any) -> Path:
    return write(folder, Story(text=True, results={"eval_loss": eval_loss}, **changes))


def test_an_option_on_a_text_is_judged_by_its_held_out_loss(tmp_path: Path) -> None:
    parent = on_text(tmp_path / "parent", 1.70)
    assert not failed(on_text(tmp_path / "good", 1.71), parent=parent, gate=gates.OPTION)
    assert failed(on_text(tmp_path / "short", 1.70, trained=99), parent=parent, gate=gates.OPTION) == {"completes"}
    assert failed(on_text(tmp_path / "bad", 2.1), parent=parent, gate=gates.OPTION) == {gates.PARENT, "coherent"}
    with pytest.raises(gates.NoGateError):
        gates.judge(parent)
