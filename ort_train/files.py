"""Files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ort_train.errors import ConfigError


def expanded(path: str | Path) -> Path:
    """The path with its leading ~ or ~user written out.

    Raises:
        ConfigError: where nobody knows that home, as in a container whose user has no name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{str(path)!r} starts in a home folder that isn't known here: write the whole path, "
            "or set HOME"
        ) from None


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


@contextmanager
def temporary_beside(out: Path, what: str) -> Iterator[Path]:
    """A folder on the disk of `out`, removed at the end; so are those that killed processes left.

    A folder is locked for as long as its process lives, so that others know which are left over.

    Args:
        out: what is to be written in the end; the folder's name begins as its does.
        what: the folder is for.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*-locked"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = out.with_name(f".{out.name}.{what}-{os.getpid()}-{secrets.token_hex(2)}-locked")
    folder.mkdir()
    try:
        with _locked(folder, is_needed=False):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets the name `out` when the block ends without an error.

    Raises:
        FileExistsError: another process has written to `out` meanwhile.
    """
    with temporary_beside(out, "incomplete") as folder:
        yield folder
        try:
            os.rename(folder, out)  # only an empty folder gives way
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError("another process has written there meanwhile") from error


@contextmanager
def _locked(folder: Path, is_needed: bool = True) -> Iterator[None]:
    """Hold a folder's lock.

    Raises:
        OSError: another process holds it; or the file system has no locks, and one is needed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if is_needed:
                raise
        yield
    finally:
        os.close(handle)


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
