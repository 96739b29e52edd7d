"""Fills the pages of experiments/: between `<!-- fill: COMMAND -->` and `<!-- end -->` come what the command prints and
the figures of its directory, which are copied beside the page.

Where the directory is not there, the place stays as it is. To be called from the root: `python experiments/fill.py` for
all pages, or with the names of their folders.
"""

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

PAGES = sorted(Path(__file__).parent.glob("**/README.md"))
PLACE = re.compile(r"(<!-- fill: python -m moe_lab table (\S+) --markdown -->\n).*?(<!-- end -->)", re.DOTALL)
CAPTIONS = {
    "loss": "Loss over epochs, mean over the seeds, above the entropy floor of the data",
    "experts": "Experts per token over epochs",
    "l0": "Gradient norm at the embedding output over epochs",
    "text_loss": "Held-out loss of the models on a text, mean over the seeds",
    "text_experts": "Experts per token of the models on a text",
    "sweep": "Thresholds against loss and against experts per token",
}


def filled(page: Path, place: re.Match[str]) -> str:
    runs = Path(place[2])
    if not runs.is_dir():
        return place[0]
    print(f"{page}: {runs}")
    moe_lab("plot", place[2])
    table = moe_lab("table", place[2], "--markdown")
    lines = figures(runs, page.parent, place.string[: place.start()])
    return f"{place[1]}\n{table.strip()}\n{lines}\n{place[3]}"


def moe_lab(*arguments: str) -> str:
    command = [sys.executable, "-m", "moe_lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def figures(runs: Path, folder: Path, above: str) -> str:
    """Copies the figures that have a caption beside the page; their lines. A name above gets that of the runs."""
    lines = []
    for name, caption in CAPTIONS.items():
        if (plot := runs / "plots" / f"{name}.png").exists():
            copy = f"{runs.name}_{plot.name}" if f"]({plot.name})" in above else plot.name
            shutil.copy(plot, folder / copy)
            lines.append(f"\n![{caption}]({copy})\n")
    return "".join(lines)


def main(folders: list[str]) -> None:
    for page in [page for page in PAGES if not folders or page.parent.name in folders]:
        page.write_text(PLACE.sub(partial(filled, page), page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
