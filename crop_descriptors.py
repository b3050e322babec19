"""Descriptors of one level at one crop position, built while the images stream by.

The formulas stand in `sinbad_utils`; here is the bookkeeping: which images share their ranges, and
which row of which descriptor matrix belongs to which image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from command_line import UserError
from image_pools import ImagePool
from sinbad_utils import FIT_SETS, cumulative_histogram, fit_ranges, project, random_directions

# Projected values worked on at a time: what stays in a processor's cache; half a GB of a GPU.
VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}


@dataclass(frozen=True)
class Descriptor:
    """How a level is described and scored."""

    n_projections: int
    n_quantiles: int
    shrinkage: float


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
        self.finite: list[tuple[list[int], Tensor]] = []  # images, whether each is

    def add(self, ids: list[int], elements: Tensor) -> None:
        """Describe some images: elements (n, channels, n_elements)."""
        if not self.directions:
            shape = (self.descriptor.n_projections, elements.shape[1])
            self.directions = [random_directions(*shape, key).to(self.device) for key in self.keys]
        # One NaN or infinity spoils the sum.
        self.finite.append((ids, torch.isfinite(elements.sum((1, 2)))))
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
                members = [index for index in waiting if index not in group.fit_ids]
                own = torch.stack([waiting[index] for index in members]) if members else own[:0]
                waiting.clear()
            self._describe(number, members, own)

    def _fit(self, number: int) -> None:
        """Fit the ranges of a group on its first images, and describe these."""
        ids = list(self.groups[number].fit_ids)
        first = torch.stack([self.waiting[number][index] for index in ids])
        self.ranges[number] = ranges = []
        for draw, directions in enumerate(self.directions):
            values = project(directions, first)
            ranges.append(fit_ranges(values))
            step = self._step(values[0].numel())
            for part in range(0, len(ids), step):
                self._write(number, draw, ids[part : part + step], values[part : part + step])

    def _describe(self, number: int, ids: list[int], elements: Tensor) -> None:
        """Describe images of a group whose ranges are fitted."""
        step = self._step(self.descriptor.n_projections * elements.shape[2])
        for start in range(0, len(ids), step):
            for draw, directions in enumerate(self.directions):
                values = project(directions, elements[start : start + step])
                self._write(number, draw, ids[start : start + step], values)

    def _step(self, n_values: int) -> int:
        """Return how many images of `n_values` projected values are worked on at a time."""
        return max(1, VALUES_AT_ONCE[self.device.type] // n_values)

    def _write(self, number: int, draw: int, ids: list[int], values: Tensor) -> None:
        """Write the descriptors of projected images into the rows of their group."""
        rows = [self.groups[number].members[index] for index in ids]
        low, high = self.ranges[number][draw]  # type: ignore[index]
        n_bins = self.descriptor.n_quantiles
        self.described[number][draw, rows] = cumulative_histogram(values, low, high, n_bins)

    def descriptors(self, draw: int, group: RangeGroup, ids: list[int]) -> Tensor:
        """Return the descriptors (n, n_projections * n_quantiles) of images of a group."""
        number = next(i for i, own in enumerate(self.groups) if own is group)
        return self.described[number][draw, [group.members[index] for index in ids]]

    def check_finite(self, names: list[str], level: int) -> None:
        """Stop if the network gave NaN or infinity for an image."""
        ids = [index for own, _ in self.finite for index in own]
        flags = torch.cat([flags for _, flags in self.finite]).tolist()  # one wait for the GPU
        bad = [index for index, is_finite in zip(ids, flags, strict=True) if not is_finite]
        if bad:
            raise UserError(
                f"features must be finite, got NaN or infinity for image {names[bad[0]]} at level "
                f"{level} ({len(bad)} images in all); check the weights and the --precision"
            )
