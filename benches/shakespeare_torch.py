"""nanoGPT's CPU recipe in PyTorch, the model of experiments/shakespeare/nanogpt.toml: `compare.py --recipe` runs both.

4 layers, width 128, 4 heads, context 64, batch 12, RMSNorm, SwiGLU 352, RoPE, no dropout, AdamW; 2,000 updates. Prints
one JSON line with the wall time of the updates (one before them, in which PyTorch compiles, left out) and the held-out
loss.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, LAYERS, HEADS, CONTEXT, BATCH, FF, STEPS = 128, 4, 4, 64, 12, 352, 2000
RATE, WARMUP, FLOOR, DECAY, CLIP = 1e-3, 100, 0.1, 0.1, 1.0
EVAL_BATCHES = 100
TEXT = Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * FF, bias=False), nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, D))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(D, eps=1e-6), nn.Linear(D, vocab, bias=False)
        width = D // HEADS
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=D**-0.5 if name.startswith("embedding") else math.sqrt(2 / p.shape[1]))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def rate(step: int) -> float:
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return RATE * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    text = TEXT.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    cut = int(0.9 * len(data))
    model = Model(len(ids))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)
    run = torch.compile(model) if options.compile else model

    def batch(part: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(part) - CONTEXT, (BATCH,)).tolist()
        pieces = torch.stack([part[start : start + CONTEXT + 1] for start in starts])
        return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()

    def loss(part: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            return run(*batch(part))

    loss(data[:cut]).backward()
    optimizer.zero_grad(set_to_none=True)
    began = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss(data[:cut]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        held_out = sum(float(loss(data[cut:])) for _ in range(EVAL_BATCHES)) / EVAL_BATCHES
    kind = f"{'compiled' if options.compile else 'eager'} {'bf16' if options.bf16 else 'f32'}"
    print(json.dumps({"side": f"PyTorch {kind}", "seconds": seconds, "loss": held_out}))


if __name__ == "__main__":
    main()
