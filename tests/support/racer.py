"""A process that moves the champion's pointer: it reads, says so, waits for a line, and only then writes.

Usage: python -m tests.support.racer STORE MANIFEST OVER NAME; prints "read", then "won" or what it was told.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.open import open_store


def main() -> None:
    url, manifest, over, name = sys.argv[1:]
    store = open_store(url)
    replace = store.replace

    def held(key: str, content: bytes, tag: str) -> str:
        print("read", flush=True)
        sys.stdin.readline()
        return replace(key, content, tag)

    store.replace = held  # type: ignore[method-assign]
    to = Manifest.model_validate_json(Path(manifest).read_text())
    try:
        champion.promote_champion(store, to, over=over, by=name, reason="won")
    except champion.ChampionMoved as error:
        print(error)
    else:
        print("won")


if __name__ == "__main__":
    main()
