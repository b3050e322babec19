"""The preprocessed images that are scored together: each kept once, crops gathered from them."""

import math
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinbad import devices, errors

Row = tuple[NDArray[Any], int]  # an array (n, 3, im_size, im_size) and a row of it
# One crop of several images: their numbers, its corner (y, x), `images.nearest_source` of its side.
Crops = tuple[Sequence[int], tuple[int, int], NDArray[np.int64]]


def crop_pixels(
    image: NDArray[Any], corner: tuple[int, int], source: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Gather the nearest-sampled pixels of one crop of one image.

    Parameters
    ----------
    image : (3, im_size, im_size), uint8, or float32 of k/255
    corner : (y, x) of the crop in pixels
    source : (size,), `images.nearest_source` of the crop's side

    Returns
    -------
    (3, size, size), uint8
    """
    y, x = corner
    pixels = image.take(y + source, axis=1).take(x + source, axis=2)
    if pixels.dtype == np.uint8:
        return pixels
    values = np.rint(pixels * 255.0)
    if not (values.min() >= 0.0 and values.max() <= 255.0):  # NaN is neither
        raise ValueError("float32 matrices must hold k/255, got other values")
    return values.astype(np.uint8)


class ImagePool:
    """Images by number, in memory-mapped arrays, or on the GPU if they fit there.

    Parameters
    ----------
    rows : where each image is
    names : of each image, for messages
    extent : (width, height) in pixels of what is no padding, of the largest image
    device : torch.device
    num_workers : threads that copy images to the GPU
    """

    def __init__(
        self,
        rows: Sequence[Row],
        names: Sequence[str],
        extent: tuple[int, int],
        device: torch.device,
        num_workers: int = 1,
    ) -> None:
        self.rows, self.names, self.extent, self.device = rows, names, extent, device
        self.im_size = rows[0][0].shape[-1]
        self.resident = self._copy_to_gpu(num_workers) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.rows)

    def is_padding(self, corner: tuple[int, int]) -> bool:
        """Tell whether a crop with this corner (y, x) lies in the padding of every image."""
        (y, x), (width, height) = corner, self.extent
        return y >= height or x >= width

    def _copy_to_gpu(self, num_workers: int) -> Tensor | None:
        """Copy the images into the GPU's memory where they take at most half of what is free.

        Memory that torch holds without using it, as of other images before, is free.
        """
        shape = (len(self), *self.rows[0][0].shape[1:])
        is_whole = all(array.dtype == np.uint8 for array, _ in self.rows)
        cuda, device = torch.cuda, self.device
        unused = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        if not is_whole or math.prod(shape) > (cuda.mem_get_info(device)[0] + unused) // 2:
            return None
        resident = torch.empty(shape, dtype=torch.uint8, device=self.device)

        def copy(index: int) -> None:
            array, row = self.rows[index]
            pixels = torch.from_numpy(np.array(array[row]))
            resident[index].copy_(devices.pin(pixels, device), non_blocking=True)

        with ThreadPoolExecutor(num_workers) as threads:
            list(threads.map(copy, range(len(self))))
        self.drop_page_cache()
        return resident

    def drop_page_cache(self) -> None:
        """Release the mapped files' pages: the process does not grow with the images it has read.

        They stay in the system's cache, so reading them again costs next to nothing.
        """
        for array in {id(array): array for array, _ in self.rows}.values():
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def gather(self, crops: Sequence[Crops]) -> Tensor:
        """Return the nearest-sampled pixels of crops, one after the other.

        Threads call it, so no torch operation here works on the pixels of a CPU: each thread would
        get a team of OpenMP threads, and with more of them than processors all sleep between
        operations instead of spinning.

        Returns
        -------
        (n, 3, 224, 224), uint8, on the GPU if the images are there, else on the CPU
        """
        if self.resident is not None:
            return torch.cat([self._gather_on_gpu(*of_images) for of_images in crops])
        of_image = [(index, corner, source) for ids, corner, source in crops for index in ids]
        side = len(of_image[0][2])
        pixels = np.empty((len(of_image), 3, side, side), np.uint8)
        for out, (index, corner, source) in zip(pixels, of_image, strict=True):
            array, row = self.rows[index]
            try:
                out[:] = crop_pixels(array[row], corner, source)
            except ValueError as error:
                raise errors.UserError(f"image {self.names[index]}: {error}") from None
        return torch.from_numpy(pixels)

    def _gather_on_gpu(
        self, ids: Sequence[int], corner: tuple[int, int], source: NDArray[np.int64]
    ) -> Tensor:
        """Return the pixels of one crop of several images that are on the GPU."""
        indices = [ids, *(start + source for start in corner)]  # one copy, not waited for
        on_gpu = devices.to_device(torch.from_numpy(np.concatenate(indices)), self.device)
        images_at, rows, columns = on_gpu.split([len(part) for part in indices])
        channels = torch.arange(3, device=self.device)[:, None, None]
        return self.resident[images_at[:, None, None, None], channels, rows[:, None], columns]
