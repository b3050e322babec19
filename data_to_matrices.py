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
import errno
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from command_line import Progress, ScriptParser, UserError, integer_from, run_script, say
from loco_datasets import DEFAULT_DATASET_DIR, IM_SIZE, KINDS, split_mvtype
from loco_folders import Plan, choose_data_sets, open_image, plan_data_set, warn_about_counts
from matrix_files import (
    LABELS_FILE,
    PATHS_FILE,
    SPLITS,
    MatrixSet,
    load_matrices,
    nearest_source,
)
from result_files import TRIES, first_difference, naming, partial_folder, sweep, to_json

SHARED_SPLITS = ("train", "valid")  # of a class' two data sets


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
) -> list[str]:
    """Decode images in parallel and write each at its place of one .npy file; return their sha256.

    Written with pwrite, not through a memory map: dirty pages of a map count as the process'
    memory, and a full disk would end it with SIGBUS instead of an error.
    """
    shape = (len(images), 3, settings["im_size"], settings["im_size"])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with naming(path), open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start, size = file.tell(), int(np.prod(shape[1:]))
        os.posix_fallocate(file.fileno(), 0, start + size * len(images))

        def convert(index: int) -> str:
            matrix = image_to_matrix(images[index], settings)
            written = os.pwrite(file.fileno(), matrix.data, start + index * size)
            if written != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            bar.update()
            return hashlib.sha256(matrix.data).hexdigest()

        with ThreadPoolExecutor(n_workers) as pool:  # Pillow decodes and resizes without the GIL
            futures = [pool.submit(convert, index) for index in range(len(images))]
            try:
                sha256 = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.fsync(file.fileno())
    return sha256


def is_finished(folder: Path, plan: Plan) -> bool:
    """Tell whether a data set's matrices are there with the same images and settings."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    cure = "choose another --out_dir, or pass --overwrite to replace it"
    if not (folder / PATHS_FILE).exists():
        raise UserError(
            f"{folder} must be new or hold matrices of this script, got files without {PATHS_FILE} "
            f"(the authors' own?); {cure}"
        )
    matrices = load_matrices(folder.parent, folder.name)
    found = {**matrices.paths, **matrices.settings}
    difference = first_difference(found, {**plan.paths, **plan.settings})
    if difference is not None:
        name, old, new = difference
        if name in SPLITS:
            old, new = f"list of {len(old)} images", f"another list, of {len(new)}"  # type: ignore[arg-type]
        raise UserError(f"{folder} was made with {name} {old}, now {name} is {new}; {cure}")
    newer = find_newer(plan, folder)
    if newer is not None:
        say(f"warning: {newer} is newer than {folder}; if it has changed, pass --overwrite")
    return True


def find_newer(plan: Plan, folder: Path) -> Path | None:
    """Return an image that is newer than the matrices in a folder, None if none is."""
    made = (folder / PATHS_FILE).stat().st_mtime
    images = (plan.class_dir / path for paths in plan.paths.values() for path in paths)
    return next((image for image in images if image.stat().st_mtime > made), None)


def find_twin(plan: Plan, out_dir: Path) -> MatrixSet | None:
    """Return finished matrices of the class' other data set if they have the same images.

    Not if an image has been written since: it may be another by now.
    """
    class_name, own_kind = split_mvtype(plan.mvtype)
    (name,) = (f"{class_name}_{kind}" for kind in KINDS if kind != own_kind)
    if not (out_dir / name / PATHS_FILE).exists() or find_newer(plan, out_dir / name):
        return None
    twin = load_matrices(out_dir, name)
    same = all(twin.paths[split] == plan.paths[split] for split in SHARED_SPLITS)
    return twin if same and twin.settings == plan.settings else None


def make_data_set(
    plan: Plan, out_dir: Path, n_workers: int, twin: MatrixSet | None, overwrite: bool
) -> None:
    """Write the matrices of one data set and put the finished folder into place.

    Parameters
    ----------
    twin : the class' other data set, whose train and validation matrices are linked
    """
    shared = SHARED_SPLITS if twin is not None else ()
    total = sum(len(plan.paths[split]) for split in SPLITS if split not in shared)
    sha256 = {}
    with partial_folder(out_dir) as partial, Progress(total, plan.mvtype, "images") as bar:
        made = partial / plan.mvtype
        made.mkdir()
        for split, name in SPLITS.items():
            if twin is not None and split in shared:
                link_or_copy(out_dir / twin.mvtype / name, made / name)
                sha256[split] = twin.sha256[split]
            else:
                images = [plan.class_dir / path for path in plan.paths[split]]
                sha256[split] = write_matrix(made / name, images, plan.settings, n_workers, bar)
        np.save(made / LABELS_FILE, plan.labels)
        record = {**plan.paths, "sha256": sha256, "settings": plan.settings}
        (made / PATHS_FILE).write_text(to_json(record), encoding="utf-8")
        put_into_place(made, out_dir / plan.mvtype, partial, overwrite)


def put_into_place(made: Path, folder: Path, partial: Path, overwrite: bool) -> None:
    """Rename a finished folder to where it belongs; one to be replaced moves to `partial` first."""
    for number in range(TRIES):
        if overwrite:
            with suppress(FileNotFoundError):
                os.replace(folder, partial / f"replaced_{number}")
        try:
            os.replace(made, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not overwrite:  # another run was faster, with the same images
                return
        else:
            return
    raise UserError(f"{folder} must be written by one run at a time, got several; start one again")


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
    parser.add_argument(
        "--dataset_dir", type=Path, default=DEFAULT_DATASET_DIR, help="folder of the classes"
    )
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
    sweep(out_dir)
    made: set[str] = set()
    for plan in plans:
        class_name = split_mvtype(plan.mvtype)[0]
        folder = out_dir / plan.mvtype
        if not overwrite and is_finished(folder, plan):
            say(f"{plan.mvtype}: finished already, {folder}")
            continue
        warn_about_counts(plan)
        # With --overwrite only what this run has made is linked.
        twin = find_twin(plan, out_dir) if not overwrite or class_name in made else None
        make_data_set(plan, out_dir, n_workers, twin, overwrite)
        made.add(class_name)
        counts = " / ".join(str(len(plan.paths[split])) for split in SPLITS)
        say(f"{plan.mvtype}: {counts} train / valid / test images")


if __name__ == "__main__":
    run_script(main)
