"""moe_lab against the PyTorch oracle: same weights, same batch, so the same logits, losses, routing and gradients.

The second half checks the oracle by itself: finite differences, published values and limits with a known answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle_case import (
    ALL_LOSSES,
    ENGINES,
    LOSSES,
    MIXTURES,
    POSITIONS,
    ROUTERS,
    Array,
    Case,
    difference,
    expert_sets,
    make_case,
    parameter_shapes,
    random_weights,
    run_moe_lab,
    train_on_text,
    trained_weights,
)

pytest.importorskip("torch", reason="the oracle needs torch: pip install torch==2.11.0")
import torch

import oracle

pytestmark = pytest.mark.torch

TEXT = "the cat sat on the mat. a dog ran to the log. the cat ran. a dog sat on the cat. " * 12
NEAR_TIE = 1e-3  # a lead of one token over another below which decoding in f32 may differ
DOCUMENT = [3, 7, 1, 9, 4, 4, 18, 2, 7, 3, 11, 0]
FEW_TOKENS = [[5, 16], [2, 13, 17]]


def evaluate(case: Case, weights: Mapping[str, Array]) -> tuple[dict[str, torch.Tensor], oracle.Outcome]:
    tensors = oracle.as_tensors(weights)
    return tensors, oracle.evaluate(tensors, case.model, case.losses, case.documents)


def solve(case: Case) -> tuple[dict[str, Array], oracle.Outcome, dict[str, torch.Tensor]]:
    """Weights of the first seed that keeps its distance, the oracle's outcome and its gradients."""
    for seed in range(300):
        weights = random_weights(case, seed)
        with torch.no_grad():
            safe = evaluate(case, weights)[1].margins.safe()
        if not safe:
            continue
        tensors, outcome = evaluate(case, weights)
        return weights, outcome, oracle.gradients(outcome, tensors)
    raise AssertionError(f"{case.name}: every seed comes too near to a jump")


def standard_cases() -> Iterator[Case]:
    """Every router with every position, heads, groups, windows and tying in turn; then heads x groups x window."""
    heads, groups = itertools.cycle(["shared2", "plain", "shared1", "shared2", "routed"]), itertools.cycle((2, 6, 1, 3))
    windows, tied = itertools.cycle((None, 3, None, 5, None, 1)), itertools.cycle((False, False, True))
    for router, position in itertools.product(ROUTERS, POSITIONS):
        yield make_case(router, position, next(heads), next(groups), next(windows), next(tied))
    for mixture, kv, window in itertools.product(MIXTURES, (1, 2, 6), (None, 3)):
        yield make_case("top_p", "cope", mixture, kv, window)
    yield make_case("top_k", documents=FEW_TOKENS, k=1)  # experts without tokens
    yield make_case("top_k_raw", documents=FEW_TOKENS, k=1)
    yield make_case("top_p", "rope", documents=FEW_TOKENS, p=0.05)
    yield make_case("top_p", p=1.0)  # every expert
    yield make_case("expert_choice", k=5)
    yield make_case("expert_choice", shared=1)
    yield make_case("top_p", shared=3)


CASES = {f"{i:02d}-{case.name}": case for i, case in enumerate(standard_cases())}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Arrays this small run ten times slower on several threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def solved(name: str) -> tuple[dict[str, Array], oracle.Outcome, dict[str, torch.Tensor]]:
    return solve(CASES[name])


def disagreements(
    answer: Mapping[str, Any],
    weights: Mapping[str, Array],
    outcome: oracle.Outcome,
    grads: Mapping[str, torch.Tensor],
    bar: float,
) -> list[str]:
    """One line for everything in which moe_lab's answer leaves the oracle's."""
    wrong = []

    def compare(what: str, ours: Any, theirs: Any) -> None:
        if (off := difference(ours, theirs)) > bar:
            wrong.append(f"{what}: off by {off:.3g}, bar {bar:g}")

    for what, names in (("weights", answer["weights"]), ("gradients", answer["gradients"])):
        if set(names) != set(weights):
            wrong.append(f"{what}: names differ in {sorted(set(names) ^ set(weights))}")
    if wrong:
        return wrong
    for name, value in weights.items():
        compare(f"weights {name}", answer["weights"][name], value)
    compare("logits", answer["logits"], torch.cat(outcome.logits).detach().numpy())
    compare("cross_entropy", answer["cross_entropy"], outcome.cross_entropy.item())
    for name in LOSSES:  # a loss that the model lacks is absent, None or 0
        theirs = outcome.losses[name].item() if name in outcome.losses else 0.0
        compare(f"losses {name}", answer["losses"].get(name) or 0.0, theirs)
    compare("total", answer["total"], outcome.total.item())
    if expert_sets(answer["experts"]) != [[sorted(token) for token in layer] for layer in outcome.experts]:
        wrong.append("experts: other experts were chosen")
    for name, grad in grads.items():
        compare(f"gradient {name}", answer["gradients"][name], grad.numpy())
    return wrong


