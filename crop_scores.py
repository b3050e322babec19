"""From matrices to the scores of every crop: one pass over the images for all that is asked.

The crops of all images, position by position, run through the network in full batches; every
level, repetition and seed takes its elements from the same forward pass, and the data sets of a
class share the images they have in common. Kept in memory: the descriptors of the crop positions
in the batch at hand (n_images x n_projections n_quantiles floats each), never features of images.
"""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones import INPUT_SIDE, FeatureExtractor, normalise_pixels
from command_line import Progress, UserError
from loco_datasets import PIXEL_LEVEL, crop_corners, crop_side
from matrix_files import MatrixSet, crop_is_empty, crop_pixels, nearest_source
from sinbad_utils import (
    FIT_SETS,
    Scores,
    Whitening,
    cumulative_histogram,
    fit_ranges,
    fit_whitening,
    nearest_distances,
    project,
    random_directions,
)

VALUES_AT_ONCE = 1 << 20  # projected values that stay in a processor's cache
BATCHES_AHEAD = 2

Extract = Callable[[Tensor], dict[int, Tensor]]
Draw = tuple[int, int]  # (seed, rep): one draw of random directions
Batch = list[tuple["CropJob", list[int]]]  # crops of several positions: position, images


@dataclass(frozen=True)
class Descriptor:
    """How a level is described and scored."""

    n_projections: int
    n_quantiles: int
    shrinkage: float


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


class ImagePool:
    """The images of a class' data sets, each once, in the order train, valid, test.

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
        known: dict[tuple[str, str], int] = {}
        for data_set in data_sets:
            made = json.dumps(data_set.settings, sort_keys=True)
            for split, images in data_set.images.items():
                ids = []
                for row, path in enumerate(data_set.paths[split]):
                    index = known.setdefault((path, made), len(self.sources))
                    if index == len(self.sources):
                        self.sources.append((images, row))
                        self.names.append(path)
                    ids.append(index)
                self.ids[data_set.mvtype, split] = ids

    def __len__(self) -> int:
        return len(self.sources)

    def ids_of(self, mvtype: str) -> list[int]:
        """Return the images of a data set, all splits."""
        return [i for (name, _), ids in self.ids.items() if name == mvtype for i in ids]

    def empty_in(self, mvtype: str, corner: tuple[int, int], side: int) -> bool:
        """Tell whether a crop is padding only in every image of a data set."""
        sources = (self.sources[i] for i in self.ids_of(mvtype))
        return all(crop_is_empty(images[row], corner, side) for images, row in sources)

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


@dataclass(frozen=True)
class RangeGroup:
    """Images that are described with the same ranges, and the images these are fitted on."""

    fit_ids: tuple[int, ...]
    members: dict[int, int]  # image -> row among the descriptors


def range_groups(
    pool: ImagePool, mvtypes: list[str], official: bool
) -> dict[tuple[str, str], RangeGroup]:
    """Assign a range group to every (mvtype, split).

    Ranges are fitted on the first 32 training images; with `official` on the first 32 of each
    split, test included, as the authors' code does.
    """
    groups: dict[tuple[int, ...], RangeGroup] = {}
    assigned = {}
    for mvtype in mvtypes:
        for split in ("train", "valid", "test"):
            ids = pool.ids[mvtype, split]
            fit_ids = tuple((ids if official else pool.ids[mvtype, "train"])[:FIT_SETS])
            group = groups.setdefault(fit_ids, RangeGroup(fit_ids, {}))
            for index in ids:
                group.members.setdefault(index, len(group.members))
            assigned[mvtype, split] = group
    return assigned


class DescriptorBuilder:
    """Describes the elements of one level at one crop position, batch by batch.

    Elements that come before their ranges can be fitted wait; no others are kept.
    """

    def __init__(
        self,
        groups: Iterable[RangeGroup],
        descriptor: Descriptor,
        keys: list[tuple[int, ...]],
        device: torch.device,
    ) -> None:
        self.groups = list({id(group): group for group in groups}.values())
        self.descriptor, self.keys, self.device = descriptor, keys, device
        length = descriptor.n_projections * descriptor.n_quantiles
        self.described = [
            torch.empty(len(keys), len(group.members), length, device=device)
            for group in self.groups
        ]
        self.waiting: list[dict[int, Tensor]] = [{} for _ in self.groups]
        self.ranges: list[list[tuple[Tensor, Tensor]] | None] = [None for _ in self.groups]
        self.directions: list[Tensor] = []
        self.not_finite: dict[int, Tensor] = {}

    def add(self, ids: list[int], elements: Tensor) -> None:
        """Describe some images: elements (n, channels, n_elements)."""
        if not self.directions:
            shape = (self.descriptor.n_projections, elements.shape[1])
            self.directions = [random_directions(*shape, key).to(self.device) for key in self.keys]
        finite = torch.isfinite(elements).flatten(1).all(1)
        self.not_finite.update(zip(ids, ~finite, strict=True))
        for number, group in enumerate(self.groups):
            rows = [i for i, index in enumerate(ids) if index in group.members]
            if not rows:
                continue
            members = [ids[i] for i in rows]
            own = elements if len(rows) == len(ids) else elements[rows]
            if self.ranges[number] is None:
                waiting = self.waiting[number]
                waiting.update(zip(members, own.clone(), strict=True))
                if any(index not in waiting for index in group.fit_ids):
                    continue
                self._fit(number)
                members, own = list(waiting), torch.stack(list(waiting.values()))
                waiting.clear()
            self._describe(number, members, own)

    def _fit(self, number: int) -> None:
        """Fit the ranges of a group on its first images."""
        first = torch.stack([self.waiting[number][i] for i in self.groups[number].fit_ids])
        self.ranges[number] = [fit_ranges(project(p, first)) for p in self.directions]

    def _describe(self, number: int, ids: list[int], elements: Tensor) -> None:
        """Write the descriptors of images into the rows of their group."""
        places = [self.groups[number].members[index] for index in ids]
        n_values = self.descriptor.n_projections * elements.shape[2]
        step = len(ids) if self.device.type != "cpu" else max(1, VALUES_AT_ONCE // n_values)
        for start in range(0, len(ids), step):
            some, rows = elements[start : start + step], places[start : start + step]
            for draw, directions in enumerate(self.directions):
                values = project(directions, some)
                low, high = self.ranges[number][draw]  # type: ignore[index]
                self.described[number][draw, rows] = cumulative_histogram(
                    values, low, high, self.descriptor.n_quantiles
                )

    def descriptors(self, draw: int, group: RangeGroup, ids: list[int]) -> Tensor:
        """Return the descriptors (n, n_projections * n_quantiles) of images of a group."""
        number = next(i for i, own in enumerate(self.groups) if own is group)
        return self.described[number][draw, [group.members[index] for index in ids]]

    def check_finite(self, names: list[str], level: int) -> None:
        """Stop if the network gave NaN or infinity for an image."""
        bad = [index for index, flag in self.not_finite.items() if bool(flag)]
        if bad:
            raise UserError(
                f"features must be finite, got NaN or infinity for image {names[bad[0]]} at level "
                f"{level} ({len(bad)} images in all); check the weights and the --precision"
            )


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
                raise UserError(f"train images must be at least 2, got {n_train} of {mvtype}")
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
