"""Scoring for CUDA on a machine without a GPU: torch's fake tensors have devices but no numbers.

Every operation is dispatched as on a GPU; one that mixes devices, or that makes the CPU wait for a
result or a copy where none is expected, is an error. Numbers and times need a GPU.
"""

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import IM_SIZE
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sinbad import backbones, image_pool, images, matrices, scoring, settings

GPU = torch.device("cuda:0")
MVTYPES = ("pushpins_loco", "pushpins_struct")
LEVELS = (7, 14, 224)
N_PROJECTIONS = 4


class InLine:
    """A thread pool without threads: fake mode is of one thread."""

    def __init__(self, n_threads: int) -> None:
        pass

    def __enter__(self) -> "InLine":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    map = staticmethod(map)

    def submit(self, function: Callable[..., Any], *args: object) -> Future[Any]:
        """Call the function at once."""
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


@dataclass
class Traffic(TorchDispatchMode):
    """What passes between CPU and GPU.

    Attributes
    ----------
    waits : shapes of what the CPU waits for
    uploads : shapes of what is copied to the GPU without a wait
    """

    waits: list[torch.Size] = field(default_factory=list)
    uploads: list[torch.Size] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the operation gives
        """Count copies; only one from pinned memory need not be waited for."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[:2][-1]
            if source.is_cuda != result.is_cuda:
                is_pinned = getattr(source, "is_in_pinned_memory", False)
                is_free = is_pinned and (kwargs.get("non_blocking") or args[2:] == (True,))
                (self.uploads if is_free else self.waits).append(source.shape)
        return result


@contextmanager
def fake_gpu(free_bytes: int) -> Iterator[Traffic]:
    """Let CUDA tensors be made and computed with; yield what passes between CPU and GPU."""
    traffic = Traffic()

    def numpy(self: FakeTensor) -> NDArray[np.float64]:
        assert self.device.type == "cpu"
        return np.zeros(self.shape, np.int64 if self.dtype == torch.int64 else np.float64)

    def to_float(self: FakeTensor) -> float:
        traffic.waits.append(self.shape)
        return 1.0

    def to_bool(self: FakeTensor) -> bool:
        traffic.waits.append(self.shape)
        return True

    def pin(values: Tensor) -> Tensor:
        assert not values.is_cuda  # torch would refuse
        values.is_in_pinned_memory = True
        return values

    memory = {"return_value": (free_bytes, free_bytes)}
    with (
        mock.patch.object(torch.cuda, "mem_get_info", **memory),
        mock.patch.object(FakeTensor, "numpy", numpy),
        mock.patch.object(FakeTensor, "__float__", to_float),
        mock.patch.object(FakeTensor, "__bool__", to_bool),
        mock.patch.object(Tensor, "pin_memory", pin),
        mock.patch.object(image_pool, "ThreadPoolExecutor", InLine),
        mock.patch.object(scoring, "ThreadPoolExecutor", InLine),
        mock.patch("sinbad_utils.N_RANGE_SETS", 3),
        FakeTensorMode(allow_non_fake_inputs=True),
        traffic,
    ):
        yield traffic


def fake_extractor(backbone: backbones.Backbone) -> backbones.FeatureExtractor:
    """Return an extractor whose network has its parameters on the GPU of `fake_gpu`."""

    def move(
        device: torch.device,
    ) -> backbones.Backbone:  # torch's own swaps tensors, fakes cannot be
        for module in list(backbone.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                moved = parameter.to(device)
                setattr(module, name, torch.nn.Parameter(moved, requires_grad=False))
        backbone.mean, backbone.std = backbone.mean.to(device), backbone.std.to(device)
        return backbone

    with mock.patch.object(backbone, "to", move):
        return backbones.FeatureExtractor(backbone, GPU, "tf32")


def test_devices_cannot_be_mixed_unnoticed() -> None:
    with fake_gpu(0), pytest.raises(RuntimeError, match=r"same device|different devices"):
        torch.ones(2, device=GPU) + torch.ones(2)


def slow_crops(data_dir: Path, ids: list[int], corner: tuple[int, int], side: int) -> Tensor:
    """Return crops of pushpins_loco's images, counted over all splits, pixel by pixel."""
    folder = data_dir / "pushpins_loco"
    splits = [np.load(folder / f"{name}_data.npy") for name in ("train", "valid", "test")]
    images = torch.from_numpy(np.concatenate(splits))
    crops = torch.zeros(len(ids), 3, 20, 20, dtype=torch.uint8)
    for crop, index in zip(crops, ids, strict=True):
        for y in range(20):
            for x in range(20):
                at = corner[0] + y * side // 20, corner[1] + x * side // 20
                crop[:, y, x] = images[index, :, at[0], at[1]]
    return crops


def load_pool(data_dir: Path, device: torch.device, *mvtypes: str) -> tuple[Any, dict]:
    """Return the pool of some test subsets, and the numbers of each split's images."""
    subsets = [matrices.load_matrices(data_dir, name) for name in mvtypes]
    return matrices.pool_subsets(subsets, device, 1)


