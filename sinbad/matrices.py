"""The matrices of a data set on disk: write, check, read, gather crops from them."""

import hashlib
import json
import logging
import math
import mmap
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from sinbad import atomic, cli, errors, layouts, loco, settings

log = logging.getLogger(__name__)

SPLITS = {"train": "train_data.npy", "valid": "valid_data.npy", "test": "test_data.npy"}
SHARED_SPLITS = ("train", "valid")  # of a class' data sets
LABELS_FILE = "image_level_label.npy"
PATHS_FILE = "image_paths.json"  # names, what tells the images apart, settings; the authors: none
IMAGES_AT_ONCE = 32  # decoded before they are written; looked at before pages are let go of

Stamp = list[Any]  # of an image's file: size in bytes, time of its last change in ns, sha256


@dataclass(frozen=True)
class MatrixSet:
    """One data set's matrices, memory-mapped.

    Attributes
    ----------
    mvtype : name, such as pushpins_loco
    images : split ("train", "valid", "test") -> (n, 3, im_size, im_size), uint8
        (float32 of k/255 in the authors' matrices)
    paths : split -> image paths relative to the class folder
    files : split -> size, time and sha256 of each image's file; empty for the authors'
    labels : (n_test,), 0 good, 1 anomalous
    settings : how the matrices were made; empty for the authors'
    """

    mvtype: str
    images: dict[str, NDArray[Any]]
    paths: dict[str, list[str]]
    files: dict[str, list[Stamp]]
    labels: NDArray[np.float64]
    settings: dict[str, Any]

    @property
    def im_size(self) -> int:
        """Side of the images in pixels."""
        return self.images["train"].shape[2]

    @property
    def image_extent(self) -> tuple[int, int]:
        """Width and height in pixels of the images in their squares."""
        return self.settings.get("width", self.im_size), self.settings.get("height", self.im_size)

    def sha256(self, split: str) -> list[str]:
        """Return what tells a split's images apart; the authors' by data set and position."""
        return [stamp[2] for stamp in self.files[split]] if self.files else self.paths[split]

    def digest(self) -> str:
        """Return one sha256 of all names, images and labels."""
        images = {split: self.sha256(split) for split in SPLITS}
        whole = json.dumps([self.paths, images, self.labels.tolist()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()


# ---------------------------------------------------------------- writing


def nearest_source(size_in: int, size_out: int) -> NDArray[np.int64]:
    """Return the source index of each of `size_out` pixels by torch's "nearest" rule.

    Asked of torch itself, since its floor(i * in / out) is computed in float32.
    """
    indices = torch.arange(size_in, dtype=torch.float32)[None, None]
    return functional.interpolate(indices, size=size_out, mode="nearest")[0, 0].long().numpy()


def picture_to_matrix(
    image: Image.Image, settings: dict[str, Any], name: object
) -> NDArray[np.uint8]:
    """Resize an image: bilinear to a square, nearest to the true aspect, padded with zeros.

    Parameters
    ----------
    image : RGB
    settings : dict
        `im_size`, `width`, `height` in pixels, `aspect` as (width, height).
    name : of the image, for messages

    Returns
    -------
    (3, im_size, im_size), uint8, image in the top left corner
    """
    im_size, width, height = settings["im_size"], settings["width"], settings["height"]
    true_width, true_height = settings["aspect"]
    if abs(image.width - image.height * true_width / true_height) > 1.0 + image.width / 1000.0:
        raise errors.UserError(
            f"{name} must have the aspect {true_width} x {true_height} of its class, got "
            f"{image.width} x {image.height} pixels; all images of a class share one aspect"
        )
    square = np.asarray(image.resize((im_size, im_size), Image.Resampling.BILINEAR))
    rows, columns = nearest_source(im_size, height), nearest_source(im_size, width)
    matrix = np.zeros((3, im_size, im_size), np.uint8)
    matrix[:, :height, :width] = square[rows[:, None], columns].transpose(2, 0, 1)
    return matrix


def image_to_matrix(path: Path, settings: dict[str, Any]) -> NDArray[np.uint8]:
    """Read an image's file as a matrix, see `picture_to_matrix`."""
    return picture_to_matrix(layouts.open_image(path), settings, path)


def stamp_of(path: Path) -> Stamp:
    """Return size, time of the last change and sha256 of a file."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()]


def write_matrix(
    path: Path, images: list[Path], settings: dict[str, Any], n_workers: int, bar: tqdm
) -> None:
    """Decode images in parallel threads and write them to one .npy file, some at a time.

    Not through a memory map: dirty pages of a map count as the process' memory, and a full disk
    would end it with SIGBUS instead of an error.
    """
    shape = (len(images), 3, settings["im_size"], settings["im_size"])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file, ThreadPoolExecutor(n_workers) as pool:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(images), IMAGES_AT_ONCE):
            part = images[start : start + IMAGES_AT_ONCE]
            for matrix in pool.map(lambda image: image_to_matrix(image, settings), part):
                file.write(matrix.data)
                bar.update()


def make_data_set(plan: layouts.Plan, out_dir: Path, n_workers: int, link: bool) -> None:
    """Write the matrices of one data set and put the finished folder into place.

    With `link`, train and validation matrices of another data set of the class are linked (copied
    where the file system has no links) if they are of the same images and settings.
    """
    images = {split: [plan.class_dir / path for path in plan.paths[split]] for split in SPLITS}
    stamps = {split: [stamp_of(path) for path in own] for split, own in images.items()}
    twin = find_twin(plan, stamps, out_dir) if link else None
    linked = SHARED_SPLITS if twin else ()
    total = sum(len(own) for split, own in images.items() if split not in linked)
    target = out_dir / plan.mvtype
    is_new = not target.exists()
    with atomic.atomic_path(target) as made, cli.progress_bar(total, plan.mvtype, "images") as bar:
        made.mkdir()
        for split, name in SPLITS.items():
            if split not in linked:
                write_matrix(made / name, images[split], plan.settings, n_workers, bar)
                continue
            try:
                (made / name).hardlink_to(twin / name)
            except (OSError, NotImplementedError):
                shutil.copyfile(twin / name, made / name)
        np.save(made / LABELS_FILE, plan.labels)
        record = {**plan.paths, "files": stamps, "settings": plan.settings}
        (made / PATHS_FILE).write_text(atomic.to_json(record), encoding="utf-8")
    if is_new:
        is_current(target, plan)  # another process may have been faster: with the same settings


def find_twin(plan: layouts.Plan, stamps: dict[str, list[Stamp]], out_dir: Path) -> Path | None:
    """Return the folder of another data set of the class with the same train and valid images."""
    class_name, own_kind = loco.split_mvtype(plan.mvtype)
    for kind in loco.KINDS:
        folder = out_dir / f"{class_name}_{kind}"
        if kind != own_kind and (folder / PATHS_FILE).exists():
            twin = load_matrices(out_dir, folder.name)
            same = all(twin.files[split] == stamps[split] for split in SHARED_SPLITS)
            if same and twin.settings == plan.settings:
                return folder
    return None


def is_current(folder: Path, plan: layouts.Plan) -> bool:
    """Tell whether a data set's matrices are there with the same settings and the same images.

    An image is the same if its path, size and time are the recorded ones, else its sha256 decides.

    Raises
    ------
    UserError
        If they are there with other settings or another list of images, or are the authors'.
    """
    if not any(folder.glob("*")):
        return False
    cure = "choose another --out_dir, or pass --overwrite to replace it"
    if not (folder / PATHS_FILE).exists():
        raise errors.UserError(
            f"{folder} must be new or hold matrices of this script, got files without {PATHS_FILE} "
            f"(the authors' own?); {cure}"
        )
    matrices = load_matrices(folder.parent, folder.name)
    made_by, now = matrices.settings["pillow"], plan.settings["pillow"]
    difference = settings.first_difference(matrices.settings | {"pillow": now}, plan.settings)
    difference = difference or settings.first_difference(matrices.paths, plan.paths)
    if difference is not None:
        name, old, new = difference
        if name in SPLITS:
            old, new = f"list of {len(old)} images", f"another list, of {len(new)}"
        raise errors.UserError(f"{folder} was made with {name} {old}, now {name} is {new}; {cure}")
    changed = _changed_images(matrices, plan)
    if changed:
        log.info(f"{plan.mvtype}: made again, {len(changed)} images have changed, as {changed[0]}")
    elif made_by != now:
        log.warning(
            f"{folder} was made by Pillow {made_by}, now it is {now}: single pixels may "
            "differ by 1; --overwrite makes it again"
        )
    return not changed


def _changed_images(matrices: MatrixSet, plan: layouts.Plan) -> list[Path]:
    """Return the images that are not those that the matrices were made of."""
    changed = []
    for split, names in plan.paths.items():
        for name, (size, time, sha256) in zip(names, matrices.files[split], strict=True):
            path = plan.class_dir / name
            facts = path.stat()
            same = (facts.st_size, facts.st_mtime_ns) == (size, time)
            if not same and stamp_of(path)[2] != sha256:
                changed.append(path)
    return changed


# ---------------------------------------------------------------- reading


def load_matrices(data_dir: Path, mvtype: str) -> MatrixSet:
    """Map the matrices of a data set into memory and check that they belong together.

    Raises
    ------
    UserError
        If a file is missing, cut short or does not fit the others.
    """
    folder = data_dir / mvtype
    command = f"python data_to_matrices.py --mvtype {loco.split_mvtype(mvtype)[0]}"
    if data_dir != cli.PATH_FLAGS["data_dir"]["default"]:
        command += f" --dataset_dir <images> --out_dir {data_dir}"
    needed = [*SPLITS.values(), LABELS_FILE]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise errors.UserError(
            f"{folder} must hold {', '.join(needed)}, got no {missing[0]}; run `{command}`"
        )
    redo = f"`{command} --overwrite` makes it again"
    images = {split: _map(folder / name, redo) for split, name in SPLITS.items()}
    labels = _map(folder / LABELS_FILE, redo)
    # The authors' matrices have no paths: such names are never shared between data sets.
    paths = {s: [f"{mvtype}/{s}/{i:04d}" for i in range(len(own))] for s, own in images.items()}
    record = {"paths": paths, "files": {}, "settings": {}}
    if (folder / PATHS_FILE).exists():
        record = _read_record(folder / PATHS_FILE, redo)
    side = images["train"].shape[-1]
    for split, array in images.items():
        path, shape = folder / SPLITS[split], array.shape
        if shape[1:] != (3, side, side) or not len(array):
            raise errors.UserError(f"{path} must be (n, 3, {side}, {side}), got {shape}; {redo}")
        if array.dtype not in (np.uint8, np.float32):
            raise errors.UserError(
                f"{path} must be uint8 (or float32 of k/255), got {array.dtype}; {redo}"
            )
        if len(record["paths"][split]) != len(array):
            raise errors.UserError(
                f"{folder / PATHS_FILE} must name {len(array)} {split} images, got "
                f"{len(record['paths'][split])}; {redo}"
            )
    if labels.shape != (len(images["test"]),) or not np.isin(labels, (0, 1)).all():
        raise errors.UserError(
            f"{folder / LABELS_FILE} must hold {len(images['test'])} labels, 0 or 1, got "
            f"{labels.size} of type {labels.dtype}; {redo}"
        )
    return MatrixSet(mvtype, images, labels=labels.astype(np.float64), **record)


def _map(path: Path, redo: str) -> NDArray[Any]:
    """Map a .npy file into memory; a damaged one is an error that names it."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever Python's own parser does
        raise errors.UserError(
            f"{path} must be a whole .npy file, got a damaged one; {redo}"
        ) from error


def _read_record(path: Path, redo: str) -> dict[str, Any]:
    """Read image_paths.json: paths, files and settings as in a MatrixSet."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        paths, files = ({s: list(of[s]) for s in SPLITS} for of in (record, record["files"]))
        return {"paths": paths, "files": files, "settings": dict(record["settings"])}
    except (ValueError, TypeError, KeyError) as error:
        raise errors.UserError(
            f"{path} must be JSON with train, valid, test, files and settings, got another "
            f"({type(error).__name__}: {error}); {redo}"
        ) from error
