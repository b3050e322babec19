"""Crops of images in full batches: fit every crop position on training images, score the others.

The fast way to the numbers of `sinbad_utils.score_crop`. Position by position, the crops of all
images run through the network in full batches, and every level, seed and repetition takes its
elements from the same forward pass. The training images of a position come first; its models are
fitted on their descriptors; the other images are scored batch by batch as they come, and nothing of
theirs is kept but their scores. No files: arrays and settings in, arrays out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

import sinbad_utils
from sinbad import backbones, cli, crops, devices, errors, images, settings
from sinbad.devices import Result
from sinbad.image_pool import ImagePool
from sinbad_utils import CropModel, Histograms, Scores

Item = TypeVar("Item")
BATCHES_AHEAD = 2  # gathered, at least; one per thread while their pixels fit PIXELS_AHEAD bytes
PIXELS_AHEAD = 1 << 29
# Crops of one forward pass. A CPU is quicker when activations stay in its cache, and one crop is
# padded to a batch there; many small batches would keep a GPU waiting for the next one.
BATCH_SIZES = {"cpu": 8, "cuda": 256}

Elements = dict[int, Tensor]  # level -> (n_images, channels, n_elements)


class Repetition(NamedTuple):
    """One repetition of the random projections of a level, by a seed."""

    level: int
    seed: int
    rep: int


class GridTask(NamedTuple):
    """Scores to compute: of a crop grid, by one repetition of the random projections."""

    ratio: float
    repetition: Repetition


@dataclass(frozen=True)
class CropPosition:
    """A crop of a grid, and the repetitions that are scored there."""

    grid: crops.CropGrid
    crop: int
    corner: tuple[int, int]  # (y, x) in pixels
    repetitions: tuple[Repetition, ...]


Models = dict[Repetition, CropModel]
KnownModels = Callable[[CropPosition, Elements], Models]  # elements: of the first images


class PositionScores(NamedTuple):
    """What was fitted and scored at one crop position; scores are (n_images,) of each split."""

    position: CropPosition
    models: Models
    scores: dict[Repetition, list[Scores]]


Batch = list[tuple["Segment", list[int]]]  # crops of one forward pass

# ---------------------------------------------------------------- one crop position


def directions_at(
    position: CropPosition, repetition: Repetition, channels: int, values: settings.Settings
) -> Tensor:
    """Return the random directions (n_projections, channels) of a crop position."""
    n_projections = values.at_level(repetition.level).n_projections
    seed_key = repetition.seed, repetition.rep, repetition.level, len(position.grid), position.crop
    return sinbad_utils.random_directions(n_projections, channels, seed_key)


def fit_models(
    batches: Iterator[Elements],
    n_train: int,
    position: CropPosition,
    values: settings.Settings,
    in_parts: devices.Halving,
) -> Models:
    """Fit the models of a crop position on the elements of its training images, batch by batch."""
    first, batches = _with_first_sets(batches)
    histograms: dict[Repetition, Histograms] = {}
    descriptors: dict[Repetition, Tensor] = {}
    for repetition in position.repetitions:
        elements = first[repetition.level]
        directions = directions_at(position, repetition, elements.shape[1], values)
        directions = devices.to_device(directions, elements.device)
        histograms[repetition] = _fit_histograms(directions, elements, values.n_quantiles, in_parts)
        shape = n_train, len(directions) * values.n_quantiles
        descriptors[repetition] = torch.empty(shape, device=elements.device)
    start = 0
    for elements_by_level in batches:
        for repetition, histogram in histograms.items():
            elements = elements_by_level[repetition.level]
            rows = slice(start, start + len(elements))
            descriptors[repetition][rows] = torch.cat(in_parts(histogram.describe, elements))
        start = rows.stop
    return {
        repetition: sinbad_utils.fit_crop_model(
            histogram,
            descriptors[repetition],
            values.at_level(repetition.level).shrinkage_factor,
            values.official,
        )
        for repetition, histogram in histograms.items()
    }


def score_images(
    batches: Iterator[Elements],
    models: Models,
    n_images: int,
    official: bool,
    in_parts: devices.Halving,
) -> dict[Repetition, Scores]:
    """Score images by the models of a crop position, batch by batch; (n_images,) each.

    `official`: by the ranges of their own first 32 in place of the training images'.
    """
    histograms = {repetition: model.histograms for repetition, model in models.items()}
    if official:
        first, batches = _with_first_sets(batches)
        for repetition, fitted in histograms.items():
            histograms[repetition] = _fit_histograms(
                fitted.directions, first[repetition.level], fitted.n_bins, in_parts
            )
    scores: dict[Repetition, Tensor] = {}
    start = 0
    for elements_by_level in batches:
        for repetition, model in models.items():
            elements = elements_by_level[repetition.level]
            score = partial(sinbad_utils.score_elements, model, histograms=histograms[repetition])
            batch_scores = torch.cat(in_parts(score, elements))
            if repetition not in scores:  # on the device: a GPU is waited for once, at the end
                scores[repetition] = batch_scores.new_empty(n_images)
            rows = slice(start, start + len(elements))
            scores[repetition][rows] = batch_scores
        start = rows.stop
    stacked = torch.stack(list(scores.values())).cpu().numpy()
    return dict(zip(scores, stacked, strict=True))


def _fit_histograms(
    directions: Tensor, elements: Tensor, n_bins: int, in_parts: devices.Halving
) -> Histograms:
    """Fit the histogram ranges on the first 32 sets, of as many directions as fit the memory."""
    fit = partial(
        sinbad_utils.fit_histograms, elements=elements[: sinbad_utils.N_RANGE_SETS], n_bins=n_bins
    )
    parts = in_parts(fit, directions, "direction")
    low, high = (torch.cat([getattr(part, end) for part in parts]) for end in ("low", "high"))
    return Histograms(directions, low, high, n_bins)


def _with_first_sets(batches: Iterator[Elements]) -> tuple[Elements, Iterator[Elements]]:
    """Merge the first batches until ranges can be fitted on them; return them, and all batches."""
    parts, n_images = [], 0
    while n_images < sinbad_utils.N_RANGE_SETS and (part := next(batches, None)):
        parts.append(part)
        n_images += len(next(iter(part.values())))
    first = {level: torch.cat([part[level] for part in parts]) for level in parts[0]}
    return first, chain([first], batches)


# ---------------------------------------------------------------- all crop positions


@dataclass(frozen=True, eq=False)
class Segment:
    """Images that go through the network one after the other at one crop position."""

    position: CropPosition
    image_ids: tuple[int, ...]


@dataclass(frozen=True)
class RangeGroup:
    """Splits that are scored with the same histogram ranges, and their images, each once."""

    splits: list[int]  # their numbers
    image_ids: tuple[int, ...]

    def by_split(self, scores: Scores, splits: Sequence[Sequence[int]]) -> dict[int, Scores]:
        """Return the scores of each split's images from those (n_images,) of the group's."""
        place = {index: i for i, index in enumerate(self.image_ids)}
        return {split: scores[[place[index] for index in splits[split]]] for split in self.splits}


def range_groups(splits: Sequence[Sequence[int]], official: bool) -> list[RangeGroup]:
    """Group the splits: all of them, or with `official` those with the same first 32 images."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image_ids in enumerate(splits):
        fit_ids = tuple(image_ids[: sinbad_utils.N_RANGE_SETS]) if official else ()
        groups.setdefault(fit_ids, []).append(number)
    result = []
    for fit_ids, numbers in groups.items():  # the first 32 as they come, equal ones too
        others = dict.fromkeys(chain(*(splits[number] for number in numbers)))
        image_ids = (*fit_ids, *(index for index in others if index not in fit_ids))
        result.append(RangeGroup(numbers, image_ids))
    return result


