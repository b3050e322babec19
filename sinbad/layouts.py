"""Image trees: which images a category has, of which split and anomaly type, and their masks."""

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
from numpy.typing import NDArray
from PIL import Image

from sinbad import errors, images, loco, settings

log = logging.getLogger(__name__)

GOOD = "good"
NORMAL_FOLDERS = (GOOD, "ok", "normal")
VALID_FOLDERS = ("validation", "valid", "val")
OTHER_FOLDERS = ("train", "test", "ground_truth")
DEFECTS_FILE = "defects_config.json"
VISA_FILE = Path("split_csv/1cls.csv")
VISA_PARTS = {("train", "normal"): "train", ("test", "normal"): GOOD, ("test", "anomaly"): "bad"}
LOCO, MVTEC, VISA, PLAIN = "LOCO", "MVTec AD", "VisA", "plain"
TREES = {
    LOCO: "<class>/{train,validation}/good, <class>/test/{good,logical_anomalies,"
    "structural_anomalies}",
    MVTEC: "<class>/train/good, <class>/test/{good,<kind>...}, no validation",
    VISA: f"{VISA_FILE} with the columns object, split, label, image, mask",
    PLAIN: "<class>/train, <class>/validation if there is one, <class>/test/{good,<any>...}; "
    "good may be ok or normal, validation valid or val",
}
LAYOUTS = "one of the layouts " + "; ".join(f"{name} ({tree})" for name, tree in TREES.items())
MIN_VALID = 5  # fewest validation images taken from training, and fewest training images left

VisaImages = dict[str, tuple[str, str]]  # path in the category's folder -> part, mask's path or ""


@dataclass(frozen=True)
class SubsetSpec:
    """What the matrices of a test subset (category x anomaly type) hold.

    Attributes
    ----------
    mvtype : name, such as pushpins_loco
    category_dir : folder of the category
    paths : split ("train", "valid", "test") -> image paths relative to `category_dir`
    labels : (n_test,), 0 normal, 1 anomalous
    settings : `images.resize_settings`, and how validation images were selected, if they were
    """

    mvtype: str
    category_dir: Path
    paths: dict[str, list[str]]
    labels: NDArray[np.float64]
    settings: dict[str, Any]


# ---------------------------------------------------------------- recognising layouts


def find_layouts(dataset_dir: Path) -> dict[str, str]:
    """Return category -> layout (a key of TREES) of all categories, LOCO's first.

    Raises
    ------
    UserError
        If there is none: what was expected, what was found, and where LOCO comes from.
    """
    visa = _read_visa(dataset_dir)
    folders = {path.parent for path in dataset_dir.glob("*/train")}
    folders |= {dataset_dir / name for name in visa if (dataset_dir / name).is_dir()}
    categories = {path.name: layout for path in folders if (layout := _layout_of(path, visa))}
    if not categories:
        names = _names_in(dataset_dir, "*/*") or _names_in(dataset_dir) or "nothing in it"
        content = f"a folder with {names}" if dataset_dir.is_dir() else "no such folder"
        raise errors.UserError(
            f"dataset_dir must hold {LAYOUTS}, got {content} ({dataset_dir}); unpack e.g. MVTec "
            f"LOCO AD into it ({loco.DOWNLOAD_PAGE}, archive sha256 {loco.ARCHIVE_SHA256}), or "
            "pass --dataset_dir"
        )
    _check_utf8(dataset_dir, list(categories))
    endings = tuple(f"_{anomaly_type}" for anomaly_type in (*loco.KINDS, loco.ALL))
    ambiguous = [name for name in categories if name.endswith(endings)]
    if ambiguous:
        raise errors.UserError(
            f"a category's folder must not end in {' or '.join(endings)}, as test subsets do, got "
            f"{ambiguous[0]} in {dataset_dir}; rename it"
        )
    in_order = sorted(categories.items(), key=lambda item: (item[0] not in loco.LOCO_CLASSES, item))
    return dict(in_order)


