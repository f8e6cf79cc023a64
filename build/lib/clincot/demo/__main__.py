"""`python -m clincot.demo`: the same as `clincot demo`."""

from __future__ import annotations

from clincot.demo.walkthrough import main

if __name__ == "__main__":
    raise SystemExit(main())
