"""Image trees: which images there are, of which split and kind, and reading one of them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sinbad.datasets import (
    ARCHIVE_SHA256,
    DOWNLOAD_PAGE,
    KINDS,
    LOCO_CLASSES,
    OTHER_COUNTS,
    expand_mvtypes,
    split_mvtype,
)
from sinbad.errors import UserError, say

GOOD = "good"
DEFECTS_FILE = "defects_config.json"
WHITE = 255  # pixel value of a mask that has been made black and white
EXPECTED_TREE = "<class>/train/good, <class>/validation/good, <class>/test/good, " + ", ".join(
    f"<class>/test/{kind}" for kind in KINDS.values()
)


@dataclass(frozen=True)
class Plan:
    """What one data set's matrices are made of: folder, images by split, labels, settings."""

    mvtype: str
    class_dir: Path
    paths: dict[str, list[str]]
    labels: NDArray[np.float64]
    settings: dict[str, Any]


# ---------------------------------------------------------------- what there is


def find_classes(dataset_dir: Path) -> list[str]:
    """Return the class folders below `dataset_dir`, LOCO's first.

    Raises
    ------
    UserError
        If there is none; says what was expected, what was found, and where LOCO comes from.
    """
    found = sorted(folder.parents[1].name for folder in dataset_dir.glob("*/train/good"))
    if not found:
        there = _names_in(dataset_dir) if dataset_dir.is_dir() else None
        what = "no such folder" if there is None else f"a folder with {there or 'nothing in it'}"
        raise UserError(
            f"dataset_dir must hold {EXPECTED_TREE} with images, got {what} ({dataset_dir}); "
            f"unpack MVTec LOCO AD there ({DOWNLOAD_PAGE}, archive sha256 {ARCHIVE_SHA256}), or "
            "pass --dataset_dir"
        )
    _check_utf8(dataset_dir, found)
    endings = tuple(f"_{kind}" for kind in KINDS)
    ambiguous = [name for name in found if name.endswith(endings)]
    if ambiguous:
        raise UserError(
            f"a class' folder must not end in {' or '.join(endings)}, as data sets do, got "
            f"{ambiguous[0]} in {dataset_dir}; rename it"
        )
    return sorted(found, key=lambda name: (name not in LOCO_CLASSES, name))


def _names_in(folder: Path, pattern: str = "*") -> str:
    """Return the first names in a folder, for messages."""
    return ", ".join(sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))[:8])


def _check_utf8(folder: Path, names: list[str]) -> None:
    """Refuse names that no text file can hold."""
    for name in names:
        if os.fsencode(name) != name.encode(errors="replace"):
            raise UserError(f"{folder} must hold names in UTF-8, got {name!r}; rename it")


def choose_data_sets(dataset_dir: Path, names: list[str] | None) -> list[str]:
    """Return the data sets asked for, or all that the folder has anomalies for."""
    found = find_classes(dataset_dir)
    if names is None:
        missing = [name for name in LOCO_CLASSES if name not in found]
        if missing:
            say(f"note: not in {dataset_dir}: {', '.join(missing)}")
    chosen = []
    for mvtype in expand_mvtypes(names or ["all"], found):
        class_name, kind = split_mvtype(mvtype)
        part = dataset_dir / class_name / "test" / KINDS[kind]
        if part.is_dir() or mvtype in (names or ()) or class_name not in found:
            chosen.append(mvtype)
        else:
            say(f"note: {mvtype} left out, there is no {part}")
    if not chosen:
        raise UserError(f"{dataset_dir} must hold anomalies of a class, got none; {EXPECTED_TREE}")
    return chosen


def list_images(class_dir: Path, part: str) -> list[str]:
    """Return the images of e.g. "train/good", by name, relative to the class folder.

    Every ending that Pillow reads; what is left out is counted in one line.
    """
    folder = class_dir / part
    if not folder.is_dir():
        there = _names_in(class_dir, "*/*") or "an empty folder"
        raise UserError(f"{class_dir} must hold {part}, got {there}; the tree is {EXPECTED_TREE}")
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    everything = sorted(path.name for path in folder.iterdir())
    names = [
        name
        for name in everything
        if Path(name).suffix.lower() in endings and not name.startswith(".")
    ]
    if not names:
        there = f"{len(everything)} other things" if everything else "an empty folder"
        raise UserError(f"{folder} must hold images that Pillow reads, got {there}; add some")
    _check_utf8(folder, names)
    n_others = len(everything) - len(names)
    if n_others:
        say(f"note: {n_others} of {len(everything)} things in {folder} are no images, left out")
    return [f"{part}/{name}" for name in names]


def plan_data_set(dataset_dir: Path, mvtype: str, im_size: int) -> Plan:
    """List a data set's images and settle the size they get."""
    class_name, kind = split_mvtype(mvtype)
    class_dir = dataset_dir / class_name
    if not class_dir.is_dir():
        raise UserError(
            f"mvtype must be of a class in {dataset_dir}, got {mvtype}; found: "
            f"{', '.join(find_classes(dataset_dir))}"
        )
    good, anomalous = (list_images(class_dir, f"test/{part}") for part in (GOOD, KINDS[kind]))
    paths = {
        "train": list_images(class_dir, f"train/{GOOD}"),
        "valid": list_images(class_dir, f"validation/{GOOD}"),
        "test": good + anomalous,
    }
    if class_name in LOCO_CLASSES:
        true_size = (LOCO_CLASSES[class_name].width, LOCO_CLASSES[class_name].height)
    else:
        true_size = open_image(class_dir / paths["train"][0]).size
    width, height = fitted_size(*true_size, im_size)
    settings = {
        "im_size": im_size,
        "width": width,
        "height": height,
        "aspect": list(true_size),
        "pillow": PIL.__version__,  # versions resize differently
    }
    labels = np.array([0.0] * len(good) + [1.0] * len(anomalous))
    return Plan(mvtype, class_dir, paths, labels, settings)


