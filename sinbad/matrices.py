"""The matrices of a test subset on disk: write, check, read, gather crops from them."""

import errno
import hashlib
import json
import logging
import mmap
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sinbad import atomic, cli, errors, image_pool, images, layouts, loco, settings

log = logging.getLogger(__name__)

SPLITS = {"train": "train_data.npy", "valid": "valid_data.npy", "test": "test_data.npy"}
SHARED_SPLITS = ("train", "valid")  # of a category's test subsets
LABELS_FILE = "image_level_label.npy"
PARTS = (*SPLITS.values(), LABELS_FILE)
PATHS_FILE = "image_paths.json"  # paths, stamps, settings; the authors' matrices have none

# Of an image's file: size in bytes, mtime in ns, sha256, ctime in ns (older records have none).
Stamp = list[Any]


@dataclass(frozen=True)
class MatrixSet:
    """The matrices of one test subset, memory-mapped.

    Attributes
    ----------
    mvtype : name, such as pushpins_loco
    images : split ("train", "valid", "test") -> (n, 3, im_size, im_size), uint8
        (float32 of k/255 in the authors' matrices)
    paths : split -> image paths relative to the category's folder
    files : split -> stamp of each image's file; empty for the authors'
    labels : (n_test,), 0 normal, 1 anomalous
    settings : `images.resize_settings` and more; empty for the authors'
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

    @cached_property
    def image_extent(self) -> tuple[int, int]:
        """(width, height) in pixels of what is image in the top left corner; the rest is padding.

        As recorded; in the authors' matrices by LOCO's sizes, for another category of theirs by
        what is not zero in all images (the whole square if nothing is).
        """
        if self.settings:
            return self.settings["width"], self.settings["height"]
        facts = loco.LOCO_CLASSES.get(loco.split_mvtype(self.mvtype)[0])
        if facts is not None:
            return images.fitted_size(facts.width, facts.height, self.im_size)
        return _nonzero_extent(self.images.values())

    def sha256(self, split: str) -> list[str]:
        """Return what identifies each image of a split; the authors' by subset and position."""
        return [stamp[2] for stamp in self.files[split]] if self.files else self.paths[split]

    @cached_property
    def digest(self) -> str:
        """Return one sha256 of all names, images and labels."""
        identities = {split: self.sha256(split) for split in SPLITS}
        content = json.dumps([self.paths, identities, self.labels.tolist()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _nonzero_extent(arrays: Iterable[NDArray[Any]]) -> tuple[int, int]:
    """Return the (width, height) that holds every pixel above zero of arrays (n, 3, side, side)."""
    nonzero: NDArray[np.bool_] | bool = False
    for array in arrays:
        mapped = getattr(array, "_mmap", None)
        for image in array:
            nonzero = nonzero | image.any(0)  # (side, side)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # or all pages would stay in memory
    rows, columns = np.nonzero(nonzero)
    side = len(nonzero)
    return (int(columns.max()) + 1, int(rows.max()) + 1) if len(rows) else (side, side)


# ---------------------------------------------------------------- writing


def stamp_of(path: Path) -> Stamp:
    """Return size, mtime, sha256 and ctime of a file."""
    facts = path.stat()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return [facts.st_size, facts.st_mtime_ns, sha256, facts.st_ctime_ns]


def write_split(
    path: Path, image_paths: list[Path], settings: dict[str, Any], n_workers: int, bar: tqdm
) -> None:
    """Decode images in parallel threads and write them to one .npy file, some at a time.

    Not through a memory map: dirty pages of a map count as the process' memory, and a full disk
    would end it with SIGBUS instead of an error.
    """
    shape = (len(image_paths), 3, settings["im_size"], settings["im_size"])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file, ThreadPoolExecutor(n_workers) as pool:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(image_paths), images.IMAGE_CHUNK):
            chunk = image_paths[start : start + images.IMAGE_CHUNK]
            for pixels in pool.map(lambda path: images.preprocess_image(path, settings), chunk):
                file.write(pixels.data)
                bar.update()


def write_matrices(
    subset: layouts.SubsetSpec, out_dir: Path, n_workers: int, link: bool = True
) -> None:
    """Write the matrices of one test subset; the finished folder is renamed into place.

    With `link`, train and validation matrices of another subset of the category are linked (copied
    where the file system has no links) if they are of the same images and settings.
    """
    files = {s: [subset.category_dir / path for path in subset.paths[s]] for s in SPLITS}
    stamps = {split: [stamp_of(path) for path in files[split]] for split in SPLITS}
    twin = find_twin(subset, stamps, out_dir) if link else None
    linked = SHARED_SPLITS if twin else ()
    n_images = sum(len(files[split]) for split in SPLITS if split not in linked)
    target = out_dir / subset.mvtype
    bar = cli.progress_bar(n_images, subset.mvtype, "images")
    try:
        with atomic.atomic_path(target) as partial, bar:
            partial.mkdir()
            for split, name in SPLITS.items():
                if split not in linked:
                    write_split(partial / name, files[split], subset.settings, n_workers, bar)
                    continue
                try:
                    (partial / name).hardlink_to(twin / name)
                except (OSError, NotImplementedError):
                    shutil.copyfile(twin / name, partial / name)
            np.save(partial / LABELS_FILE, subset.labels)
            record = {**subset.paths, "files": stamps, "settings": subset.settings}
            (partial / PATHS_FILE).write_text(atomic.to_json(record), encoding="utf-8")
    except OSError as error:
        if error.errno != errno.ECANCELED:
            raise
    # Another run may have been faster: then with the same settings and images, or it is an error.
    if not is_current(target, subset):
        raise errors.UserError(f"another run has changed {target}; run the command again, alone")


def find_twin(
    subset: layouts.SubsetSpec, stamps: dict[str, list[Stamp]], out_dir: Path
) -> Path | None:
    """Return the folder of another subset of the category with equal train and valid matrices."""
    category, anomaly_type = loco.split_mvtype(subset.mvtype)
    sha256 = {split: [stamp[2] for stamp in stamps[split]] for split in SHARED_SPLITS}
    for other_type in (kind for kind in loco.KINDS if kind != anomaly_type):
        folder = out_dir / f"{category}_{other_type}"
        if not (folder / PATHS_FILE).exists() or missing_parts(folder):
            continue
        twin = load_matrices(out_dir, folder.name)
        same = all(twin.sha256(split) == sha256[split] for split in SHARED_SPLITS)
        if same and twin.settings == subset.settings:
            return folder
    return None


def is_current(folder: Path, subset: layouts.SubsetSpec) -> bool:
    """Return whether finished matrices have the same settings and are of the same images.

    A folder with a part missing is not finished. An image is the same if its path, size, mtime and
    ctime are the recorded ones (`cp -p` and archives set the mtime alone), else its sha256 decides.

    Raises
    ------
    UserError
        If the folder holds matrices of other settings or another list of images, or the authors'.
    """
    if not any(folder.glob("*")):
        return False
    hint = "choose another --out_dir, or pass --overwrite to replace it"
    if not (folder / PATHS_FILE).exists():
        raise errors.UserError(
            f"{folder} must be new or hold matrices of this script, got files without {PATHS_FILE} "
            f"(the authors'?); {hint}"
        )
    missing = missing_parts(folder)
    if missing:
        log.info(f"{subset.mvtype}: written again, {folder / missing[0]} is missing")
        return False
    recorded = load_matrices(folder.parent, folder.name)
    pillow_then, pillow_now = recorded.settings["pillow"], subset.settings["pillow"]
    difference = settings.first_difference(
        recorded.settings | {"pillow": pillow_now}, subset.settings
    ) or settings.first_difference(recorded.paths, subset.paths)
    if difference is not None:
        name, old, new = difference
        if name in SPLITS:
            old, new = f"list of {len(old)} images", f"another list, of {len(new)}"
        raise errors.UserError(
            f"{folder} was computed with {name} {old}, now {name} is {new}; {hint}"
        )
    changed = _changed_images(recorded, subset)
    if changed:
        log.info(
            f"{subset.mvtype}: written again, {len(changed)} images have changed, such as "
            f"{changed[0]}"
        )
    elif pillow_then != pillow_now:
        log.warning(
            f"{folder} was made by Pillow {pillow_then}, this is {pillow_now}: single pixels may "
            "differ by 1; --overwrite writes it again"
        )
    return not changed


def _changed_images(recorded: MatrixSet, subset: layouts.SubsetSpec) -> list[Path]:
    """Return the images whose content is not the recorded one."""
    changed = []
    for split, names in subset.paths.items():
        for name, stamp in zip(names, recorded.files[split], strict=True):
            path = subset.category_dir / name
            facts = path.stat()
            unchanged = [facts.st_size, facts.st_mtime_ns, stamp[2], facts.st_ctime_ns] == stamp
            if not unchanged and stamp_of(path)[2] != stamp[2]:
                changed.append(path)
    return changed


# ---------------------------------------------------------------- reading


def missing_parts(folder: Path) -> list[str]:
    """Return the files that a folder of matrices lacks; the authors' have no image_paths.json."""
    return [name for name in PARTS if not (folder / name).is_file()]


def load_matrices(data_dir: Path, mvtype: str) -> MatrixSet:
    """Map the matrices of a test subset into memory and check that they fit each other.

    Raises
    ------
    UserError
        If a file is missing, cut short or does not fit the others.
    """
    folder = data_dir / mvtype
    command = f"python data_to_matrices.py --mvtype {loco.split_mvtype(mvtype)[0]}"
    if data_dir != cli.SHARED_FLAGS["data_dir"]["default"]:
        command += f" --dataset_dir <images> --out_dir {data_dir}"
    missing = missing_parts(folder)
    if missing:
        raise errors.UserError(
            f"{folder} must hold {', '.join(PARTS)}, got no {missing[0]}; run `{command}`"
        )
    redo = f"`{command} --overwrite` writes it again"
    arrays = {split: _map(folder / name, redo) for split, name in SPLITS.items()}
    labels = _map(folder / LABELS_FILE, redo)
    # The authors' matrices have no paths: such names are never shared between subsets.
    paths = {s: [f"{mvtype}/{s}/{i:04d}" for i in range(len(arrays[s]))] for s in arrays}
    record = {"paths": paths, "files": {}, "settings": {}}
    if (folder / PATHS_FILE).exists():
        record = _read_record(folder / PATHS_FILE, redo)
    side = arrays["train"].shape[-1]
    for split, array in arrays.items():
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
    if labels.shape != (len(arrays["test"]),) or not np.isin(labels, (0, 1)).all():
        raise errors.UserError(
            f"{folder / LABELS_FILE} must hold {len(arrays['test'])} labels, 0 or 1, got "
            f"{labels.size} of type {labels.dtype}; {redo}"
        )
    return MatrixSet(mvtype, arrays, labels=labels.astype(np.float64), **record)


def _map(path: Path, redo: str) -> NDArray[Any]:
    """Map a .npy file into memory; a damaged one is an error that names it."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever Python's own parser does
        raise errors.UserError(
            f"{path} must be a complete .npy file, got a damaged one; {redo}"
        ) from error


def _read_record(path: Path, redo: str) -> dict[str, Any]:
    """Read image_paths.json: paths, files and settings as in a MatrixSet."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        paths, files = ({s: list(part[s]) for s in SPLITS} for part in (record, record["files"]))
        return {"paths": paths, "files": files, "settings": dict(record["settings"])}
    except (ValueError, TypeError, KeyError) as error:
        raise errors.UserError(
            f"{path} must be JSON with train, valid, test, files and settings, got another "
            f"({type(error).__name__}: {error}); {redo}"
        ) from error


def pool_subsets(
    subsets: Iterable[MatrixSet], device: torch.device, num_workers: int
) -> tuple[image_pool.ImagePool, dict[tuple[str, str], list[int]]]:
    """Pool the images of a category's test subsets; equal files once.

    Returns
    -------
    The pool, and (mvtype, split) -> numbers of its images
    """
    subsets = list(subsets)
    rows: list[image_pool.Row] = []
    names: list[str] = []
    ids: dict[tuple[str, str], list[int]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for subset in subsets:
        preprocessing = atomic.to_json(subset.settings)
        for split, array in subset.images.items():
            ids[subset.mvtype, split] = []
            for row, sha256 in enumerate(subset.sha256(split)):
                number = numbers.setdefault((sha256, preprocessing), len(numbers))
                if number == len(rows):
                    rows.append((array, row))
                    names.append(subset.paths[split][row])
                ids[subset.mvtype, split].append(number)
    width, height = map(max, zip(*(s.image_extent for s in subsets), strict=True))
    return image_pool.ImagePool(rows, names, (width, height), device, num_workers), ids
