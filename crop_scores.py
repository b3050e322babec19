"""From matrices to the scores of every crop: one pass over the images for all that is asked.

The crops of all images, position by position, run through the network in full batches; every
level, repetition and seed takes its elements from the same forward pass, and the data sets of a
class share the images they have in common. Kept in memory: the descriptors of the crop positions
in the batch at hand (n_images x n_projections n_quantiles floats each), never features of images.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from backbones import INPUT_SIDE, FeatureExtractor, normalise_pixels
from command_line import Progress, UserError
from crop_descriptors import Descriptor, DescriptorBuilder, RangeGroup, range_groups
from image_pools import ImagePool
from loco_datasets import PIXEL_LEVEL, crop_corners, crop_side
from matrix_files import MatrixSet, nearest_source
from sinbad_utils import Scores, Whitening, fit_whitening, nearest_distances

BATCHES_AHEAD = 2

Extract = Callable[[Tensor], dict[int, Tensor]]
Draw = tuple[int, int]  # (seed, rep): one draw of random directions
Batch = list[tuple["CropJob", list[int]]]  # crops of several positions: position, images


@dataclass(frozen=True)
class ScoreTask:
    """One file of scores: a data set, a level, a crop grid, a seed and a repetition."""

    mvtype: str
    level: int
    ratio: float
    seed: int
    rep: int


@dataclass(frozen=True)
class Settings:
    """What all tasks of a run share.

    Attributes
    ----------
    descriptors : level -> how it is described
    crop_num_edge : crops per edge that the stride is made for
    official : ranges of each split's own images and C^-1, as the authors' code
    batch_size : crops of one forward pass
    num_workers : threads that gather pixels
    """

    descriptors: dict[int, Descriptor]
    crop_num_edge: int
    official: bool
    batch_size: int
    num_workers: int


@dataclass
class CropJob:
    """One crop position of a grid: where it is, and the builder of every level that wants it.

    Attributes
    ----------
    tasks : the tasks of this grid
    crop, n_crops : number of the position, row by row, and how many the grid has
    corner, side : (y, x) and side in pixels
    empty_for : data sets where this position is padding only in every image
    builders : level -> builder
    """

    tasks: list[ScoreTask]
    crop: int
    n_crops: int
    corner: tuple[int, int]
    side: int
    empty_for: set[str]
    builders: dict[int, DescriptorBuilder] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Tell whether no data set has anything but padding here."""
        return self.empty_for >= {task.mvtype for task in self.tasks}

    def draws(self, level: int) -> list[Draw]:
        """Return the draws of directions that a level wants."""
        return list(dict.fromkeys((t.seed, t.rep) for t in self.tasks if t.level == level))


