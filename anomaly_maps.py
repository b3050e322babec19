"""Anomaly maps in the official evaluation's format: the crop scores spread over the image.

They are coarse: a pixel's value is the mean score of all crops that cover it, which tells where to
look, not where the defect ends. Crops are rectangles, so a map is constant on the cells between
their edges; it is computed on the cells and repeated to pixels.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from command_line import Progress, UserError
from ensembles import DataSetScores, GridScores
from loco_datasets import LOCO_CLASSES, crop_corners, crop_side, split_mvtype
from result_files import write_atomic

MAP_ENDING = ".tiff"
COMPRESSION = "tiff_adobe_deflate"  # zlib: every TIFF reader has it

Edges = NDArray[np.int64]
Size = tuple[int, int]  # (width, height) in pixels, as Pillow's


@dataclass(frozen=True)
class MapCells:
    """The anomaly maps of a data set's test images at one size, constant on each cell.

    Attributes
    ----------
    x_edges, y_edges : (n_columns + 1,), (n_rows + 1,)
        Borders of the cells in pixels, from 0 to the width and the height.
    values : (n_test, n_rows, n_columns), float64
        Higher = more anomalous; the maximum of an image is its final score.
    """

    x_edges: Edges
    y_edges: Edges
    values: NDArray[np.float64]

    def expand(self, index: int) -> NDArray[np.float32]:
        """Return the map of one image, (height, width)."""
        rows, columns = np.diff(self.y_edges), np.diff(self.x_edges)
        cells = self.values[index].astype(np.float32)
        return cells.repeat(columns, axis=1).repeat(rows, axis=0)


def map_cells(scores: DataSetScores, size: Size) -> MapCells:
    """Spread the crop scores of all grids and ResNet levels over the image.

    A cell's value is the mean over the crops that cover it; a cell outside every crop takes the
    nearest covered one's. Each image's values are then scaled so that their maximum is its final
    score (moved there where that is not positive). Without ResNet levels a map is constant.

    Parameters
    ----------
    scores : DataSetScores
    size : (width, height) of the maps in pixels

    Raises
    ------
    UserError
        If the scores hold no settings (the authors' files): where the crops lie is not known then.
    """
    width, height = size
    grids = list(scores.grids.values())
    if not grids:
        edges = np.array([0, width]), np.array([0, height])
        return MapCells(*edges, scores.final[:, None, None])
    boxes = np.concatenate([crop_boxes(grid, size, scores.mvtype) for grid in grids])
    crops = np.concatenate([grid.crops for grid in grids])  # (crops of all grids, images)
    x_edges = np.unique(np.concatenate([boxes[:, [0, 2]].ravel(), [0, width]]))
    y_edges = np.unique(np.concatenate([boxes[:, [1, 3]].ravel(), [0, height]]))
    covered = (
        _covers(boxes[:, 1::2], y_edges)[:, :, None] & _covers(boxes[:, ::2], x_edges)[:, None]
    )
    n_covering = covered.sum(0)  # (rows, columns)
    means = np.tensordot(crops.T, covered, 1) / np.maximum(n_covering, 1)
    rows, columns = _nearest_covered(n_covering > 0, x_edges, y_edges)
    return MapCells(x_edges, y_edges, _rescaled(means[:, rows, columns], scores.final))


def crop_boxes(grid: GridScores, size: Size, mvtype: str) -> NDArray[np.int64]:
    """Return the pixels that each crop of a grid covers in an image of another size.

    A pixel belongs to a crop if the matrix' pixel under its centre does.

    Returns
    -------
    (n_crops, 4)
        Left, top, right, bottom in pixels, the last two exclusive; empty where the crop is padding.
    """
    settings = grid.settings
    if not settings.get("matrices"):
        raise UserError(
            f"scores of {mvtype} must hold the settings that tell where the crops lie, got none "
            "(the authors' own files or matrices?); make matrices and scores with "
            "data_to_matrices.py and sinbad_single_layer.py for anomaly maps"
        )
    im_size, ratio = settings["initial_res"], settings["crop_size_ratio"]
    corners = np.array(crop_corners(im_size, ratio, settings["crop_num_edge"]))[:, ::-1]
    boxes = np.hstack([corners, corners + crop_side(im_size, ratio)])  # pixels of the matrix
    fitted = np.array([settings["matrices"]["width"], settings["matrices"]["height"]] * 2)
    pixels = np.array([*size, *size])
    # The first pixel x with (x + 1/2) * fitted / pixels >= edge, in whole numbers.
    return np.minimum(-((fitted - 2 * boxes * pixels) // (2 * fitted)), pixels)


def _covers(spans: Edges, edges: Edges) -> NDArray[np.bool_]:
    """Tell which cells each span (n, 2) covers, on one axis: (n, cells)."""
    return (spans[:, :1] <= edges[:-1]) & (edges[1:] <= spans[:, 1:])


def _nearest_covered(
    covered: NDArray[np.bool_], x_edges: Edges, y_edges: Edges
) -> tuple[Edges, Edges]:
    """Return row and column of the covered cell that is nearest to each cell's centre."""
    rows, columns = np.nonzero(covered)
    y_gaps, x_gaps = _gaps(y_edges, rows)[:, None], _gaps(x_edges, columns)[None]
    nearest = np.hypot(y_gaps, x_gaps).argmin(-1)
    return rows[nearest], columns[nearest]


def _gaps(edges: Edges, own: Edges) -> NDArray[np.float64]:
    """Return how far each cell's centre is from the cells `own` (n,), on one axis: (cells, n)."""
    centres = (edges[:-1] + edges[1:])[:, None] / 2
    return np.maximum(0.0, np.maximum(edges[own] - centres, centres - edges[own + 1]))


def _rescaled(means: NDArray[np.float64], final: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale each image's cells (n, rows, columns) so that their maximum is its final score."""
    highest, final = means.max((1, 2), keepdims=True), final[:, None, None]
    scalable = (highest > 0) & (final > 0)
    shares = np.divide(means, highest, out=np.ones_like(means), where=scalable)
    return np.where(scalable, shares * final, means - highest + final)


def image_map(scores: DataSetScores, index: int, size: Size) -> NDArray[np.float32]:
    """Return the anomaly map of one test image.

    Parameters
    ----------
    scores : DataSetScores
    index : position among the test images
    size : (width, height) in pixels

    Returns
    -------
    (height, width), float32, higher = more anomalous; the maximum is the image's final score
    """
    return map_cells(scores, size).expand(index)


def image_size(dataset_dir: Path | None, class_name: str, image_path: str) -> Size:
    """Return (width, height) in pixels of an image: of its file, else as LOCO's of that class."""
    path = None if dataset_dir is None else dataset_dir / class_name / image_path
    if path is not None and path.is_file():
        try:
            with Image.open(path) as image:
                return image.size
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{path} must be an image, got something else; unpack it again from the archive"
            ) from error
    if class_name not in LOCO_CLASSES:
        raise UserError(
            f"--dataset_dir must hold {class_name}/{image_path}, whose map gets its size, got no "
            f"such file in {dataset_dir}; pass the folder with the images"
        )
    return LOCO_CLASSES[class_name].width, LOCO_CLASSES[class_name].height


def map_path(class_name: str, image_path: str) -> Path:
    """Return where the map of an image lies: "test/good/000.png" -> <class>/test/good/000.tiff."""
    path = PurePosixPath(image_path)
    if path.is_absolute() or len(path.parts) != 3 or ".." in path.parts or path.parts[0] != "test":
        raise UserError(
            f"image_paths of {class_name} must be test/<kind>/<image>, got {image_path}; run "
            "data_to_matrices.py and sinbad_single_layer.py for anomaly maps"
        )
    return Path(class_name, *path.parts).with_suffix(MAP_ENDING)


def write_maps(
    maps_dir: Path,
    sets: Sequence[DataSetScores],
    dataset_dir: Path | None,
    n_threads: int | None = None,
) -> list[Path]:
    """Write the maps of all test images, MAPS_DIR/<class>/test/<kind>/<image>.tiff, float32.

    A map has the size of the image's file in `dataset_dir`, else LOCO's. Good images, which both
    data sets of a class hold, are written once. Maps that are there already are replaced.

    Parameters
    ----------
    maps_dir : folder, made if missing
    sets : data sets with their scores
    dataset_dir : folder of the classes' images, None where there is none
    n_threads : threads that compress; by default one per processor

    Returns
    -------
    The files written
    """
    todo: dict[Path, tuple[DataSetScores, int, Size]] = {}
    cells: dict[tuple[str, Size], MapCells] = {}
    for scores in sets:
        class_name = split_mvtype(scores.mvtype)[0]
        for index, image_path in enumerate(scores.image_paths):
            path = maps_dir / map_path(class_name, image_path)
            if path not in todo:
                size = image_size(dataset_dir, class_name, image_path)
                todo[path] = scores, index, size
                if (scores.mvtype, size) not in cells:
                    cells[scores.mvtype, size] = map_cells(scores, size)
    with Progress(len(todo), "anomaly maps", "maps") as bar:

        def write(path: Path) -> None:
            scores, index, size = todo[path]
            file = io.BytesIO()
            pixels = Image.fromarray(cells[scores.mvtype, size].expand(index))
            pixels.save(file, "TIFF", compression=COMPRESSION)
            write_atomic(path, file.getvalue(), maps_dir)
            bar.update()

        with ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
            list(pool.map(write, todo))
    return list(todo)
