"""Which files of scores belong together, that they do, and their ensemble.

Scores are joined only if they were made alike. `load_data_set` checks the files of one data set,
`check_runs` the data sets and runs of one report: in every setting of `_facts`, files must agree.
"""

import argparse
import csv
import logging
import re
import textwrap
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

import sinbad_utils
from sinbad import errors, loco, score_files

log = logging.getLogger(__name__)

NETWORK_FILE = re.compile(r"(\d+)_crop_anom_maps\.npz")
PIXEL_FILE = re.compile(r"(\d+)\.00_lvl_anom_maps\.npz")
# Settings by where they must be equal: in all files, those of the network, of a data set, a level.
OF_ALL = ("official", "initial_res", "crop_num_edge")
OF_NETWORK = ("net", "weights_sha256", "precision", "compile")
OF_DATA_SET = ("images_sha256", "n_images", "matrices")
OF_LEVEL = ("n_projections", "n_quantiles", "shrinkage_factor")
IMAGE_COLUMN, SCORE_COLUMN = "image_path", "score"


@dataclass(frozen=True)
class EnsembleOptions:
    """Which saved scores are ensembled, and how."""

    version: str  # folder of the network's scores, # stands for the level
    version_224: str  # the same of the raw pixels
    levels: tuple[int, ...]  # of the network; may be empty
    rep: int  # repetition of the network's levels
    rep_num_224: int  # raw-pixel repetitions, 0 to n - 1; 0 for none
    lambda_factor: float  # weight of the raw pixels
    crop_norm: str = "grid"  # or (ours) "crop": by each crop position's own validation mean
    crop_pool: str = "mean"  # how the crops of an image are joined, see `sinbad_utils.pool_crops`

    def folders(self) -> list[tuple[int, Path]]:
        """Return the levels and, of each, the folder of the data sets; one for each repetition."""
        places = [(self.version, level, self.rep) for level in self.levels]
        places += [(self.version_224, loco.PIXEL_LEVEL, rep) for rep in range(self.rep_num_224)]
        return [
            (level, Path(version.replace("#", str(level)), f"rep_num_{rep}"))
            for version, level, rep in places
        ]


@dataclass(frozen=True)
class ScoreFile:
    """A file of scores, the level it was read for, and the crop grids beside it."""

    path: Path
    level: int
    grids: tuple[int, ...]
    scores: score_files.LevelScores

    @property
    def settings(self) -> score_files.Run:
        """What determines the numbers; empty in the authors' files."""
        return self.scores.run.get("settings", {})


@dataclass(frozen=True)
class GridScores:
    """One crop grid of one of the network's levels."""

    test: sinbad_utils.Scores  # (n_test,), of images: their crops joined
    valid: sinbad_utils.Scores  # (n_valid,), the same of validation images
    crops: sinbad_utils.Scores  # (n_crops, n_test), divided by the mean of `valid`
    own: (
        sinbad_utils.Scores
    )  # (n_crops, n_test), divided by the validation mean of their own position
    settings: score_files.Run  # what made them (crop side and so on); empty in the authors' files


@dataclass(frozen=True)
class DataSetScores:
    """One data set's scores, single and joined; all (n_test,), higher = more anomalous."""

    mvtype: str  # such as pushpins_loco
    labels: sinbad_utils.Scores  # 0 good, 1 anomalous
    image_paths: list[str]  # test images relative to the class folder
    grids: dict[tuple[int, int], GridScores]  # (level, n_crops) -> a grid of the network's
    levels: dict[int, sinbad_utils.Scores]  # normalised; 224 is the median over repetitions
    network: sinbad_utils.Scores | None  # mean of the network's levels, if there are any
    ensemble: sinbad_utils.Scores  # SINBAD's, of all levels
    extra: dict[str, sinbad_utils.Scores]  # name of another method -> its normalised scores
    final: sinbad_utils.Scores  # `ensemble`, with other methods added
    files: tuple[ScoreFile, ...]  # what all was read from
    options: EnsembleOptions


