"""Files that are either whole or not there: atomic writes, and the scores of a level on disk.

Everything is written below ROOT/.sinbad_partial/<run>/ and renamed into place. A run holds a lock
on its folder there, so what a killed run left is told from what a living one writes, and swept.
"""

import fcntl
import io
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from command_line import UserError

PARTIAL = ".sinbad_partial"
OF_A_RUN = re.compile(r".+-\d+-[0-9a-f]{8}")  # host, process, random: nothing else is swept
LABELS_FILE = "lbl.npy"
UPSTREAM_LABELS_FILE = "lbl.py.npy"
# Without working locks (some network file systems) a folder this old counts as left behind.
SECONDS_UNTIL_STALE = 24 * 3600.0
TRIES = 100  # at a folder that others remove or replace at the same moment

Run = dict[str, Any]


@contextmanager
def partial_folder(root: Path) -> Iterator[Path]:
    """Yield a fresh folder below `root`/.sinbad_partial, removed at the end; sweep the others."""
    sweep(root)
    folder = _make_folder(root / PARTIAL)
    try:
        with open(folder / "unlocked", "w") as lock:
            _try_lock(lock.fileno())
            os.rename(folder / "unlocked", folder / "lock")  # no sweeper meets it without its lock
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_if_empty(folder.parent)


def sweep(root: Path) -> None:
    """Remove what killed runs left below `root`/.sinbad_partial."""
    parent = root / PARTIAL
    if parent.is_dir():
        _sweep(parent)
        _remove_if_empty(parent)


def _make_folder(parent: Path) -> Path:
    """Make a folder of this run's own below `parent`, which other runs remove when it is empty."""
    folder = parent / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    parent.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        with suppress(FileExistsError):
            parent.mkdir()
        with suppress(FileNotFoundError):
            folder.mkdir()
            break
    else:
        folder.mkdir()
    return folder


def _try_lock(descriptor: int) -> bool | None:
    """Return whether the lock was free, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(parent: Path) -> None:
    """Remove what killed runs left below `parent`."""
    try:
        folders = [path for path in parent.iterdir() if OF_A_RUN.fullmatch(path.name)]
    except FileNotFoundError:  # another run has just removed it
        return
    for folder in folders:
        age = 0.0
        try:
            age = time.time() - folder.stat().st_mtime
            with open(folder / "lock") as lock:
                free = _try_lock(lock.fileno())
        except FileNotFoundError:  # a run between mkdir and lock, or one that died there
            free = None
        except OSError:
            continue
        if free or (free is None and age > SECONDS_UNTIL_STALE):
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder unless another run is using it."""
    try:
        folder.rmdir()
    except OSError:
        return


