"""Drawn data sets of any size, and clocks on the stages of the pipeline."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import sinbad_single_layer
from sinbad import scoring
from sinbad.backbones import FeatureExtractor
from sinbad.datasets import LOCO_CLASSES, LocoClass
from sinbad.matrices import ImagePool
from sinbad.scoring import DescriptorBuilder

STAGES = ("crop", "network", "project + histogram", "whiten + distances", "write")


def small_class(n_images: int) -> dict[str, LocoClass]:
    """Return pushpins with `n_images` in all, half of them for training."""
    full, eighth = LOCO_CLASSES["pushpins"], max(1, n_images // 8)
    n_train = max(2, n_images - 4 * eighth)
    return {"pushpins": LocoClass(full.width, full.height, n_train, *[eighth] * 4)}


def draw_dataset(folder: Path, classes: dict[str, LocoClass]) -> None:
    """Draw smooth random images in LOCO's layout, in the numbers and sizes of `classes`."""

    def draw(job: tuple[Path, LocoClass]) -> None:
        path, facts = job
        rng = np.random.default_rng(list(str(path.relative_to(folder)).encode()))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        size = (facts.width, facts.height)
        coarse.resize(size, Image.Resampling.BILINEAR).save(path, compress_level=1)

    jobs = []
    for name, facts in classes.items():
        for part, count in {
            "train/good": facts.train,
            "validation/good": facts.validation,
            "test/good": facts.good,
            "test/structural_anomalies": facts.structural,
            "test/logical_anomalies": facts.logical,
        }.items():
            (folder / name / part).mkdir(parents=True)
            jobs += [(folder / name / part / f"{i:03d}.png", facts) for i in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, jobs))


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a call in seconds, the GPU's work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watched_stages(device: torch.device) -> Iterator[tuple[dict[str, float], list[int]]]:
    """Yield stage -> seconds spent in it, and the crops of every forward pass.

    "crop" and "write" run in threads beside the others; on a GPU waiting for every stage makes the
    whole slower than it is.
    """
    seconds: dict[str, float] = defaultdict(float)
    batches: list[int] = []

    def watched(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  stands in for any function
            if stage == "network":
                batches.append(len(args[1]))
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(device)
            seconds[stage] += time.perf_counter() - started
            return result

        return run

    with ExitStack() as stack:
        for stage, owner, name in (
            ("crop", ImagePool, "gather"),
            ("network", FeatureExtractor, "extract"),
            ("project + histogram", DescriptorBuilder, "add"),
            ("whiten + distances", scoring, "fit_whitening"),
            ("whiten + distances", scoring, "nearest_distances"),
            ("write", sinbad_single_layer, "save_scores"),
        ):
            replacement = watched(stage, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield seconds, batches
