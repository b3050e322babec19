"""Anomaly maps: crop scores spread over the image, as files and for figures.

They are coarse: a pixel's value is the mean score of all crops that cover it, which tells where to
look, not where a defect ends. The files have the format of LOCO's official evaluation.
"""

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt

import sinbad_utils
from sinbad import atomic, cli, crops, ensembles, errors, images, loco, score_files

MAP_ENDING = ".tiff"
VISA_IMAGES = "Data"  # folder of the images of a VisA category; in other layouts it is `test`
COMPRESSION = "tiff_adobe_deflate"  # zlib: every TIFF reader has it

Size = tuple[int, int]  # (width, height) in pixels, as Pillow's
Grids = Mapping[Any, ensembles.GridScores]  # of some images; the keys are not used


def image_map(grids: Grids, final_score: float, index: int, size: Size) -> NDArray[np.float32]:
    """Return the map (height, width) of one image, higher = more anomalous.

    A pixel's value is the mean over the crops that cover it, scaled so that the maximum is the
    image's final score (shifted where that is not positive); constant without crop grids.

    Parameters
    ----------
    grids : crop grids of the images' ensemble
    final_score : of the image
    index : of the image in `grids`
    size : of the map

    Raises
    ------
    UserError
        If the grids have no geometry (the authors' files): the positions of crops are not known.
    """
    values = _mean_over_crops([(g.geometry, g.crops[:, index], 1.0) for g in grids.values()], size)
    highest = values.max()
    is_scaled = highest > 0 < final_score
    scaled = values / highest * final_score if is_scaled else values - highest + final_score
    return scaled.astype(np.float32)


def overlay_map(grids: Grids, index: int, size: Size) -> NDArray[np.float64]:
    """Return how far each pixel of an image is above the validation images, for figures.

    The mean over the crops that cover a pixel of their scores, each divided by the validation mean
    of its own position: about 1 where the image is like the validation images. Crops weigh
    1 / area, since smaller ones localise better. Arguments and errors as in `image_map`.
    """
    weighted = []
    for grid in grids.values():
        weight = grid.geometry.grid.ratio**-2 if grid.geometry else 1.0
        weighted.append((grid.geometry, grid.relative[:, index], weight))
    return _mean_over_crops(weighted, size)


def _mean_over_crops(
    grids: Iterable[tuple[crops.Geometry | None, sinbad_utils.Scores, float]], size: Size
) -> NDArray[np.float64]:
    """Return at each pixel the mean of the crops that cover it, else the nearest pixel's.

    `grids` holds each grid's geometry, values (n_crops,) and weight of a crop.
    """
    total, weights = np.zeros(size[::-1]), np.zeros(size[::-1])
    for geometry, values, weight in grids:
        boxes = crop_boxes(geometry, size).tolist()
        for (left, top, right, bottom), value in zip(boxes, values, strict=True):
            total[top:bottom, left:right] += weight * value
            weights[top:bottom, left:right] += weight
    covered = weights > 0
    means = np.divide(total, weights, out=total, where=covered)
    if covered.any() and not covered.all():
        nearest = distance_transform_edt(~covered, return_distances=False, return_indices=True)
        means = means[tuple(nearest)]
    return means


