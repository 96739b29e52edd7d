"""The model, its losses and its routing, stated once more in plain PyTorch, to be compared with moe_lab.

One document at a time, masks instead of windows and caches, every expert on every token, gradients by autograd: slow
and short. Formulas are those of the papers named at each function; shapes: T tokens of a document, M tokens of the
batch, d hidden size, H query heads, K key/value heads, D = d/H, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

Config = Mapping[str, Any]  # the [model] table of a run file
Weights = Mapping[str, Tensor]
ROPE_BASE = 10000.0
MAX_GAP = 1.0  # a margin where nothing was near a decision


@dataclass
class Margins:
    """How near the batch came to a place where routing or a gradient jumps; comparisons need some distance."""

    threshold: float = MAX_GAP  # |cumulative probability - p| of top-p
    selection: float = MAX_GAP  # score of the worst chosen minus the best rejected, experts and heads
    position: float = MAX_GAP  # distance of a CoPE position from an integer

    def safe(self) -> bool:
        """Whether both sides of a comparison are on the same side of every jump."""
        return self.threshold > 1e-3 and self.selection > 1e-4 and self.position > 1e-4


@dataclass
class Trace:
    """What the layers leave behind for the losses: one entry per sparse layer (routers) or per layer (heads)."""

    router_logits: list[Tensor] = field(default_factory=list)  # [M, E]
    experts: list[Tensor] = field(default_factory=list)  # [M, E] bool
    head_probs: list[Tensor] = field(default_factory=list)  # [M, routed]
    heads: list[Tensor] = field(default_factory=list)  # [M, routed] bool
    margins: Margins = field(default_factory=Margins)


@dataclass
class Outcome:
    """Everything moe_lab is compared with."""

    logits: list[Tensor]  # per document [T, V]
    cross_entropy: Tensor
    losses: dict[str, Tensor]  # unscaled means over layers; only those that the model has
    total: Tensor
    experts: list[list[set[int]]]  # per sparse layer, per token of the batch
    margins: Margins


# --------------------------------------------------------------------------------------------------------------- layers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w x / sqrt(mean x^2 + eps)."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W_down (silu(W_gate x) * W_up x), weights [out, in] (Shazeer 2020)."""
    a = x @ gate.T
    return (a * torch.sigmoid(a) * (x @ up.T)) @ down.T


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of x [heads, T, D] by position in the document; feature i turns with i + D/2 (Su 2021)."""
    length, width = x.shape[-2:]
    half = width // 2
    frequency = ROPE_BASE ** (-torch.arange(half, dtype=x.dtype) * 2 / width)
    angle = torch.arange(length, dtype=x.dtype)[:, None] * frequency[None, :]
    cos, sin = torch.cos(angle), torch.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def visible(length: int, window: int | None) -> Tensor:
    """[T, T] bool: query i sees keys i - window < j <= i."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


def cope_positions(u: Tensor, seen: Tensor) -> Tensor:
    """Unclamped contextual positions p_ij = sum of the gates of keys j..i, both included (Golovneva 2405.18719)."""
    gates = torch.sigmoid(u) * seen
    return gates.flip(-1).cumsum(-1).flip(-1)


def cope_bias(q: Tensor, u: Tensor, seen: Tensor, table: Tensor, margins: Margins) -> Tensor:
    """b_ij: q_i · table interpolated linearly at the position of key j, clamped to the last row P of the table."""
    last = table.shape[0] - 1
    raw = cope_positions(u, seen)
    position = raw.clamp(max=last)
    below = position.detach().floor().clamp(max=last - 1)
    share = position - below
    z = q @ table.T  # [H, T, P + 1]
    index = below.long()
    near = raw.detach()[(seen & (raw < last + 0.5))]
    margins.position = min(margins.position, float((near - near.round()).abs().min()))
    return (1 - share) * z.gather(-1, index) + share * z.gather(-1, index + 1)


