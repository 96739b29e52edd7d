"""One comparison of moe_lab with stated numbers: model, weights, documents, and the call that runs moe_lab on them.

Needs no torch: shared by the oracle's tests, the golden numbers and the script that makes them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LOSSES = ("balance", "entropy", "z", "heads")
# (engine, dtype, relative bar): f64 must agree to rounding, f32 to single precision.
ENGINES = (("reference", "f64", 1e-9), ("cpu", "f64", 1e-9), ("cpu", "f32", 1e-4))
# A tensor whose largest entry is below this is compared absolutely: its entries are sums that cancel.
FLOOR = 1e-2


@dataclass(frozen=True)
class Case:
    """What both sides are given. `model` is the [model] table of the run file, `losses` the [losses] table."""

    name: str
    model: dict[str, Any]
    losses: dict[str, float]
    vocab_size: int
    documents: list[list[int]]


def parameter_shapes(model: Mapping[str, Any], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of model.safetensors, in name order; matrices are [out, in]."""
    d, f = model["hidden_size"], model["intermediate_size"]
    width = d // model["num_heads"]
    kv, heads, position, router = model["num_kv_heads"] * width, model["heads"], model["position"], model["router"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, d), "model.norm.weight": (d,)}
    if not model["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab_size, d)
    if position["kind"] == "learned":
        shapes["model.embed_positions.weight"] = (position["max"], d)
    for i in range(model["num_layers"]):
        layer = f"model.layers.{i}."
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (d, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, d),
        }
        if position["kind"] == "cope":
            block["self_attn.cope.weight"] = (position["max"] + 1, width)
        if heads["routed"]:
            block["self_attn.heads.routed.weight"] = (heads["routed"], d)
            if heads["shared"]:
                block["self_attn.heads.shared.weight"] = (heads["shared"], d)
                block["self_attn.heads.split.weight"] = (2, d)
        if router["kind"] == "dense":
            block |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        else:
            experts, g = router["num_experts"], router["expert_hidden_size"]
            block["mlp.gate.weight"] = (experts, d)
            block["mlp.experts.gate_up_proj"] = (experts, 2 * g, d)
            block["mlp.experts.down_proj"] = (experts, d, g)
            if f := g * router.get("shared", 0):
                names = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
                block |= {f"mlp.shared_experts.{name}.weight": shape for name, shape in names.items()}
        shapes |= {layer + name: shape for name, shape in block.items()}
    return dict(sorted(shapes.items()))


def is_router(name: str) -> bool:
    """Whether the parameter scores experts or heads."""
    return name.endswith("mlp.gate.weight") or ".heads." in name


def scale_weights(name: str, unit: Array) -> npt.NDArray[np.float32]:
    """Numbers of variance 1 -> weights under which every part of the model has something to say. Single precision, so
    that an f32 and an f64 run start from the same values."""
    if name.endswith("norm.weight"):
        weights = 1 + 0.25 * unit
    elif name.endswith("cope.weight"):
        weights = 0.5 * unit
    elif name.startswith("model.embed"):
        weights = 0.4 * unit
    else:
        weights = (1.5 if is_router(name) else 1.0) * unit / np.sqrt(unit.shape[-1])
    return np.asarray(weights, dtype=np.float32)