class ClassScorer:
    """Scores the data sets of one class, each crop forwarded once for all tasks.

    Parameters
    ----------
    data_sets : mvtype -> matrices, of one class
    extractor : the network; may be None if only the raw-pixel level is wanted
    settings, device
    """

    def __init__(
        self,
        data_sets: dict[str, MatrixSet],
        extractor: FeatureExtractor | None,
        settings: Settings,
        device: torch.device,
    ) -> None:
        for mvtype, data_set in data_sets.items():
            n_train = len(data_set.images["train"])
            if n_train < 2:
                raise UserError(
                    f"train images must be at least 2, got {n_train} of {mvtype}; add some, and "
                    "make the matrices again"
                )
        self.extractor, self.settings, self.device = extractor, settings, device
        self.im_size = next(iter(data_sets.values())).im_size
        self.pool = ImagePool(data_sets.values(), device)
        self.pool.move_to_device(settings.num_workers)
        self.groups = range_groups(self.pool, list(data_sets), settings.official)

    def score(self, tasks: list[ScoreTask]) -> Iterator[tuple[ScoreTask, Scores, Scores]]:
        """Yield every task as soon as its last crop is scored.

        Yields
        ------
        task, (n_crops, n_test) and (n_crops, n_valid) scores, float64, higher = more anomalous
        """
        resnet = [task for task in tasks if task.level != PIXEL_LEVEL]
        pixels = [task for task in tasks if task.level == PIXEL_LEVEL]
        if resnet:
            assert self.extractor is not None
            yield from self._score_stream(resnet, self.extractor.extract)
        if pixels:
            yield from self._score_stream(pixels, self._pixel_elements)

    def _pixel_elements(self, crops: Tensor) -> dict[int, Tensor]:
        """Return the raw pixels of crops as the elements of level 224."""
        return {PIXEL_LEVEL: normalise_pixels(crops).flatten(2)}  # (crops, 3, elements)

    def _score_stream(
        self, tasks: list[ScoreTask], extract: Extract
    ) -> Iterator[tuple[ScoreTask, Scores, Scores]]:
        """Score tasks whose elements come from the same `extract`."""
        mvtypes = list(dict.fromkeys(task.mvtype for task in tasks))
        images = sorted({index for mvtype in mvtypes for index in self.pool.ids_of(mvtype)})
        jobs = [
            job
            for ratio in dict.fromkeys(t.ratio for t in tasks)
            for job in self._grid(ratio, tasks)
        ]
        levels = ",".join(str(level) for level in dict.fromkeys(task.level for task in tasks))
        n_crops = sum(len(images) for job in jobs if not job.is_empty)
        crops: dict[ScoreTask, dict[int, tuple[Scores, Scores]]] = defaultdict(dict)
        with Progress(n_crops, f"{'+'.join(mvtypes)} level {levels}", "crops") as bar:
            for job in self._complete(jobs, images, mvtypes, extract, bar):
                for task, scores in self._score_job(job).items():
                    crops[task][job.crop] = scores
                    if len(crops[task]) == job.n_crops:
                        done = crops.pop(task)
                        test, valid = zip(*(done[i] for i in range(job.n_crops)), strict=True)
                        yield task, np.stack(test), np.stack(valid)
                job.builders.clear()

    def _grid(self, ratio: float, tasks: list[ScoreTask]) -> list[CropJob]:
        """Return the crop positions of one ratio."""
        own = [task for task in tasks if task.ratio == ratio]
        side = crop_side(self.im_size, ratio)
        corners = crop_corners(self.im_size, ratio, self.settings.crop_num_edge)
        mvtypes = {task.mvtype for task in own}
        return [
            CropJob(
                own,
                crop,
                len(corners),
                corner,
                side,
                {mvtype for mvtype in mvtypes if self.pool.empty_in(mvtype, corner, side)},
            )
            for crop, corner in enumerate(corners)
        ]

    def _complete(
        self,
        jobs: list[CropJob],
        images: list[int],
        mvtypes: list[str],
        extract: Extract,
        bar: Progress,
    ) -> Iterator[CropJob]:
        """Run the crops of all jobs through `extract` in full batches; yield each filled job."""
        yield from (job for job in jobs if job.is_empty)
        groups = [self.groups[mvtype, split] for mvtype, split in self.groups if mvtype in mvtypes]
        batches = _batches(
            [job for job in jobs if not job.is_empty], images, self.settings.batch_size
        )
        for batch, crops in self._gathered(batches):
            elements = extract(crops.to(self.device, non_blocking=True))
            start = 0
            for job, ids in batch:
                for level, values in elements.items():
                    self._builder(job, level, groups).add(ids, values[start : start + len(ids)])
                start += len(ids)
                bar.update(len(ids))
                if ids[-1] == images[-1]:
                    yield job

    def _builder(self, job: CropJob, level: int, groups: list[RangeGroup]) -> DescriptorBuilder:
        """Return the builder of a level at a crop position, made on first use."""
        if level not in job.builders:
            keys = [(*draw, level, job.n_crops, job.crop) for draw in job.draws(level)]
            descriptor = self.settings.descriptors[level]
            job.builders[level] = DescriptorBuilder(groups, descriptor, keys, self.device)
        return job.builders[level]

    def _gathered(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches with their pixels (batch_size, 3, 224, 224), gathered ahead in threads."""
        if self.pool.resident is not None:
            yield from ((batch, self._gather(batch)) for batch in batches)
            return
        with ThreadPoolExecutor(max(1, self.settings.num_workers)) as threads:
            ahead = deque(
                (batch, threads.submit(self._gather, batch))
                for batch in islice(batches, BATCHES_AHEAD)
            )
            while ahead:
                batch, crops = ahead.popleft()
                yield batch, crops.result()
                self.pool.release()
                ahead.extend((b, threads.submit(self._gather, b)) for b in islice(batches, 1))

    def _gather(self, batch: Batch) -> Tensor:
        """Return the pixels of a batch; the last one is padded, so every batch is full."""
        parts = [
            self.pool.gather(ids, job.corner, nearest_source(job.side, INPUT_SIDE))
            for job, ids in batch
        ]
        n_padding = self.settings.batch_size - sum(len(part) for part in parts)
        if n_padding:
            parts.append(parts[0].new_zeros(n_padding, *parts[0].shape[1:]))
        crops = torch.cat(parts) if len(parts) > 1 else parts[0]
        return crops.pin_memory() if self.device.type == "cuda" and not crops.is_cuda else crops

    def _score_job(self, job: CropJob) -> dict[ScoreTask, tuple[Scores, Scores]]:
        """Return (test, valid) scores of one crop position for every task of its grid."""
        scores = {}
        fitted: dict[tuple[object, ...], tuple[Whitening, Tensor]] = {}
        for level, builder in job.builders.items():
            builder.check_finite(self.pool.names, level)
        for task in job.tasks:
            ids = {split: self.pool.ids[task.mvtype, split] for split in ("train", "valid", "test")}
            if task.mvtype in job.empty_for:
                scores[task] = np.zeros(len(ids["test"])), np.zeros(len(ids["valid"]))
                continue
            builder = job.builders[task.level]
            draw = job.draws(task.level).index((task.seed, task.rep))
            train = self.groups[task.mvtype, "train"]
            key = (task.level, draw, id(train), tuple(ids["train"]))  # loco and struct share it
            if key not in fitted:
                descriptors = builder.descriptors(draw, train, ids["train"])
                shrinkage = self.settings.descriptors[task.level].shrinkage
                whitening = fit_whitening(descriptors, shrinkage, squared=self.settings.official)
                fitted[key] = whitening, descriptors
            whitening, descriptors = fitted[key]
            test, valid = (
                nearest_distances(
                    whitening,
                    builder.descriptors(draw, self.groups[task.mvtype, split], ids[split]),
                    descriptors,
                )
                for split in ("test", "valid")
            )
            scores[task] = test, valid
        return scores


def _batches(jobs: list[CropJob], images: list[int], batch_size: int) -> Iterator[Batch]:
    """Cut the crops of all jobs, job by job, into batches that may span several jobs."""
    batch: Batch = []
    room = batch_size
    for job in jobs:
        start = 0
        while start < len(images):
            ids = images[start : start + room]
            batch.append((job, ids))
            start, room = start + len(ids), room - len(ids)
            if room == 0:
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch
