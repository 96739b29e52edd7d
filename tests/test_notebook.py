"""The notebooks are text without outputs, and every cell of theirs runs on a real run."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.slow
def test_the_story_of_specialisation_holds_on_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LAB_OUT", str(tmp_path))
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(ROOT / "experiments" / "specialization.ipynb")):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
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
