"""Image trees: which images there are, of which split and kind, and reading one of them."""

import argparse
import csv
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sinbad import cli, errors, loco

log = logging.getLogger(__name__)

GOOD = "good"
DEFECTS_FILE = "defects_config.json"
WHITE = 255  # pixel value of a mask that has been made black and white
VISA_FILE = Path("split_csv/1cls.csv")
VISA_PARTS = {("train", "normal"): "train", ("test", "normal"): GOOD, ("test", "anomaly"): "bad"}
LOCO, MVTEC, VISA, PLAIN = "LOCO", "MVTec AD", "VisA", "plain"
TREES = {
    LOCO: f"<class>/{{train,validation}}/good, <class>/test/{{good,{','.join(loco.KINDS.values())}}}",
    MVTEC: "<class>/train/good, <class>/test/{good,<kind>...}, no validation",
    VISA: f"{VISA_FILE} with the columns object, split, label, image, mask",
    PLAIN: "<class>/train, <class>/validation if there is one, <class>/test/{good,<any>...}",
}
LAYOUTS = "one of the layouts " + "; ".join(f"{name} ({tree})" for name, tree in TREES.items())
MIN_VALID = 5  # images taken, and images that stay


@dataclass(frozen=True)
class Plan:
    """What one data set's matrices are made of: folder, images by split, labels, settings."""

    mvtype: str
    class_dir: Path
    paths: dict[str, list[str]]
    labels: NDArray[np.float64]
    settings: dict[str, Any]


# ---------------------------------------------------------------- what there is


def find_layouts(dataset_dir: Path) -> dict[str, str]:
    """Return class -> layout (a key of TREES) of all classes, LOCO's first.

    UserError if there is none: what was expected, what was found, and where LOCO comes from.
    """
    visa = _read_visa(dataset_dir)
    folders = {path.parent for path in dataset_dir.glob("*/train")}
    folders |= {dataset_dir / name for name in visa if (dataset_dir / name).is_dir()}
    found = {own.name: layout for own in folders if (layout := _layout_of(own, visa))}
    if not found:
        there = _names_in(dataset_dir, "*/*") or _names_in(dataset_dir) or "nothing in it"
        what = f"a folder with {there}" if dataset_dir.is_dir() else "no such folder"
        raise errors.UserError(
            f"dataset_dir must hold {LAYOUTS}, got {what} ({dataset_dir}); unpack e.g. MVTec LOCO "
            f"AD there ({loco.DOWNLOAD_PAGE}, archive sha256 {loco.ARCHIVE_SHA256}), or pass --dataset_dir"
        )
    _check_utf8(dataset_dir, list(found))
    endings = tuple(f"_{kind}" for kind in (*loco.KINDS, loco.ALL))
    ambiguous = [name for name in found if name.endswith(endings)]
    if ambiguous:
        raise errors.UserError(
            f"a class' folder must not end in {' or '.join(endings)}, as data sets do, got "
            f"{ambiguous[0]} in {dataset_dir}; rename it"
        )
    return dict(sorted(found.items(), key=lambda item: (item[0] not in loco.LOCO_CLASSES, item[0])))


def _layout_of(class_dir: Path, visa: dict[str, Any]) -> str | None:
    """Recognise the layout of one class by its folders, or by VisA's list; None if it is none."""
    if class_dir.name in visa:
        return VISA
    if any((class_dir / "test" / folder).is_dir() for folder in loco.KINDS.values()):
        return LOCO
    if (class_dir / "train" / GOOD).is_dir() and not (class_dir / "validation").is_dir():
        return MVTEC
    return PLAIN if (class_dir / "train").is_dir() else None


