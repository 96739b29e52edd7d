"""Twenty short dialogues and a model that learns them in seconds."""

import json
from pathlib import Path

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

TINY = """
name = "tiny"
seed = 1
[model]
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 64
[model.position]
kind = "cope"
max = 32
[model.heads]
shared = 1
routed = 3
active = 2
[model.router]
kind = "top_p"
p = 0.4
num_experts = 4
expert_hidden_size = 32
[train]
learning_rate = 3e-3
batch_size = 4
epochs = 5
warmup_epochs = 1
"""


def write_data(folder: Path) -> dict[str, object]:
    """Twenty lines of facts and twenty of dialogue, as overrides for a run."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [f"{a} and {b} are two numbers. </s>" for a in WORDS for b in WORDS[:2]]
    chat = [f"User: What is {n}? Assistant: It is {WORDS[n % 10]}, the number {n}. </s>" for n in range(20)]
    for name, lines in (("facts", facts), ("chat", chat)):
        (folder / f"{name}.json").write_text(json.dumps(lines))
    return {"data.facts": str(folder / "facts.json"), "data.chat": str(folder / "chat.json")}
