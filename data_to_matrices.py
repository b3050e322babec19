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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from command_line import Progress, ScriptParser, UserError, integer_from, run_script, say
from loco_datasets import DEFAULT_DATASET_DIR, IM_SIZE, split_mvtype
from loco_folders import Plan, choose_data_sets, open_image, plan_data_set, warn_about_counts
from matrix_files import LABELS_FILE, PATHS_FILE, SPLITS, load_matrices, nearest_source
from result_files import first_difference, partial_folder, sweep, to_json, write_atomic


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
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--mvtype",
        nargs="+",
        help="data sets (pushpins_loco), classes (pushpins), loco, struct, all; default: all found",
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
            say(f"{plan.mvtype}: {counts} train / valid / test images")
        finished[class_name] = folder


if __name__ == "__main__":
    run_script(main)
