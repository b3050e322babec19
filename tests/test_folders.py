"""Reading images and masks of every kind, and what is left out of a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_class
from PIL import Image

from sinbad import errors, layouts, loco

SIZE = (80, 120)  # pixels, width and height


def picture() -> np.ndarray:
    """Draw red above, blue below, a white square at top left; (height, width, 3)."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:60, :, 0], pixels[60:, :, 2] = 200, 200
    pixels[:20, :20] = 255
    return pixels


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    stored = Image.fromarray(np.rot90(picture()))  # what a camera held to its side stores
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(layouts.open_image(tmp_path / "turned.png"), picture())


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    grey = picture()[:, :, 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "gray16.png")
    read = np.asarray(layouts.open_image(tmp_path / "gray16.png"))
    for channel in range(3):
        np.testing.assert_array_equal(read[:, :, channel], picture()[:, :, 0])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_unknown_range_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, SIZE, 70_000).save(tmp_path / "wide.tiff")
    with pytest.raises(errors.UserError, match=r"wide\.tiff must have 8 or 16 bits a channel"):
        layouts.open_image(tmp_path / "wide.tiff")


def test_every_ending_that_pillow_reads_is_an_image_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "train/good"
    (folder / "more").mkdir(parents=True)
    names = ["a.PNG", "b.jpg", "c.jfif", "d.gif", "e.webp", "f.ppm", "g.bmp", "h.tif", "i.jp2"]
    for name in names:
        Image.fromarray(picture()).save(folder / name)
    for other in ("._a.PNG", "notes.txt", "Thumbs.db"):
        (folder / other).write_bytes(b"no image")
    assert layouts.list_images(tmp_path, "train/good") == [f"train/good/{name}" for name in names]
    assert f"4 of {len(names) + 4} things in {folder} are no images" in capsys.readouterr().err


def test_palette_masks_are_read_as_indices(tmp_path: Path) -> None:
    indices = np.zeros((120, 80), np.uint8)
    indices[:10, :10], indices[50:60, 50:60] = 1, 2
    mask = Image.fromarray(indices, "P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(tmp_path / "000.PNG")
    assert int((layouts.mask_pixels(tmp_path / "000.PNG") > 0).sum()) == 200


IMAGES = ["test/good/000.png", *(f"test/logical_anomalies/{n:03d}.png" for n in range(4))]


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Return a class folder with a list of three defects, two of them of one pixel value."""
    defects = {"missing": 255, "swapped": 240, "turned": 240}
    config = [{"defect_name": name, "pixel_value": value} for name, value in defects.items()]
    (tmp_path / "defects_config.json").write_text(json.dumps(config))
    return tmp_path


def write_mask(path: Path, value: int) -> None:
    """Write a mask with one square of a pixel value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:4, 2:4] = value
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("form", ["{:03d}/000.png", "{:03d}.png", "{:03d}/000.PNG"])
def test_masks_tell_which_images_show_which_defect(
    form: str, masks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = masks / "ground_truth/logical_anomalies"
    for number, value in ((0, 255), (1, 240), (2, 255)):
        write_mask(folder / form.format(number), value)
    (folder / "._000.png").write_bytes(b"what macOS leaves")
    found = layouts.defect_images(masks, IMAGES)
    assert found == {"missing": [1, 3], "swapped or turned": [2]}
    assert "1 images of" in capsys.readouterr().err  # 003 has no mask


def test_several_masks_of_an_image_count_each(masks: Path) -> None:
    for name, value in (("000.png", 255), ("001.png", 240)):
        write_mask(masks / "ground_truth/logical_anomalies/000" / name, value)
    assert layouts.defect_images(masks, IMAGES[:2]) == {"missing": [1], "swapped or turned": [1]}


@pytest.mark.parametrize("name", loco.LOCO_CLASSES)
def test_true_sizes_of_locos_classes(name: str, tmp_path: Path) -> None:
    draw_class(tmp_path / name)
    sizes = {
        "breakfast_box": [1600, 1280],
        "juice_bottle": [800, 1600],
        "pushpins": [1700, 1000],
        "screw_bag": [1600, 1100],
        "splicing_connectors": [1700, 850],
    }
    settings = layouts.plan_data_set(tmp_path, f"{name}_loco", 1024).settings
    assert settings["aspect"] == sizes[name]
    assert max(settings["width"], settings["height"]) == 1024
