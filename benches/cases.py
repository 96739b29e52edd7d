"""What is timed: the presets, and the shapes of the sweep."""

from dataclasses import dataclass, replace
from itertools import combinations, product


@dataclass(frozen=True)
class Case:
    """One shape and model; both sides get every number."""

    name: str
    vocab: int
    d: int
    layers: int
    heads: int
    kv: int
    experts: int
    hidden: int
    ff: int
    seq: int
    batch: int
    p: float = 0.4
    pos: str = "cope"
    dense: bool = False
    moh: bool = True

    @property
    def tokens(self) -> int:
        return self.seq * self.batch

    def ours(self) -> list[str]:
        """Flags of `moe-lab bench`."""
        sets = {
            "hidden_size": self.d,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "num_kv_heads": self.kv,
            "intermediate_size": self.ff,
        }
        if self.moh:
            shared = max(1, self.heads // 4)
            routed = self.heads - shared
            sets |= {"heads.shared": shared, "heads.routed": routed, "heads.active": -(-2 * routed // 3)}
        if not self.dense:
            sets |= {"router.num_experts": self.experts, "router.expert_hidden_size": self.hidden, "router.p": self.p}
        flags = [f"--set=model.{key}={value}" for key, value in sets.items()]
        flags += ["--preset=seed", f"--pos={self.pos}", f"--vocab={self.vocab}"]
        flags += [f"--seq={self.seq}", f"--batch={self.batch}"]
        return flags + ["--dense"] * self.dense + ["--no-moh"] * (not self.moh)

    def torch(self) -> list[str]:
        """Flags of torch_peer.py."""
        names = ("vocab", "d", "layers", "heads", "kv", "experts", "hidden", "ff", "seq", "batch", "p", "pos")
        flags = [f"--{name}={getattr(self, name)}" for name in names]
        return flags + ["--dense"] * self.dense + ["--no-moh"] * (not self.moh)


SEED = Case("seed", 600, 128, 3, 8, 4, 4, 128, 256, 80, 8)
SMALL = Case("small", 512, 384, 6, 6, 2, 8, 512, 1024, 256, 16)
MEDIUM = Case("medium", 32000, 768, 12, 12, 4, 8, 1024, 2048, 1024, 8)
DENSE_SMALL = replace(SMALL, name="small, dense RoPE", dense=True, pos="rope", moh=False)
PRESETS = {case.name: case for case in (SEED, SMALL, DENSE_SMALL, MEDIUM)}


@dataclass(frozen=True)
class Variant:
    """A way in which PyTorch runs the model."""

    moe: str
    bf16: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        return " ".join(["compiled" if self.compiled else "eager", self.moe, "bf16" if self.bf16 else "f32"])

    def flags(self) -> list[str]:
        moe = [f"--moe={self.moe}"] if self.moe != "swiglu" else []
        return [*moe, *["--bf16"] * self.bf16, *["--compile"] * self.compiled]


def variants(case: Case, compiled: bool = True) -> list[Variant]:
    """Every variant that PyTorch has for a case; what it cannot compile (data-dependent shapes) runs eagerly alone."""
    if case.dense:
        kinds = [("swiglu", False), *[("swiglu", True)] * compiled]
    else:
        kinds = [("loop", False), ("grouped", False), *[("dense", True)] * compiled]
        kinds += [("dense", False)] * (case.experts <= 16)
    return [Variant(moe, bf16, is_compiled) for moe, is_compiled in kinds for bf16 in (False, True)]


# width, context, experts, p: every pair of values of two of them is in some row.
SWEEP = [
    (64, 32, 1, 0.2),
    (64, 256, 4, 0.4),
    (64, 1024, 16, 0.6),
    (64, 4096, 64, 0.9),
    (128, 32, 4, 0.6),
    (128, 256, 1, 0.9),
    (128, 1024, 64, 0.2),
    (128, 4096, 16, 0.4),
    (256, 32, 16, 0.9),
    (256, 256, 64, 0.6),
    (256, 1024, 1, 0.4),
    (256, 4096, 4, 0.2),
    (384, 32, 64, 0.4),
    (384, 256, 16, 0.2),
    (384, 1024, 4, 0.9),
    (384, 4096, 1, 0.6),
    (512, 32, 4, 0.9),
    (512, 256, 1, 0.6),
    (512, 1024, 64, 0.4),
    (512, 4096, 16, 0.2),
    (1024, 32, 16, 0.4),
    (1024, 256, 64, 0.2),
    (1024, 1024, 1, 0.9),
    (1024, 4096, 4, 0.6),
]
COMPILED_IN_SWEEP = (1, 7, 8, 14, 16, 22)  # every width and every context is among them, and 1 to 16 experts


def sweep_case(width: int, context: int, experts: int, p: float) -> Case:
    heads = max(2, width // 64)
    hidden = max(32, width // 2)
    batch = max(1, 1024 // context)
    name = f"width {width}, context {context}, {experts} experts, p {p}"
    return Case(name, 512, width, 2, heads, max(1, heads // 2), experts, hidden, 2 * width, context, batch, p)


def uncovered() -> list[tuple[int, int, object, object]]:
    """Pairs of values that no row of the sweep has; empty."""
    columns = list(zip(*SWEEP, strict=True))
    missing = []
    for i, j in combinations(range(len(columns)), 2):
        seen = {(row[i], row[j]) for row in SWEEP}
        missing += [(i, j, *pair) for pair in product(set(columns[i]), set(columns[j])) if pair not in seen]
    return missing
