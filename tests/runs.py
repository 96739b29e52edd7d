"""Hand-made run directories: what a gate, a table or a figure reads, without training anything."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import exp, log
from pathlib import Path
from typing import Any

Layer = dict[str, Any]
DENSE = 'kind = "dense"'


@dataclass(frozen=True)
class Story:
    """A run as it would have gone; the defaults are a healthy top-p run that passes stage 1."""

    router: str = 'kind = "top_p"\np = 0.4\nnum_experts = 8'
    seed: int = 1
    name: str = "hand-made"
    epochs: int = 100
    trained: int = 100  # chat epochs that were really trained
    status: str = "completed"
    quick: bool = False
    parent: str | None = None
    data: str = "hash of the data"
    text: bool = False  # on a plain text: one phase, held-out losses, two updates an epoch
    loss: float = 0.21
    results: dict[str, Any] = field(default_factory=dict)
    layer: Callable[[int, float], Layer] | None = None  # (block, progress 0..1) -> the moe measures of one layer
    capacity: float = 1.0  # of a mixture of depths
    copies: int = 0  # variants beside every document
    rows: tuple[dict[str, Any], ...] = ()  # further rows at the end of the stream

    def but(self, **changes: Any) -> "Story":
        return replace(self, **changes)


def healthy(block: int, progress: float) -> Layer:
    """Experts that are used, differ by token and tell about it; the router learns."""
    return {
        "experts_per_token": 1.75 - 0.1 * block * progress,
        "experts_std": 0.5 - 0.1 * block,
        "router_entropy": 1.9 - 0.6 * progress,
        "load": [0.2, 0.15, 0.125, 0.125, 0.125, 0.1, 0.1, 0.075],
        "histogram": [0, 400, 500, 100, 0, 0, 0, 0, 0],
        "information": 0.6 * progress,
    }


def write(folder: Path, story: Story) -> Path:
    """Writes run.toml, run.json and metrics.jsonl of a story."""
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(_toml(story))
    (folder / "run.json").write_text(json.dumps(_record(story)))
    rows = [*_stream(story), *story.rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _toml(story: Story) -> str:
    quick = "quick = true\n" if story.quick else ""
    sizes = "" if "dense" in story.router else "expert_hidden_size = 16\n"
    data = 'text = "tinyshakespeare"' if story.text else "max_length = 80"
    length = f"max_steps = {2 * story.epochs}" if story.text else f"epochs = {story.epochs}"
    return (
        f'name = "{story.name}"\nseed = {story.seed}\n{quick}[data]\n{data}\n'
        f"[model]\nhidden_size = 32\n[model.router]\n{story.router}\n{sizes}[train]\n{length}\n"
        f"[model.depths]\ncapacity = {story.capacity}\n[data.augment]\ncopies = {story.copies}\n"
    )


def _record(story: Story) -> dict[str, Any]:
    sparse = "dense" not in story.router
    results = {
        "train_loss": story.loss, "paraphrase_loss": 6.7, "flops_per_token": 3e6,
        "loss": story.loss, "loss_micro": story.loss - 0.01, "floor": 0.17, "excess": story.loss - 0.17,
        "recite": 60, "recite_total": 60, "token_f1": 1.0, "paraphrase_f1": 0.41, "paraphrase_recite": 3,
        "paraphrase_total": 30, "facts_loss_before": 0.3, "facts_loss_after": 1.2, "l0": 0.4, "tokens": 400000,
        "experts_per_token": 1.7 if sparse else None, "experts_std": 0.4 if sparse else None,
        "eval_loss": 0.2, "seconds": 100.5, "tokens_per_second": 40000.0, "params": 900000, "active_params": 500000,
    }  # fmt: skip
    variants = {role: {"sha256": f"{role} {story.seed}"} for role in ("augment", "augmented") if story.copies}
    return {
        "id": story.name,
        "status": story.status,
        "parent": story.parent,
        "data": {
            "text" if story.text else "chat": {"sha256": story.data},
            "paraphrases": {"sha256": story.name},
            **variants,
        },
        "results": {**results, **story.results},
    }


def _stream(story: Story) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "ts": 0.0, "tokens": 0, "kind": "event", "event": "run_started"}]
    step = 0
    documents = (("facts", story.epochs), ("chat", story.trained))
    for phase, epochs in (("text", story.trained),) if story.text else documents:
        for epoch in range(1, epochs + 1):
            progress = (epoch - 1) / max(1, epochs - 1)
            for _ in range(2):
                step += 1
                rows.append(_place(step, "train", phase, epoch) | _step(progress))
            if "dense" not in story.router:
                rows.append(_place(step, "moe", phase, epoch) | _moe(story, progress))
            rows.append(_place(step, "eval", phase, epoch) | _epoch(progress, 0.3 if phase == "facts" else story.loss))
            if story.text:
                rows[-1]["eval/loss"] = rows[-1]["epoch/loss"] + 0.1
                del rows[-1]["epoch/floor"]
    return rows


def _place(step: int, kind: str, phase: str, epoch: int) -> dict[str, Any]:
    return {"step": step, "ts": step / 10, "tokens": 100 * step, "kind": kind, "phase": phase, "epoch": epoch}


def _step(progress: float) -> dict[str, Any]:
    norms = {f"grad/layer_{i:02}/param_norm": (i + 1) * exp(-2 * progress) for i in range(15)}
    return {
        "train/loss": 5.0 - 4.0 * progress,
        "train/learning_rate": 1e-4 * (1 - 0.9 * progress),
        "train/lr_scale_mean": 1.5,
        "train/l0": 2.0 - progress,
        **norms,
    }


def _moe(story: Story, progress: float) -> dict[str, Any]:
    layer = story.layer or healthy
    rows = {f"moe/layer_{i:02}/{key}": value for i in range(3) for key, value in layer(i, progress).items()}
    mean = sum(layer(i, progress)["experts_per_token"] for i in range(3)) / 3
    return {**rows, "moe/experts_per_token": mean}


def _epoch(progress: float, last: float) -> dict[str, Any]:
    loss = 5.0 * exp(-progress * log(5.0 / last))
    l0 = 2.0 - progress
    return {
        "epoch/loss": loss,
        "epoch/floor": 0.17,
        "epoch/l0_min": l0 / 2,
        "epoch/l0_mean": l0,
        "epoch/l0_max": 2 * l0,
    }
