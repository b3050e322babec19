"""Anomaly maps: the crop scores spread over the image, as files and for pictures.

They are coarse: a pixel's value is the mean score of all crops that cover it, which tells where to
look, not where the defect ends. The files have the official evaluation's format.
"""

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import distance_transform_edt

import sinbad_utils
from sinbad import atomic, cli, ensembles, errors, loco

MAP_ENDING = ".tiff"
VISA_IMAGES = "Data"  # folder of VisA's classes; elsewhere test images lie in `test`
COMPRESSION = "tiff_adobe_deflate"  # zlib: every TIFF reader has it

Size = tuple[int, int]  # (width, height) in pixels, as Pillow's


def image_map(scores: ensembles.DataSetScores, index: int, size: Size) -> NDArray[np.float32]:
    """Return the map (height, width) of the test image `index`, higher = more anomalous.

    A pixel's value is the mean over the crops that cover it, scaled so that the maximum is the
    image's final score (moved there where that is not positive); constant without crop grids.

    UserError if the scores hold no settings (the authors' files): where crops lie is not known.
    """
    final = scores.final[index]
    grids = [(grid, grid.crops[:, index], 1.0) for grid in scores.grids.values()]
    values = _mean_over_crops(grids, size, scores.mvtype)
    highest = values.max()
    scaled = values / highest * final if highest > 0 < final else values - highest + final
    return scaled.astype(np.float32)


def overlay_map(scores: ensembles.DataSetScores, index: int, size: Size) -> NDArray[np.float64]:
    """Return where one test image is out of the ordinary, (height, width), for pictures.

    The mean over the crops that cover a pixel, of crop scores divided by the validation mean of
    their own position: about 1 is like the validation images, there. Small crops, which tell the
    place better, weigh more: by 1 / area.
    """
    grids = [
        (grid, grid.own[:, index], grid.settings.get("crop_size_ratio", 1.0) ** -2)
        for grid in scores.grids.values()
    ]
    return _mean_over_crops(grids, size, scores.mvtype)


def _mean_over_crops(
    grids: Iterable[tuple[ensembles.GridScores, sinbad_utils.Scores, float]],
    size: Size,
    mvtype: str,
) -> NDArray[np.float64]:
    """Return at each pixel the mean of the crops that cover it; of the nearest pixel's if none.

    `grids` holds crop grids, their values (n_crops,) and the weight of each crop.
    """
    total, weights = np.zeros(size[::-1]), np.zeros(size[::-1])
    for grid, values, weight in grids:
        boxes = crop_boxes(grid, size, mvtype).tolist()
        for (left, top, right, bottom), value in zip(boxes, values, strict=True):
            total[top:bottom, left:right] += weight * value
            weights[top:bottom, left:right] += weight
    covered = weights > 0
    means = np.divide(total, weights, out=total, where=covered)
    if covered.any() and not covered.all():
        nearest = distance_transform_edt(~covered, return_distances=False, return_indices=True)
        means = means[tuple(nearest)]
    return means


