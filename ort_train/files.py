"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: matplotlib picks the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def new_folder_obstacle(folder: Path) -> str | None:
    """Why a folder can't be written elsewhere and then get this name; None: it can.

    Args:
        folder: absolute, without links: a rename replaces a link, not what it stands for.
    """
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            return "is not an empty folder, and nothing is overwritten: name a new one"
        if folder.is_mount():
            return (
                "is where a disk is mounted, and what is written gets its name by a rename when it "
                "is whole: name a new folder in it"
            )
    return parent_obstacle(folder)


def parent_obstacle(path: Path) -> str | None:
    """Why nothing can be made at a path; None: it can."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return f"can't be made, as {str(parent)!r} is no folder: name another one"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"can't be made, as nothing can be written into {str(parent)!r}: name another one"
    return None