def add_ensemble_flags(parser: argparse.ArgumentParser) -> None:
    """Add --extra_norm, --crop_norm and --crop_pool."""
    add = parser.add_argument
    add(
        "--extra_norm",
        choices=("mean", "std"),
        default="mean",
        help="--extra_scores are divided by their validation mean, or standardised",
    )
    add(
        "--crop_norm",
        choices=("grid", "crop"),
        default="grid",
        help="validation mean that crops are divided by: of the grid, of the crop",
    )
    add("--crop_pool", choices=("mean", "max"), default="mean", help="joins an image's crops")


# ---------------------------------------------------------------- reading


def find_mvtypes(runs: Iterable[EnsembleOptions], names: list[str]) -> list[str]:
    """Return the data sets that names stand for; of a class or a group those with any scores.

    UserError if there are scores of none.
    """
    roots = dict.fromkeys(root for options in runs for _, root in options.folders())
    found = {path.parent.name for root in roots for path in root.glob("*/*_anom_maps.npz")}
    chosen = loco.choose_mvtypes(names, found)
    if roots and not found.intersection(chosen):
        raise errors.UserError(
            f"version must hold scores of {', '.join(chosen)}, got none in {next(iter(roots))}; "
            "run sinbad_single_layer.py, or pass --version and the --pyramid_level there are"
        )
    return chosen


def load_data_set(options: EnsembleOptions, mvtype: str) -> DataSetScores:
    """Read all levels of a data set and ensemble them.

    UserError if a level or repetition is missing, or files do not belong together.
    """
    files = [f for level, root in options.folders() for f in _read(root / mvtype, level)]
    if not files:
        raise errors.UserError(
            "pyramid_level must name a level, or rep_num_224 be above 0, got neither; see --help"
        )
    _check_alike(("", file) for file in files)
    return join(mvtype, files, options)


def join(mvtype: str, files: list[ScoreFile], options: EnsembleOptions) -> DataSetScores:
    """Ensemble the scores of a data set, all levels, grids and repetitions of it.

    Paper: section on ensembling; the formulas stand in `sinbad_utils`.
    """
    grids = [(file.level, _grid_of(file, options)) for file in files]
    levels = {}
    for level in options.levels:
        own = [grid for level_of_grid, grid in grids if level_of_grid == level]
        levels[level] = sinbad_utils.combine_grids(
            [grid.test for grid in own], [grid.valid for grid in own]
        )
    pixels = [
        sinbad_utils.combine_grids([g.test], [g.valid])
        for level, g in grids
        if level == loco.PIXEL_LEVEL
    ]
    network = np.mean(list(levels.values()), axis=0) if levels else None
    ensemble = sinbad_utils.ensemble_scores(list(levels.values()), pixels, options.lambda_factor)
    if pixels:
        levels[loco.PIXEL_LEVEL] = np.median(pixels, axis=0)
    labels = files[0].scores.labels
    unnamed = [f"test/{i:04d}" for i in range(len(labels))]  # the authors' images
    paths = next(filter(None, (file.scores.image_paths for file in files)), unnamed)
    by_grid = {(level, len(g.crops)): g for level, g in grids if level != loco.PIXEL_LEVEL}
    return DataSetScores(
        mvtype,
        labels,
        paths,
        by_grid,
        levels,
        network,
        ensemble,
        {},
        ensemble,
        tuple(files),
        options,
    )


def _grid_of(file: ScoreFile, options: EnsembleOptions) -> GridScores:
    """Join and normalise the crops of one file."""
    test, valid = file.scores.test, file.scores.valid
    means = valid.mean(1, keepdims=True) + sinbad_utils.SCORE_EPSILON
    own = test / means
    if options.crop_norm == "crop":
        test, valid = own, valid / means
    joined, joined_valid = (
        sinbad_utils.pool_crops(crops, options.crop_pool) for crops in (test, valid)
    )
    crops = sinbad_utils.normalise_scores(test, joined_valid)
    return GridScores(joined, joined_valid, crops, own, file.settings)


