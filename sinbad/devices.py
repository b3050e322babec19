"""The device that computes: its choice, copies to it, and its memory, short or freed."""

import ctypes
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sinbad import errors

log = logging.getLogger(__name__)
Result = TypeVar("Result")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 28  # more than the activations of a batch on a CPU
LARGE_BYTES = 1 << 25  # the most that glibc takes for M_MMAP_THRESHOLD


def choose_device(name: str) -> torch.device:
    """Return the device named `auto` (CUDA if present), `cpu`, `cuda` or `cuda:<i>`.

    Raises
    ------
    UserError
        If the device is not one of these, or is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if match is None or (name != "cpu" and int(match[1] or 0) >= count):
        raise errors.UserError(
            f"device must be auto, cpu, cuda or cuda:<i> of this machine ({count} CUDA devices), "
            f"got {name}; pass --device cpu"
        )
    return torch.device(name)


def pin(values: Tensor, device: torch.device) -> Tensor:
    """Return values where a GPU can copy them from on its own; for a CPU as they are."""
    return values.pin_memory() if device.type == "cuda" and not values.is_cuda else values


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; the CPU does not wait for a GPU to copy them."""
    return pin(values, device).to(device, non_blocking=True)


class Halving:
    """Computes batches in parts, halved when the GPU runs out of memory.

    Attributes
    ----------
    sizes : what a batch consists of ("crop") -> how many a part has; missing: the whole batch
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def __call__(
        self, function: Callable[[Tensor], Result], batch: Tensor, of: str = "crop"
    ) -> list[Result]:
        """Return the results of the parts; halving is logged, and stays for other batches.

        Raises
        ------
        UserError
            If the GPU's memory is too small for a part of one.
        """
        while True:
            size = self.sizes.get(of, len(batch))
            try:
                return [function(part) for part in batch.split(size)]
            except torch.cuda.OutOfMemoryError as error:
                size = min(size, len(batch))
                if size == 1:
                    raise errors.UserError(
                        f"out of GPU memory for a single {of}; free the GPU, or pass --device cpu"
                    ) from error
            # Only here, when the error with its frames is gone, is their memory free again.
            self.sizes[of] = (size + 1) // 2
            log.info(
                f"GPU memory is too small for {size} {of}s at once, going on with {self.sizes[of]}"
            )
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- freed memory, with glibc


def keep_freed_memory() -> None:
    """Keep freed memory at the end of the heap, up to 256 MB: the next batch needs no new pages.

    It acts on the whole process. Blocks of 32 MB and more still go back at once: kept, they would
    be pinned by what is small and outlives them.
    """
    _call_glibc("mallopt", M_MMAP_THRESHOLD, LARGE_BYTES)
    _call_glibc("mallopt", M_TRIM_THRESHOLD, KEPT_BYTES)


def give_freed_memory_back() -> None:
    """Give what is kept, and the holes between what is in use, back to the system."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *args: int) -> None:
    """Call a function of glibc; with another C library do nothing."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*args)
