"""One image: modes, orientation, resizing, masks."""

import errno
import io
import os
import struct
from pathlib import Path
from typing import Any

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


def png(image: Image.Image, **options: Any) -> Image.Image:  # noqa: ANN401  what Pillow takes
    """Return an image written to a PNG file and opened again, not decoded yet."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(file)


def exif(numerator: int, denominator: int, orientation: int = 6) -> bytes:
    """Return an EXIF with an orientation and a resolution of numerator / denominator."""
    entries = struct.pack("<HHLL", 0x0112, 3, 1, orientation) + struct.pack(
        "<HHLL", 0x011A, 10, 1, 38
    )
    fraction = struct.pack("<ll", numerator, denominator)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + struct.pack("<L", 0) + fraction


def test_arrays_are_taken_as_they_are() -> None:
    np.testing.assert_array_equal(images.open_image(upright()), upright())
    for bad in (upright()[..., :2], upright()[..., 0], upright().astype(np.int16)):
        with pytest.raises(
            errors.UserError, match=r"image 0 must be \(height, width, 3\) of uint8"
        ):
            images.open_image(bad)


@pytest.mark.parametrize("numerator", [72, -1])  # -1 / 0 is none, Pillow cannot write it again
def test_exif_orientation_is_applied_to_files_and_pillow_images(
    numerator: int, tmp_path: Path
) -> None:
    stored = Image.fromarray(np.rot90(upright()))  # what a camera held to its side stores
    stored.save(tmp_path / "turned.png", exif=exif(numerator, int(numerator > 0)))
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(images.open_image(image), upright())
    assert images.oriented_size(tmp_path / "turned.png") == SIZE


@pytest.mark.parametrize("orientation", range(9))  # 0: no EXIF
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff", "webp"])
def test_the_oriented_size_is_that_of_the_decoded_image(
    ending: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"image.{ending}"
    options = {"exif": exif(72, 1, orientation)} if orientation else {}
    Image.fromarray(upright()).save(path, **options)
    expected = images.open_image(path).size
    assert expected == (SIZE if orientation < 5 else SIZE[::-1])
    decoded: list[Image.Image] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image))
    assert images.oriented_size(path) == expected
    assert not decoded


def test_an_exif_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    Image.fromarray(upright()).save(tmp_path / "a.png", exif=b"Exif\0\0broken")
    np.testing.assert_array_equal(images.open_image(tmp_path / "a.png"), upright())
    assert images.oriented_size(tmp_path / "a.png") == SIZE


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey = upright()[:, :, 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "gray16.png")
    for image in (tmp_path / "gray16.png", Image.open(tmp_path / "gray16.png")):
        read = np.asarray(images.open_image(image))
        np.testing.assert_array_equal(read, upright()[:, :, [0, 0, 0]])
    assert not caplog.messages


def test_twelve_bits_in_a_file_of_sixteen_are_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_warned", set())
    for value in (0, 4096, 4095, 4095):
        images.open_image(Image.fromarray(np.full((4, 4), value, np.uint16)), f"{value}.png")
    (line,) = caplog.messages
    assert line.startswith("4095.png has 16 bits per channel but no value above 4095")
    assert "multiply them by 16" in line


GREY = Image.fromarray(upright()[:, :, 0])  # 0 is transparent below
TRANSPARENT = {
    "LA": png(Image.merge("LA", [GREY, GREY.point(lambda value: 255 * (value > 0))])),
    "L": png(GREY, transparency=0),
    "I;16": png(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), transparency=0),
    "P": png(GREY.convert("P"), transparency=0),
    "RGB": png(GREY.convert("RGB"), transparency=(0, 0, 0)),
}


def test_of_several_frames_the_first_is_read_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "_warned", set())
    first, other = Image.fromarray(upright()), Image.new("RGB", SIZE)
    first.save(tmp_path / "single.gif")
    np.testing.assert_array_equal(images.open_image(tmp_path / "single.gif"), upright())
    for name in ("pages.tif", "moving.webp", "moving.gif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        first.save(tmp_path / name, save_all=True, append_images=[other], **options)
        np.testing.assert_array_equal(images.open_image(tmp_path / name), upright())
    expected = f"{tmp_path}/pages.tif has several frames or pages, of which the first is read"
    assert caplog.messages == [f"{expected} (said once)"]


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparent_pixels_are_white_and_warned_of_once(
    mode: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_warned", set())
    assert TRANSPARENT[mode].mode == mode
    expected = np.where(np.asarray(GREY) == 0, 255, np.asarray(GREY))
    for _ in range(2):
        read = np.asarray(images.open_image(TRANSPARENT[mode], "x.png"))
        np.testing.assert_array_equal(read, np.stack([expected] * 3, -1))
    assert caplog.messages == ["x.png has transparent pixels, which are read as white (said once)"]


def test_what_transparent_pixels_hide_is_not_seen() -> None:
    alpha = np.full((*upright().shape[:2], 1), 255, np.uint8)
    alpha[:30], alpha[30:40] = 0, 128
    noise = np.random.default_rng(0).integers(0, 256, upright().shape, dtype=np.uint8)
    hidden = [np.where(alpha == 0, colour, upright()).astype(np.uint8) for colour in (0, noise)]
    black, noisy = (
        np.asarray(images.open_image(Image.fromarray(np.dstack([pixels, alpha]))))
        for pixels in hidden
    )
    np.testing.assert_array_equal(black, noisy)
    np.testing.assert_array_equal(black[40:], upright()[40:])


def test_errors_of_the_system_are_no_damaged_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(upright()).save(tmp_path / "a.png")
    for number in (errno.ESTALE, errno.EMFILE, errno.ENOMEM):

        def load(image: Image.Image, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        with pytest.raises(OSError, match=r"a\.png") as caught:
            images.open_image(tmp_path / "a.png")
        assert caught.value.errno == number


def test_a_damaged_image_is_named_by_whichever_way_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(upright()).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    for image, name in ((path, ""), (Image.open(path), "image 3")):
        with pytest.raises(errors.UserError, match=f"{name or path} must be a complete image"):
            images.open_image(image, name)


def test_an_image_that_is_too_large_is_said_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(upright()).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # an error from twice as many
    with pytest.raises(errors.UserError, match=r"large.png is too large: .*\(9600 pixels\)"):
        images.open_image(tmp_path / "large.png")


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


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_mask_values_of_every_mode(mode: str, tmp_path: Path) -> None:
    values = np.zeros((30, 40), np.uint16 if mode == "I;16" else np.uint8)
    values[3:5, 5:9], values[7, 7] = 240, 255
    mask = Image.fromarray(values)
    (mask if mode == mask.mode else mask.convert(mode)).save(tmp_path / "mask.png")
    assert images.mask_values(tmp_path / "mask.png") == {0, 240, 255}


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