def _read(folder: Path, level: int) -> list[ScoreFile]:
    """Read a level's crop grids, largest first; of the raw pixels its one file."""
    is_pixels = level == loco.PIXEL_LEVEL
    form, shown = (PIXEL_FILE, "<crop side>.00_lvl") if is_pixels else (NETWORK_FILE, "<n>_crop")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = sorted(filter(None, map(form.fullmatch, names)), key=lambda match: int(match[1]))
    if not matches or (is_pixels and len(matches) > 1):
        rep = folder.parent.name.removeprefix("rep_num_")
        cure = f"run `python sinbad_single_layer.py --mvtype {folder.name} --pyramid_level {level} "
        cure += f"--rep {rep}`, or ask for fewer levels and repetitions"
        raise errors.UserError(
            f"{folder} must hold {'one file' if is_pixels else 'files'} {shown}_anom_maps.npz, got "
            f"{' and '.join(m[0] for m in matches) or 'none'}; "
            f"{'move all but one away' if matches else cure}"
        )
    paths = [folder / match[0] for match in reversed(matches)]
    read = [score_files.read_scores(path) for path in paths]
    grids = tuple(len(scores.test) for scores in read)
    return [ScoreFile(p, level, grids, scores) for p, scores in zip(paths, read, strict=True)]


# ---------------------------------------------------------------- what belongs together


def check_runs(runs: dict[str, list[DataSetScores]]) -> None:
    """Stop if data sets or runs of one report differ in more than images, and seed or repetition.

    Says in one line how many files carry no record, so that nothing could be checked.
    """
    files = [(name, file) for name, sets in runs.items() for own in sets for file in own.files]
    _check_alike(files)
    without = [file.path for _, file in files if not file.settings]
    if without:
        log.warning(
            f"{len(without)} of {len(files)} files of scores carry no record of what made "
            f"them, as {without[0]}: whether they belong together could not be checked"
        )


def _check_alike(files: Iterable[tuple[str, ScoreFile]]) -> None:
    """Stop if two files (with the name of their run) are one, or differ where they must not."""
    places: dict[Path, tuple[Path, int]] = {}
    seen: dict[tuple[str, Hashable], tuple[Any, Path]] = {}
    for run, file in files:
        path, level = places.setdefault(file.path.resolve(), (file.path, file.level))
        if (path, level) != (file.path, file.level):
            raise errors.UserError(
                f"every file of scores must be read once, got {path} for level {level} and "
                f"{file.path} for level {file.level}, which are one; put # in --version where the "
                "level stands, and let no folder be a link to another"
            )
        for key, value in _facts(run, file).items():
            other, path = seen.setdefault(key, (value, file.path))
            if value != other:
                pair = other, value
                if isinstance(value, list):  # the first place that differs
                    pair = next(two for two in zip_longest(*pair) if two[0] != two[1])
                first, second = (textwrap.shorten(str(one), 90) for one in pair)
                raise errors.UserError(
                    f"scores that are joined must be alike in {key[0]}, got {first} in {path} and "
                    f"{second} in {file.path}; run sinbad_single_layer.py with the same settings "
                    "for both (another --version_name, or --overwrite)"
                )


def _facts(run: str, file: ScoreFile) -> dict[tuple[str, Hashable], Any]:
    """Return (what, within what) -> its value in a file; files must agree in all they share."""
    scores, settings, mvtype = file.scores, file.settings, file.path.parent.name
    facts: dict[tuple[str, Hashable], Any] = {
        ("labels", mvtype): scores.labels.tolist(),
        ("number of validation images", mvtype): scores.valid.shape[1],
    }
    if scores.image_paths:
        facts["image_paths", mvtype] = scores.image_paths
    is_network = file.level != loco.PIXEL_LEVEL
    if is_network:
        facts["numbers of crops", ""] = list(file.grids)
    if not settings:
        return facts
    where = {"pyramid_level": file.level, "mvtype": mvtype, "rep": file.path.parts[-3]}
    own = {**settings, "rep": f"rep_num_{settings['rep']}"}
    difference = score_files.first_difference({name: own[name] for name in where}, where)
    if difference is not None:
        name, found, wanted = difference
        raise errors.UserError(
            f"{file.path} must hold scores of {name} {wanted}, got {found}; was the folder "
            "renamed, or does --version lack its #?"
        )
    facts["pillow", ""] = settings["matrices"].get("pillow")
    scopes = [
        (OF_ALL, ""),
        (OF_DATA_SET, mvtype),
        (OF_LEVEL, file.level),
        (("seed",), run),
        (("crop_size_ratio",), (file.level, len(scores.test))),
    ]
    scopes += [(OF_NETWORK, "")] if is_network else []
    return facts | {(name, scope): settings.get(name) for names, scope in scopes for name in names}


