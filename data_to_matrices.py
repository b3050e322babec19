"""Turn the images of MVTec LOCO AD (or of a folder tree like it) into numpy matrices.

Reads   DATASET_DIR/<class>/{train,validation,test}/<good or a kind of anomaly>/*.png
Writes  OUT_DIR/<class>_<loco|struct>/{train,valid,test}_data.npy, image_level_label.npy,
        image_paths.json

    python data_to_matrices.py
    python data_to_matrices.py --mvtype pushpins --dataset_dir ../dataset_loco

Every class found is done. A data set that is finished already is skipped; a run that was killed is
started again with the same command.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from command_line import Progress, ScriptParser, UserError, integer_from, run_script, say
from loco_datasets import (
    ARCHIVE_SHA256,
    DEFAULT_DATASET_DIR,
    DOWNLOAD_PAGE,
    IM_SIZE,
    KINDS,
    LOCO_CLASSES,
    OTHER_COUNTS,
    expand_mvtypes,
    split_mvtype,
)
from matrix_files import LABELS_FILE, PATHS_FILE, SPLITS, fitted_size, nearest_source
from result_files import first_difference, partial_folder, sweep, to_json, write_atomic

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

    def record(self) -> dict[str, Any]:
        """Return what is written to image_paths.json."""
        return {**self.paths, "settings": self.settings}


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
            f"LOCO AD there ({DOWNLOAD_PAGE}, archive sha256 {ARCHIVE_SHA256}), or pass --dataset_dir"
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
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    if not names:
        raise UserError(f"{folder} must hold images ({' '.join(IMAGE_ENDINGS)}), got none")
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


def open_image(path: Path) -> Image.Image:
    """Decode an image as RGB; a broken one is an error that names it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} must be a whole image, got one that cannot be decoded "
            f"({type(error).__name__}); unpack it again from the archive"
        ) from error


def image_to_matrix(path: Path, settings: dict[str, Any]) -> NDArray[np.uint8]:
    """Read an image: bilinear to a square, nearest to the true aspect, padded with zeros.

    Parameters
    ----------
    path : Path
    settings : dict
        `im_size`, `width`, `height` in pixels, `aspect` as (width, height).

    Returns
    -------
    (3, im_size, im_size), uint8, image in the top left corner
    """
    im_size, width, height = settings["im_size"], settings["width"], settings["height"]
    image = open_image(path)
    true_width, true_height = settings["aspect"]
    if abs(image.width - image.height * true_width / true_height) > 1.0 + image.width / 1000.0:
        raise UserError(
            f"{path} must have the aspect {true_width} x {true_height} of its class, got "
            f"{image.width} x {image.height} pixels; all images of a class share one aspect"
        )
    square = np.asarray(image.resize((im_size, im_size), Image.Resampling.BILINEAR))
    rows, columns = nearest_source(im_size, height), nearest_source(im_size, width)
    matrix = np.zeros((3, im_size, im_size), np.uint8)
    matrix[:, :height, :width] = square[rows[:, None], columns].transpose(2, 0, 1)
    return matrix


def write_matrix(
    path: Path, images: list[Path], settings: dict[str, Any], n_workers: int, bar: Progress
) -> None:
    """Decode images in parallel and write each at its place of one .npy file.

    Written with pwrite, not through a memory map: dirty pages of a map count as the process'
    memory, and a full disk would end it with SIGBUS instead of an error.
    """
    shape = (len(images), 3, settings["im_size"], settings["im_size"])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start, size = file.tell(), int(np.prod(shape[1:]))
        os.posix_fallocate(file.fileno(), 0, start + size * len(images))

        def convert(index: int) -> None:
            matrix = image_to_matrix(images[index], settings)
            written = os.pwrite(file.fileno(), matrix.data, start + index * size)
            if written != size:
                raise OSError(28, os.strerror(28), str(path))
            bar.update()

        with ThreadPoolExecutor(n_workers) as pool:  # Pillow decodes and resizes without the GIL
            futures = [pool.submit(convert, index) for index in range(len(images))]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.fsync(file.fileno())


