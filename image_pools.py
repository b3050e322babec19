"""The images of a class' data sets, each once, and the pixels of their crops."""

import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matrix_files import MatrixSet, crop_is_empty, crop_pixels

IMAGES_AT_ONCE = 32  # mapped before their pages are let go of


class ImagePool:
    """The images of a class' data sets in the order train, valid, test; equal pixels once.

    Attributes
    ----------
    ids : (mvtype, split) -> indices of its images in the pool
    names : path of each image, for messages
    """

    def __init__(self, data_sets: Iterable[MatrixSet], device: torch.device) -> None:
        self.sources: list[tuple[NDArray[np.uint8], int]] = []
        self.names: list[str] = []
        self.ids: dict[tuple[str, str], list[int]] = {}
        self.device = device
        self.resident: Tensor | None = None
        known: dict[str, int] = {}
        for data_set in data_sets:
            for split, images in data_set.images.items():
                names = data_set.paths[split]
                keys = data_set.sha256.get(split, names)  # the authors' names are never shared
                for row, (key, name) in enumerate(zip(keys, names, strict=True)):
                    index = known.setdefault(key, len(self.sources))
                    if index == len(self.sources):
                        self.sources.append((images, row))
                        self.names.append(name)
                    self.ids.setdefault((data_set.mvtype, split), []).append(index)

    def __len__(self) -> int:
        return len(self.sources)

    def ids_of(self, mvtype: str) -> list[int]:
        """Return the images of a data set, all splits."""
        return [i for (name, _), ids in self.ids.items() if name == mvtype for i in ids]

    def empty_in(self, mvtype: str, corner: tuple[int, int], side: int) -> bool:
        """Tell whether a crop is padding only in every image of a data set."""
        ids = self.ids_of(mvtype)
        for start in range(0, len(ids), IMAGES_AT_ONCE):
            part = (self.sources[i] for i in ids[start : start + IMAGES_AT_ONCE])
            empty = all(crop_is_empty(images[row], corner, side) for images, row in part)
            self.release()
            if not empty:
                return False
        return True

    def move_to_device(self, num_workers: int) -> None:
        """Copy the images into the GPU's memory where they take less than half of what is free."""
        if self.device.type != "cuda":
            return
        images, row = self.sources[0]
        shape = images[row].shape
        free, _ = torch.cuda.mem_get_info(self.device)
        if len(self) * int(np.prod(shape)) > free // 2 or images.dtype != np.uint8:
            return
        self.resident = torch.empty((len(self), *shape), dtype=torch.uint8, device=self.device)

        def copy(index: int) -> None:
            images, row = self.sources[index]
            self.resident[index].copy_(torch.from_numpy(np.array(images[row])))

        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            list(pool.map(copy, range(len(self))))
        self.release()

    def release(self) -> None:
        """Let go of the mapped files' pages: the process does not grow with the images it has read.

        They stay in the system's cache, so reading them again costs next to nothing.
        """
        for images in {id(images): images for images, _ in self.sources}.values():
            mapped = getattr(images, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def gather(self, ids: list[int], corner: tuple[int, int], source: NDArray[np.int64]) -> Tensor:
        """Return the nearest-sampled pixels of one crop of several images.

        Returns
        -------
        (n, 3, 224, 224), uint8, on the GPU if the images are there, else on the CPU
        """
        if self.resident is None:
            crops = np.empty((len(ids), 3, len(source), len(source)), np.uint8)
            for out, index in zip(crops, ids, strict=True):
                images, row = self.sources[index]
                out[:] = crop_pixels(images[row], corner, source)
            return torch.from_numpy(crops)
        rows, columns = (torch.from_numpy(start + source).to(self.device) for start in corner)
        images_at = torch.tensor(ids, device=self.device)[:, None, None, None]
        channels = torch.arange(3, device=self.device)[:, None, None]
        return self.resident[images_at, channels, rows[:, None], columns]
