"""Files of scores: write, read, their record, and which of them may be ensembled."""

import functools
import io
import json
import logging
import math
import platform
import re
import subprocess
import textwrap
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from sinbad import __version__, atomic, crops, ensembles, errors, loco, settings
from sinbad_utils import Scores

log = logging.getLogger(__name__)

LABELS_FILE = "lbl.npy"
UPSTREAM_LABELS_FILE = "lbl.py.npy"
BACKBONE_FILE = re.compile(r"(\d+)_crop_anom_maps\.npz")
PIXEL_FILE = re.compile(r"(\d+)\.00_lvl_anom_maps\.npz")

# What must be equal among files that are ensembled, and in which files. Beside the settings:
# facts of the images, the weights, and how the images were preprocessed.
GRID_FILES, SUBSET_FILES = "files of one crop grid", "files of one test subset"
SCOPES = settings.ALL_FILES, settings.BACKBONE_FILES, settings.LEVEL_FILES, settings.RUN_FILES
EQUAL_IN = {scope: settings.names_equal_in(scope) for scope in SCOPES}
EQUAL_IN[settings.ALL_FILES] += ("pillow",)
EQUAL_IN[settings.BACKBONE_FILES] += ("weights_sha256", "numbers of crops")
EQUAL_IN[GRID_FILES] = ("crop_size_ratio",)
EQUAL_IN[SUBSET_FILES] = ("images_sha256", "n_images", "matrices", "labels", "image_paths")
EQUAL_IN[SUBSET_FILES] += ("number of validation images",)

Record = dict[str, Any]  # {"settings": what determines the scores, "made_with": versions, machine}


@dataclass(frozen=True)
class ScoreFile:
    """One file of scores: a level, a crop grid, a repetition.

    Attributes
    ----------
    level : pyramid level that it was written or read for
    test, valid : (n_crops, n_images), float64, higher = more anomalous
    labels : (n_test,), 0 good, 1 anomalous
    image_paths : the test images, relative to the category's folder; empty in the authors' files
    record : see `Record`; empty in the authors' files
    """

    path: Path
    level: int
    test: NDArray[np.float64]
    valid: NDArray[np.float64]
    labels: NDArray[np.float64]
    image_paths: list[str]
    record: Record

    @property
    def recorded(self) -> dict[str, Any]:
        """What determines the scores; empty in the authors' files."""
        return self.record.get("settings", {})

    @property
    def geometry(self) -> crops.Geometry | None:
        """Where the crops lie; None in the authors' files, or of their matrices."""
        recorded = self.recorded
        if not recorded.get("matrices"):
            return None
        names = "initial_res", "crop_size_ratio", "crop_num_edge"
        grid = crops.CropGrid(*(recorded[name] for name in names))
        return crops.Geometry(grid, (recorded["matrices"]["width"], recorded["matrices"]["height"]))


# ---------------------------------------------------------------- the record