# ------------------------------------------------------------------------------------------------- moe_lab = the oracle


@pytest.mark.parametrize(("engine", "dtype", "bar"), ENGINES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("name", CASES)
def test_moe_lab_agrees(name: str, engine: str, dtype: str, bar: float, tmp_path: Path) -> None:
    weights, outcome, grads = solved(name)
    answer = run_moe_lab(CASES[name], weights, engine, dtype, tmp_path)
    assert not disagreements(answer, weights, outcome, grads, bar)


@pytest.mark.full
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_moe_lab_agrees_everywhere(router: str, position: str, tmp_path: Path) -> None:
    for heads, kv, window, tied in itertools.product(MIXTURES, (1, 2, 6), (None, 4), (False, True)):
        case = make_case(router, position, heads, kv, window, tied)
        weights, outcome, grads = solve(case)
        for engine, dtype, bar in ENGINES:
            answer = run_moe_lab(case, weights, engine, dtype, tmp_path)
            assert not disagreements(answer, weights, outcome, grads, bar), f"{case.name} {engine} {dtype}"


@pytest.mark.parametrize("name", ["dense", "top_p", "expert_choice", "top_k_shared"])
def test_moe_lab_agrees_on_its_own_initialisation(name: str, tmp_path: Path) -> None:
    case = make_case(name, heads="shared2")
    shapes = parameter_shapes(case.model, case.vocab_size)
    for seed in range(30):
        answer = run_moe_lab(case, None, "cpu", "f64", tmp_path, seed)
        weights = answer["weights"]
        assert {key: value.shape for key, value in weights.items()} == shapes
        tensors, outcome = evaluate(case, weights)
        if outcome.margins.safe():
            assert not disagreements(answer, weights, outcome, oracle.gradients(outcome, tensors), 1e-9)
            return
    pytest.fail("every seed comes too near to a jump")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("router", ["dense", "top_p", "top_k"])
def test_decoding_agrees(router: str, position: str, window: int | None, tmp_path: Path) -> None:
    """A model out of its run directory: logits of a text, and greedy text with and without a cache."""
    case = make_case(router, position, window=window)
    model = train_on_text(case, TEXT, tmp_path)
    weights = oracle.as_tensors(trained_weights(tmp_path))
    letters = sorted(set(TEXT))  # the ids of a character tokenizer
    compared = 0
    for prompt in ("the c", "a dog", "mat. ", "ran", "o"):
        ids = [letters.index(letter) for letter in prompt]
        with torch.no_grad():
            logits = oracle.forward(weights, case.model, [torch.tensor(ids)])[0][0]
        assert difference(model.logits(prompt), logits.numpy()) < 1e-4
        expected, lead = oracle.generate_greedy(weights, case.model, ids, 11)  # within the 16 learned positions
        if lead > NEAR_TIE:
            compared += 1
            for cache in (True, False):
                text = model.generate(prompt, max_tokens=11, temperature=0.0, cache=cache)
                assert text == "".join(letters[token] for token in expected)
    assert compared >= 2  # not all of them ties


# ------------------------------------------------------------------------------------------------- the oracle by itself


@pytest.mark.parametrize("name", [*CASES][::4])
def test_gradients_by_central_differences(name: str) -> None:
    """Three entries of every parameter; routing sets and shares of tokens do not move under so small a step."""
    case = CASES[name]
    weights, _, grads = solved(name)
    rng = np.random.default_rng(1)
    step = 1e-5
    for key, grad in grads.items():
        analytic, numeric = [], []
        for flat in rng.choice(grad.numel(), size=3, replace=False):
            index = np.unravel_index(flat, tuple(grad.shape))
            totals = []
            for sign in (1, -1):
                moved = {k: np.asarray(v, dtype=np.float64) for k, v in weights.items()}
                moved[key] = moved[key].copy()
                moved[key][index] += sign * step
                with torch.no_grad():
                    totals.append(evaluate(case, moved)[1].total.item())
            analytic.append(grad[index].item())
            numeric.append((totals[0] - totals[1]) / (2 * step))
        assert difference(analytic, numeric) < 1e-6, key


def test_every_parameter_has_a_gradient() -> None:
    """Nothing is cut off. A window of one key leaves no choice to queries and keys, so it is not among these."""
    for router, position in itertools.product(ROUTERS, POSITIONS):
        _, outcome, grads = solve(make_case(router, position))
        assert math.isfinite(outcome.total.item())
        assert [name for name, grad in grads.items() if not grad.abs().max() > 1e-4] == []


def test_experts_without_tokens_get_no_gradient() -> None:
    case = make_case("top_k", documents=FEW_TOKENS, k=1)
    _, outcome, grads = solve(case)
    for layer, tokens in enumerate(outcome.experts):
        unused = sorted(set(range(5)) - set().union(*tokens))
        assert unused
        assert not grads[f"model.layers.{layer}.mlp.experts.gate_up_proj"][unused].any()
        assert not grads[f"model.layers.{layer}.mlp.experts.down_proj"][unused].any()


def logits_of(case: Case, weights: Mapping[str, Array], document: list[int]) -> torch.Tensor:
    """[T, V] of one sequence of inputs."""
    with torch.no_grad():
        return oracle.forward(oracle.as_tensors(weights), case.model, [torch.tensor(document)])[0][0]


def test_cope_with_a_zero_table_is_no_position() -> None:
    with_table, without = make_case("top_p", "cope"), make_case("top_p", "none")
    weights = random_weights(with_table, 0)
    zeroed = {k: np.zeros_like(v) if k.endswith("cope.weight") else v for k, v in weights.items()}
    plain = {k: v for k, v in weights.items() if not k.endswith("cope.weight")}
    assert torch.equal(logits_of(with_table, zeroed, DOCUMENT), logits_of(without, plain, DOCUMENT))
    assert not torch.allclose(logits_of(with_table, weights, DOCUMENT), logits_of(without, plain, DOCUMENT))


def test_cope_positions_count_gates() -> None:
    """A constant logit gives (i - j + 1) sigmoid(u); a window leaves the positions inside it as they are."""
    i, j = torch.arange(6)[:, None], torch.arange(6)[None, :]
    u = torch.full((1, 6, 6), 0.7, dtype=torch.float64)
    seen = oracle.visible(6, None)
    expected = (i - j + 1) * torch.sigmoid(u)
    torch.testing.assert_close(oracle.cope_positions(u, seen)[0][seen], expected[0][seen], rtol=1e-14, atol=0)
    narrow = oracle.visible(6, 3)
    mixed = torch.randn(1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        oracle.cope_positions(mixed, narrow)[0][narrow], oracle.cope_positions(mixed, seen)[0][narrow]
    )


def test_cope_bias_interpolates_and_clamps() -> None:
    """Gates of 1/2 and a table whose row n holds n: the bias is the position itself, 2 at most."""
    u = torch.zeros(1, 6, 6, dtype=torch.float64)
    q = torch.ones(1, 6, 1, dtype=torch.float64)
    table = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    bias = oracle.cope_bias(q, u, oracle.visible(6, None), table, oracle.Margins())
    assert bias[0, 5].tolist() == [2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert bias[0, 0, 0].item() == 0.5


def test_rope_depends_on_distance_only() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, dtype=torch.float64, generator=rng).expand(1, 9, 8) for _ in range(2))
    products = (oracle.rotate(q) @ oracle.rotate(k).transpose(-1, -2))[0]
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.01
    torch.testing.assert_close(oracle.rotate(q).norm(dim=-1), q.norm(dim=-1))


