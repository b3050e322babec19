"""One image: decode, orient, resize; from a path, a Pillow image or an array."""

import errno
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH
from torch.nn import functional

from sinbad import errors

log = logging.getLogger(__name__)

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
IMAGE_CHUNK = 32  # images decoded before the first of them is passed on
WHITE = 255
TRANSPOSITIONS = {  # EXIF orientation -> how to turn an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_warned: set[str] = set()  # what has been said once


# ---------------------------------------------------------------- decode and orient


def open_image(image: ImageInput, name: str = "") -> Image.Image:
    """Return an image in RGB, the same by whichever way it comes in.

    EXIF orientation is applied, 16 bits per channel are scaled to 8, transparent pixels are
    composited on white.

    Parameters
    ----------
    image : path, Pillow image, or (height, width, 3) uint8 array
    name : for messages; by default the path

    Raises
    ------
    UserError
        If the image is damaged or too large, or its numbers have no known range.
    OSError
        Of the system (no such file, too many open files, ...), always with a file name.
    """
    name = name or image_name(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise errors.UserError(
                f"{name} must be (height, width, 3) of uint8, got {image.shape} of "
                f"{image.dtype}; convert it"
            )
        return Image.fromarray(image)
    decoded = _decode(image, name)
    # ImageOps.exif_transpose writes the whole EXIF anew, and fails where any other entry is broken.
    orientation = _orientation(decoded.getexif)
    if orientation in TRANSPOSITIONS:
        decoded = decoded.transpose(TRANSPOSITIONS[orientation])
    if decoded.mode[0] in "IF":  # 16-bit grey, or numbers whose range is not known
        decoded = _scale_to_8_bits(decoded, name)
    if decoded.has_transparency_data:
        with_alpha = decoded.convert("RGBA")
        if with_alpha.getextrema()[3][0] < WHITE:
            _warn_once("transparent", f"{name} has transparent pixels, which are read as white")
            white = Image.new("RGBA", with_alpha.size, "white")
            decoded = Image.alpha_composite(white, with_alpha)
    return decoded.convert("RGB")


def image_name(image: ImageInput, number: int = 0) -> str:
    """Return the name of an image in messages and tables: its path, or its number."""
    is_path = isinstance(image, (str, os.PathLike))
    return os.fspath(image) if is_path else f"image {number}"


def _decode(image: str | os.PathLike[str] | Image.Image, name: str) -> Image.Image:
    """Decode an image in its own mode."""
    with _named_errors(name):
        if isinstance(image, Image.Image):
            image.load()
            return image
        with Image.open(image) as opened:
            has_frames = getattr(opened, "is_animated", False)  # a GIF is asked while it is open
            opened.load()
    if has_frames and opened.format != "MPO":  # a camera's previews
        _warn_once("frames", f"{name} has several frames or pages, of which the first is read")
    return opened


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Say which image cannot be decoded, and leave errors of the system what they are."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = str(error).partition(",")[0]  # Image size (N pixels) exceeds limit of M pixels
        raise errors.UserError(f"{name} is too large: {size}; scale it down") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises whatever its decoder comes across
        # Pillow's own OSErrors have no errno; EINVAL: a damaged file gave a negative offset.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or name
            raise
        raise errors.UserError(
            f"{name} must be a complete image file, got one that cannot be decoded "
            f"({type(error).__name__}); copy it, or unpack its archive, again"
        ) from error


def _orientation(read_exif: Callable[[], Image.Exif]) -> int | None:
    """Return the orientation in an EXIF; one that cannot be read says nothing."""
    try:
        return read_exif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # whatever its parser comes across
        return None


def oriented_size(path: Path) -> tuple[int, int]:
    """Return the (width, height) in pixels that `open_image` gives, without decoding the image.

    Raises
    ------
    UserError
        If the file is no image, or too large.
    """
    with _named_errors(str(path)), Image.open(path) as opened:
        width, height = opened.size
        # Not PngImageFile's own getexif, which decodes the image to see what comes after it.
        orientation = _orientation(functools.partial(Image.Image.getexif, opened))
        if opened.format == "TIFF":  # whose size some versions of Pillow have turned already
            width, height = (opened.tag_v2[tag] for tag in (IMAGEWIDTH, IMAGELENGTH))
    return (height, width) if orientation in SIDEWAYS else (width, height)


def _scale_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)  # (height, width)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floats" if image.mode == "F" else "more"
        raise errors.UserError(f"{name} must have 8 or 16 bits per channel, got {kind}; convert it")
    if 0 < values.max() < 4096:
        _warn_once(
            "dark",
            f"{name} has 16 bits per channel but no value above {values.max()}, so it looks dark: "
            "if its values are of 12 bits, multiply them by 16 (10 bits: by 64) and save it again",
        )
    grey = Image.fromarray(np.rint(values.astype(np.int64) / 257.0).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(values != image.info["transparency"]).convert("L"))
    return grey


def _warn_once(topic: str, message: str) -> None:
    """Warn of the first image of its sort alone."""
    if topic not in _warned:
        _warned.add(topic)
        log.warning(f"{message} (said once)")


def mask_values(path: Path) -> set[int]:
    """Return the pixel values in a mask: indices of a palette, the largest channel of colours."""
    mask = _decode(path, str(path))
    if mask.mode in ("L", "P"):  # 60 times faster than np.unique
        return {value for _, value in mask.getcolors()}
    pixels = np.asarray(mask).astype(np.int64)
    if pixels.ndim == 3:
        pixels = pixels[:, :, [band != "A" for band in mask.getbands()]].max(2)
    return set(np.unique(pixels).tolist())


# ---------------------------------------------------------------- resize


def fitted_size(width: int, height: int, im_size: int) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image whose long side becomes `im_size`."""
    longest = max(width, height)
    return max(1, int(im_size * width / longest)), max(1, int(im_size * height / longest))


def resize_settings(true_size: tuple[int, int], im_size: int) -> dict[str, Any]:
    """Return what determines the pixels of a preprocessed image, as it is recorded.

    Parameters
    ----------
    true_size : (width, height) of the category's images in pixels; all share its aspect ratio
    im_size : side of the array in pixels
    """
    width, height = fitted_size(*true_size, im_size)
    return {
        "im_size": im_size,
        "width": width,
        "height": height,
        "aspect": list(true_size),
        "pillow": PIL.__version__,  # versions resize differently
    }


def nearest_source(size_in: int, size_out: int) -> NDArray[np.int64]:
    """Return the source index of each of `size_out` pixels by torch's "nearest" rule.

    Asked of torch itself, since its floor(i * in / out) is computed in float32.
    """
    indices = torch.arange(size_in, dtype=torch.float32)[None, None]
    return functional.interpolate(indices, size=size_out, mode="nearest")[0, 0].long().numpy()


def preprocess_image(
    image: ImageInput, settings: dict[str, Any], name: str = ""
) -> NDArray[np.uint8]:
    """Read and resize an image: bilinear to a square, nearest to its aspect ratio, zero-padded.

    Parameters
    ----------
    image : see `open_image`
    settings : see `resize_settings`
    name : for messages; by default the path

    Returns
    -------
    (3, im_size, im_size), uint8, image in the top left corner

    Raises
    ------
    UserError
        If the image cannot be read (see `open_image`) or has another aspect ratio.
    """
    name = name or image_name(image)
    opened = open_image(image, name)
    im_size, width, height = settings["im_size"], settings["width"], settings["height"]
    true_width, true_height = settings["aspect"]
    if abs(opened.width - opened.height * true_width / true_height) > 1.0 + opened.width / 1000.0:
        raise errors.UserError(
            f"{name} must have the aspect ratio {true_width} x {true_height} of its category, got "
            f"{opened.width} x {opened.height} pixels; crop or pad it"
        )
    square = np.asarray(opened.resize((im_size, im_size), Image.Resampling.BILINEAR))
    rows, columns = nearest_source(im_size, height), nearest_source(im_size, width)
    padded = np.zeros((3, im_size, im_size), np.uint8)
    padded[:, :height, :width] = square[rows[:, None], columns].transpose(2, 0, 1)
    return padded


def preprocess_images(
    inputs: Sequence[ImageInput], settings: dict[str, Any], first: int = 0
) -> Iterator[NDArray[np.uint8] | errors.UserError]:
    """Yield each image as `preprocess_image`, or the error of one that cannot be read.

    `first` is the number of the first image, for the names of those without a path.
    """

    def read(number: int) -> NDArray[np.uint8] | errors.UserError:
        name = image_name(inputs[number], first + number)
        try:
            return preprocess_image(inputs[number], settings, name)
        except errors.UserError as error:
            return error
        except OSError as error:
            return errors.UserError(f"{name}: {error.strerror or error}")

    numbers = range(len(inputs))
    with ThreadPoolExecutor() as pool:
        for start in numbers[::IMAGE_CHUNK]:
            yield from pool.map(read, numbers[start : start + IMAGE_CHUNK])


def preprocess_to_array(
    inputs: Sequence[ImageInput], settings: dict[str, Any]
) -> NDArray[np.uint8]:
    """Return preprocessed images (n, 3, im_size, im_size), mapped from a file that goes with them.

    UserError for the first that cannot be read.
    """
    with tempfile.TemporaryFile() as file:
        for image in preprocess_images(inputs, settings):
            if isinstance(image, errors.UserError):
                raise image
            try:
                file.write(image.data)
                file.flush()
            except OSError as error:  # a full disk names none
                error.filename = f"the folder of temporary files {tempfile.gettempdir()}"
                raise
        shape = (len(inputs), 3, settings["im_size"], settings["im_size"])
        return np.memmap(file, np.uint8, "r", shape=shape)