def selection_gap(scores: Tensor, chosen: Tensor) -> float:
    """Smallest distance, over the rows, between the worst chosen and the best rejected score."""
    worst = scores.masked_fill(~chosen, math.inf).amin(-1)
    best = scores.masked_fill(chosen, -math.inf).amax(-1)
    return float((worst - best).detach().min())


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """bool like scores: the k largest of each row, the lowest index first among equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def head_gates(x: Tensor, w: Weights, prefix: str, heads: Config, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """Mixture of heads (Jin 2410.11842, with the scale factors of its code): gates [T, H], and of the routed heads
    their probabilities and the chosen ones. The shared heads come first."""
    shared, active = heads["shared"], heads["active"]
    routed_probs = softmax(x @ w[prefix + "heads.routed.weight"].T, dim=-1)
    chosen = top_k_mask(routed_probs.detach(), active)
    trace.margins.selection = min(trace.margins.selection, selection_gap(routed_probs, chosen))
    kept = routed_probs * chosen
    routed_gates = active * kept / kept.sum(-1, keepdim=True)
    if not shared:
        return routed_gates, routed_probs, chosen
    alpha = 2 * softmax(x @ w[prefix + "heads.split.weight"].T, dim=-1)
    shared_gates = shared * softmax(x @ w[prefix + "heads.shared.weight"].T, dim=-1)
    gates = torch.cat([alpha[:, :1] * shared_gates, alpha[:, 1:] * routed_gates], dim=-1)
    return gates, routed_probs, chosen


def attention(x: Tensor, w: Weights, prefix: str, config: Config, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention of one document, x [T, d] normed. Query head h uses key/value head h // (H/K)."""
    length, d = x.shape
    n_heads, n_kv = config["num_heads"], config["num_kv_heads"]
    width = d // n_heads

    def project(name: str, count: int) -> Tensor:
        return (x @ w[f"{prefix}{name}_proj.weight"].T).view(length, count, width).transpose(0, 1)

    q, k, v = project("q", n_heads), project("k", n_kv), project("v", n_kv)
    k, v = k.repeat_interleave(n_heads // n_kv, dim=0), v.repeat_interleave(n_heads // n_kv, dim=0)
    if config["position"]["kind"] == "rope":
        q, k = rotate(q), rotate(k)
    seen = visible(length, config.get("window"))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    if config["position"]["kind"] == "cope":
        scores = scores + cope_bias(q, scores, seen, w[prefix + "cope.weight"], trace.margins)
    mixed = softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ v  # [H, T, D]

    probs, chosen = x.new_zeros(length, 0), torch.zeros(length, 0, dtype=torch.bool)
    if config["heads"]["routed"]:
        gates, probs, chosen = head_gates(x, w, prefix, config["heads"], trace)
        mixed = mixed * gates.T[:, :, None]
    return mixed.transpose(0, 1).reshape(length, d) @ w[prefix + "o_proj.weight"].T, probs, chosen


# -------------------------------------------------------------------------------------------------------------- routing


def top_p_mask(probs: Tensor, p: float) -> Tensor:
    """bool [T, E]: the shortest prefix, best first, whose probability strictly exceeds p (Huang 2403.07652)."""
    sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
    better = sorted_probs.cumsum(-1) - sorted_probs
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, better <= p)


