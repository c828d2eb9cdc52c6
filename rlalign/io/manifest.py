"""What a saved folder consists of: every file with its size and CRC-32, written last and compared before it is read.

A file that the disk does not give back (a bad sector) is damage like any other: it is told, and no OSError leaves.
"""

import json
import os
import zlib
from pathlib import Path

from rlalign.io.files import sync, write_atomic

MANIFEST = "files.json"


def write_manifest(root: Path) -> None:
    """Lists the files below a folder that is otherwise complete, as they are read back now; all of it is then on disk.

    Raises OSError where a file cannot be read back or put on disk.
    """
    for path in root.rglob("*"):  # Orbax syncs the arrays' data at most
        sync(path)
    saved = {p.relative_to(root).as_posix(): [p.stat().st_size, _crc32(p)] for p in _files(root)}
    write_atomic(root / MANIFEST, json.dumps(saved, indent=0))


def missing(root: Path) -> str | None:
    """What is wrong with a folder by names and sizes alone, which costs no read of the files; None if nothing."""
    try:
        saved = json.loads((root / MANIFEST).read_bytes())
        sizes = {name: size for name, (size, _) in saved.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing" if os.path.isdir(root) else "there is no such checkpoint"
    except OSError as error:
        return _unreadable(MANIFEST, error)
    except ValueError:
        return f"{MANIFEST} is truncated or damaged"
    except (AttributeError, TypeError):
        return f"{MANIFEST} is damaged, or of an earlier version, without checksums"
    try:
        found = {path.relative_to(root).as_posix(): path.stat().st_size for path in _files(root)}
    except OSError as error:
        return _unreadable(os.path.relpath(error.filename or root, root), error)
    for name, size in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes instead of {size}"
    for name in found:
        # No checksum would vouch for it; what systems leave lying about (.DS_Store, .nfs) is read by nobody.
        if name not in sizes and not Path(name).name.startswith("."):
            return f"{name} is not listed in {MANIFEST}"
    return None


def changed(root: Path) -> str | None:
    """The first file that cannot be read, or whose bytes are not those that were saved; where nothing is `missing`."""
    name = MANIFEST
    try:
        for name, (_, checksum) in json.loads((root / MANIFEST).read_bytes()).items():
            if _crc32(root / name) != checksum:
                return f"{name} is not what was saved (its CRC-32 differs)"
    except OSError as error:
        return _unreadable(name, error)
    return None


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} cannot be read ({error.strerror or error})"


def _files(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*")) if path.is_file() and path != root / MANIFEST]


def _crc32(path: Path, *, chunk: int = 1 << 20) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            checksum = zlib.crc32(block, checksum)
    return checksum