def random_weights(case: Case, seed: int) -> dict[str, Array]:
    """Normal numbers, CoPE tables and routers included."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(case.model, case.vocab_size)
    return {name: scale_weights(name, rng.standard_normal(shape)) for name, shape in shapes.items()}


def formula_weights(case: Case, phase: int) -> dict[str, Array]:
    """Weights from a formula: entry i (flat, from 0) of the parameter that is n-th in name order is
    sqrt(2) sin(0.618 (i + 1)^2 + n + phase), then `scale_weights`. The square keeps matrices of full rank."""
    weights: dict[str, Array] = {}
    for n, (name, shape) in enumerate(parameter_shapes(case.model, case.vocab_size).items()):
        i = np.arange(int(np.prod(shape)), dtype=np.float64)
        unit = np.sqrt(2.0) * np.sin(0.618 * (i + 1) ** 2 + n + phase)
        weights[name] = scale_weights(name, unit.reshape(shape))
    return weights


def toml_table(table: Mapping[str, Any], path: str = "") -> str:
    """A nested mapping as TOML; JSON writes strings, numbers, booleans and lists of numbers as TOML does."""
    plain = [f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, Mapping)]
    text = (f"[{path}]\n" if path else "") + "".join(plain)
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += toml_table(value, f"{path}.{key}" if path else key)
    return text


def run_file(case: Case, seed: int = 0) -> str:
    """The run file of the case, as text."""
    head = {"name": "oracle", "seed": seed}
    return toml_table(head | {"model": case.model, "losses": case.losses})


def run_moe_lab(
    case: Case, weights: Mapping[str, Array] | None, engine: str, dtype: str, folder: Path, seed: int = 0
) -> dict[str, Any]:
    """moe_lab's answer: weights, logits [n, V], cross_entropy, losses, total, gradients, experts. Without weights it
    draws its own by the seed."""
    native = importlib.import_module("moe_lab._native")
    path = None if weights is None else str(write_weights(weights, folder))
    answer: dict[str, Any] = native.loss_and_gradients(
        run_file(case, seed), path, case.documents, case.vocab_size, engine, dtype
    )
    return answer


def write_weights(weights: Mapping[str, Array], folder: Path) -> Path:
    """A model.safetensors of F32 tensors in the folder: length of the header, header (JSON), values, little-endian."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in weights.items():
        raw = np.ascontiguousarray(value, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_weights(path: Path) -> dict[str, Array]:
    """The F32 tensors of a model.safetensors."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    weights: dict[str, Array] = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        weights[name] = np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"]).copy()
    return weights


def train_on_text(case: Case, text: str, folder: Path) -> Any:
    """Trains the case for some steps on the characters of a text, into `folder`/run; the model as moe_lab loads it."""
    native = importlib.import_module("moe_lab._native")
    path = folder / "text.txt"
    path.write_text(text)
    run: dict[str, Any] = {"name": "oracle", "seed": 1, "model": case.model, "losses": case.losses}
    run["data"] = {"text": str(path), "tokenizer": "char", "block_size": 12}
    run["train"] = {"max_steps": 60, "batch_size": 8, "learning_rate": 0.01, "lr_scale": "none"}
    for _ in native.Trainer(native.Run.parse(toml_table(run)), out=str(folder / "run")):
        pass
    return native.Model.load(str(folder / "run"))


def trained_weights(folder: Path) -> dict[str, Array]:
    """The weights of the newest checkpoint in `folder`/run."""
    checkpoints = (folder / "run" / "checkpoints").glob("checkpoint-*")
    return read_weights(max(checkpoints, key=lambda path: int(path.name.split("-")[1])) / "model.safetensors")


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the largest entry of `theirs` (at least FLOOR); infinite for a wrong shape or a
    number that is not finite."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    if a.size == 0:
        return 0.0
    return float(np.abs(a - b).max() / max(np.abs(b).max(), FLOOR))


def expert_sets(layers: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """Experts per layer and token, in ascending order."""
    return [[sorted(int(e) for e in token) for token in layer] for layer in layers]


# ------------------------------------------------------------------------------------------------------------ building

DOCUMENTS = [[3, 7, 1, 9, 4, 4, 18, 2, 7, 3, 11, 0, 5], [5, 16], [8, 1, 1, 12, 6, 19, 8, 10], [2, 13, 17]]
ALL_LOSSES = {"balance": 0.3, "entropy": 0.2, "z": 0.1, "heads": 0.4}
PLAIN_HEADS = {"shared": 0, "routed": 0, "active": 0}
ROUTERS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "top_p": {"kind": "top_p", "p": 0.6, "num_experts": 5, "expert_hidden_size": 6},
    "top_p_layers": {"kind": "top_p", "p": [0.7, 0.35], "num_experts": 5, "expert_hidden_size": 6},
    "top_p_renormalised": {
        "kind": "top_p",
        "p": 0.6,
        "renormalize": True,
        "num_experts": 5,
        "expert_hidden_size": 6,
    },
    "top_k": {"kind": "top_k", "k": 2, "num_experts": 5, "expert_hidden_size": 6},
    "top_k_raw": {"kind": "top_k", "k": 2, "renormalize": False, "num_experts": 5, "expert_hidden_size": 6},
    "expert_choice": {"kind": "expert_choice", "k": 2, "num_experts": 5, "expert_hidden_size": 6},
    "top_k_shared": {"kind": "top_k", "k": 2, "shared": 2, "num_experts": 5, "expert_hidden_size": 6},
}
POSITIONS: dict[str, dict[str, Any]] = {
    "cope": {"kind": "cope", "max": 4},
    "rope": {"kind": "rope"},
    "none": {"kind": "none"},
    "learned": {"kind": "learned", "max": 16},
}
MIXTURES: dict[str, dict[str, int]] = {
    "plain": PLAIN_HEADS,
    "shared2": {"shared": 2, "routed": 4, "active": 2},
    "shared1": {"shared": 1, "routed": 5, "active": 3},
    "routed": {"shared": 0, "routed": 6, "active": 4},
}


def make_case(
    router: str,
    position: str = "cope",
    heads: str = "shared2",
    kv: int = 2,
    window: int | None = None,
    tied: bool = False,
    documents: list[list[int]] | None = None,
    **router_changes: Any,
) -> Case:
    """A small case by the names above; further keywords change the router."""
    model: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": kv}
    model |= {"intermediate_size": 20, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6}
    if window is not None:
        model["window"] = window
    model |= {"position": POSITIONS[position], "heads": MIXTURES[heads], "router": ROUTERS[router] | router_changes}
    name = "-".join([router, position, heads, f"kv{kv}"] + [f"window{window}"] * (window is not None) + ["tied"] * tied)
    return Case(name, model, ALL_LOSSES, 20, documents or DOCUMENTS)