def crop_boxes(geometry: crops.Geometry | None, size: Size) -> NDArray[np.int64]:
    """Return the pixels that each crop of a grid covers in an image of another size.

    A pixel belongs to a crop if the pixel of the preprocessed image under its centre does.

    Returns
    -------
    (n_crops, 4): left, top, right, bottom, the last two exclusive; empty if the crop is padding
    """
    if geometry is None:
        raise errors.UserError(
            "scores must record the positions of their crops, got no record (the authors' own "
            "files?); run data_to_matrices.py and sinbad_single_layer.py for anomaly maps"
        )
    corners = np.array(geometry.grid.corners)[:, ::-1]
    boxes = np.hstack([corners, corners + geometry.grid.side])
    fitted = np.array([*geometry.extent, *geometry.extent])
    pixels = np.array([*size, *size])
    # The first pixel x with (x + 1/2) * fitted / pixels >= edge, in whole numbers.
    return np.minimum(-((fitted - 2 * boxes * pixels) // (2 * fitted)), pixels)


# ---------------------------------------------------------------- files


def image_size(dataset_dir: Path, category: str, image_path: str) -> Size:
    """Return (width, height) in pixels of an image: its file's, else LOCO's of that category."""
    path = dataset_dir / category / image_path
    if path.is_file():
        return images.oriented_size(path)
    if category not in loco.LOCO_CLASSES:
        raise errors.UserError(
            f"--dataset_dir must hold {category}/{image_path}, for the size of its map, got "
            f"{dataset_dir} without it; pass the folder with the images"
        )
    return loco.LOCO_CLASSES[category].width, loco.LOCO_CLASSES[category].height


def map_paths(
    maps_dir: Path, sets: Sequence[score_files.SubsetScores], dataset_dir: Path
) -> dict[Path, tuple[score_files.SubsetScores, int]]:
    """Return path of a map -> its data set and image; normal images, in several sets, once.

    "test/good/000.png" -> MAPS_DIR/<category>/test/good/000.tiff; in a folder where two images
    would share a map, the image's ending stays: 000.png.tiff.
    """
    sources: dict[PurePosixPath, tuple[score_files.SubsetScores, int]] = {}
    for scores in sets:
        category = loco.split_mvtype(scores.mvtype)[0]
        for index, image_path in enumerate(scores.image_paths):
            parts = PurePosixPath(image_path).parts
            is_test = parts[0] == VISA_IMAGES or (parts[0] == "test" and len(parts) == 3)
            if not is_test or ".." in parts:
                raise errors.UserError(
                    f"image_paths of {category} must be test/<type>/<image>, got {image_path}; "
                    "run data_to_matrices.py and sinbad_single_layer.py for anomaly maps"
                )
            sources.setdefault(PurePosixPath(category, image_path), (scores, index))
    for folder in dict.fromkeys(path.parent for path in sources):
        target = (maps_dir / folder).resolve()
        for image_dir in (dataset_dir, dataset_dir / folder.parts[0], dataset_dir / folder):
            if target.is_relative_to(image_dir.resolve()):
                raise errors.UserError(
                    f"maps_dir must lie outside the images, got {maps_dir}, which would put maps "
                    f"among those of {image_dir}; choose another"
                )
    counts = Counter(path.with_suffix("") for path in sources)
    shared = {path.parent for path, count in counts.items() if count > 1}
    paths = {}
    for path, source in sources.items():
        name = path.name if path.parent in shared else path.stem
        paths[maps_dir / path.parent / f"{name}{MAP_ENDING}"] = source
    return paths


def write_maps(
    maps_dir: Path,
    sets: Sequence[score_files.SubsetScores],
    dataset_dir: Path,
    n_threads: int | None = None,
) -> list[Path]:
    """Write the maps of all test images, float32 (see `map_paths`); return the files.

    A map has the size of the image's file in `dataset_dir`, else LOCO's; existing maps are
    replaced. `n_threads` is one per processor by default.
    """
    paths = map_paths(maps_dir, sets, dataset_dir)
    sizes = {}  # all of them first, before anything is written
    for path, (scores, index) in paths.items():
        category = loco.split_mvtype(scores.mvtype)[0]
        sizes[path] = image_size(dataset_dir, category, scores.image_paths[index])

    def write(path: Path) -> None:
        (scores, index), file = paths[path], io.BytesIO()
        values = image_map(scores.ensemble.grids, scores.final[index], index, sizes[path])
        Image.fromarray(values).save(file, "TIFF", compression=COMPRESSION)
        atomic.atomic_write(path, file.getvalue(), maps_dir)

    bar = cli.progress_bar(len(paths), "anomaly maps", "maps")
    with bar, ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        for _ in pool.map(write, paths):
            bar.update()
    return list(paths)
