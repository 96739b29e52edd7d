"""`python -m moe_lab VERB`: hands the command line to cli.main."""

import sys

from moe_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