def test_attention_is_that_of_torch() -> None:
    """Without positions and mixtures: torch's scaled dot product with grouped queries."""
    case = make_case("dense", "none", "plain", kv=2)
    w = oracle.as_tensors(random_weights(case, 0))
    x = torch.randn(9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prefix = "model.layers.0.self_attn."
    ours, _, _ = oracle.attention(x, w, prefix, case.model, oracle.Trace())
    q, k, v = ((x @ w[f"{prefix}{n}_proj.weight"].T).view(1, 9, -1, 4).transpose(1, 2) for n in "qkv")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1).reshape(9, 24) @ w[prefix + "o_proj.weight"].T)


@pytest.mark.parametrize(
    ("probs", "p", "chosen"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.4, {0}),
        ([0.5, 0.3, 0.15, 0.05], 0.5, {0, 1}),
        ([0.5, 0.3, 0.15, 0.05], 0.79, {0, 1}),
        ([0.05, 0.15, 0.5, 0.3], 0.79, {2, 3}),
        ([0.05, 0.15, 0.5, 0.3], 0.0, {2}),
        ([0.05, 0.15, 0.5, 0.3], 1.0, {0, 1, 2, 3}),
        ([0.125] * 8, 0.4, {0, 1, 2, 3}),
        ([0.25] * 4, 0.4, {0, 1}),
    ],
)
def test_top_p_counts(probs: list[float], p: float, chosen: set[int]) -> None:
    mask = oracle.top_p_mask(torch.tensor([probs], dtype=torch.float64), p)
    assert {int(e) for e in mask[0].nonzero()} == chosen


