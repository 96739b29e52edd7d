"""Fills experiments/README.md: between `<!-- fill: COMMAND -->` and `<!-- end -->` comes what the command prints.

Where its directory is not there, the place stays as it is. To be called from the root: `python experiments/fill.py`.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")
PLACE = re.compile(r"(<!-- fill: python (-m moe_lab table (\S+) --markdown) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(place: re.Match[str]) -> str:
    if not Path(place[3]).is_dir():
        return place[0]
    print(f"python {place[2]}")
    command = [sys.executable, *shlex.split(place[2])]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"{place[1]}\n{table.strip()}\n\n{place[4]}"


def main() -> None:
    PAGE.write_text(PLACE.sub(filled, PAGE.read_text()))


if __name__ == "__main__":
    main()