def write_atomic(path: Path, data: bytes, root: Path | None = None) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    path : Path
        Its folder is made if missing.
    data : bytes
    root : Path, optional
        Folder on the same file system whose .sinbad_partial holds the unfinished file; by default
        the file's own folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), partial_folder(root or path.parent) as folder:
        unfinished = folder / path.name
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error that names no file (a full disk does not) name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def to_json(value: object) -> str:
    """Return the JSON text of `value`, the same for equal values."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class LevelScores:
    """One file of scores: a level, a crop grid, a repetition.

    Attributes
    ----------
    test, valid : (n_crops, n_images), float64, higher = more anomalous
    labels : (n_test,), 0 good, 1 anomalous
    image_paths : the test images, relative to the class folder; empty in the authors' files
    run : what determines the numbers; empty in the authors' files
    """

    test: NDArray[np.float64]
    valid: NDArray[np.float64]
    labels: NDArray[np.float64]
    image_paths: list[str]
    run: Run


def save_scores(path: Path, scores: LevelScores, root: Path) -> None:
    """Write a file of scores and, before it, the labels beside it (equal runs: equal bytes).

    The authors' labels are removed: their ensemble script takes any other file for the labels.
    """
    labels_path = path.parent / LABELS_FILE
    buffer = io.BytesIO()
    np.save(buffer, scores.labels)
    if not labels_path.exists() or labels_path.read_bytes() != buffer.getvalue():
        write_atomic(labels_path, buffer.getvalue(), root)
    labels_path.with_name(UPSTREAM_LABELS_FILE).unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        anom_map_test=scores.test,
        anom_map_valid=scores.valid,
        image_paths=np.array(scores.image_paths, dtype=np.str_),
        run=np.array(to_json(scores.run)),
    )
    write_atomic(path, buffer.getvalue(), root)


def read_array(path: Path) -> NDArray[Any]:
    """Read a .npy file whole; a damaged one is an error that names it."""
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever Python's own parser does
        raise UserError(
            f"{path} must be a whole .npy file, got a damaged one ({error}); delete it and run the "
            "step that writes it again"
        ) from error


def read_scores(path: Path) -> LevelScores:
    """Read a file of scores, ours or the authors', with the labels beside it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            test, valid = archive["anom_map_test"], archive["anom_map_valid"]
            image_paths = archive["image_paths"].tolist() if "image_paths" in archive else []
            run = json.loads(str(archive["run"])) if "run" in archive else {}
        _check_scores(path, test, valid, run)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a cut zip raises BadZipFile, zlib.error, KeyError, ValueError, ...
        raise UserError(
            f"{path} must be a whole file of scores, got a damaged one ({error}); delete it and "
            "run sinbad_single_layer.py again"
        ) from error
    labels_path = path.parent / LABELS_FILE
    if not labels_path.exists():
        labels_path = path.parent / UPSTREAM_LABELS_FILE
    if not labels_path.exists():
        raise UserError(
            f"{path.parent} must hold {LABELS_FILE} (or {UPSTREAM_LABELS_FILE}), got neither; run "
            "sinbad_single_layer.py with --overwrite"
        )
    labels = read_array(labels_path)
    if labels.shape != test.shape[1:]:
        raise UserError(
            f"{labels_path} must hold {test.shape[1]} labels as {path.name} has test images, got "
            f"{labels.size}; run sinbad_single_layer.py with --overwrite"
        )
    return LevelScores(test, valid, labels, image_paths, run)


def _check_scores(path: Path, test: NDArray[Any], valid: NDArray[Any], run: object) -> None:
    """Refuse arrays that are no scores of one crop grid, or not of the grid the name tells."""
    for name, array in (("anom_map_test", test), ("anom_map_valid", valid)):
        if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    n_crops = re.match(r"(\d+)_crop_", path.name)
    expected = int(n_crops[1]) if n_crops else len(test)
    if not len(test) == len(valid) == expected or math.isqrt(len(test)) ** 2 != len(test):
        raise ValueError(f"{len(test)} and {len(valid)} crops in a file of {expected}")
    if not isinstance(run, dict) or not isinstance(run.get("settings", {}), dict):
        raise ValueError("run is no record of settings")


def is_finished(path: Path, run: Run) -> bool:
    """Tell whether a file of scores is there already, made with the same settings.

    Raises
    ------
    UserError
        If it is there with other settings; names the first that differs.
    """
    labels = [path.with_name(name) for name in (LABELS_FILE, UPSTREAM_LABELS_FILE)]
    if not path.exists() or not any(map(Path.exists, labels)):
        return False
    found, wanted = read_scores(path).run.get("settings"), run["settings"]
    if found is None:
        raise UserError(
            f"{path} must be a file of this collection, got one without settings (the authors' "
            "own?); choose another --version_name or --results_dir, or pass --overwrite"
        )
    difference = first_difference(found, wanted)
    if difference is not None:
        name, old, new = difference
        raise UserError(
            f"{path} was made with {name} {old}, now {name} is {new}; choose another "
            "--version_name, or pass --overwrite to replace it"
        )
    return True


def first_difference(found: Run, wanted: Run) -> tuple[str, object, object] | None:
    """Return (name, found, wanted) of the first setting that differs, None if all are equal."""
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            return name, found.get(name), wanted.get(name)
    return None