@functools.cache
def environment_info(batch_size: int, device: torch.device) -> dict[str, object]:
    """Return versions, device, threads and git commit: they may change last bits, or nothing."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    on_gpu = device.type == "cuda"
    return {
        "batch_size": batch_size,
        "commit": commit,
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "machine": platform.machine(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "sinbad": __version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


# ---------------------------------------------------------------- files


def write_scores(file: ScoreFile) -> None:
    """Write a file of scores and, before it, the labels beside it (equal runs: equal bytes).

    Where the authors' labels lie already and are equal, ours are not written beside them: their
    ensemble script takes any other file for the labels.
    """
    hidden_in = atomic.hidden_folder(file.path.parent)
    upstream_labels = file.path.with_name(UPSTREAM_LABELS_FILE)
    if not upstream_labels.exists():
        labels, labels_path = io.BytesIO(), file.path.with_name(LABELS_FILE)
        np.save(labels, file.labels)
        if not labels_path.is_file() or labels_path.read_bytes() != labels.getvalue():
            atomic.atomic_write(labels_path, labels.getvalue(), hidden_in)
    elif not np.array_equal(_read_labels(upstream_labels), file.labels):
        raise errors.UserError(
            f"{upstream_labels} must hold the labels of these images, got others; choose another "
            "--version_name or --results_dir"
        )
    buffer = io.BytesIO()
    np.savez(
        buffer,
        anom_map_test=file.test,
        anom_map_valid=file.valid,
        image_paths=np.array(file.image_paths, dtype=np.str_),
        run=np.array(atomic.to_json(file.record)),
    )
    atomic.atomic_write(file.path, buffer.getvalue(), hidden_in)


def _read_labels(path: Path) -> NDArray[np.float64]:
    """Read a .npy file; a damaged one is an error that names it."""
    content = io.BytesIO(path.read_bytes())
    try:
        return np.load(content, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # a damaged header raises whatever Python's own parser does
        raise errors.UserError(
            f"{path} must be a complete .npy file, got a damaged one ({error}); delete it and run "
            "the step that writes it again"
        ) from error


def read_scores(path: Path, level: int) -> ScoreFile:
    """Read a file of a level's scores, ours or the authors', with the labels beside it."""
    content = io.BytesIO(path.read_bytes())  # here errors of the system show: none is damage
    try:
        with np.load(content, allow_pickle=False) as archive:
            test, valid = archive["anom_map_test"], archive["anom_map_valid"]
            image_paths = archive["image_paths"].tolist() if "image_paths" in archive else []
            record = json.loads(str(archive["run"])) if "run" in archive else {}
        _check_scores(path, test, valid, record)
    except MemoryError:
        raise
    except Exception as error:  # a cut zip raises BadZipFile, zlib.error, KeyError, ValueError, ...
        raise errors.UserError(
            f"{path} must be a complete file of scores, got a damaged one ({error}); delete it and "
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
    return ScoreFile(path, level, test, valid, labels, image_paths, record)


def _check_scores(path: Path, test: NDArray[Any], valid: NDArray[Any], record: object) -> None:
    """Refuse arrays that are no scores of one crop grid, or not of the grid in the file's name."""
    for name, array in (("anom_map_test", test), ("anom_map_valid", valid)):
        if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    n_crops = BACKBONE_FILE.fullmatch(path.name)
    expected = int(n_crops[1]) if n_crops else len(test)
    if not len(test) == len(valid) == expected or math.isqrt(len(test)) ** 2 != len(test):
        raise ValueError(f"{len(test)} and {len(valid)} crops in a file of {expected}")
    if not isinstance(record, dict) or not isinstance(record.get("settings", {}), dict):
        raise ValueError("run is no record of settings")


def is_finished(path: Path, expected: dict[str, Any]) -> bool:
    """Tell whether a file of scores exists, computed with the `expected` settings.

    Raises
    ------
    UserError
        If it exists with other settings; names the first that differs.
    """
    if not path.exists():
        return False
    recorded = read_scores(path, expected["pyramid_level"]).recorded
    if not recorded:
        raise errors.UserError(
            f"{path} must be a file of this collection, got one without settings (the authors' "
            "own?); choose another --version_name or --results_dir, or pass --overwrite"
        )
    difference = settings.first_difference(recorded, expected)
    if difference is not None:
        name, old, new = difference
        raise errors.UserError(
            f"{path} was computed with {name} {old}, now {name} is {new}; choose another "
            "--version_name, or pass --overwrite to replace it"
        )
    for output in (path, path.with_name(LABELS_FILE)):
        atomic.remove_hidden(output, atomic.hidden_folder(path.parent))
    return True


# ---------------------------------------------------------------- the ensemble of files


