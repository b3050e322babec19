"""Fitted models as a detector keeps and saves them: the descriptors as whole numbers.

A fraction is a count of elements over their number, so the counts give the descriptors back
exactly, in a quarter of the memory or half of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sinbad_utils
from sinbad import backbones, settings
from sinbad.scoring import CropPosition, Models
from sinbad_utils import BLOCK, CropModel, Histograms

Position = tuple[int, int, int]  # level, number of crops, crop


@dataclass(frozen=True)
class StoredModels:
    """The models of one level and crop position, of all repetitions, as they are saved.

    Attributes
    ----------
    ranges : (2, n_reps, n_projections), float32, low and high
    counts : (n_reps, n_train, n_projections * n_bins), elements below each threshold
    n_elements : of a set
    """

    ranges: NDArray[np.float32]
    counts: NDArray[Any]
    n_elements: int

    @classmethod
    def of(cls, models: Sequence[CropModel], n_elements: int) -> "StoredModels":
        """Keep fitted models; exact, since a fraction is a count over `n_elements`."""
        low = torch.stack([model.histograms.low for model in models])
        high = torch.stack([model.histograms.high for model in models])
        descriptors = torch.stack([model.train_descriptors for model in models])
        counts = (descriptors.double() * n_elements).round().cpu().numpy()
        dtype = np.uint8 if n_elements <= 255 else np.uint16
        return cls(torch.stack([low, high]).cpu().numpy(), counts.astype(dtype), n_elements)

    def fit(self, rep: int, directions: torch.Tensor, values: settings.Settings) -> CropModel:
        """Fit the model of one repetition again, on the device of its `directions`."""
        low, high = (torch.from_numpy(ends).to(directions.device) for ends in self.ranges[:, rep])
        descriptors = torch.cat(list(self._descriptors(rep, directions.device)))
        histograms = Histograms(directions, low, high, values.n_quantiles)
        return sinbad_utils.fit_crop_model(histograms, descriptors, values.shrinkage_factor)

    def shrink(self, model: CropModel) -> CropModel:
        """Return a model without what `restore` derives from the counts: most of its memory.

        On a GPU the centred descriptors stay: deriving them takes longer than scoring an image.
        """
        neighbours, empty = model.neighbours, model.train_descriptors.new_empty(0)
        if empty.device.type == "cpu":
            neighbours = replace(neighbours, centred=empty)
        return replace(model, train_descriptors=empty, neighbours=neighbours)

    def restore(self, model: CropModel, rep: int) -> CropModel:
        """Return the shrunk model of a repetition, ready to score."""
        if len(model.neighbours.centred):
            return model
        mean, n_train = model.neighbours.mean, model.neighbours.n_train
        shape = (-(-number // BLOCK) * BLOCK for number in (n_train, len(mean)))
        centred = mean.new_empty(*shape)
        centred[n_train:], centred[:, len(mean) :] = 0.0, 0.0
        blocks = self._descriptors(rep, mean.device)
        for rows, block in zip(centred.split(BLOCK), blocks, strict=True):
            rows[: len(block), : len(mean)].copy_(block).sub_(mean)  # faster than of two types
        return replace(model, neighbours=replace(model.neighbours, centred=centred))

    def _descriptors(self, rep: int, device: torch.device) -> Iterator[torch.Tensor]:
        """Yield the training descriptors (BLOCK images, n_projections * n_bins), float32."""
        low, high = torch.from_numpy(self.ranges[:, rep]).to(device)
        n_bins = self.counts.shape[2] // len(low)
        scale = ((high > low) / self.n_elements).repeat_interleave(n_bins)
        for counts in torch.from_numpy(self.counts[rep]).to(device).split(BLOCK):  # in the cache
            yield counts.float().mul_(scale)


def store(position: CropPosition, models: Models) -> dict[Position, StoredModels]:
    """Return the models of a crop position as they are saved, those of a level together."""
    stored = {}
    for level in dict.fromkeys(repetition.level for repetition in models):
        repetitions = [model for p, model in models.items() if p.level == level]
        side = backbones.INPUT_SIDE if level == settings.PIXEL_LEVEL else level
        key = level, len(position.grid), position.crop
        stored[key] = StoredModels.of(repetitions, n_elements=side**2)
    return stored
