"""Arrows point down only: manifests and imports are read, and an arrow that climbs fails."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["tensor", "moe_router", "model", "train", "bindings"]  # lowest first
HOMES = {  # the only crates that may name an outside crate
    "pyo3": {"bindings"},
    "numpy": {"bindings"},
    "candle-core": {"tensor"},
    "candle-nn": set(),
    "gemm": {"tensor"},
    "tch": {"tensor"},
    "torch-sys": {"train", "bindings"},  # what is linked passes its flags
    "rayon": {"tensor", "train"},  # train owns the pool, tensor's kernels use it
    "tokenizers": {"train"},
    "clap": {"train"},
}
MODULES = {  # python/moe_lab: what each module may import of the package
    "__init__": {"plots", "frames", "train"},
    "__main__": {"cli", "verbs"},
    "verbs": {
        "terminal",
        "outcomes",
        "specialize",
        "subsets",
        "watch",
        "report",
        "comparison",
        "roadmap",
        "stages",
        "train",
        "gates",
        "tables",
        "plots",
        "frames",
        "tensorboard",
        "text",
    },
    "cli": {"terminal", "outcomes", "lr_find", "sweep", "roadmap", "stages", "options", "train", "frames", "text"},
    "outcomes": {"terminal", "report", "roadmap", "stages", "train", "tables", "frames"},
    "terminal": {"text"},
    "report": {"plots", "roadmap", "stages", "train", "tables", "gates", "frames"},
    "roadmap": {"stages", "jobs", "train", "tables", "gates", "plots", "frames"},
    "stages": {"options", "specialize", "jobs", "train", "gates", "tables", "plots", "frames"},
    "options": {"gates"},
    "sweep": {"jobs", "stages", "train", "frames", "text"},
    "jobs": set(),
    "tensorboard": {"frames"},
    "specialize": {"plots", "token_classes"},
    "token_classes": set(),
    "subsets": {"specialize"},
    "lr_find": {"plots"},
    "watch": {"frames", "text"},
    "comparison": {"statistics", "text", "tables", "gates", "frames"},
    "statistics": set(),
    "text": set(),
    "tables": {"gates", "frames", "text"},
    "plots": {"gates", "frames"},
    "gates": {"frames"},
    "frames": {"_native"},
    "train": {"_native", "text"},
}


def manifests() -> dict[str, set[str]]:
    """Crate -> its normal dependencies."""
    command = ["cargo", "metadata", "--no-deps", "--offline", "--format-version=1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    packages = json.loads(found.stdout)["packages"]
    return {each["name"]: {d["name"] for d in each["dependencies"] if d["kind"] is None} for each in packages}


def climbing(crates: dict[str, set[str]]) -> list[str]:
    """Every arrow that does not point down, and every outside crate that is not at home."""
    up = [
        f"{crate} -> {other}"
        for crate, needs in crates.items()
        for other in needs & set(FLOORS)
        if FLOORS.index(other) >= FLOORS.index(crate)
    ]
    away = [
        f"{crate} -> {other}"
        for crate, needs in crates.items()
        for other in needs
        if crate not in HOMES.get(other, FLOORS)
    ]
    return sorted(up + away)


def test_every_crate_has_its_floor_and_no_arrow_climbs() -> None:
    crates = manifests()
    assert set(crates) == set(FLOORS)
    assert climbing(crates) == []


def test_the_rule_catches_what_it_should() -> None:
    assert climbing({"tensor": {"model"}}) == ["tensor -> model"]
    assert climbing({"model": {"pyo3"}}) == ["model -> pyo3"]
    assert climbing({"train": {"tensor", "candle-core"}}) == ["train -> candle-core"]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_files() -> list[Path]:
    return sorted((ROOT / "python" / "moe_lab").glob("*.py"))


@pytest.mark.parametrize("path", package_files(), ids=lambda path: path.stem)
def test_modules_import_only_what_lies_below_them(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("moe_lab.")}
    modules = {file.stem for file in package_files()} | {"_native"}
    assert ours & modules <= MODULES[path.stem]


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in package_files()} == set(MODULES)


@pytest.mark.parametrize("path", package_files(), ids=lambda path: path.stem)
def test_the_package_imports_neither_experiments_nor_torch_nor_pyplot(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"experiments", "tests"}
    assert "torch" not in tops or path.stem == "train"
    assert "matplotlib.pyplot" not in set(imports(path))


def rust_files(crate: str) -> list[Path]:
    return sorted((ROOT / "crates" / crate / "src").rglob("*.rs"))


def test_unsafe_lives_in_the_kernels_only() -> None:
    code = re.compile(r"\bunsafe\b(?!_code)")
    kernels = ROOT / "crates" / "tensor" / "src" / "kernels"
    for crate in FLOORS[:-1]:
        for path in rust_files(crate):
            lines = (line.split("//")[0] for line in path.read_text().splitlines())
            assert path.is_relative_to(kernels) or not any(code.search(line) for line in lines), path


@pytest.mark.parametrize("crate", ["moe_router", "model", "train"])
def test_the_upper_floors_forbid_unsafe_code(crate: str) -> None:
    assert "#![forbid(unsafe_code)]" in (ROOT / "crates" / crate / "src" / "lib.rs").read_text()


def test_the_workspace_has_no_default_members_and_no_root_package() -> None:
    manifest = (ROOT / "Cargo.toml").read_text()
    assert not re.search(r"^default-members|^\[package\]", manifest, re.MULTILINE)
