"""The notebooks are text without outputs, and every cell of theirs runs on a real run."""

import json
from pathlib import Path
from typing import Any

import pytest

from runs import Story, write

ROOT = Path(__file__).resolve().parent.parent
STORY = ROOT / "experiments" / "specialization.ipynb"
NOTEBOOKS = sorted(ROOT.glob("experiments/**/*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells(path)}) == len(cells(path))


def executed(path: Path, most: int | None = None) -> dict[str, Any]:
    """The names that a notebook leaves behind, or its first so many cells of code."""
    names: dict[str, Any] = {}
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    for number, cell in enumerate(code[:most]):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


def test_the_story_may_be_that_of_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path / "real", Story(epochs=2, trained=2))
    monkeypatch.setenv("MOE_LAB_RUN", str(run))
    monkeypatch.setenv("MOE_LAB_OUT", str(tmp_path / "kept"))
    names = executed(STORY, 2)
    assert names["shown"] == "a run that was given: hand-made, seed 1, completed, loss 0.2100"
    assert names["out"] == run
    assert [path.name for path in tmp_path.iterdir()] == ["real"]


@pytest.mark.slow
def test_the_story_of_specialisation_holds_on_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LAB_OUT", str(tmp_path))
    monkeypatch.delenv("MOE_LAB_RUN", raising=False)
    names = executed(STORY)
    assert names["shown"].startswith("a quick run of this notebook: stage1, seed ")
    assert set(names["told"]["view"]) == {"form", "place", "part", "sentence", "domain"}
    for view in ("form", "domain"):
        known = names["told"].filter(names["pl"].col("view") == view)
        assert known["p"].max() <= 0.05, f"experts know the {view} of a token"
    assert set(names["domains"]["class"]) == {"facts", "chat"}
    assert (names["scores"]["score"] > names["scores"]["shuffled"]).all()
    last = names["settled"].filter(names["pl"].col("step") == names["settled"]["step"].max())
    assert last["agreement"].to_list() == [1.0] * last.height
    assert (names["settled"]["agreement"] > names["settled"]["chance"]).all()
    for loss in ("facts_loss", "chat_loss"):
        assert names["again"][loss] == names["live"][loss]
        assert names["early_routed_late"][loss] != names["early"][loss]
    left = names["left"].rows(named=True)
    whole = {row["domain"]: row["loss"] for row in left if row["experts"] == "all"}
    alone = {row["domain"]: row["loss"] for row in left if row["experts"] == "own" and row["kept"] == 1}
    assert all(alone[domain] > whole[domain] for domain in ("facts", "chat")), "experts that are gone are missed"
    assert {"subsets.parquet", "saturation.csv", "lift_part.png", "lift_domain.png"} <= {
        path.name for path in names["paths"]
    }
