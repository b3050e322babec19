"""From matrices to the scores of every crop: one pass over the images for all that is asked.

The fast way to the numbers of `sinbad_utils.score_crop`. The crops of all images, position by
position, run through the network in full batches; every level, repetition and seed takes its
elements from the same forward pass, and the data sets of a class share the images they have in
common. Kept in memory: the descriptors of the crop positions in the batch at hand (n_images x
n_projections n_quantiles floats each), never features of images.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

import sinbad_utils
from sinbad import backbones, cli, errors, loco, matrices, score_plans

BATCHES_AHEAD = 2
# Projected values worked on at a time: what stays in a processor's cache; half a GB of a GPU.
VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}

Ranges = Sequence[tuple[Tensor, Tensor]]  # (low, high) of every draw
Extract = Callable[[Tensor], dict[int, Tensor]]
Batch = list[tuple["CropJob", list[int]]]  # crops of several positions: position, images


# ---------------------------------------------------------------- descriptors, batch by batch


@dataclass(frozen=True, eq=False)
class RangeGroup:
    """Images that are described with the same ranges, and the images these are fitted on."""

    fit_ids: tuple[int, ...]
    members: dict[int, int]  # image -> row among the descriptors


def range_groups(
    pool: matrices.ImagePool, mvtypes: list[str], official: bool
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
            fit_ids = tuple(
                (ids if official else pool.ids[mvtype, "train"])[: sinbad_utils.N_RANGE_SETS]
            )
            group = groups.setdefault(fit_ids, RangeGroup(fit_ids, {}))
            for index in ids:
                group.members.setdefault(index, len(group.members))
            assigned[mvtype, split] = group
    return assigned


def as_index(numbers: list[int]) -> slice | list[int]:
    """Return consecutive numbers as a slice: a GPU need not be waited for to index by it."""
    first = numbers[0] if numbers else 0
    consecutive = numbers == list(range(first, first + len(numbers)))
    return slice(first, first + len(numbers)) if consecutive else numbers


class DescriptorBuilder:
    """Describes the images of a range group at one level and crop position, batch by batch.

    Elements that come before their ranges can be fitted wait; no others are kept.

    Attributes
    ----------
    described : (n_draws, n_images, n_directions * n_bins), rows as the group's
    """

    def __init__(
        self, group: RangeGroup, directions: list[Tensor], n_bins: int, ranges: Ranges = ()
    ) -> None:
        self.group, self.directions, self.n_bins = group, directions, n_bins
        shape = len(directions), len(group.members), len(directions[0]) * n_bins
        self.described = torch.empty(shape, device=directions[0].device)
        self.waiting: list[tuple[list[int], Tensor]] = []
        self.ranges = ranges  # of each draw; fitted where none are given

    def add(self, ids: list[int], elements: Tensor) -> None:
        """Describe those of some images that belong to the group; (n, channels, n_elements)."""
        own = [i for i, index in enumerate(ids) if index in self.group.members]
        ids, elements = [ids[i] for i in own], elements[as_index(own)]
        if not self.ranges:
            self.waiting.append((ids, elements.clone()))
            ids = [index for part, _ in self.waiting for index in part]
            if not set(ids).issuperset(self.group.fit_ids):
                return
            elements = torch.cat([part for _, part in self.waiting])
            self.waiting.clear()
            first = elements[as_index([ids.index(index) for index in self.group.fit_ids])]
            self.ranges = [
                sinbad_utils.fit_ranges(sinbad_utils.project(own, first)) for own in self.directions
            ]
        step = self._step(len(self.directions[0]) * elements.shape[2])
        for start in range(0, len(ids), step):
            rows = self._rows(ids[start : start + step])
            for draw, directions in enumerate(self.directions):
                values = sinbad_utils.project(directions, elements[start : start + step])
                shares = sinbad_utils.cumulative_histogram(values, *self.ranges[draw], self.n_bins)
                self.described[draw, rows] = shares

    def _step(self, n_values: int) -> int:
        """Return how many images of `n_values` projected values are worked on at a time."""
        return max(1, VALUES_AT_ONCE[self.described.device.type] // n_values)

    def _rows(self, ids: list[int]) -> slice | list[int]:
        """Return the rows of images of the group."""
        return as_index([self.group.members[index] for index in ids])

    def descriptors(self, draw: int, ids: list[int]) -> Tensor:
        """Return the descriptors (n, n_directions * n_bins) of images of the group."""
        return self.described[draw, self._rows(ids)]


@dataclass(eq=False)
class CropJob:
    """One crop position of a grid: where it is, and the builders of every level that wants it.

    Attributes
    ----------
    tasks : the tasks of this grid
    crop, n_crops : number of the position, row by row, and how many the grid has
    corner, side : (y, x) and side in pixels
    is_empty : whether there is only padding in every image
    builders : level -> a builder for each range group
    finite : level -> whether the elements of each image so far are finite, batch by batch
    """

    tasks: list[score_plans.ScoreTask]
    crop: int
    n_crops: int
    corner: tuple[int, int]
    side: int
    is_empty: bool
    builders: dict[int, list[DescriptorBuilder]] = field(default_factory=dict)
    finite: dict[int, list[Tensor]] = field(default_factory=dict)

    def draws(self, level: int) -> list[tuple[int, int]]:
        """Return the draws of directions, (seed, rep), that a level wants."""
        return list(dict.fromkeys((t.seed, t.rep) for t in self.tasks if t.level == level))

    def check_finite(self, names: list[str]) -> None:
        """Stop if the network gave NaN or infinity for an image; `names` of all images."""
        for level, parts in self.finite.items():
            flags = torch.cat(parts).tolist()  # one wait for the GPU
            bad = [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
            if bad:
                raise errors.UserError(
                    f"features must be finite, got NaN or infinity for image {bad[0]} at level "
                    f"{level} ({len(bad)} images in all); check the weights and the --precision"
                )


# ---------------------------------------------------------------- the stream


class ClassScorer:
    """Scores the data sets of one class, each crop forwarded once for all tasks.

    Parameters
    ----------
    plan : ScorePlan
    data_sets : mvtype -> matrices, of one class
    extractor : the network; may be None if only the raw-pixel level is wanted
    device : torch.device
    known : (level, number of crops, crop) -> ranges, of training images seen before: nothing is
        fitted, and what is not there is padding
    """

    def __init__(
        self,
        plan: score_plans.ScorePlan,
        data_sets: dict[str, matrices.MatrixSet],
        extractor: backbones.FeatureExtractor | None,
        device: torch.device,
        known: Mapping[tuple[int, int, int], Ranges] | None = None,
    ) -> None:
        for mvtype, data_set in data_sets.items():
            n_train = len(data_set.images["train"])
            if n_train < 2 and known is None:
                raise errors.UserError(
                    f"train images must be at least 2, got {n_train} of {mvtype}; add some, and "
                    "make the matrices again"
                )
        self.plan, self.extractor, self.device, self.known = plan, extractor, device, known
        self.batch_size = plan.batch_size_on(device)
        self.im_size = next(iter(data_sets.values())).im_size
        self.pool = matrices.ImagePool(data_sets.values(), device)
        self.pool.move_to_device(plan.num_workers)
        self.groups = range_groups(self.pool, list(data_sets), plan.official)

    def score(
        self, tasks: list[score_plans.ScoreTask]
    ) -> Iterator[tuple[score_plans.ScoreTask, sinbad_utils.Scores, sinbad_utils.Scores]]:
        """Yield every task as soon as its last crop is scored.

        Yields
        ------
        task, (n_crops, n_test) and (n_crops, n_valid) scores, float64, higher = more anomalous
        """
        splits, n_done = ("test", "valid"), Counter[score_plans.ScoreTask]()
        scores: dict[score_plans.ScoreTask, list[sinbad_utils.Scores]] = {}
        for job in self.crop_jobs(tasks):
            fitted: dict[
                tuple[int, ...], sinbad_utils.WhitenedNeighbours
            ] = {}  # shared by a class' data sets
            for task in job.tasks:
                ids = {split: self.pool.ids[task.mvtype, split] for split in ("train", *splits)}
                shapes = [(job.n_crops, len(ids[split])) for split in splits]
                own = scores.setdefault(task, [np.zeros(shape) for shape in shapes])
                if not job.is_empty:
                    key = (task.level, task.seed, task.rep, *ids["train"])
                    if key not in fitted:
                        shrinkage = self.plan.descriptor(task.level).shrinkage
                        train = self.descriptors(job, task, "train")
                        fitted[key] = sinbad_utils.fit_whitening(
                            train, shrinkage, full_inverse=self.plan.official
                        )
                    for split, rows in zip(splits, own, strict=True):
                        described = self.descriptors(job, task, split)
                        rows[job.crop] = fitted[key].nearest(described)
                n_done[task] += 1
                if n_done[task] == job.n_crops:
                    yield task, *scores.pop(task)

    def crop_jobs(self, tasks: list[score_plans.ScoreTask]) -> Iterator[CropJob]:
        """Yield every crop position with all images described; it is emptied afterwards."""
        network = [task for task in tasks if task.level != loco.PIXEL_LEVEL]
        pixels = [task for task in tasks if task.level == loco.PIXEL_LEVEL]
        if network:
            assert self.extractor is not None
            yield from self._stream(network, self.extractor.extract)
        if pixels:
            yield from self._stream(
                pixels, lambda crops: {loco.PIXEL_LEVEL: backbones.pixel_elements(crops)}
            )

    def _stream(self, tasks: list[score_plans.ScoreTask], extract: Extract) -> Iterator[CropJob]:
        """Describe the crops of tasks whose elements come from the same `extract`."""
        mvtypes = list(dict.fromkeys(task.mvtype for task in tasks))
        images = sorted(
            {i for (name, _), ids in self.pool.ids.items() if name in mvtypes for i in ids}
        )
        names = [self.pool.names[index] for index in images]
        groups = [group for (name, _), group in self.groups.items() if name in mvtypes]
        ratios = dict.fromkeys(task.ratio for task in tasks)
        jobs = [job for ratio in ratios for job in self._grid(ratio, tasks)]
        yield from (job for job in jobs if job.is_empty)
        jobs = [job for job in jobs if not job.is_empty]
        levels = ",".join(dict.fromkeys(str(task.level) for task in tasks))
        with cli.progress_bar(
            len(images) * len(jobs), f"{'+'.join(mvtypes)} level {levels}", "crops"
        ) as bar:
            for batch, crops in self._gathered(full_batches(jobs, images, self.batch_size)):
                elements = extract(crops.to(self.device, non_blocking=True))
                start = 0
                for job, ids in batch:
                    for level, values in elements.items():
                        self._add(job, level, groups, ids, values[start : start + len(ids)])
                    start += len(ids)
                    bar.update(len(ids))
                    if ids[-1] == images[-1]:
                        job.check_finite(names)
                        yield job
                        job.builders.clear()

    def _grid(self, ratio: float, tasks: list[score_plans.ScoreTask]) -> list[CropJob]:
        """Return the crop positions of one ratio."""
        own = [task for task in tasks if task.ratio == ratio]
        side = loco.crop_side(self.im_size, ratio)
        corners = loco.crop_corners(self.im_size, ratio, self.plan.crop_num_edge)
        jobs = []
        for crop, corner in enumerate(corners):
            if self.known is None:
                is_empty = self.pool.is_empty(corner, side)
            else:
                is_empty = (own[0].level, len(corners), crop) not in self.known
            jobs.append(CropJob(own, crop, len(corners), corner, side, is_empty))
        return jobs

    def _add(
        self,
        job: CropJob,
        level: int,
        groups: list[RangeGroup],
        ids: list[int],
        elements: Tensor,
    ) -> None:
        """Describe images at a crop position; the level's builders are made on first use."""
        if level not in job.builders:
            own = self.plan.descriptor(level)
            shape = (own.n_projections, elements.shape[1])
            keys = [(*draw, level, job.n_crops, job.crop) for draw in job.draws(level)]
            directions = [
                sinbad_utils.random_directions(*shape, key).to(self.device) for key in keys
            ]
            ranges = (self.known or {}).get((level, job.n_crops, job.crop), ())
            job.builders[level] = [
                DescriptorBuilder(group, directions, own.n_quantiles, ranges)
                for group in dict.fromkeys(groups)
            ]
        # One NaN or infinity spoils the sum.
        job.finite.setdefault(level, []).append(torch.isfinite(elements.sum((1, 2))))
        for builder in job.builders[level]:
            builder.add(ids, elements)

    def _gathered(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches with their pixels (batch_size, 3, 224, 224), gathered ahead in threads."""
        with ThreadPoolExecutor(self.plan.num_workers) as threads:
            made = ((batch, threads.submit(self._gather, batch)) for batch in batches)
            ahead = deque(islice(made, BATCHES_AHEAD))
            while ahead:
                batch, crops = ahead.popleft()
                yield batch, crops.result()
                self.pool.release()
                ahead.extend(islice(made, 1))

    def _gather(self, batch: Batch) -> Tensor:
        """Return the pixels of a batch; the last one is padded, so every batch is full."""
        parts = [
            self.pool.gather(
                ids, job.corner, matrices.nearest_source(job.side, backbones.INPUT_SIDE)
            )
            for job, ids in batch
        ]
        n_padding = self.batch_size - sum(len(part) for part in parts)
        crops = torch.cat([*parts, parts[0].new_zeros(n_padding, *parts[0].shape[1:])])
        return crops.pin_memory() if self.device.type == "cuda" and not crops.is_cuda else crops

    def descriptors(self, job: CropJob, task: score_plans.ScoreTask, split: str) -> Tensor:
        """Return the descriptors of a split's images at one crop position."""
        group = self.groups[task.mvtype, split]
        builder = next(own for own in job.builders[task.level] if own.group is group)
        draw = job.draws(task.level).index((task.seed, task.rep))
        return builder.descriptors(draw, self.pool.ids[task.mvtype, split])


def full_batches(jobs: list[CropJob], images: list[int], batch_size: int) -> Iterator[Batch]:
    """Cut the crops of all jobs, job by job, into batches that may span several jobs."""
    crops = ((job, index) for job in jobs for index in images)
    while batch := list(islice(crops, batch_size)):
        by_job = groupby(batch, key=itemgetter(0))
        yield [(job, [index for _, index in own]) for job, own in by_job]
