"""Scoring for CUDA on a machine without a GPU: torch's fake tensors have devices but no numbers.

Every operation is dispatched as on a GPU; one that mixes devices, or that makes the CPU wait for a
result where none is expected, is an error. Numbers and times need a GPU.
"""

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
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

from sinbad import backbones, matrices, score_plans, scoring
from sinbad_single_layer import parse_args

GPU = torch.device("cuda:0")
MVTYPES = ("pushpins_loco", "pushpins_struct")
LEVELS = (7, 14, 224)
N_DIRECTIONS = 4


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


@contextmanager
def fake_gpu(free_bytes: int) -> Iterator[list[torch.Size]]:
    """Let CUDA tensors be made and computed with; yield the shapes of waits for their numbers."""
    waits = []

    def numpy(self: FakeTensor) -> NDArray[np.float64]:
        assert self.device.type == "cpu"
        return np.zeros(self.shape, np.int64 if self.dtype == torch.int64 else np.float64)

    def to_float(self: FakeTensor) -> float:
        waits.append(self.shape)
        return 1.0

    def to_list(self: FakeTensor) -> list[bool]:
        waits.append(self.shape)
        return [True] * len(self)

    memory = {"return_value": (free_bytes, free_bytes)}
    with (
        mock.patch.object(torch.cuda, "mem_get_info", **memory),
        mock.patch.object(FakeTensor, "numpy", numpy),
        mock.patch.object(FakeTensor, "__float__", to_float),
        mock.patch.object(FakeTensor, "tolist", to_list),
        mock.patch.object(matrices, "ThreadPoolExecutor", InLine),
        mock.patch.object(scoring, "ThreadPoolExecutor", InLine),
        mock.patch("sinbad_utils.N_RANGE_SETS", 3),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield waits


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


@pytest.mark.parametrize("resident", [False, True], ids=["images stay", "images on the GPU"])
def test_the_gathered_pixels_are_those_of_the_images(resident: bool, data_dir: Path) -> None:
    """The GPU's way too: its indexing is the same on a CPU."""
    pool = matrices.ImagePool(
        [matrices.load_matrices(data_dir, "pushpins_loco")], torch.device("cpu")
    )
    if resident:
        pool.resident = torch.from_numpy(np.stack([images[row] for images, row in pool.sources]))
    corner, side = (3, 17), 30
    found = pool.gather([0, 4, 2, 9, 12], corner, images.nearest_source(side, 20))
    assert torch.equal(found, slow_crops(data_dir, [0, 4, 2, 9, 12], corner, side))


def move(pool: matrices.ImagePool, free_bytes: int) -> Tensor | None:
    """Let the pool move its images to a GPU of some free memory, which is the CPU's."""
    empty, pool.device = torch.empty, GPU
    memory = mock.patch.object(torch.cuda, "mem_get_info", return_value=(free_bytes, free_bytes))
    on_cpu = mock.patch.object(
        torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype)
    )
    with memory, on_cpu:
        pool.move_to_device(2)
    return pool.resident


def test_images_move_where_they_take_no_more_than_half_of_the_memory(data_dir: Path) -> None:
    data_set = matrices.load_matrices(data_dir, "pushpins_loco")
    pool = matrices.ImagePool([data_set], torch.device("cpu"))
    pool.move_to_device(2)
    assert pool.resident is None
    n_bytes = len(pool) * 3 * IM_SIZE * IM_SIZE
    assert move(pool, 2 * n_bytes - 1) is None
    expected = np.concatenate(list(data_set.images.values()))
    np.testing.assert_array_equal(move(pool, 2 * n_bytes), expected)
    floats = {split: images.astype(np.float32) for split, images in data_set.images.items()}
    assert move(matrices.ImagePool([replace(data_set, images=floats)], GPU), 1 << 40) is None


def test_pages_that_were_read_are_let_go_of(data_dir: Path) -> None:
    data_set = matrices.load_matrices(data_dir, "pushpins_loco")
    mapped = data_set.images["test"]
    mapped._mmap = mock.Mock()
    images = {**data_set.images, "train": np.array(data_set.images["train"]), "test": mapped}
    pool = matrices.ImagePool([replace(data_set, images=images)], torch.device("cpu"))
    pool.release()  # training images are in memory, nothing is mapped
    assert mapped._mmap.madvise.mock_calls == [mock.call(mmap.MADV_DONTNEED)]


def test_pages_are_let_go_of_while_a_class_is_searched_for_padding(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = matrices.ImagePool(
        [matrices.load_matrices(data_dir, "pushpins_loco")], torch.device("cpu")
    )
    monkeypatch.setattr(matrices, "IMAGES_AT_ONCE", 4)
    releases: list[None] = []
    monkeypatch.setattr(pool, "release", lambda: releases.append(None))
    assert not pool.is_empty((0, 0), 16)
    assert len(releases) == 1
    assert pool.is_empty((48, 48), 16)  # below the drawn 85 x 50 pixels
    assert len(releases) == 1 + -(-len(pool) // 4)


@pytest.mark.parametrize("free_bytes", [0, 1 << 40], ids=["images stay", "images on the GPU"])
@pytest.mark.parametrize("official", [False, True])
def test_scoring_mixes_no_devices_and_waits_for_no_more_than_it_must(
    data_dir: Path, free_bytes: int, official: bool
) -> None:
    data_sets = {mvtype: matrices.load_matrices(data_dir, mvtype) for mvtype in MVTYPES}
    tasks = [
        score_plans.ScoreTask(mvtype, level, 0.7, 0, rep, "ver1")
        for mvtype in MVTYPES
        for level in LEVELS
        for rep in (0, 1)
    ]
    flags = ["--mvtype", "pushpins", "--n_projections", str(N_DIRECTIONS), "--batch_size", "8"]
    flags += ["--shrinkage_factor", ".1", "--num_workers", "1", *["--official"] * official]
    score_plan = score_plans.ScorePlan.of(parse_args(flags), tasks, data_dir)
    backbone = backbones.build_backbone(
        "resnet18", backbones.load_weights("resnet18", "random"), (7, 14)
    )
    pinned: list[bool] = []

    def pin(crops: Tensor) -> Tensor:
        assert not crops.is_cuda  # torch would refuse
        pinned.append(True)
        return crops

    with fake_gpu(free_bytes) as waits, mock.patch.object(Tensor, "pin_memory", pin):
        scorer = scoring.ClassScorer(score_plan, data_sets, fake_extractor(backbone), GPU)
        scored = {task: (test.shape, valid.shape) for task, test, valid in scorer.score(tasks)}
    assert (scorer.pool.resident is None) == (free_bytes == 0)
    assert bool(pinned) == (free_bytes == 0)
    assert scored == dict.fromkeys(tasks, ((4, 5), (4, 3)))
    # A crop position waits for its flags "finite", then, a repetition, for the mean variance.
    n_images = len(scorer.pool)
    assert sorted(waits) == [()] * (4 * len(LEVELS) * 2) + [(n_images,)] * (4 * len(LEVELS))
