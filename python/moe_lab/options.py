"""The options of stages 2 to 5: each is one named change to its parent run, made by one or more shipped run files.

A new option is a line here and a run file in experiments/; nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_lab import gates


@dataclass(frozen=True, slots=True)
class Option:
    """`runs` are shipped run files, each of which is trained and judged against `parent`; one that passes is enough."""

    name: str  # "2c"
    title: str
    runs: tuple[str, ...] = ()
    parent: str = "stage1"  # shipped run file that the runs extend
    asks: tuple[Callable[[gates.Pairs], gates.Criterion], ...] = ()  # beyond the gate of every option, over the seeds
    specializes: bool = False  # has no runs: the parent's experts are studied

    @property
    def stage(self) -> str:
        return f"stage{self.name[0]}"


OPTIONS = (
    Option("2a", "activation checkpointing", ("stage2a",), asks=(gates.takes_less_memory, gates.same_bits)),
    Option("2b", "gradient monitoring and response", ("stage2b",)),
    Option("2c", "warm-up length and shape", ("stage2c", "stage2c_exponential")),
    Option("3a", "learning-rate schedule: floor, peak, restarts", ("stage3a", "stage3a_peak", "stage3a_sgdr")),
    Option("3b", "batch size with the rate that goes with it", ("stage3b", "stage3b_linear", "stage3b_updates")),
    Option(
        "3c",
        "augmentation of the facts and dialogues",
        ("stage3c", "stage3c_updates"),
        asks=(gates.understands_paraphrases,),
    ),
    Option("4a", "depth per token", ("stage4a", "stage4a_causal"), asks=(gates.takes_fewer_flops,)),
    Option("4b", "window per token", ("stage4b",), parent="text"),
    Option("4c", "specialisation of the experts", specializes=True),
    Option("5a", "threshold per layer", ("stage5a", "stage5a_roadmap"), asks=(gates.same_experts,)),
    Option("5b", "threshold per token, learned", ("stage5b",)),
    Option("5c", "several lengths of text", ("stage5c",), parent="text"),
)


def chosen(stage: str, names: Sequence[str] | None) -> tuple[Option, ...]:
    """The options of those names, in their order in the stage, or all of it. Raises ValueError in one sentence."""
    own = {option.name: option for option in OPTIONS if option.stage == stage}
    wanted = [name.lower() for name in names or own]
    for name in wanted:
        if name not in own:
            raise ValueError(f"--option '{name}' is none of {stage}; it has {', '.join(own)}")
    return tuple(option for name, option in own.items() if name in wanted)


def named(name: str) -> Option:
    return next(option for option in OPTIONS if option.name == name)
