"""`python -m himoe` is the command line `himoe`."""

import sys

from himoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
