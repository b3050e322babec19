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

from sinbad import matrices, scoring
from sinbad.backbones import Backbone, FeatureExtractor, build_backbone, load_weights
from sinbad.matrices import load_matrices
from sinbad.scoring import ClassScorer, ScorePlan, ScoreTask
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
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
        mock.patch.object(matrices, "ThreadPoolExecutor", InLine),
        mock.patch.object(scoring, "ThreadPoolExecutor", InLine),
        mock.patch.object(scoring, "FIT_SETS", 3),
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
        backbone.mean, backbone.std = backbone.mean.to(device), backbone.std.to(device)
        return backbone

    with mock.patch.object(backbone, "to", move):
        return FeatureExtractor(backbone, GPU, "tf32")


def test_devices_cannot_be_mixed_unnoticed() -> None:
    with fake_gpu(0), pytest.raises(RuntimeError, match=r"same device|different devices"):
        torch.ones(2, device=GPU) + torch.ones(2)


@pytest.mark.parametrize("free_bytes", [0, 1 << 40], ids=["images stay", "images on the GPU"])
@pytest.mark.parametrize("official", [False, True])
def test_scoring_mixes_no_devices_and_waits_for_no_more_than_it_must(
    data_dir: Path, free_bytes: int, official: bool
) -> None:
    data_sets = {mvtype: load_matrices(data_dir, mvtype) for mvtype in MVTYPES}
    tasks = [
        ScoreTask(mvtype, level, 0.7, 0, rep, "ver1")
        for mvtype in MVTYPES
        for level in LEVELS
        for rep in (0, 1)
    ]
    flags = ["--mvtype", "pushpins", "--n_projections", str(N_DIRECTIONS), "--batch_size", "8"]
    flags += ["--shrinkage_factor", ".1", "--num_workers", "1", *["--official"] * official]
    plan = ScorePlan.of(parse_args(flags), tasks, data_dir)
    backbone = build_backbone("resnet18", load_weights("resnet18", "random"), (7, 14))
    with fake_gpu(free_bytes) as waits:
        scorer = ClassScorer(plan, data_sets, fake_extractor(backbone), GPU)
        scored = {task: (test.shape, valid.shape) for task, test, valid in scorer.score(tasks)}
    assert (scorer.pool.resident is None) == (free_bytes == 0)
    assert scored == dict.fromkeys(tasks, ((4, 5), (4, 3)))
    # A crop position waits for its flags "finite", then, a repetition, for the mean variance.
    n_images = len(scorer.pool)
    assert sorted(waits) == [()] * (4 * len(LEVELS) * 2) + [(n_images,)] * (4 * len(LEVELS))
