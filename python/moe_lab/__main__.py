"""`python -m moe_lab VERB`: hands the command line to cli.main."""

import sys

from moe_lab import cli, verbs  # noqa: F401 (verbs puts its own behind those of cli)

if __name__ == "__main__":
    sys.exit(cli.main())