def is_finished(folder: Path, plan: Plan) -> bool:
    """Tell whether a data set's matrices are there with the same images and settings."""
    from matrix_files import load_matrices

    if not (folder / PATHS_FILE).exists():
        return False
    matrices = load_matrices(folder.parent, folder.name)
    found = {**matrices.paths, **matrices.settings}
    difference = first_difference(found, {**plan.paths, **plan.settings})
    if difference is None:
        return True
    name, old, new = difference
    if name in SPLITS:
        old, new = f"list of {len(old)} images", f"another list, of {len(new)}"  # type: ignore[arg-type]
    raise UserError(
        f"{folder} was made with {name} {old}, now {name} is {new}; choose another --out_dir, or "
        "pass --overwrite to replace it"
    )


def make_data_set(plan: Plan, out_dir: Path, n_workers: int, finished: dict[str, Path]) -> Path:
    """Write the matrices of one data set; those that the class' other set has are linked.

    Parameters
    ----------
    finished : dict
        Class -> folder of a data set of this run with the same train and validation images.
    """
    folder = out_dir / plan.mvtype
    class_name = split_mvtype(plan.mvtype)[0]
    twin = finished.get(class_name)
    todo = [split for split in SPLITS if split == "test" or twin is None]
    total = sum(len(plan.paths[split]) for split in todo)
    with partial_folder(out_dir) as partial, Progress(total, plan.mvtype, "images") as bar:
        for split, name in SPLITS.items():
            if split in todo:
                images = [plan.class_dir / path for path in plan.paths[split]]
                write_matrix(partial / name, images, plan.settings, n_workers, bar)
            else:
                link_or_copy(twin / name, partial / name)  # type: ignore[operator]
        np.save(partial / LABELS_FILE, plan.labels)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PATHS_FILE).unlink(missing_ok=True)
        for name in (*SPLITS.values(), LABELS_FILE):
            os.replace(partial / name, folder / name)
    write_atomic(folder / PATHS_FILE, to_json(plan.record()).encode(), out_dir)
    return folder


def link_or_copy(source: Path, target: Path) -> None:
    """Make a second name of a file, or a copy where the file system has no hard links."""
    link: Callable[[Path, Path], Any] = os.link
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--mvtype",
        nargs="+",
        help="data sets (pushpins_loco), classes (pushpins), loco, struct or all; default: all found",
    )
    parser.add_argument("--dataset_dir", type=Path, default=DEFAULT_DATASET_DIR)
    parser.add_argument("--out_dir", type=Path, help="default: DATASET_DIR/data_matrices")
    parser.add_argument(
        "--im_size", type=integer_from(8), default=IM_SIZE, help="side of the matrices in pixels"
    )
    parser.add_argument(
        "--num_workers", type=integer_from(1), default=os.cpu_count() or 1, help="decoding threads"
    )
    parser.add_argument("--overwrite", action="store_true", help="make finished matrices again")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the matrices of every data set asked for."""
    args = parse_args(argv)
    make_matrices(
        args.dataset_dir,
        args.out_dir or args.dataset_dir / "data_matrices",
        choose_data_sets(args.dataset_dir, args.mvtype),
        args.im_size,
        args.num_workers,
        args.overwrite,
    )


def make_matrices(
    dataset_dir: Path,
    out_dir: Path,
    mvtypes: list[str],
    im_size: int = IM_SIZE,
    n_workers: int = 1,
    overwrite: bool = False,
) -> None:
    """Make the matrices of several data sets; finished ones are skipped, one line for each."""
    plans = [plan_data_set(dataset_dir, mvtype, im_size) for mvtype in mvtypes]
    finished: dict[str, Path] = {}
    sweep(out_dir)
    for plan in plans:
        class_name = split_mvtype(plan.mvtype)[0]
        folder = out_dir / plan.mvtype
        if not overwrite and is_finished(folder, plan):
            say(f"{plan.mvtype}: finished already, {folder}")
        else:
            warn_about_counts(plan)
            make_data_set(plan, out_dir, n_workers, finished)
            counts = " / ".join(str(len(plan.paths[split])) for split in SPLITS)
            print(f"{plan.mvtype}: {counts} train / valid / test images -> {folder}", flush=True)
        finished[class_name] = folder


if __name__ == "__main__":
    run_script(main)
