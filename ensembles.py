"""Read the scores of all levels of a data set and ensemble them."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command_line import UserError
from loco_datasets import PIXEL_LEVEL, choose_mvtypes
from result_files import LevelScores, Run, read_scores
from sinbad_utils import Scores, ensemble_scores, grid_scores, level_scores, normalise_scores

RESNET_FILE = re.compile(r"(\d+)_crop_anom_maps\.npz")
PIXEL_FILE = re.compile(r"\d+\.00_lvl_anom_maps\.npz")


@dataclass(frozen=True)
class EnsembleOptions:
    """Which saved scores are ensembled, and how.

    Attributes
    ----------
    version, version_224 : folder of the scores, # stands for the level
    levels : ResNet levels; may be empty
    rep : repetition of the ResNet levels
    rep_num_224 : raw-pixel repetitions, 0 to n - 1; 0 for none
    lambda_factor : weight of the raw pixels
    """

    version: str
    version_224: str
    levels: tuple[int, ...]
    rep: int
    rep_num_224: int
    lambda_factor: float

    def folder(self, level: int, rep: int, mvtype: str) -> Path:
        """Return the folder of one level's scores of a data set."""
        version = self.version_224 if level == PIXEL_LEVEL else self.version
        return Path(version.replace("#", str(level))) / f"rep_num_{rep}" / mvtype


@dataclass(frozen=True)
class GridScores:
    """One crop grid of one ResNet level.

    Attributes
    ----------
    joined : (n_test,), normalised scores of the images
    crops : (n_crops, n_test), crop scores divided by the same validation mean
    settings : what made them (crop side and so on); empty in the authors' files
    """

    joined: Scores
    crops: Scores
    settings: Run


@dataclass(frozen=True)
class DataSetScores:
    """One data set's scores, single and joined; all (n_test,), higher = more anomalous.

    Attributes
    ----------
    mvtype : name, such as pushpins_loco
    labels : 0 good, 1 anomalous
    image_paths : test images relative to the class folder
    grids : (level, n_crops) -> one crop grid of a ResNet level
    levels : level -> normalised scores of one level; 224 is the median over repetitions
    resnet : mean of the ResNet levels; None if there are none
    ensemble : SINBAD's, of all levels
    extra : name of another method -> its normalised scores
    final : `ensemble`, with other methods added
    """

    mvtype: str
    labels: Scores
    image_paths: list[str]
    grids: dict[tuple[int, int], GridScores]
    levels: dict[int, Scores]
    resnet: Scores | None
    ensemble: Scores
    extra: dict[str, Scores]
    final: Scores


def find_mvtypes(options: EnsembleOptions, names: list[str]) -> list[str]:
    """Return the data sets that names stand for; of a class or a group those that have scores.

    Raises
    ------
    UserError
        If there are scores of none.
    """
    level, rep = (options.levels[0], options.rep) if options.levels else (PIXEL_LEVEL, 0)
    root = options.folder(level, rep, "")
    chosen = choose_mvtypes(names, [path.name for path in root.glob("*_*")])
    if not any((root / name).is_dir() for name in chosen):
        raise UserError(
            f"version must hold scores of {', '.join(chosen)}, got none in {root}; run "
            "sinbad_single_layer.py first, or pass --version and the --pyramid_level there are"
        )
    return chosen


