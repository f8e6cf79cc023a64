"""A process that moves the champion pointer, and waits for a line on stdin between its read and its write.

Usage: python -m tests.support.racer STORE MANIFEST OVER NAME. It prints "read", then "won" or the error.
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

    def wait_and_replace(key: str, content: bytes, tag: str) -> str:
        print("read", flush=True)
        sys.stdin.readline()
        return replace(key, content, tag)

    store.replace = wait_and_replace  # type: ignore[method-assign]
    to = Manifest.model_validate_json(Path(manifest).read_text())
    try:
        champion.promote_champion(store, to, over=over, by=name, reason="won")
    except champion.ChampionMoved as error:
        print(error)
    else:
        print("won")


if __name__ == "__main__":
    main()