def test_ties_go_to_the_lowest_index() -> None:
    assert oracle.top_k_mask(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), 3)[0].tolist() == [True, True, True, False]


@pytest.mark.parametrize(("renormalize", "share"), [(False, 0.8), (True, 1.0)])
def test_combine_weights(renormalize: bool, share: float) -> None:
    logits = torch.tensor([[0.05, 0.15, 0.5, 0.3]], dtype=torch.float64).log()
    for kind, option in (("top_p", {"p": 0.6}), ("top_k", {"k": 2})):
        router = {"kind": kind, "num_experts": 4, "renormalize": renormalize, **option}
        weights, _ = oracle.route(logits, router, 0, oracle.Margins())
        expected = torch.tensor([[0, 0, 0.5, 0.3]], dtype=torch.float64) * share / 0.8
        torch.testing.assert_close(weights, expected)


def test_expert_choice_takes_columns() -> None:
    case = CASES[next(name for name in CASES if "expert_choice" in name)]
    _, outcome, _ = solve(case)
    lengths = [len(document) - 1 for document in case.documents]
    for layer in outcome.experts:
        start = 0
        for length in lengths:
            counts = [sum(e in token for token in layer[start : start + length]) for e in range(5)]
            assert counts == [min(length, math.ceil(2 * length / 5))] * 5
            start += length


