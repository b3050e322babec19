"""One image: modes, orientation, resizing, masks."""

from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image
from numpy.typing import NDArray
from PIL import Image

from sinbad import errors, images

SIZE = (80, 120)  # pixels, width and height


def upright() -> NDArray[np.uint8]:
    """Return red above, blue below, a white square at top left; (height, width, 3)."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:60, :, 0], pixels[60:, :, 2] = 200, 200
    pixels[:20, :20] = 255
    return pixels


def slow_resize(path: Path, true_size: tuple[int, int], im_size: int) -> NDArray[np.uint8]:
    """DESIGN section 3, pixel by pixel; the bilinear resize is Pillow's by definition."""
    with Image.open(path) as image:
        square = image.convert("RGB").resize((im_size, im_size), Image.Resampling.BILINEAR)
    width, height = (int(im_size * side / max(true_size)) for side in true_size)
    padded = np.zeros((3, im_size, im_size), np.uint8)
    for y in range(height):
        for x in range(width):
            source = (x * im_size // width, y * im_size // height)
            padded[:, y, x] = square.getpixel(source)
    return padded


# ---------------------------------------------------------------- decode and orient


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    stored = Image.fromarray(np.rot90(upright()))  # what a camera held to its side stores
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(images.open_image(tmp_path / "turned.png"), upright())


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    grey = upright()[:, :, 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "gray16.png")
    read = np.asarray(images.open_image(tmp_path / "gray16.png"))
    np.testing.assert_array_equal(read, upright()[:, :, [0, 0, 0]])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_unknown_range_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, SIZE, 70_000).save(tmp_path / "wide.tiff")
    with pytest.raises(errors.UserError, match=r"wide\.tiff must have 8 or 16 bits per channel"):
        images.open_image(tmp_path / "wide.tiff")


def test_masks_with_a_palette_are_read_as_indices(tmp_path: Path) -> None:
    indices = np.zeros((120, 80), np.uint8)
    indices[:10, :10], indices[50:60, 50:60] = 1, 2
    mask = Image.fromarray(indices, "P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(tmp_path / "000.PNG")
    assert images.mask_values(tmp_path / "000.PNG") == {0, 1, 2}


# ---------------------------------------------------------------- resize


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    draw_image("train/good", 0).convert(mode).save(path)
    settings = images.resize_settings((1700, 1000), 32)
    expected = slow_resize(path, (1700, 1000), 32)
    np.testing.assert_array_equal(images.preprocess_image(path, settings), expected)


@pytest.mark.parametrize(("size_in", "size_out"), [(44, 224), (63, 224), (1024, 640), (1024, 602)])
def test_nearest_source_is_the_floor_of_the_ratio(size_in: int, size_out: int) -> None:
    expected = [i * size_in // size_out for i in range(size_out)]
    assert images.nearest_source(size_in, size_out).tolist() == expected


@pytest.mark.parametrize(("size", "fits"), [((86, 50), True), ((85, 51), False)])
def test_an_aspect_ratio_may_be_a_pixel_off_in_width(size: tuple[int, int], fits: bool) -> None:
    settings = images.resize_settings((1700, 1000), 32)
    image = draw_image("train/good", 0, size)
    if fits:
        assert images.preprocess_image(image, settings).shape == (3, 32, 32)
    else:
        with pytest.raises(errors.UserError, match="3 must have the aspect ratio 1700 x 1000"):
            images.preprocess_image(image, settings, "image 3")