class CropScorer:
    """Runs the crops of images through the network in full batches, fits and scores them.

    Parameters
    ----------
    pool : the images
    values : what is computed, and how
    extractor : the network; None if only raw pixels are wanted
    title : of the progress bar
    """

    def __init__(
        self,
        pool: ImagePool,
        values: settings.Settings,
        extractor: backbones.FeatureExtractor | None,
        title: str = "images",
    ) -> None:
        self.pool, self.values, self.extractor, self.title = pool, values, extractor, title
        self.batch_size = batch_size_on(pool.device, values)
        self.in_parts = devices.Halving()  # the steps after the network

    def score_grids(
        self, tasks: Sequence[GridTask], train_ids: Sequence[int], splits: Sequence[Sequence[int]]
    ) -> Iterator[tuple[GridTask, list[Scores]]]:
        """Yield every task as soon as its last crop is scored.

        Yields
        ------
        task, scores (n_crops, n_images) of each of `splits`, float64, higher = more anomalous
        """
        arrays: dict[GridTask, list[Scores]] = {}
        for position, _, scores in self.score_positions(tasks, train_ids, splits):
            n_crops = len(position.grid)
            for repetition, split_scores in scores.items():
                task = GridTask(position.grid.ratio, repetition)
                if task not in arrays:
                    arrays[task] = [np.zeros((n_crops, len(ids))) for ids in splits]
                for array, crop_scores in zip(arrays[task], split_scores, strict=True):
                    array[position.crop] = crop_scores
                if position.crop == n_crops - 1:
                    yield task, arrays.pop(task)

    def score_positions(
        self,
        tasks: Sequence[GridTask],
        train_ids: Sequence[int],
        splits: Sequence[Sequence[int]],
        known_models: KnownModels | None = None,
    ) -> Iterator[PositionScores]:
        """Yield the fitted models of every crop position, and the scores of splits of the images.

        A position in the padding of all images has no models, and scores 0.

        Parameters
        ----------
        tasks : what is computed
        train_ids : images that the models are fitted on, unless `known_models` returns them
        splits : images to score; those that several splits share are scored once

        Raises
        ------
        UserError
            If there are fewer than 2 training images, or features are NaN or infinite.
        """
        if not known_models and len(train_ids) < 2:
            raise errors.UserError(
                f"training images must be at least 2, got {len(train_ids)}; add some"
            )
        pixels = [task for task in tasks if task.repetition.level == settings.PIXEL_LEVEL]
        network = [task for task in tasks if task.repetition.level != settings.PIXEL_LEVEL]
        if network:
            positions = self._positions(network)
            yield from self._run(positions, self._features, train_ids, splits, known_models)
        if pixels:
            positions = self._positions(pixels)
            yield from self._run(positions, _pixel_elements, train_ids, splits, known_models)

    def _positions(self, tasks: Sequence[GridTask]) -> list[CropPosition]:
        """Return the crop positions of all grids of some tasks."""
        positions = []
        for ratio in dict.fromkeys(task.ratio for task in tasks):
            grid = self.values.grid(ratio)
            repetitions = tuple(task.repetition for task in tasks if task.ratio == ratio)
            corners = enumerate(grid.corners)
            positions += [CropPosition(grid, i, corner, repetitions) for i, corner in corners]
        return positions

    def _run(
        self,
        positions: list[CropPosition],
        extract: Callable[[Tensor], Elements],
        train_ids: Sequence[int],
        splits: Sequence[Sequence[int]],
        known_models: KnownModels | None,
    ) -> Iterator[PositionScores]:
        """Fit and score positions whose elements come from the same `extract`."""
        groups = range_groups(splits, self.values.official)
        image_ids = [group.image_ids for group in groups]
        if not known_models:
            image_ids.insert(0, tuple(train_ids))
        inside = [p for p in positions if not self.pool.is_padding(p.corner)]
        segments = self._by_segment([Segment(p, ids) for p in inside for ids in image_ids], extract)
        for position in positions:
            if self.pool.is_padding(position.corner):
                zeros = [np.zeros(len(ids)) for ids in splits]
                yield PositionScores(position, {}, dict.fromkeys(position.repetitions, zeros))
                continue
            models: Models = {}
            if not known_models:
                batches, n_images = next(segments), len(train_ids)
                models = fit_models(batches, n_images, position, self.values, self.in_parts)
            by_split: dict[Repetition, dict[int, Scores]] = {p: {} for p in position.repetitions}
            for group in groups:
                batches, n_images = next(segments), len(group.image_ids)
                if known_models:
                    first = next(batches)
                    models, batches = known_models(position, first), chain([first], batches)
                scored = score_images(
                    batches, models, n_images, self.values.official, self.in_parts
                )
                for repetition, scores in scored.items():
                    by_split[repetition] |= group.by_split(scores, splits)
            ordered = {
                repetition: [scores[number] for number in range(len(splits))]
                for repetition, scores in by_split.items()
            }
            yield PositionScores(position, models, ordered)

    def _by_segment(
        self, segments: list[Segment], extract: Callable[[Tensor], Elements]
    ) -> Iterator[Iterator[Elements]]:
        """Yield, segment by segment, the batches of elements of its images."""
        by_segment = groupby(self._forward(segments, extract), key=itemgetter(0))
        for segment, parts in by_segment:
            yield self._finite(segment, (elements for _, elements in parts))

    def _forward(
        self, segments: list[Segment], extract: Callable[[Tensor], Elements]
    ) -> Iterator[tuple[Segment, Elements]]:
        """Yield the elements of all segments' images, each batch's in parts of one segment."""
        total = sum(len(segment.image_ids) for segment in segments)
        with cli.progress_bar(total, self.title, "crops") as bar:
            for batch, pixels in self._gathered(full_batches(segments, self.batch_size)):
                elements = extract(pixels.to(self.pool.device, non_blocking=True))
                start = 0
                for segment, ids in batch:
                    rows = slice(start, start + len(ids))
                    yield segment, {level: values[rows] for level, values in elements.items()}
                    start = rows.stop
                    bar.update(len(ids))

    def _finite(self, segment: Segment, batches: Iterator[Elements]) -> Iterator[Elements]:
        """Yield batches; stop after the last one if the network gave NaN or infinity."""
        flags: dict[int, Tensor] = {}
        start = 0
        for elements in batches:
            for level, values in elements.items():
                if level not in flags:
                    shape = len(segment.image_ids)
                    flags[level] = torch.empty(shape, dtype=torch.bool, device=values.device)
                # One NaN or infinity spoils the sum.
                flags[level][start : start + len(values)] = torch.isfinite(values.sum((1, 2)))
            start += len(values)
            yield elements
        if torch.stack(list(flags.values())).all():  # a GPU is waited for once
            return
        for level, finite in flags.items():
            if not finite.all():
                bad = [
                    i for i, ok in zip(segment.image_ids, finite.tolist(), strict=True) if not ok
                ]
                raise errors.UserError(
                    f"features must be finite, got NaN or infinity for image "
                    f"{self.pool.names[bad[0]]} at level {level} ({len(bad)} of {len(finite)} "
                    "images); check the weights and the --precision"
                )

    def _gathered(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches with their pixels (n_crops, 3, 224, 224), gathered ahead in threads."""
        n_ahead, n_threads = self._batches_ahead(), self.values.n_workers
        for batch, pixels in map_ahead(self._gather, batches, n_ahead, n_threads):
            yield batch, pixels
            self.pool.drop_page_cache()

    def _batches_ahead(self) -> int:
        """Return how many batches are gathered at once."""
        if self.pool.resident is not None:
            return BATCHES_AHEAD
        n_fitting = PIXELS_AHEAD // (3 * backbones.INPUT_SIDE**2 * self.batch_size)
        return max(BATCHES_AHEAD, min(self.values.n_workers, n_fitting))

    def _features(self, pixels: Tensor) -> Elements:
        """Run the network over a batch; the last one is padded, so every batch is full."""
        padding = pixels.new_zeros(self.batch_size - len(pixels), *pixels.shape[1:])
        return self.extractor.extract(torch.cat([pixels, padding]) if len(padding) else pixels)

    def _gather(self, batch: Batch) -> Tensor:
        """Return the pixels of a batch."""
        positions = [(ids, segment.position) for segment, ids in batch]
        pixels = self.pool.gather(
            [
                (ids, at.corner, images.nearest_source(at.grid.side, backbones.INPUT_SIDE))
                for ids, at in positions
            ]
        )
        return devices.pin(pixels, self.pool.device)


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], n_ahead: int, n_threads: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result; `n_ahead` are held at a time, computed in threads."""
    with ThreadPoolExecutor(n_threads) as threads:
        submitted = ((item, threads.submit(function, item)) for item in items)
        ahead = deque(islice(submitted, n_ahead))
        while ahead:
            yield ahead[0][0], ahead[0][1].result()
            ahead.popleft()  # and with it the result
            ahead.extend(islice(submitted, 1))


def full_batches(segments: Iterable[Segment], batch_size: int) -> Iterator[Batch]:
    """Cut the crops of all segments into batches that may span several of them."""
    pairs = ((segment, index) for segment in segments for index in segment.image_ids)
    while batch := list(islice(pairs, batch_size)):
        by_segment = groupby(batch, key=itemgetter(0))
        yield [(segment, [index for _, index in group]) for segment, group in by_segment]


def _pixel_elements(pixels: Tensor) -> Elements:
    """Return raw pixels as the elements of their level."""
    return {settings.PIXEL_LEVEL: backbones.pixel_elements(pixels)}


def batch_size_on(device: torch.device, values: settings.Settings) -> int:
    """Return the crops of one forward pass."""
    return values.batch_size or BATCH_SIZES[device.type]
