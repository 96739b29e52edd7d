"""The experiments' pages: options and run files, places to fill and their commands, links and their files."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest

import moe_lab
from moe_lab.options import OPTIONS

HOME = Path(__file__).resolve().parent.parent / "experiments"
PAGES = sorted(HOME.glob("**/README.md"))


def test_every_option_and_its_run_files_are_on_the_page_of_its_stage() -> None:
    for option in OPTIONS:
        page = (HOME / f"stage{option.name[0]}" / "README.md").read_text()
        assert f"| {option.name} |" in page
        for name in option.runs:
            assert f"(../{name}.toml)" in page
            assert moe_lab.Run.load(name).name == name
            assert moe_lab.Run.load(str(HOME / f"{name}.toml")).diff(moe_lab.Run.load(name)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_places_are_filled_by_what_the_command_prints_and_by_its_figures(tmp_path: Path) -> None:
    sys.path.insert(0, str(HOME))
    try:
        import fill  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(HOME))
    text = "".join(page.read_text() for page in PAGES)
    assert len(fill.PLACE.findall(text)) == text.count("<!-- fill:") == text.count("<!-- end -->") >= 5
    page = tmp_path / "README.md"
    elsewhere = text.replace("runs/", f"{tmp_path}/none/")
    assert fill.PLACE.sub(partial(fill.filled, page), elsewhere) == elsewhere
    runs = tmp_path / "runs"
    (runs / "plots").mkdir(parents=True)
    (runs / "plots" / "loss.png").write_bytes(b"figure")
    fill.moe_lab = lambda verb, *_: "| new |\n" if verb == "table" else ""
    text = f"a\n<!-- fill: python -m moe_lab table {runs} --markdown -->\nold\n<!-- end -->\nb"
    new = fill.PLACE.sub(partial(fill.filled, page), text)
    assert "old" not in new
    assert f"-->\n\n| new |\n\n![{fill.CAPTIONS['loss']}](loss.png)\n\n<!-- end -->\nb" in new
    assert (tmp_path / "loss.png").read_bytes() == b"figure"
    again = text.replace("old", f"![{fill.CAPTIONS['loss']}](loss.png)") + text
    assert fill.PLACE.sub(partial(fill.filled, page), again).count("](runs_loss.png)") == 1
    assert (tmp_path / "runs_loss.png").exists()
