"""The image folders of MVTec LOCO AD, or of a tree like it: what is there, and reading an image."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from command_line import UserError, say
from loco_datasets import (
    ARCHIVE_SHA256,
    DOWNLOAD_PAGE,
    KINDS,
    LOCO_CLASSES,
    OTHER_COUNTS,
    expand_mvtypes,
    split_mvtype,
)
from matrix_files import fitted_size

DEFECTS_FILE = "defects_config.json"
WHITE = 255  # pixel value of a mask that has been made black and white
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
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


def find_classes(dataset_dir: Path) -> list[str]:
    """Return the class folders below `dataset_dir`, LOCO's first.

    Raises
    ------
    UserError
        If there is none; says what was expected, what was found, and where LOCO comes from.
    """
    found = sorted(folder.parents[1].name for folder in dataset_dir.glob("*/train/good"))
    if not found:
        there = (
            sorted(path.name for path in dataset_dir.iterdir())[:8] if dataset_dir.is_dir() else []
        )
        what = f"a folder with {', '.join(there) or 'nothing in it'}"
        raise UserError(
            f"dataset_dir must hold {EXPECTED_TREE} with images, got "
            f"{what if dataset_dir.is_dir() else 'no such folder'} ({dataset_dir}); unpack MVTec "
            f"LOCO AD there ({DOWNLOAD_PAGE}, archive sha256 {ARCHIVE_SHA256}), or pass "
            "--dataset_dir"
        )
    ambiguous = [name for name in found if name.endswith(tuple(f"_{kind}" for kind in KINDS))]
    if ambiguous:
        raise UserError(
            f"a class' folder must not end in {' or '.join(f'_{kind}' for kind in KINDS)}, as data "
            f"sets do, got {ambiguous[0]} in {dataset_dir}; rename it"
        )
    return sorted(found, key=lambda name: (name not in LOCO_CLASSES, name))


def list_images(class_dir: Path, part: str) -> list[str]:
    """Return the images of e.g. "train/good", by name, relative to the class folder."""
    folder = class_dir / part
    if not folder.is_dir():
        there = sorted(str(path.relative_to(class_dir)) for path in class_dir.glob("*/*"))[:8]
        raise UserError(
            f"{class_dir} must hold {part}, got {', '.join(there) or 'an empty folder'}; the tree "
            f"is {EXPECTED_TREE}"
        )
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")
    )
    if not names:
        raise UserError(f"{folder} must hold images ({' '.join(IMAGE_ENDINGS)}), got none")
    unreadable = [name for name in names if os.fsencode(name) != name.encode(errors="replace")]
    if unreadable:
        raise UserError(f"{folder} must hold names in UTF-8, got {unreadable[0]!r}; rename it")
    return [f"{part}/{name}" for name in names]


def plan_data_set(dataset_dir: Path, mvtype: str, im_size: int) -> Plan:
    """List a data set's images and settle the size they get."""
    class_name, kind = split_mvtype(mvtype)
    class_dir = dataset_dir / class_name
    if not class_dir.is_dir():
        find_classes(dataset_dir)  # says more where there is no class at all
        raise UserError(
            f"mvtype must be of a class in {dataset_dir}, got {mvtype}; found: "
            f"{', '.join(find_classes(dataset_dir))}"
        )
    good, anomalous = (list_images(class_dir, f"test/{part}") for part in ("good", KINDS[kind]))
    paths = {
        "train": list_images(class_dir, "train/good"),
        "valid": list_images(class_dir, "validation/good"),
        "test": good + anomalous,
    }
    if class_name in LOCO_CLASSES:
        true_size = (LOCO_CLASSES[class_name].width, LOCO_CLASSES[class_name].height)
    else:
        with open_image(class_dir / paths["train"][0]) as image:
            true_size = image.size
    width, height = fitted_size(*true_size, im_size)
    settings = {"im_size": im_size, "width": width, "height": height, "aspect": list(true_size)}
    labels = np.array([0.0] * len(good) + [1.0] * len(anomalous))
    return Plan(mvtype, class_dir, paths, labels, settings)


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
        "good": n_good,
        KINDS[kind]: len(plan.labels) - n_good,
    }
    expected = {
        "train": facts.train,
        "validation": facts.validation,
        "good": facts.good,
        KINDS[kind]: facts.logical if kind == "loco" else facts.structural,
    }
    other = {**expected, **OTHER_COUNTS.get(class_name, {})}
    if found not in (expected, other):
        pairs = [f"{n} {found[n]} (LOCO: {expected[n]})" for n in found if found[n] != expected[n]]
        say(f"warning: {plan.mvtype} is not the whole data set: {', '.join(pairs)}")


def open_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Decode an image as RGB (or another of Pillow's modes); a broken one is an error."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{path} must have 8 bits a channel, got Pillow's mode {image.mode}; convert it"
                )
            return image.convert(mode)
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} must be a whole image, got one that cannot be decoded "
            f"({type(error).__name__}); unpack it again from the archive"
        ) from error


def choose_data_sets(dataset_dir: Path, names: list[str] | None) -> list[str]:
    """Return the data sets asked for, or all that the folder has anomalies for."""
    found = find_classes(dataset_dir)
    if names is None:
        missing = [name for name in LOCO_CLASSES if name not in found]
        if missing:
            say(f"note: not in {dataset_dir}: {', '.join(missing)}")
    wanted = expand_mvtypes(names or ["all"], found)
    explicit = set(names or ())
    chosen = []
    for mvtype in wanted:
        class_name, kind = split_mvtype(mvtype)
        part = dataset_dir / class_name / "test" / KINDS[kind]
        if part.is_dir() or mvtype in explicit or class_name not in found:
            chosen.append(mvtype)
        else:
            say(f"note: {mvtype} left out, there is no {part}")
    if not chosen:
        raise UserError(f"{dataset_dir} must hold anomalies of a class, got none; {EXPECTED_TREE}")
    return chosen


def defect_images(class_dir: Path, image_paths: list[str]) -> dict[str, list[int]]:
    """Tell which test images show which kind of defect, by the ground truth masks.

    Reads CLASS_DIR/defects_config.json (a mask's pixel value -> the defect's name) and
    CLASS_DIR/ground_truth/<kind>/<image>/*.png.

    Returns
    -------
    defect -> indices into `image_paths`, in the order of the configuration; empty without one, and
    where the masks are black and white (some copies of LOCO)
    """
    config_path = class_dir / DEFECTS_FILE
    if not config_path.is_file():
        return {}
    try:
        config = json.loads(config_path.read_text())
        names = {int(entry["pixel_value"]): str(entry["defect_name"]) for entry in config}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{config_path} must list pixel_value and defect_name of every defect, got "
            f"{type(error).__name__}: {error}; unpack it again from the archive"
        ) from error
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = list(pool.map(lambda path: _mask_values(class_dir, path), image_paths))
    if set().union(*values) == {WHITE} and len(names) > 1:
        say(f"note: the masks in {class_dir} are black and white, which defect is not told by them")
        return {}
    found = {
        name: [i for i, in_image in enumerate(values) if value in in_image]
        for value, name in names.items()
    }
    return {name: images for name, images in found.items() if images}


def _mask_values(class_dir: Path, image_path: str) -> set[int]:
    """Return the pixel values of all masks of one test image."""
    path = Path(image_path)
    folder = class_dir / "ground_truth" / path.parent.name / path.stem
    values: set[int] = set()
    for mask_path in sorted(folder.glob("*.png")):
        counts = open_image(mask_path, "L").histogram()
        values |= {value for value, count in enumerate(counts) if count}
    return values - {0}
