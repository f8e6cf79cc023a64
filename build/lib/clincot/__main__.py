"""`python -m clincot`: the same as the console script `clincot`."""

from __future__ import annotations

from clincot.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