def fitted_size(width: int, height: int, im_size: int) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image whose long side becomes `im_size`."""
    longest = max(width, height)
    return max(1, int(im_size * width / longest)), max(1, int(im_size * height / longest))


def warn_about_counts(plan: Plan) -> None:
    """Say where the numbers of images differ from LOCO's."""
    class_name, kind = split_mvtype(plan.mvtype)
    if class_name not in LOCO_CLASSES:
        return
    facts = LOCO_CLASSES[class_name]
    n_good = int((plan.labels == 0).sum())
    found = {
        "train": len(plan.paths["train"]),
        "validation": len(plan.paths["valid"]),
        GOOD: n_good,
        KINDS[kind]: len(plan.labels) - n_good,
    }
    expected = {
        "train": facts.train,
        "validation": facts.validation,
        GOOD: facts.good,
        KINDS[kind]: facts.logical if kind == "loco" else facts.structural,
    }
    other = {**expected, **OTHER_COUNTS.get(class_name, {})}
    if found not in (expected, other):
        pairs = [f"{n} {found[n]} (LOCO: {expected[n]})" for n in found if found[n] != expected[n]]
        say(f"warning: {plan.mvtype} is not the whole data set: {', '.join(pairs)}")


# ---------------------------------------------------------------- reading an image


def open_image(path: Path) -> Image.Image:
    """Decode an image as RGB: turned as its EXIF says, 16 bits a channel scaled to 8.

    Raises
    ------
    UserError
        If it is broken, or of numbers without a known range.
    """
    image = ImageOps.exif_transpose(_decode(path))
    if image.mode.startswith("I"):  # 16-bit grey
        values = np.asarray(image).astype(np.int64)  # (height, width)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path} must have 8 or 16 bits a channel, got more; convert it")
        image = Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{path} must have 8 or 16 bits a channel, got floats; convert it")
    return image.convert("RGB")


def _decode(path: Path) -> Image.Image:
    """Decode an image as it is; a broken one is an error."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} must be a whole image, got one that cannot be decoded "
            f"({type(error).__name__}); unpack it again from the archive"
        ) from error


# ---------------------------------------------------------------- masks


def defect_images(class_dir: Path, image_paths: list[str]) -> dict[str, list[int]]:
    """Tell which test images show which kind of defect, by the ground truth masks.

    Reads CLASS_DIR/defects_config.json (a mask's pixel value -> the defect's name) and
    CLASS_DIR/ground_truth/<kind>/<image>/*.png, or <kind>/<image>.png as in some copies.

    Returns
    -------
    defect -> indices into `image_paths`, in the order of the configuration; empty without one, and
    where the masks are black and white (some copies of LOCO)
    """
    config_path = class_dir / DEFECTS_FILE
    if not config_path.is_file():
        return {}
    names: dict[int, list[str]] = {}  # pixel value -> defects, more than one where they share it
    try:
        for entry in json.loads(config_path.read_text(encoding="utf-8")):
            names.setdefault(int(entry["pixel_value"]), []).append(str(entry["defect_name"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{config_path} must list pixel_value and defect_name of every defect, got "
            f"{type(error).__name__}: {error}; unpack it again from the archive"
        ) from error
    anomalous = [i for i, path in enumerate(image_paths) if Path(path).parent.name != GOOD]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda i: _mask_values(class_dir, image_paths[i]), anomalous))
    values = dict(zip(anomalous, found, strict=True))
    without = [image_paths[i] for i, own in values.items() if not own]
    if without:
        say(f"warning: {len(without)} images of {class_dir} have no mask, as {without[0]}")
    if set().union(*found) == {WHITE} and len(names) > 1:
        say(f"note: the masks in {class_dir} are black and white, which defect is not told by them")
        return {}
    by_defect = {
        " or ".join(own): [i for i, in_image in values.items() if value in in_image]
        for value, own in names.items()
    }
    return {name: images for name, images in by_defect.items() if images}


def _mask_values(class_dir: Path, image_path: str) -> set[int]:
    """Return the pixel values but 0 of all masks of one test image; {} where there is none."""
    path = Path(image_path)
    folder = class_dir / "ground_truth" / path.parent.name
    values: set[int] = set()
    for place, stem in ((folder / path.stem, None), (folder, path.stem)):
        for mask in sorted(place.iterdir()) if place.is_dir() else ():
            is_mask = mask.suffix.lower() == ".png" and not mask.name.startswith(".")
            if is_mask and stem in (None, mask.stem):
                values |= set(np.unique(mask_pixels(mask)).tolist())
    return values - {0}


def mask_pixels(path: Path) -> NDArray[np.int64]:
    """Return the pixel values (height, width) of a mask; of a palette its indices."""
    pixels = np.asarray(_decode(path)).astype(np.int64)
    return pixels if pixels.ndim == 2 else pixels[:, :, :3].max(2)
