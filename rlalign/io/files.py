"""Files that are replaced whole or not at all."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlalign.hosts import fetch


def fingerprint(tree: Any) -> str:
    """SHA-256 of the bytes of every array of a tree, in its order: equal for bitwise equal parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(fetch(leaf)).tobytes())
    return digest.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces a file: readers, and a restart after a kill, see the old content or the new one, never a part.

    Args:
      path: in an existing folder.
      content: a text is written as UTF-8; what UTF-8 cannot hold (a lone surrogate) becomes "?".
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", errors="replace"))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file, or the renames inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
