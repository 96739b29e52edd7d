"""A laboratory for adaptive sparse transformers: fast training in Rust, reading and judging in Python.

Names are loaded when they are first used, so that `import moe_lab` is fast and figures need no compiled module.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_lab import plots as plots
    from moe_lab.frames import read_metrics as read_metrics
    from moe_lab.train import DivergedError as DivergedError
    from moe_lab.train import Model as Model
    from moe_lab.train import Run as Run
    from moe_lab.train import Trainer as Trainer
    from moe_lab.train import __version__ as __version__

_HOMES = {
    "DivergedError": "train",
    "Model": "train",
    "Run": "train",
    "Trainer": "train",
    "__version__": "train",
    "read_metrics": "frames",
}

__all__ = ["DivergedError", "Model", "Run", "Trainer", "__version__", "plots", "read_metrics"]


def __getattr__(name: str) -> object:
    if name == "plots":
        return import_module("moe_lab.plots")
    if name in _HOMES:
        return getattr(import_module(f"moe_lab.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moe_lab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