def _layout_of(category_dir: Path, visa: dict[str, VisaImages]) -> str | None:
    """Recognise the layout of a category by its folders, or by VisA's list; None if it is none."""
    if category_dir.name in visa:
        return VISA
    if any((category_dir / "test" / folder).is_dir() for folder in loco.KINDS.values()):
        return LOCO
    has_validation = any((category_dir / folder).is_dir() for folder in VALID_FOLDERS)
    if (category_dir / "train" / GOOD).is_dir() and not has_validation:
        return MVTEC
    return PLAIN if (category_dir / "train").is_dir() else None


def _read_visa(dataset_dir: Path) -> dict[str, VisaImages]:
    """Read VisA's list: category -> its images; empty where there is no list."""
    path = dataset_dir / VISA_FILE
    categories: dict[str, VisaImages] = {}
    if not path.is_file():
        return categories
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                category, name = row["image"].split("/", 1)
                listed = categories.setdefault(row["object"], {})
                if category != row["object"] or name in listed or ".." in Path(name).parts:
                    raise ValueError(f"image {row['image']}")
                listed[name] = VISA_PARTS[row["split"], row["label"]], row["mask"] or ""
    except (ValueError, KeyError, AttributeError, csv.Error) as error:
        raise errors.UserError(
            f"{path} must list object, split, label, image (once, below its object) and mask, got "
            f"{type(error).__name__}: {error}; unpack it again from the archive"
        ) from error
    return categories


def _names_in(folder: Path, pattern: str = "*") -> str:
    """Return the first names in a folder, for messages."""
    return _shorten(sorted(str(path.relative_to(folder)) for path in folder.glob(pattern)))


def _shorten(names: list[str]) -> str:
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])


def _check_utf8(folder: Path, names: list[str]) -> None:
    """Refuse names that no text file can hold."""
    for name in names:
        if os.fsencode(name) != name.encode(errors="replace"):
            raise errors.UserError(f"{folder} must hold names in UTF-8, got {name!r}; rename it")


def choose_subsets(dataset_dir: Path, names: list[str] | None) -> list[str]:
    """Return the test subsets asked for by `--mvtype`, or all that the folder has anomalies for."""
    categories = find_layouts(dataset_dir)
    for name in names or ():
        if name not in (*categories, *loco.KINDS, loco.ALL):
            _check_found(name, dataset_dir, categories)
    by_layout = {layout: [n for n in categories if categories[n] == layout] for layout in TREES}
    shown = [f"{layout} ({', '.join(by_layout[layout])})" for layout in TREES if by_layout[layout]]
    log.info(f"layouts in {dataset_dir}: {'; '.join(shown)}")
    expected = loco.LOCO_CLASSES if by_layout[LOCO] else _read_visa(dataset_dir)
    missing = [name for name in expected if name not in categories]
    if names is None and missing:
        log.info(f"note: not found in {dataset_dir}: {', '.join(missing)}")
    types = {n: tuple(loco.KINDS) if categories[n] == LOCO else (loco.ALL,) for n in categories}
    chosen = []
    for mvtype in loco.expand_mvtypes(names or [loco.ALL], types):
        category, anomaly_type = loco.split_mvtype(mvtype)
        is_listed = categories.get(category) == VISA
        has_anomalies = is_listed or _anomaly_folders(dataset_dir / category, anomaly_type)
        if has_anomalies or mvtype in (names or ()):
            chosen.append(mvtype)
        else:
            folder = dataset_dir / category / "test" / loco.KINDS.get(anomaly_type, "<any>")
            log.info(f"note: {mvtype} skipped, no folder {folder}")
    if not chosen:
        raise errors.UserError(
            f"{dataset_dir} must hold anomalous images of a category, got none; {LAYOUTS}"
        )
    return chosen


# ---------------------------------------------------------------- listing images


def _find_folder(folder: Path, names: tuple[str, ...]) -> str | None:
    """Return which of the folders that mean the same is in `folder`, if any; two are an error."""
    present = [name for name in names if (folder / name).is_dir()]
    if len(present) > 1:
        raise errors.UserError(
            f"{folder} must hold one of {', '.join(names)}, got {' and '.join(present)}; move the "
            "images into one of them"
        )
    return present[0] if present else None


