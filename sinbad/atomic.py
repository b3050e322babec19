"""Atomic writes of files and folders, without locks. Standard library only.

An output is written under a hidden name of its own, flushed to disk and renamed. The process that
renames an output also removes hidden files left by killed or slower runs of the same result. A
slower run whose hidden file is gone goes on with the output it finds.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_TRIES = 100  # of a write that other runs cancel
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # file descriptors


@contextmanager
def atomic_path(path: Path, hidden_in: Path | None = None) -> Iterator[Path]:
    """Yield a hidden path to create a file or a folder at; rename it to `path` when complete.

    Parameters
    ----------
    path : Path
        Its folder is made if missing; what it names is replaced, through a symbolic link. A folder
        that another process has finished meanwhile stays, so its readers never miss it.
    hidden_in : Path, optional
        Folder on the same file system that no reader lists; by default that of `path`.

    Raises
    ------
    OSError
        Of the system, always with a file name (a full disk names none).
    """
    target, prefix = _locate(path, hidden_in)
    for folder in (target.parent, prefix.parent):
        folder.mkdir(parents=True, exist_ok=True)
    before = _identity(target)
    hidden = Path(f"{prefix}{secrets.token_hex(4)}.partial")
    try:
        yield hidden
        for written in (*hidden.rglob("*"), hidden):
            _flush(written)
        with suppress(FileNotFoundError):  # another process has just moved it
            if hidden.is_dir() and target.is_dir() and _identity(target) == before:
                target.rename(f"{hidden}.old")
        os.replace(hidden, target)
        _flush(target.parent)
        remove_hidden(path, hidden_in)
    except OSError as error:
        if str(error.filename or hidden).startswith(str(hidden)):
            is_late = error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
            if is_late and (error.filename2 or not os.path.lexists(hidden)) and target.exists():
                if _identity(target) != before:
                    return  # a faster run has finished the output
                text = "another run removed what this one was writing; run it again alone"
                raise OSError(errno.ECANCELED, text, str(path)) from error
            error.filename = str(path)
        raise
    finally:
        _remove(hidden)


def atomic_write(path: Path, data: bytes | str, hidden_in: Path | None = None) -> None:
    """Write a file atomically (see `atomic_path`), or as a shell does into a device or a pipe.

    Text is UTF-8 whatever the locale.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    stream = _find_stream(path)
    if stream is None:
        for _ in range(MAX_TRIES):
            try:
                with atomic_path(path, hidden_in) as hidden:
                    hidden.write_bytes(content)
                return
            except OSError as error:  # another run has just tidied up; what is written is at hand
                if error.errno != errno.ECANCELED:
                    raise
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), str(path))
    print(end="", flush=True)  # what was printed before comes first
    with _named(path), open(stream, "wb", closefd=stream is path) as file:
        file.write(content)


def check_writable(path: Path) -> None:
    """Raise the system's error if a file cannot be written later; nothing is made."""
    with _named(path):
        if _find_stream(path) is None:
            target, _ = _locate(path)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            folder = next(folder for folder in target.parents if folder.exists())
            tempfile.TemporaryFile(dir=folder, prefix=".").close()


def hidden_folder(folder: Path) -> Path:
    """Return the nearest folder, on the same file system, that readers of `folder` do not list.

    The folder's parent (of the folder itself, where its name is a symbolic link); the folder where
    that is another file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parent = folder.resolve().parent
    return parent if parent.stat().st_dev == folder.stat().st_dev else folder


def remove_hidden(path: Path, hidden_in: Path | None = None) -> None:
    """Remove what killed and slower runs left of a finished output."""
    _, prefix = _locate(path, hidden_in)
    for hidden in prefix.parent.glob(f"{glob.escape(prefix.name)}*"):
        _remove(hidden)


def to_json(value: object) -> str:
    """Return the JSON text of `value`, the same for equal values."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)


def _locate(path: Path, hidden_in: Path | None = None) -> tuple[Path, Path]:
    """Return where an output lies, and how the paths of its hidden files begin.

    The digest tells outputs of one file name apart whose hidden files share a folder.
    """
    target = Path(os.path.realpath(path))
    beside = hidden_in is None or path.is_symlink()  # a link may lead to another file system
    folder = target.parent if beside else hidden_in.resolve()
    digest = hashlib.sha256(os.fsencode(os.path.relpath(target, folder))).hexdigest()
    return target, folder / f".{target.name[:50]}.{digest[:12]}-"


def _find_stream(path: Path) -> int | Path | None:
    """Return what to open for a path that is no file to replace: stdout, stderr, device or pipe."""
    if str(path) in STREAMS:
        return STREAMS[str(path)]
    return None if path.is_file() or path.is_dir() or not path.exists() else path


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells an output from the one that another process puts in its place."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a full disk names no file
        error.filename = str(path)
        raise


def _remove(hidden: Path) -> None:
    """Remove a file, or a folder at once: a slower run may still be writing in it."""
    with suppress(OSError):  # another process removes it
        if hidden.is_dir():
            shutil.rmtree(hidden.rename(f"{hidden}.old"), ignore_errors=True)
        else:
            hidden.unlink()


def _flush(path: Path) -> None:
    """Flush a file or a folder to disk, where the system can."""
    with suppress(PermissionError, FileNotFoundError):  # a folder on Windows; removed meanwhile
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
        finally:
            os.close(descriptor)
