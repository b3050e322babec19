"""Files and folders that are whole or not there, without locks. Standard library only.

An output is written under a hidden name of its own, flushed to disk and renamed. Two processes that
make the same result do it twice and rename equal bytes. What a killed process left is removed by
the next one that writes there.
"""

import errno
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# .<name>.<host>-<process>-<random>.partial
PARTIAL = re.compile(r"\..+\.(?P<host>[^/]+)-(?P<process>\d+)-[0-9a-f]{8}\.partial")
SECONDS_UNTIL_STALE = 24 * 3600.0  # another host's left-over counts as one from then on


@contextmanager
def atomic_path(path: Path, hidden_in: Path | None = None) -> Iterator[Path]:
    """Yield a hidden path to write a file or a folder at; rename it to `path` when all is written.

    Parameters
    ----------
    path : Path
        Its folder is made if missing; what is there already is replaced. A folder that was not
        there at the beginning is another process': that one stays, so its readers never miss it.
    hidden_in : Path, optional
        Folder on the same file system that no reader lists; by default that of `path`.

    Raises
    ------
    OSError
        Of the system, always with a file name (a full disk names none).
    """
    folder = hidden_in or path.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    remove_left_overs(folder)
    was_there = path.exists()
    own = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial = folder / f".{path.name}.{own}.partial"
    try:
        yield partial
        for written in [*sorted(partial.rglob("*")), partial]:
            _flush(written)
        _rename(partial, path, was_there)
        _flush(path.parent)
    except OSError as error:
        if error.filename is None or error.filename == str(partial):
            error.filename = str(path)
        raise
    finally:
        _remove(partial)


def atomic_write(path: Path, data: bytes | str, hidden_in: Path | None = None) -> None:
    """Write a file whole or not at all; text is UTF-8 whatever the locale (see `atomic_path`)."""
    with atomic_path(path, hidden_in) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def folder_beside(folder: Path) -> Path:
    """Return the nearest folder, on the same file system, that the readers of `folder` do not list.

    The folder's parent (of the folder itself, where its name is a symbolic link); the folder where
    that is another file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parent = folder.resolve().parent
    return parent if parent.stat().st_dev == folder.stat().st_dev else folder


def remove_left_overs(folder: Path) -> None:
    """Remove what killed processes left in a folder; what a living one writes stays."""
    for path in list(folder.glob(".*.partial")):
        form = PARTIAL.fullmatch(path.name)
        if form and _is_left_over(path, form["host"], int(form["process"])):
            _remove(path)


def _is_left_over(path: Path, host: str, process: int) -> bool:
    """Tell whether nobody writes at a hidden path any more."""
    if host == socket.gethostname() and os.name == "posix":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # there, and somebody else's
            pass
    with suppress(FileNotFoundError):
        return time.time() - path.lstat().st_mtime > SECONDS_UNTIL_STALE
    return False


def _rename(partial: Path, path: Path, replace: bool) -> None:
    """Rename to `path`; a folder that is there is moved aside first, or kept if not `replace`."""
    while True:
        try:
            os.replace(partial, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not partial.is_dir():
                raise
        if not replace:
            return
        aside = partial.with_name(f".old{partial.name}")
        with suppress(FileNotFoundError):  # another process has just moved it
            os.replace(path, aside)
        _remove(aside)


def _remove(path: Path) -> None:
    """Remove a file or a folder, whoever else may be removing it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file or a folder to disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, on some systems
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(descriptor)


def to_json(value: object) -> str:
    """Return the JSON text of `value`, the same for equal values."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