@dataclass(frozen=True)
class Selection:
    """Which files of scores are ensembled."""

    version: str  # folder of the backbone's scores, # stands for the level
    version_224: str  # the same of the raw pixels
    levels: tuple[int, ...]  # of the backbone; may be empty
    rep: int  # repetition of the backbone's levels
    rep_num_224: int  # raw-pixel repetitions, 0 to n - 1; 0 for none

    def folders(self) -> list[tuple[int, Path]]:
        """Return level and folder of the test subsets, one for each level and repetition."""
        places = [(self.version, level, self.rep) for level in self.levels]
        pixels = self.version_224, settings.PIXEL_LEVEL
        places += [(*pixels, rep) for rep in range(self.rep_num_224)]
        return [(n, Path(root.replace("#", str(n)), f"rep_num_{rep}")) for root, n, rep in places]


@dataclass(frozen=True)
class SubsetScores:
    """The ensembled scores of one test subset; all (n_test,), higher = more anomalous."""

    mvtype: str  # such as pushpins_loco
    labels: Scores  # 0 good, 1 anomalous
    image_paths: list[str]  # test images relative to the category's folder
    ensemble: ensembles.Ensemble
    values: settings.Settings  # only lambda_factor, crop_norm and crop_pool count
    files: tuple[ScoreFile, ...]  # what all was read from
    extra: dict[str, Scores]  # name of another method -> its normalised scores
    final: Scores  # the ensemble's, with other methods added


def find_mvtypes(selections: Iterable[Selection], names: list[str]) -> list[str]:
    """Return the test subsets that names stand for; of a category or group those with any scores.

    UserError if there are scores of none.
    """
    roots = dict.fromkeys(root for selection in selections for _, root in selection.folders())
    present = {path.parent.name for root in roots for path in root.glob("*/*_anom_maps.npz")}
    chosen = loco.choose_mvtypes(names, present)
    if roots and not present.intersection(chosen):
        raise errors.UserError(
            f"version must hold scores of {', '.join(chosen)}, got none in {next(iter(roots))}; "
            "run sinbad_single_layer.py, or change --version or --pyramid_level"
        )
    return chosen


def load_subset(selection: Selection, mvtype: str, values: settings.Settings) -> SubsetScores:
    """Read all levels of a test subset and ensemble them.

    UserError if a level or repetition is missing, or the files' settings are inconsistent.
    """
    folders = selection.folders()
    files = [file for level, root in folders for file in _read_folder(root / mvtype, level)]
    if not files:
        raise errors.UserError(
            "pyramid_level must name a level, or rep_num_224 be above 0, got neither; see --help"
        )
    check_consistent({"": files})
    crop_scores = [ensembles.CropScores(f.level, f.test, f.valid, f.geometry) for f in files]
    ensemble = ensembles.combine(crop_scores, values)
    labels = files[0].labels
    unnamed = [f"test/{i:04d}" for i in range(len(labels))]  # the authors' images
    paths = next((file.image_paths for file in files if file.image_paths), unnamed)
    return SubsetScores(mvtype, labels, paths, ensemble, values, tuple(files), {}, ensemble.final)


def _read_folder(folder: Path, level: int) -> list[ScoreFile]:
    """Read a level's crop grids, largest first; of the raw pixels its one file."""
    is_pixels = level == settings.PIXEL_LEVEL
    form = PIXEL_FILE if is_pixels else BACKBONE_FILE
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = sorted(filter(None, map(form.fullmatch, names)), key=lambda match: int(match[1]))
    if is_pixels and len(matches) > 1:
        raise errors.UserError(
            f"{folder} must hold one file <crop side>.00_lvl_anom_maps.npz, got "
            f"{' and '.join(match[0] for match in matches)}; move all but one away"
        )
    if not matches:
        shown = "one file <crop side>.00_lvl" if is_pixels else "files <n>_crop"
        rep = folder.parent.name.removeprefix("rep_num_")
        raise errors.UserError(
            f"{folder} must hold {shown}_anom_maps.npz, got none; run `python "
            f"sinbad_single_layer.py --mvtype {folder.name} --pyramid_level {level} --rep {rep}`, "
            "or ask for fewer levels and repetitions"
        )
    return [read_scores(folder / match[0], level) for match in reversed(matches)]


