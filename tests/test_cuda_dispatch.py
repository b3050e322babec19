"""Scoring for CUDA on a machine without a GPU: torch's fake tensors have devices but no numbers.

Every operation is dispatched as on a GPU; one that mixes devices, or that makes the CPU wait for a
result where none is expected, is an error. Numbers and times need a GPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import crop_descriptors
import crop_scores
import image_pools
from backbones import Backbone, FeatureExtractor, load_weights
from crop_descriptors import Descriptor
from crop_scores import ClassScorer, ScoreTask, Settings
from matrix_files import load_matrices

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
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
        mock.patch.object(image_pools, "ThreadPoolExecutor", InLine),
        mock.patch.object(crop_scores, "ThreadPoolExecutor", InLine),
        mock.patch.object(crop_descriptors, "FIT_SETS", 3),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield waits


def fake_extractor(backbone: Backbone) -> FeatureExtractor:
    """Return an extractor whose network has its parameters on the GPU of `fake_gpu`."""

    def move(device: torch.device) -> Backbone:  # torch's own swaps tensors, fakes cannot be
        for module in list(backbone.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                moved = parameter.to(device)
                setattr(module, name, torch.nn.Parameter(moved, requires_grad=False))
        return backbone

    with mock.patch.object(backbone, "to", move):
        return FeatureExtractor(backbone, GPU, "tf32")


def test_devices_cannot_be_mixed_unnoticed() -> None:
    with fake_gpu(0), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=GPU) + torch.ones(2)


@pytest.mark.parametrize("free_bytes", [0, 1 << 40], ids=["images stay", "images on the GPU"])
@pytest.mark.parametrize("official", [False, True])
def test_scoring_mixes_no_devices_and_waits_for_no_more_than_it_must(
    data_dir: Path, free_bytes: int, official: bool
) -> None:
    data_sets = {mvtype: load_matrices(data_dir, mvtype) for mvtype in MVTYPES}
    descriptor = Descriptor(N_DIRECTIONS, 5, 0.1)
    settings = Settings(dict.fromkeys(LEVELS, descriptor), 4, official, 8, 1)
    tasks = [
        ScoreTask(mvtype, level, 0.7, 0, rep)
        for mvtype in MVTYPES
        for level in LEVELS
        for rep in (0, 1)
    ]
    backbone = Backbone("resnet18", load_weights("resnet18", "random"), (7, 14))
    with fake_gpu(free_bytes) as waits:
        scorer = ClassScorer(data_sets, fake_extractor(backbone), settings, GPU)
        scored = {task: (test.shape, valid.shape) for task, test, valid in scorer.score(tasks)}
    assert (scorer.pool.resident is None) == (free_bytes == 0)
    assert scored == dict.fromkeys(tasks, ((4, 5), (4, 3)))
    # A crop position waits for its flags "finite", then, a repetition, for the mean variance.
    n_images = len(scorer.pool)
    assert sorted(waits) == [()] * (4 * len(LEVELS) * 2) + [(n_images,)] * (4 * len(LEVELS))
