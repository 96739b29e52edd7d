"""`python -m moe_lab VERB`: hands the command line to cli.main."""

import sys

from moe_lab import verbs  # noqa: F401 (puts its verbs beside those of cli)
from moe_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