@pytest.mark.parametrize("resident", [False, True], ids=["images stay", "images on the GPU"])
def test_the_gathered_pixels_are_those_of_the_images(resident: bool, data_dir: Path) -> None:
    """The GPU's way too: its indexing is the same on a CPU."""
    pool, _ = load_pool(data_dir, torch.device("cpu"), "pushpins_loco")
    if resident:
        pool.resident = torch.from_numpy(np.stack([array[row] for array, row in pool.rows]))
    corner, side = (3, 17), 30
    pixels = pool.gather([([0, 4, 2, 9, 12], corner, images.nearest_source(side, 20))])
    assert torch.equal(pixels, slow_crops(data_dir, [0, 4, 2, 9, 12], corner, side))


def copy_to_gpu(
    pool: image_pool.ImagePool, free_bytes: int, reserved: int = 0, allocated: int = 0
) -> Tensor | None:
    """Let the pool copy its images to a GPU of some free memory, which is the CPU's."""
    empty, pool.device = torch.empty, GPU
    with (
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(free_bytes, 1 << 40)),
        mock.patch.object(torch.cuda, "memory_reserved", return_value=reserved),
        mock.patch.object(torch.cuda, "memory_allocated", return_value=allocated),
        mock.patch.object(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype)),
        mock.patch.object(Tensor, "pin_memory", Tensor.clone),
    ):
        return pool._copy_to_gpu(2)


def test_images_are_copied_where_they_take_no_more_than_half_of_the_memory(data_dir: Path) -> None:
    pool, _ = load_pool(data_dir, torch.device("cpu"), "pushpins_loco")
    assert pool.resident is None
    n_bytes = len(pool) * 3 * IM_SIZE * IM_SIZE
    assert copy_to_gpu(pool, 2 * n_bytes - 1) is None
    subset = matrices.load_matrices(data_dir, "pushpins_loco")
    expected = np.concatenate(list(subset.images.values()))
    np.testing.assert_array_equal(copy_to_gpu(pool, 2 * n_bytes), expected)
    # What torch holds without using it is free.
    assert copy_to_gpu(pool, n_bytes, n_bytes + 7, 8) is None
    assert copy_to_gpu(pool, n_bytes, n_bytes + 7, 7) is not None
    pool.rows = [(array.astype(np.float32), row) for array, row in pool.rows]
    assert copy_to_gpu(pool, 1 << 40) is None


def test_pages_that_were_read_are_released(data_dir: Path) -> None:
    mapped = matrices.load_matrices(data_dir, "pushpins_loco").images["test"]
    mapped._mmap = mock.Mock()
    rows = [(mapped, 0), (np.array(mapped), 0), (mapped, 1)]  # the second is not mapped
    pool = image_pool.ImagePool(rows, ["", "", ""], (64, 64), torch.device("cpu"))
    pool.drop_page_cache()
    assert mapped._mmap.madvise.mock_calls == [mock.call(mmap.MADV_DONTNEED)]


@pytest.mark.parametrize("free_bytes", [0, 1 << 40], ids=["images stay", "images on the GPU"])
@pytest.mark.parametrize("official", [False, True])
def test_scoring_mixes_no_devices_and_waits_for_no_more_than_it_must(
    data_dir: Path, free_bytes: int, official: bool
) -> None:
    values = settings.Settings(
        n_projections=N_PROJECTIONS,
        shrinkage_factor=0.1,
        batch_size=8,
        num_workers=1,
        initial_res=IM_SIZE,
        official=official,
    )
    tasks = [
        scoring.GridTask(0.7, scoring.Repetition(level, 0, rep))
        for level in LEVELS
        for rep in (0, 1)
    ]
    backbone = backbones.build_backbone(
        "resnet18", backbones.load_weights("resnet18", "random"), (7, 14)
    )
    with fake_gpu(free_bytes) as traffic:
        pool, ids = load_pool(data_dir, GPU, *MVTYPES)
        splits = [ids[mvtype, split] for mvtype in MVTYPES for split in ("valid", "test")]
        scorer = scoring.CropScorer(pool, values, fake_extractor(backbone))
        traffic.waits.clear()  # the network's parameters
        results = dict(scorer.score_grids(tasks, ids[MVTYPES[0], "train"], splits))
    assert (pool.resident is None) == (free_bytes == 0)
    shapes = [(4, len(ids)) for ids in splits]
    assert {task: [array.shape for array in results[task]] for task in results} == dict.fromkeys(
        tasks, shapes
    )
    # A crop position waits for the flag "finite" of each of its segments, then, for each
    # repetition, for the mean variance, and for the scores of each segment but the training one's.
    n_segments = 3 if official else 2  # training, validation and test, or both at once
    n_streams = 2  # the network's levels, the raw pixels
    n_flags, n_scores = n_streams * n_segments, n_streams * (n_segments - 1)
    assert len(traffic.waits) == 4 * (n_flags + len(tasks) + n_scores)
    assert sum(shape == () for shape in traffic.waits) == 4 * (n_flags + len(tasks))
    # What is not waited for: directions of each repetition; the normalisation of raw pixels and
    # the crops of each batch; or each image once, and of each batch and segment where to gather.
    n_batches = 4 * 15 // 8 + 1
    n_gathered = n_streams * n_batches
    if free_bytes:
        n_gathered += len(pool) + n_streams * 4 * n_segments
    assert len(traffic.uploads) <= 4 * len(tasks) + n_batches + n_gathered