def load_data_set(options: EnsembleOptions, mvtype: str) -> DataSetScores:
    """Read all levels of a data set and ensemble them.

    Paper: section on ensembling; the formulas stand in `sinbad_utils`.

    Raises
    ------
    UserError
        If a level, a repetition or a crop grid is missing, or files do not fit each other.
    """
    files: dict[int, dict[int, LevelScores]] = {}
    for level in options.levels:
        files[level] = _read_grids(options.folder(level, options.rep, mvtype), level)
        first = files[options.levels[0]]
        if files[level].keys() != first.keys():
            raise UserError(
                f"levels must have the same crop grids, got {sorted(first)} of level "
                f"{options.levels[0]} and {sorted(files[level])} of level {level} for {mvtype}; "
                "run sinbad_single_layer.py for what is missing"
            )
    reps = [
        _read_pixels(options.folder(PIXEL_LEVEL, rep, mvtype)) for rep in range(options.rep_num_224)
    ]
    everything = [scores for grids in files.values() for scores in grids.values()] + reps
    _check_same_images(mvtype, everything)
    levels = {
        level: level_scores([s.test for s in grids.values()], [s.valid for s in grids.values()])
        for level, grids in files.items()
    }
    pixels = [level_scores([s.test], [s.valid]) for s in reps]
    resnet = np.mean(list(levels.values()), axis=0) if levels else None
    ensemble = ensemble_scores(list(levels.values()), pixels, options.lambda_factor)
    if pixels:
        levels[PIXEL_LEVEL] = np.median(pixels, axis=0)
    return DataSetScores(
        mvtype,
        everything[0].labels,
        next((s.image_paths for s in everything if s.image_paths), [])
        or [f"test/{i:04d}" for i in range(len(everything[0].labels))],
        {
            (level, n_crops): _grid_of(scores)
            for level, grids in files.items()
            for n_crops, scores in grids.items()
        },
        levels,
        resnet,
        ensemble,
        {},
        ensemble,
    )


def _grid_of(scores: LevelScores) -> GridScores:
    """Normalise the scores of one crop grid."""
    valid = grid_scores(scores.valid)
    return GridScores(
        normalise_scores(grid_scores(scores.test), valid),
        normalise_scores(scores.test, valid),
        scores.run.get("settings", {}),
    )


def _read_grids(folder: Path, level: int) -> dict[int, LevelScores]:
    """Read the crop grids of a ResNet level, largest grid first."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    grids = {
        int(match[1]): folder / match[0] for name in names if (match := RESNET_FILE.fullmatch(name))
    }
    if not grids:
        raise UserError(
            f"{folder} must hold scores (<n>_crop_anom_maps.npz), got none; run "
            f"`python sinbad_single_layer.py --mvtype {folder.name} --pyramid_level {level}` first"
        )
    return {n_crops: read_scores(grids[n_crops]) for n_crops in sorted(grids, reverse=True)}


def _read_pixels(folder: Path) -> LevelScores:
    """Read one repetition of the raw-pixel level."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    files = [folder / name for name in names if PIXEL_FILE.fullmatch(name)]
    if len(files) > 1:
        raise UserError(
            f"{folder} must hold one file <crop side>.00_lvl_anom_maps.npz, got "
            f"{' and '.join(path.name for path in files)}; move all but one away"
        )
    if not files:
        rep = folder.parent.name.removeprefix("rep_num_")
        raise UserError(
            f"{folder} must hold a file <crop side>.00_lvl_anom_maps.npz, got none; run "
            f"`python sinbad_single_layer.py --mvtype {folder.name} --pyramid_level 224 --rep {rep}"
            "` first, or pass the number of repetitions there are as --rep_num_224 (0 for none)"
        )
    return read_scores(files[0])


def _check_same_images(mvtype: str, everything: list[LevelScores]) -> None:
    """Stop if files of one data set are of different images."""
    if not everything:
        raise UserError(
            "pyramid_level must name a level, or rep_num_224 be above 0, got neither; see --help"
        )
    first = everything[0]
    for scores in everything:
        same = np.array_equal(scores.labels, first.labels)
        if scores.image_paths and first.image_paths:
            same = same and scores.image_paths == first.image_paths
        if not same or scores.valid.shape[1] != first.valid.shape[1]:
            raise UserError(
                f"scores of {mvtype} must be of the same images, got files of "
                f"{len(first.labels)} and {len(scores.labels)} test, {first.valid.shape[1]} and "
                f"{scores.valid.shape[1]} validation images, or of other names or labels; run "
                "sinbad_single_layer.py again with --overwrite"
            )