def test_losses_have_published_values() -> None:
    first = torch.tensor([[True, False, False, False]]).expand(6, 4)
    uniform = torch.full((6, 4), 0.25, dtype=torch.float64)
    collapsed = torch.tensor([[0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).expand(6, 4)
    assert oracle.balance_loss(uniform, first).item() == pytest.approx(1.0, abs=1e-12)
    assert oracle.balance_loss(collapsed, first).item() == pytest.approx(3.88, abs=1e-12)
    level = torch.full((6, 4), 1.5, dtype=torch.float64)
    assert oracle.z_loss(level).item() == pytest.approx((1.5 + math.log(4)) ** 2, abs=1e-12)
    assert oracle.entropy_loss(level).item() == pytest.approx(math.log(4), abs=1e-12)


def test_total_weighs_documents_equally() -> None:
    case = make_case("top_p")
    weights = random_weights(case, 0)
    _, outcome = evaluate(case, weights)
    means = []
    for document, logits in zip(case.documents, outcome.logits, strict=True):
        log_probs = torch.log_softmax(logits, dim=-1)
        means.append(-sum(log_probs[t, target].item() for t, target in enumerate(document[1:])) / (len(document) - 1))
    assert outcome.cross_entropy.item() == pytest.approx(sum(means) / len(means), abs=1e-12)
    extra = sum(ALL_LOSSES[name] * value.item() for name, value in outcome.losses.items())
    assert set(outcome.losses) == set(LOSSES)
    assert outcome.total.item() == pytest.approx(outcome.cross_entropy.item() + extra, abs=1e-12)


def test_all_heads_active_and_zero_routers_is_plain_attention() -> None:
    mixture, plain = make_case("top_p", heads="shared2"), make_case("top_p", heads="plain")
    mixture.model["heads"] = {"shared": 2, "routed": 4, "active": 4}
    weights = random_weights(mixture, 0)
    zeroed = {k: np.zeros_like(v) if ".heads." in k else v for k, v in weights.items()}
    bare = {k: v for k, v in weights.items() if ".heads." not in k}
    assert torch.equal(logits_of(mixture, zeroed, DOCUMENT), logits_of(plain, bare, DOCUMENT))
    assert not torch.allclose(logits_of(mixture, weights, DOCUMENT), logits_of(plain, bare, DOCUMENT))


def test_copied_groups_are_full_attention() -> None:
    """Two key/value heads copied to six are the same model."""
    grouped, full = make_case("dense", kv=2), make_case("dense", kv=6)
    weights = random_weights(grouped, 0)
    copied = {
        k: np.repeat(v.reshape(2, 4, 24), 3, axis=0).reshape(24, 24) if "k_proj" in k or "v_proj" in k else v
        for k, v in weights.items()
    }
    torch.testing.assert_close(logits_of(grouped, weights, DOCUMENT), logits_of(full, copied, DOCUMENT))


def test_order_of_experts_does_not_matter() -> None:
    case = make_case("top_p")
    weights = random_weights(case, 0)
    order = [3, 0, 4, 1, 2]
    permuted = {k: v[order] if ".mlp." in k else v for k, v in weights.items()}
    torch.testing.assert_close(logits_of(case, weights, DOCUMENT), logits_of(case, permuted, DOCUMENT))


def test_shared_experts_alone_are_a_dense_layer() -> None:
    """Their sum is one SwiGLU of their hidden rows, with weight 1 for every token."""
    shared, dense = make_case("top_k_shared"), make_case("dense")
    weights = random_weights(shared, 0)
    weights |= {k: np.zeros_like(v) for k, v in weights.items() if ".experts.down_proj" in k}
    renamed = {k.replace("mlp.shared_experts.", "mlp."): v for k, v in weights.items()}
    torch.testing.assert_close(logits_of(shared, weights, DOCUMENT), logits_of(dense, renamed, DOCUMENT))


def test_silent_projections_leave_the_embedding() -> None:
    """W_O = W_down = 0 makes every block the identity."""
    case = make_case("top_k")
    weights = random_weights(case, 0)
    weights |= {k: np.zeros_like(v) for k, v in weights.items() if "o_proj" in k or "down_proj" in k}
    w = oracle.as_tensors(weights)
    x = oracle.rms_norm(w["model.embed_tokens.weight"][torch.tensor(DOCUMENT)], w["model.norm.weight"], 1e-6)
    assert torch.equal(logits_of(case, weights, DOCUMENT), x @ w["lm_head.weight"].T)


@pytest.mark.parametrize("router", ["dense", "top_p", "top_k", "expert_choice"])
@pytest.mark.parametrize("position", POSITIONS)
def test_no_token_sees_the_future(router: str, position: str) -> None:
    """Except under expert choice, whose training rule looks ahead: there the test shows that it would notice."""
    case = make_case(router, position)
    weights = random_weights(case, 0)
    before = logits_of(case, weights, DOCUMENT)
    unchanged = []
    for t in range(1, len(DOCUMENT)):
        after = logits_of(case, weights, [*DOCUMENT[:t], *((token + 1) % 20 for token in DOCUMENT[t:])])
        assert not torch.allclose(before[t], after[t])
        unchanged.append(torch.allclose(before[:t], after[:t], rtol=0, atol=1e-12))
    assert all(unchanged) == (router != "expert_choice")


def test_window_hides_older_tokens() -> None:
    """Two layers with a window of 3 reach 4 tokens back, no further."""
    case = make_case("top_p", window=3)
    weights = random_weights(case, 0)
    changed = logits_of(case, weights, [19, *DOCUMENT[1:]])
    moved = (changed - logits_of(case, weights, DOCUMENT)).abs().amax(-1) > 1e-12
    assert moved.tolist() == [True] * 5 + [False] * (len(DOCUMENT) - 5)


def test_documents_do_not_see_each_other() -> None:
    case = make_case("expert_choice")
    weights = random_weights(case, 0)
    _, outcome = evaluate(case, weights)
    for document, logits in zip(case.documents, outcome.logits, strict=True):
        torch.testing.assert_close(logits.detach(), logits_of(case, weights, document[:-1]), rtol=0, atol=1e-12)


def test_difference_notices() -> None:
    assert difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert difference([1.0, 2.1], [1.0, 2.0]) == pytest.approx(0.05)
    assert difference([1.0, math.nan], [1.0, 2.0]) == math.inf
    assert difference([1.0], [1.0, 2.0]) == math.inf
