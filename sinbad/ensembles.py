"""Crop scores -> grids -> levels -> ensemble: arrays in, arrays out.

The formulas stand in `sinbad_utils`; paper: section on ensembling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import sinbad_utils
from sinbad import crops, settings
from sinbad_utils import Scores


@dataclass(frozen=True)
class CropScores:
    """Scores of a crop grid at one level, of one repetition."""

    level: int
    test: Scores  # (n_crops, n_test), higher = more anomalous
    valid: Scores  # (n_crops, n_valid)
    geometry: crops.Geometry | None = None  # None: not known (the authors' files)


@dataclass(frozen=True)
class GridScores:
    """One crop grid of one of the backbone's levels."""

    test: Scores  # (n_test,), of images: their crops pooled
    valid: Scores  # (n_valid,), the same of validation images
    crops: Scores  # (n_crops, n_test), divided by the mean of `valid`
    relative: Scores  # (n_crops, n_test), divided by the validation mean of their own position
    geometry: crops.Geometry | None


@dataclass(frozen=True)
class Ensemble:
    """Scores of images, single and combined; all (n_test,), higher = more anomalous."""

    grids: dict[tuple[int, int], GridScores]  # (level, n_crops) -> a grid of the backbone's
    levels: dict[int, Scores]  # normalised; 224 is the median over repetitions
    network: Scores | None  # mean of the backbone's levels, if there are any
    final: Scores  # SINBAD's score, of all levels


def combine(crop_scores: Sequence[CropScores], values: settings.Settings) -> Ensemble:
    """Ensemble the crop scores of all levels, grids and repetitions.

    Parameters
    ----------
    crop_scores : at least one; of level 224 one for each repetition, else one for each grid
    values : lambda_factor, crop_norm and crop_pool count

    Raises
    ------
    ValueError
        If there are none, or two of one grid of a backbone's level.
    """
    if not crop_scores:
        raise ValueError("crop_scores must not be empty")
    network_grids: dict[tuple[int, int], GridScores] = {}
    pixels = []
    for scores in crop_scores:
        key, grid = (scores.level, len(scores.test)), _pool_grid(scores, values)
        if scores.level == settings.PIXEL_LEVEL:
            pixels.append(sinbad_utils.combine_grids([grid.test], [grid.valid]))
        elif key in network_grids:
            raise ValueError(
                f"crop_scores must be one of each grid, got two of (level, crops) {key}"
            )
        else:
            network_grids[key] = grid
    levels = {}
    for level in dict.fromkeys(level for level, _ in network_grids):
        grids = [grid for (other, _), grid in network_grids.items() if other == level]
        levels[level] = sinbad_utils.combine_grids(
            [grid.test for grid in grids], [grid.valid for grid in grids]
        )
    network = np.mean(list(levels.values()), axis=0) if levels else None
    final = sinbad_utils.ensemble_scores(list(levels.values()), pixels, values.lambda_factor)
    if pixels:
        levels[settings.PIXEL_LEVEL] = np.median(pixels, axis=0)
    return Ensemble(network_grids, levels, network, final)


def _pool_grid(scores: CropScores, values: settings.Settings) -> GridScores:
    """Pool and normalise the crops of a grid."""
    test, valid = scores.test, scores.valid
    means = valid.mean(1, keepdims=True)
    # A position where training and validation images do not vary takes the grid's mean.
    means = np.where(means > sinbad_utils.SCORE_EPSILON, means, means.mean())
    means = means + sinbad_utils.SCORE_EPSILON
    relative = test / means
    if values.crop_norm == "crop":
        test, valid = relative, valid / means
    pooled, pooled_valid = (
        sinbad_utils.pool_crops(array, values.crop_pool) for array in (test, valid)
    )
    normalised = sinbad_utils.normalise_scores(test, pooled_valid)
    return GridScores(pooled, pooled_valid, normalised, relative, scores.geometry)
