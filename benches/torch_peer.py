"""Our model in PyTorch, as fast as PyTorch makes it: what our step is timed against (tests/oracle.py judges numbers).

The mathematics is that of `moe-lab bench`: the same shapes, one fixed random batch, learning rate 0, so that every step
does the same work and a router cannot sharpen on the batch while it is timed. Compiled and eager, f32 and bf16
(autocast), experts as a loop, as grouped products (torch._grouped_mm) or all of them for every token (dense).

Prints one JSON line once warm, then one for every line "SECONDS" on stdin: median and best step of that many seconds.
"""

import argparse
import json
import math
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BALANCE, ENTROPY, HEADS = 1e-2, 1e-4, 1e-2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Grouped queries, mixture of heads; rotary positions (PyTorch's fused kernel) or contextual ones (it has none)."""

    def __init__(self, c: argparse.Namespace) -> None:
        super().__init__()
        self.c, self.width = c, c.d // c.heads
        self.q = nn.Linear(c.d, c.d, bias=False)
        self.kv = nn.Linear(c.d, 2 * c.kv * self.width, bias=False)
        self.o = nn.Linear(c.d, c.d, bias=False)
        self.shared = max(1, c.heads // 4)
        self.routed = c.heads - self.shared
        self.active = 0 if c.no_moh else math.ceil(2 * self.routed / 3)
        if c.pos == "cope":
            self.table = nn.Parameter(torch.zeros(c.pmax, self.width))
        else:
            angles = 10000.0 ** (-torch.arange(0, self.width, 2) / self.width)
            angles = torch.outer(torch.arange(c.seq), angles)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        if self.active:
            self.router = nn.Linear(c.d, c.heads + 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c, (b, t, _) = self.c, x.shape
        q = self.q(x).view(b, t, c.heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, c.kv, self.width).permute(2, 0, 3, 1, 4)
        repeats = c.heads // c.kv
        if c.pos == "rope":
            cos, sin = self.cos.to(q.dtype), self.sin.to(q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            y = self.contextual(q, k, v)
        y, aux = y.transpose(1, 2), x.new_zeros(())
        if self.active:
            gates, aux = self.gates(x)
            y = y * gates.unsqueeze(-1)
        return self.o(y.reshape(b, t, c.d)), aux

    def contextual(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(self.width)
        mask = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        gates = torch.sigmoid(scores) * mask
        positions = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.c.pmax - 1)
        low, high = positions.floor().long(), positions.ceil().long()
        logits = q @ self.table.t().to(q.dtype)
        share = positions - low
        bias = logits.gather(-1, high) * share + logits.gather(-1, low) * (1 - share)
        return (scores + bias).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared, routed, split = self.router(x).split([self.shared, self.routed, 2], -1)
        split, shared, routed = split.softmax(-1), shared.softmax(-1), routed.softmax(-1)
        chosen = torch.zeros_like(routed).scatter(-1, routed.topk(self.active, -1).indices, 1.0)
        balance = self.routed * (chosen.mean((0, 1)) * routed.mean((0, 1))).sum()
        return torch.cat([split[..., :1] * shared, split[..., 1:] * routed * chosen], -1), HEADS * balance


class SwiGLU(nn.Module):
    def __init__(self, c: argparse.Namespace) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(c.d, 2 * c.ff, bias=False), nn.Linear(c.ff, c.d, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up), x.new_zeros(()), x.new_zeros(())


class Experts(nn.Module):
    """Top-p: a token takes its likeliest experts until their probabilities exceed p."""

    def __init__(self, c: argparse.Namespace) -> None:
        super().__init__()
        self.c = c
        self.router = nn.Linear(c.d, c.experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(c.experts, c.d, 2 * c.hidden) * c.d**-0.5)
        self.down = nn.Parameter(torch.randn(c.experts, c.hidden, c.d) * c.hidden**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, x = x.shape, x.reshape(-1, self.c.d)
        p = self.router(x).float().softmax(-1)
        mass, order = p.sort(-1, descending=True)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, (mass.cumsum(-1) - mass) <= self.c.p)
        balance = self.c.experts * (chosen.float().mean(0) * p.mean(0)).sum()
        entropy = -(p * p.clamp_min(1e-9).log()).sum(-1).mean()
        y = getattr(self, self.c.moe)(x, p, chosen)
        return y.view(shape), BALANCE * balance + ENTROPY * entropy, chosen.float().sum(-1).mean()

    def loop(self, x: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.c.experts):
            tokens = chosen[:, e].nonzero(as_tuple=True)[0]
            if tokens.numel() == 0:
                continue
            gate, up = (x[tokens] @ self.gate_up[e].to(x.dtype)).chunk(2, -1)
            y = (F.silu(gate) * up) @ self.down[e].to(x.dtype)
            out.index_add_(0, tokens, (y * p[tokens, e].unsqueeze(-1).to(x.dtype)).to(out.dtype))
        return out

    def grouped(self, x: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        expert, token = chosen.t().nonzero(as_tuple=True)
        ends = chosen.sum(0).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[token], self.gate_up.to(x.dtype), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down.to(x.dtype), offs=ends)
        y = y * p[token, expert].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype))

    def dense(self, x: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,edh->neh", x, self.gate_up.to(x.dtype)).chunk(2, -1)
        y = torch.einsum("neh,ehd->ned", F.silu(gate) * up, self.down.to(x.dtype))
        return (y * (p * chosen).unsqueeze(-1).to(x.dtype)).sum(1)


class Model(nn.Module):
    def __init__(self, c: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.vocab, c.d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        norms = [nn.ModuleList(nn.RMSNorm(c.d, eps=1e-5) for _ in range(c.layers)) for _ in range(2)]
        self.attention_norms, self.ff_norms = norms
        self.attention = nn.ModuleList(Attention(c) for _ in range(c.layers))
        self.ff = nn.ModuleList(SwiGLU(c) if c.dense else Experts(c) for _ in range(c.layers))
        self.norm, self.head = nn.RMSNorm(c.d, eps=1e-5), nn.Linear(c.d, c.vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embedding(ids)
        aux, active = x.new_zeros(()), x.new_zeros(())
        blocks = zip(self.attention_norms, self.attention, self.ff_norms, self.ff, strict=True)
        for attention_norm, attention, ff_norm, ff in blocks:
            y, loss = attention(attention_norm(x))
            x, aux = x + y, aux + loss
            y, loss, experts = ff(ff_norm(x))
            x, aux, active = x + y, aux + loss, active + experts
        logits = self.head(self.norm(x)).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten()), aux, active / len(self.ff)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("vocab", "d", "layers", "heads", "kv", "experts", "hidden", "ff", "seq", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--pmax", type=int, default=64)
    parser.add_argument("--p", type=float, default=0.4)
    parser.add_argument("--pos", choices=["cope", "rope"], default="cope")
    parser.add_argument("--moe", choices=["loop", "grouped", "dense"], default="loop")
    for flag in ("compile", "bf16", "dense", "no-moh"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warm", type=int, default=3, help="steps before the first line")
    c = parser.parse_args()
    torch.set_num_threads(c.threads)
    torch.manual_seed(0)
    model = Model(c).to(c.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    run = torch.compile(model) if c.compile else model
    batch = torch.randint(c.vocab, (c.batch, c.seq + 1)).to(c.device)
    ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> Tensor:
        with torch.autocast(c.device.partition(":")[0], torch.bfloat16, enabled=c.bf16):
            loss, aux, experts = run(ids, targets)
        (loss + aux).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if c.device != "cpu":
            torch.cuda.synchronize()
        return experts

    def report(**fields: object) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**fields, "peak_memory_bytes": memory}), flush=True)

    began = time.perf_counter()
    for _ in range(c.warm):
        experts = step()
    params = sum(p.numel() for p in model.parameters())
    report(warm_seconds=time.perf_counter() - began, experts_per_token=float(experts), params=params)
    for line in sys.stdin:
        times: list[float] = []
        end = time.perf_counter() + float(line)
        while time.perf_counter() < end or not times:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        times.sort()
        median = times[len(times) // 2]
        report(ms_per_step=1e3 * median, ms_per_step_best=1e3 * times[0], tokens_per_second=ids.numel() / median)


if __name__ == "__main__":
    main()