def _anomaly_folders(category_dir: Path, anomaly_type: str) -> list[str]:
    """Return the folders of an anomaly type; of `all` every folder of test but the normal one."""
    names = sorted(path.name for path in category_dir.glob("test/*") if path.is_dir())
    if anomaly_type in loco.KINDS:
        names = [name for name in names if name == loco.KINDS[anomaly_type]]
    return [f"test/{name}" for name in names if name not in NORMAL_FOLDERS and name[0] != "."]


def list_images(folder: Path) -> list[str]:
    """Return the names of the images in a folder, sorted.

    Every file extension that Pillow opens; other files and sub-folders are skipped with one line.
    """
    everything = sorted(path.name for path in folder.iterdir())
    names = [name for name in everything if _is_image(name)]
    skipped = sorted(set(everything) - set(names))
    if not names:
        content = _shorten(skipped) or "an empty folder"
        raise errors.UserError(
            f"{folder} must hold images that Pillow reads, got {content}; put them into this "
            "folder itself, not below it"
        )
    _check_utf8(folder, names)
    if skipped:
        log.info(
            f"note: {len(skipped)} of {len(everything)} files skipped (not images) in {folder}: "
            f"{_shorten(skipped)}"
        )
    return names


def _is_image(name: str) -> bool:
    extensions = Image.registered_extensions()
    return extensions.get(Path(name).suffix.lower()) in Image.OPEN and name[0] != "."


def _list_folder(category_dir: Path, part: str) -> list[str]:
    """Return the images of e.g. "train/good", by name, relative to the category's folder."""
    if not (category_dir / part).is_dir():
        names = _names_in(category_dir, "*/*") or "an empty folder"
        raise errors.UserError(f"{category_dir} must hold {part}, got {names}; give it {LAYOUTS}")
    _check_utf8(category_dir, [part])
    return [f"{part}/{name}" for name in list_images(category_dir / part)]


def _list_parts(
    category_dir: Path, anomaly_type: str, layout: str, visa: dict[str, VisaImages]
) -> dict[str, list[str]]:
    """Return the images of "train", "validation" (if any), "good" and "bad", folder by folder."""
    if layout == VISA:
        listed = visa[category_dir.name]
        parts = {
            part: sorted(n for n in listed if listed[n][0] == part) for part in VISA_PARTS.values()
        }
        for part, paths in parts.items():
            if not paths:
                raise errors.UserError(
                    f"{VISA_FILE} must list {part} images of {category_dir}, got none"
                )
        return parts
    valid = _find_folder(category_dir, VALID_FOLDERS) or ("validation" if layout == LOCO else None)
    folders: dict[str, list[str]] = {}
    for part, split in {"train": "train", "validation": valid, GOOD: "test"}.items():
        if split is not None:
            name = _find_folder(category_dir / split, NORMAL_FOLDERS)
            if name is None and (split == "test" or layout == LOCO):
                name = GOOD
            folders[part] = [split if name is None else f"{split}/{name}"]
    expected = f"test/{loco.KINDS.get(anomaly_type, '<any>')}"
    folders["bad"] = _anomaly_folders(category_dir, anomaly_type) or [expected]
    _warn_about_ignored(category_dir, layout, set().union(*folders.values()))
    return {
        part: [path for folder in folders[part] for path in _list_folder(category_dir, folder)]
        for part in folders
    }


def _warn_about_ignored(category_dir: Path, layout: str, read: set[str]) -> None:
    """Name the folders, and the images beside folders, that are not read."""
    ignored = {path.name for path in category_dir.iterdir() if path.is_dir()}
    ignored -= {*OTHER_FOLDERS, *VALID_FOLDERS}
    for split in {Path(folder).parts[0] for folder in read if "/" in folder}:
        ignored |= {f"{split}/{path.name}" for path in (category_dir / split).glob("*")}
    ignored -= read.union(f"test/{folder}" for folder in loco.KINDS.values())
    names = sorted(name for name in ignored if Path(name).name[0] != ".")
    if names:
        log.warning(
            f"{len(names)} folders or files ignored in {category_dir}: {_shorten(names)} (expected "
            f"{TREES[layout]})"
        )


