"""Pictures that a person hands in: paths, Pillow images or arrays -> matrices of a data set."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sinbad import errors, layouts, matrices

NAME = "pictures"  # stands where a data set's name stands
Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


def as_image(picture: Picture) -> Image.Image:
    """Return a picture as a Pillow image."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, np.ndarray):
        return layouts.open_image(Path(picture))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise errors.UserError(
            "an array must be (height, width, 3) of uint8, got "
            f"{picture.shape} of {picture.dtype}; convert it"
        )
    return Image.fromarray(picture)


def name_of(picture: Picture, number: int) -> str:
    """Return a picture's path, or its number."""
    is_path = isinstance(picture, (str, os.PathLike))
    return os.fspath(picture) if is_path else f"picture {number}"


def read_pictures(
    pictures: Sequence[Picture], settings: dict[str, Any], first: int = 0
) -> Iterator[NDArray[np.uint8] | errors.UserError]:
    """Yield the matrix of each picture, or why there is none; the first has the number `first`.

    `settings` are im_size, width, height in pixels and aspect, as of the training pictures.
    """

    def read(number: int) -> NDArray[np.uint8] | errors.UserError:
        picture = pictures[number]
        name = name_of(picture, first + number)
        try:
            return matrices.picture_to_matrix(as_image(picture), settings, name)
        except errors.UserError as error:
            return error
        except OSError as error:
            return errors.UserError(f"{name}: {error.strerror or error}")

    numbers = range(len(pictures))
    with ThreadPoolExecutor() as pool:
        for start in numbers[:: matrices.IMAGES_AT_ONCE]:
            yield from pool.map(read, numbers[start : start + matrices.IMAGES_AT_ONCE])


def matrices_in_file(pictures: Sequence[Picture], settings: dict[str, Any]) -> NDArray[np.uint8]:
    """Return the matrices of good pictures, mapped from a file that goes when they do."""
    with TemporaryFile() as file:
        for matrix in read_pictures(pictures, settings):
            if isinstance(matrix, errors.UserError):
                raise matrix
            file.write(matrix.data)
        file.flush()
        shape = (len(pictures), 3, settings["im_size"], settings["im_size"])
        if not len(pictures):  # nothing cannot be mapped
            return np.zeros(shape, np.uint8)
        return np.memmap(file, np.uint8, "r", shape=shape)


def matrix_set(settings: dict[str, Any], **splits: NDArray[np.uint8]) -> matrices.MatrixSet:
    """Return pictures as a data set; equal ones are told apart by their place."""
    none = np.zeros((0, 3, settings["im_size"], settings["im_size"]), np.uint8)
    images = {split: splits.get(split, none) for split in ("train", "valid", "test")}
    paths = {split: [f"{split} {i}" for i in range(len(own))] for split, own in images.items()}
    return matrices.MatrixSet(NAME, images, paths, {}, np.zeros(len(images["test"])), settings)