def route(logits: Tensor, router: Config, layer: int, margins: Margins) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] of a document -> combine weights [T, E] (0 where not chosen), chosen experts [T, E] bool."""
    probs = softmax(logits, dim=-1)
    fixed = probs.detach()
    kind = router["kind"]
    if kind == "top_p":
        p = router["p"][layer] if isinstance(router["p"], Sequence) else router["p"]
        chosen = top_p_mask(fixed, p)
        sums = fixed.sort(dim=-1, descending=True).values.cumsum(-1)[:, :-1]
        margins.threshold = min(margins.threshold, float((sums - p).abs().min()))
        margins.selection = min(margins.selection, selection_gap(fixed, chosen))
    elif kind == "top_k":
        chosen = top_k_mask(fixed, router["k"])
        margins.selection = min(margins.selection, selection_gap(fixed, chosen))
    elif kind == "expert_choice":  # Zhou 2022, training rule: each expert takes its best tokens of the document
        capacity = min(len(probs), math.ceil(router["k"] * len(probs) / router["num_experts"]))
        chosen = top_k_mask(fixed.T, capacity).T
        margins.selection = min(margins.selection, selection_gap(fixed.T, chosen.T))
    else:
        raise ValueError(f"unknown router.kind {kind!r}")
    weights = probs * chosen
    if kind != "expert_choice" and router.get("renormalize", kind == "top_k"):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def sparse_ffn(
    x: Tensor, w: Weights, prefix: str, router: Config, layer: int, margins: Margins
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = sum over the chosen experts of weight · expert(x_t), plus each shared expert of every x_t (Dai 2401.06066);
    also the router logits and the chosen experts."""
    logits = x @ w[prefix + "gate.weight"].T
    weights, chosen = route(logits, router, layer, margins)
    g = router["expert_hidden_size"]
    y = torch.zeros_like(x)
    for e in range(router["num_experts"]):
        gate_up, down = w[prefix + "experts.gate_up_proj"][e], w[prefix + "experts.down_proj"][e]
        y = y + weights[:, e, None] * swiglu(x, gate_up[:g], gate_up[g:], down)
    for s in range(router.get("shared", 0)):
        gate, up, down = (w[f"{prefix}shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        own = slice(s * g, (s + 1) * g)
        y = y + swiglu(x, gate[own], up[own], down[:, own])
    return y, logits, chosen


# ---------------------------------------------------------------------------------------------------------------- model


def embed(tokens: Tensor, w: Weights, config: Config) -> Tensor:
    """Token embedding, plus the embedding of the position in the document where positions are learned."""
    x = w["model.embed_tokens.weight"][tokens]
    if config["position"]["kind"] == "learned":
        if len(tokens) > config["position"]["max"]:
            raise ValueError(f"{len(tokens)} tokens, but position.max is {config['position']['max']}")
        x = x + w["model.embed_positions.weight"][: len(tokens)]
    return x


def forward(w: Weights, config: Config, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Trace]:
    """Logits [T, V] of each document. Layers outside, documents inside, for auxiliary losses see the whole batch."""
    eps = config.get("rms_norm_eps", 1e-6)
    trace = Trace()
    xs = [embed(tokens, w, config) for tokens in inputs]
    for layer in range(config["num_layers"]):
        prefix = f"model.layers.{layer}."
        router_logits, experts, head_probs, heads = [], [], [], []
        for n, x in enumerate(xs):
            normed = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
            y, probs, chosen_heads = attention(normed, w, prefix + "self_attn.", config, trace)
            x = x + y
            normed = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
            if config["router"]["kind"] == "dense":
                gate, up, down = (w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                xs[n] = x + swiglu(normed, gate, up, down)
            else:
                y, logits, chosen = sparse_ffn(normed, w, prefix + "mlp.", config["router"], layer, trace.margins)
                xs[n] = x + y
                router_logits.append(logits)
                experts.append(chosen)
            head_probs.append(probs)
            heads.append(chosen_heads)
        if router_logits:
            trace.router_logits.append(torch.cat(router_logits))
            trace.experts.append(torch.cat(experts))
        if config["heads"]["routed"]:
            trace.head_probs.append(torch.cat(head_probs))
            trace.heads.append(torch.cat(heads))
    output = w["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return [rms_norm(x, w["model.norm.weight"], eps) @ output.T for x in xs], trace


# --------------------------------------------------------------------------------------------------------------- losses


def balance_loss(probs: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e Q_e: f the share of tokens that chose e (constant), Q the mean probability (Fedus 2101.03961)."""
    return probs.shape[-1] * (chosen.to(probs.dtype).mean(0) * probs.mean(0)).sum()


def entropy_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the router in nats (Huang 2403.07652)."""
    log_probs = log_softmax(logits, dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared logsumexp of the router logits (Zoph 2202.08906)."""
    return (torch.logsumexp(logits, dim=-1) ** 2).mean()


def auxiliary_losses(trace: Trace) -> dict[str, Tensor]:
    """Each auxiliary loss that the model has, averaged over its layers."""
    losses: dict[str, list[Tensor]] = {}
    for logits, chosen in zip(trace.router_logits, trace.experts, strict=True):
        losses.setdefault("balance", []).append(balance_loss(softmax(logits, dim=-1), chosen))
        losses.setdefault("entropy", []).append(entropy_loss(logits))
        losses.setdefault("z", []).append(z_loss(logits))
    for probs, chosen in zip(trace.head_probs, trace.heads, strict=True):
        losses.setdefault("heads", []).append(balance_loss(probs, chosen))
    return {name: torch.stack(values).mean() for name, values in losses.items()}


def evaluate(
    w: Weights, config: Config, coefficients: Mapping[str, float], documents: Sequence[Sequence[int]]
) -> Outcome:
    """Losses of a batch. Each document weighs 1: its mean cross-entropy over d[1:] given d[:-1]."""
    inputs = [torch.tensor(document[:-1]) for document in documents]
    logits, trace = forward(w, config, inputs)
    targets = [torch.tensor(document[1:]) for document in documents]
    mean_loss = torch.stack([cross_entropy(rows, t) for rows, t in zip(logits, targets, strict=True)]).mean()
    losses = auxiliary_losses(trace)
    total = mean_loss
    for name, value in losses.items():
        total = total + coefficients[name] * value
    experts = [[{int(e) for e in row.nonzero()} for row in chosen] for chosen in trace.experts]
    return Outcome(logits, mean_loss, losses, total, experts, trace.margins)


def as_tensors(weights: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arrays -> leaf tensors that collect gradients."""
    return {name: torch.as_tensor(value).to(dtype).clone().requires_grad_() for name, value in weights.items()}


def gradients(outcome: Outcome, w: Weights) -> dict[str, Tensor]:
    """d total / d parameter, by name."""
    grads = torch.autograd.grad(outcome.total, list(w.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(w.keys(), grads, strict=True))


@torch.no_grad()
def generate_greedy(w: Weights, config: Config, prompt_ids: Sequence[int], n: int) -> tuple[list[int], float]:
    """The n most likely next tokens, one by one, without a cache and without a stop token; and the smallest lead of a
    chosen token over the second best. Expert choice has no causal rule here and is refused."""
    if config["router"]["kind"] == "expert_choice":
        raise ValueError("expert_choice looks at later tokens: no decoding by its training rule")
    tokens, lead = list(prompt_ids), math.inf
    for _ in range(n):
        logits, _ = forward(w, config, [torch.tensor(tokens)])
        best = logits[0][-1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt_ids) :], lead
