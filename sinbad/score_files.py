"""The files of scores on disk: one a level, crop grid and repetition, with what made it."""

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinbad import atomic, errors

LABELS_FILE = "lbl.npy"
UPSTREAM_LABELS_FILE = "lbl.py.npy"

Run = dict[str, Any]


@dataclass(frozen=True)
class LevelScores:
    """One file of scores: a level, a crop grid, a repetition.

    Attributes
    ----------
    test, valid : (n_crops, n_images), float64, higher = more anomalous
    labels : (n_test,), 0 good, 1 anomalous
    image_paths : the test images, relative to the class folder; empty in the authors' files
    run : {"settings": what determines the numbers, "made_with": versions and machine}; empty in the
        authors' files
    """

    test: NDArray[np.float64]
    valid: NDArray[np.float64]
    labels: NDArray[np.float64]
    image_paths: list[str]
    run: Run


def save_scores(path: Path, scores: LevelScores) -> None:
    """Write a file of scores and, before it, the labels beside it (equal runs: equal bytes).

    Where the authors' labels lie already and are equal, ours are not written beside them: their
    ensemble script takes any other file for the labels.
    """
    hidden_in = atomic.hidden_folder(path.parent)
    theirs = path.with_name(UPSTREAM_LABELS_FILE)
    if not theirs.exists():
        labels = io.BytesIO()
        np.save(labels, scores.labels)
        atomic.atomic_write(path.with_name(LABELS_FILE), labels.getvalue(), hidden_in)
    elif not np.array_equal(_read_labels(theirs), scores.labels):
        raise errors.UserError(
            f"{theirs} must hold the labels of these images, got others; choose another "
            "--version_name or --results_dir"
        )
    buffer = io.BytesIO()
    np.savez(
        buffer,
        anom_map_test=scores.test,
        anom_map_valid=scores.valid,
        image_paths=np.array(scores.image_paths, dtype=np.str_),
        run=np.array(atomic.to_json(scores.run)),
    )
    atomic.atomic_write(path, buffer.getvalue(), hidden_in)


def _read_labels(path: Path) -> NDArray[np.float64]:
    """Read a .npy file; a damaged one is an error that names it."""
    try:
        return np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever Python's own parser does
        raise errors.UserError(
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
        raise errors.UserError(
            f"{path} must be a whole file of scores, got a damaged one ({error}); delete it and "
            "run sinbad_single_layer.py again"
        ) from error
    places = (path.with_name(name) for name in (LABELS_FILE, UPSTREAM_LABELS_FILE))
    labels_path = next((place for place in places if place.exists()), None)
    if labels_path is None:
        raise errors.UserError(
            f"{path.parent} must hold {LABELS_FILE} (or {UPSTREAM_LABELS_FILE}), got neither; run "
            "sinbad_single_layer.py with --overwrite"
        )
    labels = _read_labels(labels_path)
    if labels.shape != test.shape[1:]:
        raise errors.UserError(
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
    """Tell whether a file of scores is present with the same settings; if so, tidy up beside it.

    Raises
    ------
    UserError
        If it is there with other settings; names the first that differs.
    """
    if not path.exists():
        return False
    found, wanted = read_scores(path).run.get("settings"), run["settings"]
    if found is None:
        raise errors.UserError(
            f"{path} must be a file of this collection, got one without settings (the authors' "
            "own?); choose another --version_name or --results_dir, or pass --overwrite"
        )
    difference = first_difference(found, wanted)
    if difference is not None:
        name, old, new = difference
        raise errors.UserError(
            f"{path} was made with {name} {old}, now {name} is {new}; choose another "
            "--version_name, or pass --overwrite to replace it"
        )
    for output in (path, path.with_name(LABELS_FILE)):
        atomic.remove_hidden(output, atomic.hidden_folder(path.parent))
    return True


def first_difference(found: Run, wanted: Run) -> tuple[str, Any, Any] | None:
    """Return (name, found, wanted) of the first setting that differs, None if all are equal."""
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            return name, found.get(name), wanted.get(name)
    return None