def _read_visa(dataset_dir: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Read VisA's list, if any: class -> image, as in a Plan -> its part, its mask's path or ""."""
    path = dataset_dir / VISA_FILE
    classes: dict[str, dict[str, tuple[str, str]]] = {}
    if not path.is_file():
        return classes
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                before, name = row["image"].split("/", 1)
                images = classes.setdefault(row["object"], {})
                if before != row["object"] or name in images or ".." in Path(name).parts:
                    raise ValueError(f"image {row['image']}")
                images[name] = VISA_PARTS[row["split"], row["label"]], row["mask"] or ""
    except (ValueError, KeyError, AttributeError, csv.Error) as error:
        raise errors.UserError(
            f"{path} must list object, split, label, image (once, below its object) and mask, got "
            f"{type(error).__name__}: {error}; unpack it again from the archive"
        ) from error
    return classes


def _names_in(folder: Path, pattern: str = "*") -> str:
    """Return the first names in a folder, for messages."""
    return ", ".join(sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))[:8])


def _check_utf8(folder: Path, names: list[str]) -> None:
    """Refuse names that no text file can hold."""
    for name in names:
        if os.fsencode(name) != name.encode(errors="replace"):
            raise errors.UserError(f"{folder} must hold names in UTF-8, got {name!r}; rename it")


def choose_data_sets(dataset_dir: Path, names: list[str] | None) -> list[str]:
    """Return the data sets asked for, or all that the folder has anomalies for."""
    found = find_layouts(dataset_dir)
    by_layout = {layout: [name for name in found if found[name] == layout] for layout in TREES}
    shown = [f"{layout} ({', '.join(own)})" for layout, own in by_layout.items() if own]
    log.info(f"layouts in {dataset_dir}: {'; '.join(shown)}")
    expected = loco.LOCO_CLASSES if by_layout[LOCO] else _read_visa(dataset_dir)
    missing = [name for name in expected if name not in found]
    if names is None and missing:
        log.info(f"note: not in {dataset_dir}: {', '.join(missing)}")
    kinds_of = {name: tuple(loco.KINDS) if found[name] == LOCO else (loco.ALL,) for name in found}
    chosen = []
    for mvtype in loco.expand_mvtypes(names or [loco.ALL], kinds_of):
        class_name, kind = loco.split_mvtype(mvtype)
        there = _anomaly_folders(dataset_dir / class_name, kind) or found.get(class_name) == VISA
        if there or mvtype in (names or ()) or class_name not in found:
            chosen.append(mvtype)
        else:
            folder = dataset_dir / class_name / "test" / loco.KINDS.get(kind, "<any>")
            log.info(f"note: {mvtype} left out, there is no {folder}")
    if not chosen:
        raise errors.UserError(f"{dataset_dir} must hold anomalies of a class, got none; {LAYOUTS}")
    return chosen


def _anomaly_folders(class_dir: Path, kind: str) -> list[str]:
    """Return the folders with a kind's anomalies; of `all` every folder of test but good."""
    names = sorted(path.name for path in class_dir.glob("test/*") if path.is_dir())
    wanted = (
        [loco.KINDS[kind]]
        if kind in loco.KINDS
        else [n for n in names if n != GOOD and n[0] != "."]
    )
    return [f"test/{name}" for name in names if name in wanted]


def list_images(class_dir: Path, part: str) -> list[str]:
    """Return the images of e.g. "train/good", by name, relative to the class folder.

    Every ending that Pillow reads; what is left out is counted in one line.
    """
    folder = class_dir / part
    if not folder.is_dir():
        there = _names_in(class_dir, "*/*") or "an empty folder"
        raise errors.UserError(f"{class_dir} must hold {part}, got {there}; give it {LAYOUTS}")
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    everything = sorted(path.name for path in folder.iterdir())
    names = [n for n in everything if Path(n).suffix.lower() in endings and n[0] != "."]
    if not names:
        there = f"{len(everything)} other things" if everything else "an empty folder"
        raise errors.UserError(
            f"{folder} must hold images that Pillow reads, got {there}; add some"
        )
    _check_utf8(folder, [part, *names])
    n_others = len(everything) - len(names)
    if n_others:
        log.info(
            f"note: {n_others} of {len(everything)} things in {folder} are no images, left out"
        )
    return [f"{part}/{name}" for name in names]


def _list_parts(
    class_dir: Path, kind: str, layout: str, visa: dict[str, dict[str, tuple[str, str]]]
) -> dict[str, list[str]]:
    """Return the images of "train", "validation" (if any), "good" and "bad", folder by folder."""
    if layout == VISA:
        images = visa[class_dir.name]
        parts = {
            part: sorted(n for n in images if images[n][0] == part) for part in VISA_PARTS.values()
        }
        for part, own in parts.items():
            if not own:
                raise errors.UserError(
                    f"{VISA_FILE} must list {part} images of {class_dir}, got none"
                )
        return parts
    splits = [s for s in ("train", "validation") if layout == LOCO or (class_dir / s).is_dir()]
    in_good = [s for s in splits if layout == LOCO or (class_dir / s / GOOD).is_dir()]
    folders = {split: [f"{split}/{GOOD}" if split in in_good else split] for split in splits}
    folders[GOOD] = [f"test/{GOOD}"]
    folders["bad"] = _anomaly_folders(class_dir, kind) or [f"test/{loco.KINDS.get(kind, '<any>')}"]
    read = {f"test/{folder}" for folder in loco.KINDS.values()}.union(*folders.values())
    beside = [path for split in (*in_good, "test") for path in class_dir.glob(f"{split}/*")]
    others = [path for path in beside if f"{path.parent.name}/{path.name}" not in read]
    if others:
        log.info(f"note: {len(others)} things of {class_dir} are left out, as {min(others)}")
    return {p: [i for f in own for i in list_images(class_dir, f)] for p, own in folders.items()}


def add_valid_share_flag(parser: argparse.ArgumentParser) -> None:
    """Add --valid_share."""
    parser.add_argument(
        "--valid_share",
        type=cli.PATH_FLAGS["valid_share"]["type"],
        default=loco.VALID_SHARE,
        help=f"of the training images, at least {MIN_VALID}, taken where there is no validation",
    )


def _draw_validation(class_dir: Path, train: list[str], share: float, seed: int) -> list[str]:
    """Choose the training images that are taken for validation, by their names and the seed."""
    n_valid = max(MIN_VALID, round(share * len(train)))
    if len(train) - n_valid < MIN_VALID:
        raise errors.UserError(
            f"{class_dir} must hold {n_valid + MIN_VALID} training images or more, {n_valid} of "
            f"them for validation, got {len(train)}; add some, or change --valid_share"
        )
    drawn = sorted(train, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return sorted(drawn[:n_valid])


def plan_data_set(
    dataset_dir: Path,
    mvtype: str,
    im_size: int,
    valid_share: float = loco.VALID_SHARE,
    seed: int = 0,
) -> Plan:
    """List a data set's images and settle the size they get.

    Without validation images, `valid_share` of the training images, drawn by `seed`, are taken.
    """
    class_name, kind = loco.split_mvtype(mvtype)
    class_dir = dataset_dir / class_name
    visa = _read_visa(dataset_dir)
    layout = _layout_of(class_dir, visa)
    if layout is None or (kind in loco.KINDS and layout != LOCO):
        found = ", ".join(f"{name} ({own})" for name, own in find_layouts(dataset_dir).items())
        raise errors.UserError(
            f"mvtype must be of a class in {dataset_dir}, <class>_{loco.ALL} where its layout is not "
            f"{LOCO}, got {mvtype}; found: {found}"
        )
    parts = _list_parts(class_dir, kind, layout, visa)
    if class_name in loco.LOCO_CLASSES and layout == LOCO:
        true_size = (loco.LOCO_CLASSES[class_name].width, loco.LOCO_CLASSES[class_name].height)
    else:
        true_size = open_image(class_dir / parts["train"][0]).size
    width, height = fitted_size(*true_size, im_size)
    # Pillow's versions resize differently.
    settings = {
        "im_size": im_size,
        "width": width,
        "height": height,
        "aspect": list(true_size),
        "pillow": PIL.__version__,
    }
    train, valid = parts["train"], parts.get("validation", [])
    if not valid:
        valid = _draw_validation(class_dir, train, valid_share, seed)
        train = [name for name in train if name not in valid]
        settings |= {"valid_share": valid_share, "valid_seed": seed}
    labels = np.array([0.0] * len(parts[GOOD]) + [1.0] * len(parts["bad"]))
    paths = {"train": train, "valid": valid, "test": parts[GOOD] + parts["bad"]}
    return Plan(mvtype, class_dir, paths, labels, settings)


def fitted_size(width: int, height: int, im_size: int) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image whose long side becomes `im_size`."""
    longest = max(width, height)
    return max(1, int(im_size * width / longest)), max(1, int(im_size * height / longest))


def loco_counts(mvtype: str) -> list[dict[str, int]]:
    """Return how many images of train, validation, good and its kind LOCO's copies have, if any."""
    class_name, kind = loco.split_mvtype(mvtype)
    if class_name not in loco.LOCO_CLASSES or kind not in loco.KINDS:
        return []
    facts = loco.LOCO_CLASSES[class_name]
    counts = {
        "train": facts.train,
        "validation": facts.validation,
        GOOD: facts.good,
        loco.KINDS[kind]: facts.logical if kind == "loco" else facts.structural,
    }
    return [counts, {**counts, **loco.OTHER_COUNTS.get(class_name, {})}]


def warn_about_counts(plan: Plan) -> None:
    """Say where the numbers of images differ from LOCO's."""
    n_good = int((plan.labels == 0).sum())
    splits = [len(plan.paths[split]) for split in ("train", "valid")]
    found = [*splits, n_good, len(plan.labels) - n_good]
    counts = loco_counts(plan.mvtype)
    if counts and found not in [list(own.values()) for own in counts]:
        expected = zip(counts[0].items(), found, strict=True)
        pairs = [f"{name} {own} (LOCO: {loco})" for (name, loco), own in expected if own != loco]
        log.warning(f"{plan.mvtype} is not the whole data set: {', '.join(pairs)}")


# ---------------------------------------------------------------- reading an image


def open_image(path: Path) -> Image.Image:
    """Decode an image as RGB: turned as its EXIF says, 16 bits a channel scaled to 8.

    UserError if it is broken, or of numbers without a known range.
    """
    image = ImageOps.exif_transpose(_decode(path))
    if image.mode[0] in "IF":  # 16-bit grey, or numbers whose range is not known
        values = np.asarray(image)  # (height, width)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            found = "floats" if image.mode == "F" else "more"
            raise errors.UserError(
                f"{path} must have 8 or 16 bits a channel, got {found}; convert it"
            )
        image = Image.fromarray(np.rint(values.astype(np.int64) / 257.0).astype(np.uint8))
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
        raise errors.UserError(
            f"{path} must be a whole image, got one that cannot be decoded "
            f"({type(error).__name__}); copy it, or unpack its archive, again"
        ) from error


# ---------------------------------------------------------------- masks


def defect_images(class_dir: Path, image_paths: list[str]) -> dict[str, list[int]]:
    """Return defect -> indices of the test images that show it.

    In LOCO by CLASS_DIR/defects_config.json (a mask's pixel value -> the defect's name) and the
    masks CLASS_DIR/ground_truth/<kind>/<image>/*.png, or <kind>/<image>.png as in some copies; none
    of LOCO's without a configuration, or if masks are black and white. Elsewhere by the sub-folder
    of test, in VisA `bad`; masks are <kind>/<image>_mask.png, or listed by VisA. Anomalous images
    without a mask are named if there are masks.
    """
    names = _defect_values(class_dir)
    visa = _read_visa(class_dir.parent).get(class_dir.name, {})
    in_test = [Path(path).parts[1] if path.startswith("test/") else GOOD for path in image_paths]
    parts = [visa.get(path, [of])[0] for path, of in zip(image_paths, in_test, strict=True)]
    anomalous = [i for i, part in enumerate(parts) if part != GOOD]
    values: dict[int, set[int]] = {}
    if names or visa or (class_dir / "ground_truth").is_dir():
        masks = [_mask_files(class_dir, image_paths[i], visa) for i in anomalous]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            values = dict(zip(anomalous, pool.map(_mask_values, masks), strict=True))
    without = [image_paths[i] for i, own in values.items() if not own]
    if without:
        log.warning(f"{len(without)} images of {class_dir} have no mask, as {without[0]}")
    if not names:
        kinds = [part for part in dict.fromkeys(parts) if part not in (GOOD, *loco.KINDS.values())]
        return {kind: [i for i in anomalous if parts[i] == kind] for kind in kinds}
    if set().union(*values.values()) == {WHITE} and len(names) > 1:
        log.info(
            f"note: the masks in {class_dir} are black and white, which defect is not told by them"
        )
        return {}
    by_defect = {
        " or ".join(own): [i for i, in_image in values.items() if value in in_image]
        for value, own in names.items()
    }
    return {name: images for name, images in by_defect.items() if images}


def _defect_values(class_dir: Path) -> dict[int, list[str]]:
    """Return pixel value -> defects, more than one where they share it; {} without the file."""
    config_path = class_dir / DEFECTS_FILE
    names: dict[int, list[str]] = {}
    if not config_path.is_file():
        return names
    try:
        for entry in json.loads(config_path.read_text(encoding="utf-8")):
            names.setdefault(int(entry["pixel_value"]), []).append(str(entry["defect_name"]))
    except (ValueError, TypeError, KeyError) as error:
        raise errors.UserError(
            f"{config_path} must list pixel_value and defect_name of every defect, got "
            f"{type(error).__name__}: {error}; unpack it again from the archive"
        ) from error
    return names


def _mask_files(class_dir: Path, image_path: str, visa: dict[str, tuple[str, str]]) -> list[Path]:
    """Return the files of all masks of one test image."""
    if image_path in visa:
        mask = class_dir.parent / visa[image_path][1]
        return [mask] if mask.is_file() else []
    path = Path(image_path)
    folder = class_dir / "ground_truth" / path.parent.name
    found = [m for m in folder.glob("*.*") if m.stem in (path.stem, f"{path.stem}_mask")]
    found += (folder / path.stem).glob("*.*")
    return [mask for mask in found if mask.suffix.lower() == ".png" and mask.name[0] != "."]


def _mask_values(masks: list[Path]) -> set[int]:
    """Return the pixel values but 0 of all masks of an image; {} where there is none."""
    return {value for mask in masks for value in np.unique(mask_pixels(mask)).tolist()} - {0}


def mask_pixels(path: Path) -> NDArray[np.int64]:
    """Return the pixel values (height, width) of a mask; of a palette its indices."""
    pixels = np.asarray(_decode(path)).astype(np.int64)
    return pixels if pixels.ndim == 2 else pixels[:, :, :3].max(2)
