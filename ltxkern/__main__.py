"""`python -m ltxkern` is the command `ltxkern`."""

import sys

from ltxkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
