"""The experiments' page: every option and run file is on it, every place to fill has its command, every link a file."""

import re
import sys
from pathlib import Path

import moe_lab
from moe_lab.options import OPTIONS

HOME = Path(__file__).resolve().parent.parent / "experiments"
PAGE = (HOME / "README.md").read_text()


def test_every_option_and_its_run_files_are_on_the_page() -> None:
    for option in OPTIONS:
        assert f"| {option.name} |" in PAGE
        for name in option.runs:
            assert f"({name}.toml)" in PAGE
            assert moe_lab.Run.load(name).name == name
            assert moe_lab.Run.load(str(HOME / f"{name}.toml")).diff(moe_lab.Run.load(name)) == []


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (HOME / target).exists(), target


def test_places_are_filled_by_what_the_command_prints(tmp_path: Path) -> None:
    sys.path.insert(0, str(HOME))
    try:
        import fill  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(HOME))
    places = fill.PLACE.findall(PAGE)
    assert len(places) == PAGE.count("<!-- fill:") == PAGE.count("<!-- end -->")
    elsewhere = PAGE.replace("runs/", f"{tmp_path}/none/")
    assert fill.PLACE.sub(fill.filled, elsewhere) == elsewhere
    text = f"a\n<!-- fill: python -m moe_lab table {tmp_path} --markdown -->\nold\n<!-- end -->\nb"
    told = type("Done", (), {"stdout": "| new |\n"})
    fill.subprocess = type("Fake", (), {"run": staticmethod(lambda *_, **__: told)})
    assert "old" not in (new := fill.PLACE.sub(fill.filled, text))
    assert "-->\n\n| new |\n\n<!-- end -->\nb" in new
