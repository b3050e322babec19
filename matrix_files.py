"""The matrices of a data set on disk: their names, their settings, reading them back."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from command_line import UserError
from loco_datasets import DEFAULT_DATA_DIR, IM_SIZE

SPLITS = {"train": "train_data.npy", "valid": "valid_data.npy", "test": "test_data.npy"}
LABELS_FILE = "image_level_label.npy"
PATHS_FILE = "image_paths.json"  # names, sha256 of the pixels, settings; the authors have none


@dataclass(frozen=True)
class MatrixSet:
    """One data set's matrices, memory-mapped.

    Attributes
    ----------
    mvtype : name, such as pushpins_loco
    images : split ("train", "valid", "test") -> (n, 3, im_size, im_size), uint8
        (float32 of k/255 in the authors' matrices)
    paths : split -> image paths relative to the class folder
    sha256 : split -> of each image's pixels in the matrix; empty for the authors'
    labels : (n_test,), 0 good, 1 anomalous
    settings : how the matrices were made; empty for the authors'
    """

    mvtype: str
    images: dict[str, NDArray[Any]]
    paths: dict[str, list[str]]
    sha256: dict[str, list[str]]
    labels: NDArray[np.float64]
    settings: dict[str, Any]

    @property
    def im_size(self) -> int:
        """Side of the images in pixels."""
        return self.images["train"].shape[2]

    def digest(self) -> str:
        """Return one sha256 of all names, pixels (unless the authors') and labels."""
        whole = json.dumps([self.paths, self.sha256, self.labels.tolist()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()


def nearest_source(size_in: int, size_out: int) -> NDArray[np.int64]:
    """Return the source index of each of `size_out` pixels by torch's "nearest" rule.

    Asked of torch itself, since its floor(i * in / out) is computed in float32.
    """
    indices = torch.arange(size_in, dtype=torch.float32)[None, None]
    return functional.interpolate(indices, size=size_out, mode="nearest")[0, 0].long().numpy()


def load_matrices(data_dir: Path, mvtype: str) -> MatrixSet:
    """Map the matrices of a data set into memory and check that they belong together.

    Raises
    ------
    UserError
        If a file is missing, cut short or does not fit the others.
    """
    folder = data_dir / mvtype
    class_name = mvtype.rpartition("_")[0]
    command = f"python data_to_matrices.py --mvtype {class_name}"
    if data_dir != DEFAULT_DATA_DIR:
        command += f" --dataset_dir <images> --out_dir {data_dir}"
    needed = [*SPLITS.values(), LABELS_FILE]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} must hold {', '.join(needed)}, got no {missing[0]}; run `{command}`"
        )
    redo = f"`{command} --overwrite` makes it again"
    images = {split: _map(folder / name, redo) for split, name in SPLITS.items()}
    labels = _map(folder / LABELS_FILE, redo)
    record = _read_record(folder / PATHS_FILE, redo)
    # The authors' matrices have no paths: such names are never shared between data sets.
    paths = {
        split: record.get(split) or [f"{mvtype}/{split}/{i:04d}" for i in range(len(images[split]))]
        for split in SPLITS
    }
    sha256 = record.get("sha256", {})
    for split, array in images.items():
        _check_split(folder / SPLITS[split], array, images["train"].shape[-1], redo)
        if any(len(of[split]) != len(array) for of in (paths, sha256) if of):
            raise UserError(
                f"{folder / PATHS_FILE} must name {len(array)} {split} images, got "
                f"{len(paths[split])}; {redo}"
            )
    if labels.shape != (len(images["test"]),) or not np.isin(labels, (0, 1)).all():
        raise UserError(
            f"{folder / LABELS_FILE} must hold {len(images['test'])} labels, 0 or 1, got "
            f"{labels.size} of type {labels.dtype}; {redo}"
        )
    settings = record.get("settings", {})
    return MatrixSet(mvtype, images, paths, sha256, np.asarray(labels, np.float64), settings)


def _check_split(path: Path, array: NDArray[Any], side: int, redo: str) -> None:
    """Refuse an array that does not hold images of the side that all splits have."""
    if array.shape[1:] != (3, side, side) or not len(array):
        raise UserError(f"{path} must be (n, 3, {side}, {side}), got {array.shape}; {redo}")
    if array.dtype not in (np.uint8, np.float32):
        raise UserError(f"{path} must be uint8 (or float32 of k/255), got {array.dtype}; {redo}")


def _map(path: Path, redo: str) -> NDArray[Any]:
    """Map a .npy file into memory; a damaged one is an error that names it."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.ndim == 0:
            raise ValueError("no array")
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever Python's own parser does
        raise UserError(f"{path} must be a whole .npy file, got a damaged one; {redo}") from error
    return array


def _read_record(path: Path, redo: str) -> dict[str, Any]:
    """Read image_paths.json; {} where there is none, as in the authors' folders."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        for names in (record, record["sha256"]):
            if not all(isinstance(name, str) for split in SPLITS for name in names[split]):
                raise TypeError("names must be text")
        return {**record, "settings": dict(record["settings"])}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} must be JSON with train, valid, test, sha256 and settings, got another "
            f"({type(error).__name__}: {error}); {redo}"
        ) from error


def fitted_size(width: int, height: int, im_size: int) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image whose long side becomes `im_size`."""
    longest = max(width, height)
    return max(1, int(im_size * width / longest)), max(1, int(im_size * height / longest))


def check_im_size(matrices: MatrixSet, initial_res: int) -> None:
    """Stop if the matrices are of another size than the run asks for."""
    if matrices.im_size != initial_res:
        default = "" if matrices.im_size != IM_SIZE else " (the default)"
        raise UserError(
            f"initial_res must be the side of the matrices of {matrices.mvtype}, "
            f"{matrices.im_size}, got {initial_res}; pass --initial_res {matrices.im_size}{default}"
        )


def crop_is_empty(image: NDArray[Any], corner: tuple[int, int], side: int) -> bool:
    """Tell whether a crop of an image (3, side, side) is padding (zeros) only."""
    y, x = corner
    return not image[:, y : y + side, x : x + side].any()


def crop_pixels(
    image: NDArray[Any], corner: tuple[int, int], source: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Gather the nearest-sampled pixels of one crop of one image.

    Parameters
    ----------
    image : (3, im_size, im_size), uint8, or float32 of k/255
    corner : (y, x) of the crop in pixels
    source : (size,)
        `nearest_source` of the crop's side.

    Returns
    -------
    (3, size, size), uint8
    """
    y, x = corner
    pixels = image[:, y + source[:, None], x + source[None, :]]
    if pixels.dtype == np.uint8:
        return pixels
    values = np.rint(pixels * 255.0)
    if not (values.min() >= 0.0 and values.max() <= 255.0):  # NaN is neither
        raise UserError("float32 matrices must hold k/255, got other values; make them again")
    return values.astype(np.uint8)