def crop_boxes(grid: ensembles.GridScores, size: Size, mvtype: str) -> NDArray[np.int64]:
    """Return the pixels that each crop of a grid covers in an image of another size.

    A pixel belongs to a crop if the matrix' pixel under its centre does. (n_crops, 4): left, top,
    right, bottom in pixels, the last two exclusive; empty where the crop is padding.
    """
    settings = grid.settings
    if not settings.get("matrices"):
        raise errors.UserError(
            f"scores of {mvtype} must hold the settings that tell where the crops lie, got none "
            "(the authors' own files or matrices?); make matrices and scores with "
            "data_to_matrices.py and sinbad_single_layer.py for anomaly maps"
        )
    im_size, ratio = settings["initial_res"], settings["crop_size_ratio"]
    corners = np.array(loco.crop_corners(im_size, ratio, settings["crop_num_edge"]))[:, ::-1]
    boxes = np.hstack([corners, corners + loco.crop_side(im_size, ratio)])  # pixels of the matrix
    fitted = np.array([settings["matrices"]["width"], settings["matrices"]["height"]] * 2)
    pixels = np.array([*size, *size])
    # The first pixel x with (x + 1/2) * fitted / pixels >= edge, in whole numbers.
    return np.minimum(-((fitted - 2 * boxes * pixels) // (2 * fitted)), pixels)


# ---------------------------------------------------------------- files


def image_size(dataset_dir: Path, class_name: str, image_path: str) -> Size:
    """Return (width, height) in pixels of an image: of its file, else as LOCO's of that class."""
    path = dataset_dir / class_name / image_path
    if path.is_file():
        try:
            with Image.open(path) as image:
                return image.size
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise errors.UserError(
                f"{path} must be an image, got something else; unpack it again from the archive"
            ) from error
    if class_name not in loco.LOCO_CLASSES:
        raise errors.UserError(
            f"--dataset_dir must hold {class_name}/{image_path}, whose map gets its size, got no "
            f"such file in {dataset_dir}; pass the folder with the images"
        )
    return loco.LOCO_CLASSES[class_name].width, loco.LOCO_CLASSES[class_name].height


def map_paths(
    maps_dir: Path, sets: Sequence[ensembles.DataSetScores], dataset_dir: Path
) -> dict[Path, tuple[ensembles.DataSetScores, int]]:
    """Return where each map lies -> the image it is of; good images, in several sets, once.

    "test/good/000.png" -> MAPS_DIR/<class>/test/good/000.tiff; in a folder where two images would
    share a map, the image's ending stays: 000.png.tiff.
    """
    images: dict[PurePosixPath, tuple[ensembles.DataSetScores, int]] = {}
    for scores in sets:
        class_name = loco.split_mvtype(scores.mvtype)[0]
        for index, image_path in enumerate(scores.image_paths):
            parts = PurePosixPath(image_path).parts
            is_test = parts[0] == VISA_IMAGES or (parts[0] == "test" and len(parts) == 3)
            if not is_test or ".." in parts:
                raise errors.UserError(
                    f"image_paths of {class_name} must be test/<kind>/<image>, got {image_path}; "
                    "run data_to_matrices.py and sinbad_single_layer.py for anomaly maps"
                )
            images.setdefault(PurePosixPath(class_name, image_path), (scores, index))
    for folder in dict.fromkeys(path.parent for path in images):
        target = (maps_dir / folder).resolve()
        for own in (dataset_dir, dataset_dir / folder.parts[0], dataset_dir / folder):
            if target.is_relative_to(own.resolve()):
                raise errors.UserError(
                    f"maps_dir must lie outside the images, got {maps_dir}, whose maps would lie "
                    f"among those of {own}; choose another"
                )
    counts = Counter(path.with_suffix("") for path in images)
    shared = {path.parent for path, count in counts.items() if count > 1}
    return {
        maps_dir
        / path.parent
        / f"{path.name if path.parent in shared else path.stem}{MAP_ENDING}": image
        for path, image in images.items()
    }


def write_maps(
    maps_dir: Path,
    sets: Sequence[ensembles.DataSetScores],
    dataset_dir: Path,
    n_threads: int | None = None,
) -> list[Path]:
    """Write the maps of all test images, float32 (see `map_paths`); return the files.

    A map has the size of the image's file in `dataset_dir`, else LOCO's. Maps that are there
    already are replaced. `n_threads` is by default one per processor.
    """
    paths = map_paths(maps_dir, sets, dataset_dir)
    sizes = {
        path: image_size(dataset_dir, loco.split_mvtype(own.mvtype)[0], own.image_paths[index])
        for path, (own, index) in paths.items()
    }

    def write(path: Path) -> None:
        file = io.BytesIO()
        pixels = Image.fromarray(image_map(*paths[path], sizes[path]))
        pixels.save(file, "TIFF", compression=COMPRESSION)
        atomic.atomic_write(path, file.getvalue(), maps_dir)

    bar = cli.progress_bar(len(paths), "anomaly maps", "maps")
    with bar, ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        for _ in pool.map(write, paths):
            bar.update()
    return list(paths)
