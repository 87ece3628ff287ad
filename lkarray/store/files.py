"""Files and folders as the operating system has them: durable, private, and never someone else's.

A file is on the disk when it was flushed, and still there after a power cut when the folders that
lead to it were, too. What lkarray keeps for itself (locks, files that are being written) is made
so that nobody else reads it and no link at its place is followed.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from lkarray.errors import StoreError

_PRIVATE = 0o600
_AT_ONCE = 16


def fsync(path: Path) -> None:
    """Make the operating system put a file or the entries of a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_all(files: Iterable[Path], root: Path) -> None:
    """Flush files below ``root``, and each folder from theirs up to the one that holds ``root``.

    Several at once: the file system then writes its journal for all of them together.
    """
    files = list(files)
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(root)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fsync, [*files, *sorted(folders | {root})]))
    with suppress(PermissionError):  # a folder that may be entered, but not read
        fsync(root.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, and flush the entries of the new ones."""
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(made):
        with suppress(PermissionError):  # a folder that may be entered, but not read
            fsync(path.parent)


def open_lock(path: Path) -> int:
    """Open the file of a lock, made if it is missing, and return its descriptor.

    Raises
    ------
    StoreError
        It belongs to another user, who alone may open it; or there is a link, a folder or
        something else that is no file of lkarray's own.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, _PRIVATE)
    except PermissionError:
        owner = _owner(path)
        if owner is None:
            raise
        raise StoreError(
            f"{path} belongs to {owner}, and only they may open it; use a path of your own, or, if "
            "none of their processes is writing there, ask them to remove that file"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise
        raise _no_lock(path, _kind(os.lstat(path))) from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        kind = _kind(status) if not stat.S_ISREG(status.st_mode) else "a file of several names"
        raise _no_lock(path, kind)
    return handle


def _no_lock(path: Path, kind: str) -> StoreError:
    return StoreError(
        f"{path} is {kind}, where lkarray keeps a lock; nothing was touched. Remove it, or choose "
        "another path"
    )


def _kind(status: os.stat_result) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")


def _owner(path: Path) -> str | None:
    """Return who owns a file, if it is not this process."""
    try:
        owner = os.lstat(path).st_uid
    except OSError:
        return None
    if owner == os.geteuid():
        return None
    try:
        return f"user {pwd.getpwuid(owner).pw_name}"
    except KeyError:
        return f"user {owner}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside ``path``, flushed and put in its place at the end.

    A failure or kill leaves what was at ``path``. The new file is this user's alone while it is
    written; a link at its name, or at ``path``, is replaced and not followed.

    Raises
    ------
    StoreError
        There is a folder, a pipe or the like at ``path`` or at the new file's name.
    """
    new = path.with_name(f".{path.stem}.part{path.suffix}")  # the suffix tells writers the format
    for place in (path, new):
        with suppress(FileNotFoundError):
            mode = os.lstat(place).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise StoreError(
                    f"{place} is {_kind(os.lstat(place))}, where a file is to be written; nothing "
                    "was touched. Remove it, or choose another path"
                )
    new.unlink(missing_ok=True)  # of a run that was killed
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _PRIVATE))
    try:
        yield new
        fsync(new)
        os.chmod(new, _mode(path))
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    with suppress(PermissionError):
        fsync(path.absolute().parent)


def _mode(path: Path) -> int:
    """Return the permissions that a file has, or that a new one gets."""
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            return stat.S_IMODE(status.st_mode)
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def write_text(path: Path, text: str) -> None:
    """Write a text file, in one move."""
    with replacing(path) as new:
        new.write_text(text, "utf8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, in one move."""
    with replacing(path) as new:
        new.write_bytes(content)
