"""``python -m skd`` is the command ``skd``."""

import sys

from skd.cli import main

if __name__ == "__main__":
    sys.exit(main())
