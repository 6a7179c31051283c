"""`python -m jlora` is the console."""

import sys

from jlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
