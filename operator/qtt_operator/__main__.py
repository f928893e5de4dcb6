"""`qtt`, `kubectl qtt` and `python -m qtt_operator`: the command line."""

from __future__ import annotations

import sys

from qtt_operator.cli import main

if __name__ == "__main__":
    sys.exit(main())