def _select_validation(category_dir: Path, train: list[str], share: float, seed: int) -> list[str]:
    """Select the training images used for validation, by their names and the seed."""
    n_valid = max(MIN_VALID, round(share * len(train)))
    if len(train) - n_valid < MIN_VALID:
        raise errors.UserError(
            f"{category_dir} must hold {n_valid + MIN_VALID} training images or more, {n_valid} of "
            f"them for validation, got {len(train)}; add some, or change --valid_share"
        )
    shuffled = sorted(train, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return sorted(shuffled[:n_valid])


def _check_found(mvtype: str, dataset_dir: Path, categories: dict[str, str]) -> None:
    """Refuse a test subset whose category, or anomaly type, is not in the folder."""
    category, _, anomaly_type = mvtype.rpartition("_")
    layout = categories.get(category)
    if layout is None or anomaly_type not in (*(loco.KINDS if layout == LOCO else ()), loco.ALL):
        shown = ", ".join(f"{name} ({categories[name]})" for name in categories)
        raise errors.UserError(
            f"mvtype must be a category in {dataset_dir} or a subset of it (<class>_{loco.ALL}; "
            f"<class>_loco and <class>_struct where its layout is {LOCO}), got {mvtype}; the "
            f"categories are {shown}"
        )


def find_subset(
    dataset_dir: Path,
    mvtype: str,
    im_size: int,
    valid_share: float = settings.VALID_SHARE,
    seed: int = 0,
) -> SubsetSpec:
    """List the images of a test subset and the size they are resized to.

    Without validation images, the fraction `valid_share` of the training images, sampled by
    `seed`, is used.

    Raises
    ------
    UserError
        If the subset is not in the folder, or has too few images.
    """
    category, anomaly_type = loco.split_mvtype(mvtype)
    category_dir = dataset_dir / category
    visa = _read_visa(dataset_dir)
    layout = _layout_of(category_dir, visa)
    if layout is None or (anomaly_type in loco.KINDS and layout != LOCO):
        _check_found(mvtype, dataset_dir, find_layouts(dataset_dir))
    parts = _list_parts(category_dir, anomaly_type, layout, visa)
    if layout == LOCO and (facts := loco.LOCO_CLASSES.get(category)):
        true_size = facts.width, facts.height
    else:
        true_size = images.open_image(category_dir / parts["train"][0]).size
    settings = images.resize_settings(true_size, im_size)
    train, valid = parts["train"], parts.get("validation", [])
    if not valid:
        valid = _select_validation(category_dir, train, valid_share, seed)
        train = [name for name in train if name not in valid]
        settings |= {"valid_share": valid_share, "valid_seed": seed}
        log.info(
            f"{mvtype}: no validation images, {len(valid)} of {len(valid) + len(train)} training "
            "images are used for validation (--valid_share, --seed)"
        )
    labels = np.array([0.0] * len(parts[GOOD]) + [1.0] * len(parts["bad"]))
    paths = {"train": train, "valid": valid, "test": parts[GOOD] + parts["bad"]}
    return SubsetSpec(mvtype, category_dir, paths, labels, settings)


def loco_counts(mvtype: str) -> list[dict[str, int]]:
    """Return the numbers of images of each part in LOCO's copies; [] for other subsets."""
    category, anomaly_type = loco.split_mvtype(mvtype)
    if category not in loco.LOCO_CLASSES or anomaly_type not in loco.KINDS:
        return []
    facts = loco.LOCO_CLASSES[category]
    counts = {"train": facts.train, "validation": facts.validation, GOOD: facts.good}
    n_anomalous = facts.logical if anomaly_type == "loco" else facts.structural
    counts[loco.KINDS[anomaly_type]] = n_anomalous
    return [counts, {**counts, **loco.OTHER_COUNTS.get(category, {})}]


def warn_about_counts(subset: SubsetSpec) -> None:
    """Warn where the numbers of images differ from LOCO's."""
    n_good = int((subset.labels == 0).sum())
    splits = [len(subset.paths[split]) for split in ("train", "valid")]
    present = [*splits, n_good, len(subset.labels) - n_good]
    counts = loco_counts(subset.mvtype)
    if counts and present not in [list(copy.values()) for copy in counts]:
        pairs = zip(counts[0].items(), present, strict=True)
        differing = [f"{name} {n} (LOCO: {n_loco})" for (name, n_loco), n in pairs if n != n_loco]
        log.warning(f"{subset.mvtype} is not the whole data set: {', '.join(differing)}")


# ---------------------------------------------------------------- masks


def defect_images(category_dir: Path, image_paths: list[str]) -> dict[str, list[int]]:
    """Return defect -> indices of the test images that show it.

    In LOCO by CATEGORY_DIR/defects_config.json (a mask's pixel value -> the defect's name) and the
    masks CATEGORY_DIR/ground_truth/<kind>/<image>/*.png, or <kind>/<image>.png as in some copies;
    none of LOCO's without a configuration, or if masks are black and white. Elsewhere by the
    sub-folder of test, in VisA `bad`; masks are <kind>/<image>_mask.png, or listed by VisA.
    Anomalous images without a mask are named if there are masks.
    """
    defects = _defect_values(category_dir)
    visa = _read_visa(category_dir.parent).get(category_dir.name, {})
    parts = [_part_of(path, visa) for path in image_paths]
    anomalous = [i for i, part in enumerate(parts) if part != GOOD]
    values: dict[int, set[int]] = {}
    if defects or visa or (category_dir / "ground_truth").is_dir():
        masks = [_mask_files(category_dir, image_paths[i], visa) for i in anomalous]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            values = dict(zip(anomalous, pool.map(_defect_pixels, masks), strict=True))
    without = [image_paths[i] for i, in_image in values.items() if not in_image]
    if without:
        log.warning(
            f"{len(without)} of {len(anomalous)} anomalous images of {category_dir} have no mask, "
            f"such as {without[0]}"
        )
    if not defects:
        types = [part for part in dict.fromkeys(parts) if part not in (GOOD, *loco.KINDS.values())]
        return {name: [i for i in anomalous if parts[i] == name] for name in types}
    if set().union(*values.values()) == {images.WHITE} and len(defects) > 1:
        log.info(
            f"note: the masks in {category_dir} are black and white, they do not tell which defect "
            "they show"
        )
        return {}
    by_defect = {
        " or ".join(names): [i for i, in_image in values.items() if value in in_image]
        for value, names in defects.items()
    }
    return {name: indices for name, indices in by_defect.items() if indices}


def _part_of(image_path: str, visa: VisaImages) -> str:
    """Return the folder of test that an image is of: "good" if normal; "bad" in VisA."""
    if image_path in visa:
        return visa[image_path][0]
    folder = Path(image_path).parts[1] if image_path.startswith("test/") else GOOD
    return GOOD if folder in NORMAL_FOLDERS else folder


def _defect_values(category_dir: Path) -> dict[int, list[str]]:
    """Return pixel value -> defects, more than one where they share it; {} without the file."""
    config_path = category_dir / DEFECTS_FILE
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


def _mask_files(category_dir: Path, image_path: str, visa: VisaImages) -> list[Path]:
    if image_path in visa:
        mask = category_dir.parent / visa[image_path][1]
        return [mask] if mask.is_file() else []
    path = Path(image_path)
    folder = category_dir / "ground_truth" / path.parent.name
    masks = [m for m in folder.glob("*.*") if m.stem in (path.stem, f"{path.stem}_mask")]
    masks += (folder / path.stem).glob("*.*")
    return [mask for mask in masks if _is_image(mask.name)]


def _defect_pixels(masks: list[Path]) -> set[int]:
    """Return the pixel values but 0 of all masks of an image."""
    return set().union(*map(images.mask_values, masks)) - {0}