# ---------------------------------------------------------------- another method's scores


@dataclass(frozen=True)
class ExtraScores:
    """Another method's scores: its name, every end of an image's path -> score, weight, norm."""

    name: str
    by_image: dict[str, float]
    weight: float
    norm: str


def read_extra_scores(path: Path, weight: float, norm: str) -> ExtraScores:
    """Read a CSV file of image paths and scores (higher = more anomalous).

    Of a path its end counts: <class>/<path of the image in it>. With a header line its columns
    `image_path` and `score` are taken, so our own scores.csv is read too; without one the first
    two columns.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a mark
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise errors.UserError(f"{path} must be CSV in UTF-8, got {error}; save it so") from error
    columns = [IMAGE_COLUMN, SCORE_COLUMN]
    if rows and set(columns) <= set(rows[0][1]):
        columns = rows.pop(0)[1]
    image, value = columns.index(IMAGE_COLUMN), columns.index(SCORE_COLUMN)
    by_image = {}
    for number, row in rows:
        try:
            parts, score = Path(row[image]).parts, float(row[value])
        except (IndexError, ValueError):
            parts, score = (), float("nan")
        if len(parts) < 2 or not np.isfinite(score):
            raise errors.UserError(
                f"{path} line {number} must be <class>/<path of an image>,<number>, got "
                f"{','.join(row)}; the first line may be {IMAGE_COLUMN},{SCORE_COLUMN}"
            )
        by_image |= {"/".join(parts[i:]): score for i in range(len(parts) - 1)}
    if not by_image:
        raise errors.UserError(f"{path} must hold lines <image path>,<score>, got none")
    return ExtraScores(path.stem, by_image, weight, norm)


def add_extra_scores(scores: DataSetScores, extra: ExtraScores) -> DataSetScores:
    """Add weight * another method's scores, normalised by its validation scores; ranks stay.

    UserError if the file lacks a test image of the data set, or all validation images of its class
    (no file can have those of a layout without such a folder), or cannot be normalised so.
    """
    class_name = loco.split_mvtype(scores.mvtype)[0]
    images = [f"{class_name}/{path}" for path in scores.image_paths]
    missing = [image for image in images if image not in extra.by_image]
    if missing:
        raise errors.UserError(
            f"extra_scores must hold every test image of {scores.mvtype}, got no {missing[0]} "
            f"({len(missing)} of {len(images)} are missing)"
        )
    before = f"{class_name}/validation/"
    valid = np.array([s for image, s in extra.by_image.items() if image.startswith(before)])
    if not len(valid):
        raise errors.UserError(
            f"extra_scores must hold the validation images, got none of {before}; scores are "
            "normalised by theirs, so a class without that folder takes none"
        )
    test = np.array([extra.by_image[image] for image in images])
    lowest, mean, spread = min(test.min(), valid.min()), valid.mean(), valid.std()
    is_mean = extra.norm == "mean"
    if is_mean and (lowest < 0 or mean <= 0):
        raise errors.UserError(
            "extra_scores that are divided by their validation mean must not be negative, nor that "
            f"mean 0, got a lowest of {lowest:g} and a mean of {mean:g}; pass --extra_norm std"
        )
    if not is_mean and not spread > 0:
        raise errors.UserError(
            f"extra_scores must vary over the validation images for --extra_norm std, got "
            f"{len(valid)} equal ones; pass --extra_norm mean"
        )
    normalised = sinbad_utils.normalise_scores(test, valid) if is_mean else (test - mean) / spread
    final = scores.ensemble + extra.weight * normalised
    return replace(scores, extra={extra.name: normalised}, final=final)
