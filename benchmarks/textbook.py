"""The algorithm written plainly, as one would from the paper: what the benchmark compares with.

For each crop the network sees all crops of all images and one crop's features are kept; the p x p
covariance is formed and inverted; the directions, ranges and histograms are those of sinbad_utils.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sinbad.backbones import INPUT_SIDE, Backbone, FeatureExtractor, Weights
from sinbad.datasets import crop_corners, crop_side
from sinbad_utils import cumulative_histogram, fit_ranges, project, random_directions

LEVEL = 14


def textbook_scores(
    images: dict[str, Tensor],
    net: str,
    weights: Weights,
    ratio: float,
    n_projections: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Score the images of one data set at level 14 and one crop grid.

    Parameters
    ----------
    images : split -> (n, 3, im_size, im_size), uint8; "train", "valid" and "test"
    net, weights : backbone
    ratio : crop side as a share of im_size
    n_projections : directions; p is five times as many
    device

    Returns
    -------
    "valid", "test" -> (n_crops, n), float64, higher = more anomalous
    """
    extractor = FeatureExtractor(Backbone(net, weights, (LEVEL,)), device)
    im_size = images["train"].shape[2]
    side, corners = crop_side(im_size, ratio), crop_corners(im_size, ratio, 4)
    scores: dict[str, list[Tensor]] = {"valid": [], "test": []}
    for wanted in range(len(corners)):
        elements = {split: [] for split in images}
        for split, own in images.items():
            for image in own:
                crops = torch.stack([image[:, y : y + side, x : x + side] for y, x in corners])
                crops = functional.interpolate(crops.float(), size=INPUT_SIDE).byte()
                elements[split].append(extractor.extract(crops.to(device))[LEVEL][wanted])
        channels = elements["train"][0].shape[0]
        key = (0, 0, LEVEL, len(corners), wanted)
        directions = random_directions(n_projections, channels, key).to(device)
        values = {split: project(directions, torch.stack(own)) for split, own in elements.items()}
        low, high = fit_ranges(values["train"][:32])
        described = {
            split: cumulative_histogram(own, low, high, 5).double() for split, own in values.items()
        }
        for split, own in _distances(described, shrinkage=0.1).items():
            scores[split].append(own)
    return {split: torch.stack(own).cpu() for split, own in scores.items()}


def _distances(described: dict[str, Tensor], shrinkage: float) -> dict[str, Tensor]:
    """Return the squared Mahalanobis distances to the nearest training descriptor."""
    train = described["train"]
    covariance = torch.cov(train.T, correction=0)
    length = len(covariance)
    identity = torch.eye(length, dtype=torch.float64, device=train.device)
    covariance = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / length * identity
    inverse = torch.linalg.inv(covariance)
    nearest = {}
    for split in ("valid", "test"):
        rows = []
        for query in described[split]:
            deltas = train - query  # (n_train, p)
            rows.append(((deltas @ inverse) * deltas).sum(1).min())
        nearest[split] = torch.stack(rows)
    return nearest