def check_runs(runs: dict[str, list[SubsetScores]]) -> None:
    """Stop if test subsets or runs of one report differ in more than images, and seed or rep.

    Says in one line how many files carry no record, so that nothing could be checked.
    """
    by_run = {run: [file for s in subsets for file in s.files] for run, subsets in runs.items()}
    check_consistent(by_run)
    files = list(chain(*by_run.values()))
    without = [file.path for file in files if not file.recorded]
    if without:
        log.warning(
            f"{len(without)} of {len(files)} files of scores carry no record of their settings, as "
            f"{without[0]}: whether they are consistent could not be checked"
        )


def check_consistent(files_of_runs: Mapping[str, Sequence[ScoreFile]]) -> None:
    """Stop if two files are the same file, or differ in what must be equal in both (EQUAL_IN).

    The error names both files and the setting.
    """
    seen: dict[tuple[str, str, Hashable], tuple[Any, Path]] = {}
    levels: dict[Path, tuple[Path, int]] = {}
    for run, files in files_of_runs.items():
        n_crops = defaultdict(list)  # of all files of a folder
        for file in files:
            n_crops[file.path.parent].append(len(file.test))
        for file in files:
            path, level = levels.setdefault(file.path.resolve(), (file.path, file.level))
            if (path, level) != (file.path, file.level):
                raise errors.UserError(
                    f"{path} (level {level}) and {file.path} (level {file.level}) are the same "
                    "file; put # in --version where the level stands, and let no folder be a link "
                    "to another"
                )
            _check_place(file)
            facts = _facts(file) | {"numbers of crops": n_crops[file.path.parent]}
            within: dict[str, Hashable] = {
                settings.ALL_FILES: "",
                settings.BACKBONE_FILES: "",
                settings.LEVEL_FILES: file.level,
                settings.RUN_FILES: run,
                GRID_FILES: (file.level, len(file.test)),
                SUBSET_FILES: file.path.parent.name,
            }
            if file.level == settings.PIXEL_LEVEL:
                del within[settings.BACKBONE_FILES]
            for scope, key in within.items():
                for name in EQUAL_IN[scope]:
                    if name in facts:
                        value, path = seen.setdefault((scope, name, key), (facts[name], file.path))
                        if value != facts[name]:
                            raise _inconsistent(name, path, value, file.path, facts[name])


def _facts(file: ScoreFile) -> dict[str, Any]:
    """Return what files may have to agree in; of the authors' files only what the arrays show."""
    facts: dict[str, Any] = {
        "labels": file.labels.tolist(),
        "number of validation images": file.valid.shape[1],
    }
    if file.image_paths:
        facts["image_paths"] = file.image_paths
    if file.recorded:
        facts |= dict.fromkeys(chain(*EQUAL_IN.values())) | facts | file.recorded
        facts["pillow"] = file.recorded["matrices"].get("pillow")
    return facts


def _check_place(file: ScoreFile) -> None:
    """Stop if a file's record is of another level, test subset or repetition than its folders."""
    rep_folder = file.path.parent.parent.name
    place = {"pyramid_level": file.level, "mvtype": file.path.parent.name, "rep": rep_folder}
    if not file.recorded:
        return
    recorded = file.recorded | {"rep": f"rep_num_{file.recorded['rep']}"}
    difference = settings.first_difference({name: recorded[name] for name in place}, place)
    if difference is not None:
        name, value, expected = difference
        raise errors.UserError(
            f"{file.path} must hold scores of {name} {expected}, got {value}; was the folder "
            "renamed, or does --version lack its #?"
        )


def _inconsistent(name: str, path: Path, value: Any, other: Path, other_value: Any) -> Exception:  # noqa: ANN401
    pair = value, other_value
    if isinstance(value, list):  # the first place that differs
        pair = next(two for two in zip_longest(*pair) if two[0] != two[1])
    first, second = (textwrap.shorten(str(shown), 90) for shown in pair)
    return errors.UserError(
        f"scores that are ensembled must be consistent in {name}, got {first} in {path} and "
        f"{second} in {other}; run sinbad_single_layer.py with the same settings for both (another "
        "--version_name, or --overwrite)"
    )
