"""SINBAD on one page: from the elements of images, at one crop position, to anomaly scores.

An image (or a time series) is a *set* of elements: positions of a feature map, pixels, time steps.
`score_crop` is the paper's algorithm; below it stand the functions it calls, then the ensemble.
Source: "Set Features for Fine-grained Anomaly Detection", arXiv 2302.12245 and 2311.14773.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

N_RANGE_SETS = 32  # training sets that the histogram ranges are fitted on
RANGE = 0.01, 0.99  # quantiles of the projected values
ENSEMBLE_SIDE = 4  # side of the map that the crop scores of a grid are resized to
SCORE_EPSILON = 1e-5  # added to the validation mean, and to the normalised score
# Projected values computed at a time: what stays in a processor's cache; half a GB of a GPU.
VALUES_PER_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}
MANY_CHANNELS = 64  # projected by oneDNN itself: conv1d chooses by the number of sets, mm is slow
FLAG_TYPE = {"cpu": torch.float32, "cuda": torch.float16}  # a GPU copies bools to int64 to sum
BLOCK, QUERY_BLOCK = 32, {"cpu": 8, "cuda": 1024}  # rows of one product: training, queries
NO_VARIANCE = 1e-24  # mean variance of descriptors that differ by rounding only

Scores = NDArray[np.float64]


def score_crop(
    train_elements: Tensor,
    elements: Tensor,
    seed_key: tuple[int, ...],
    n_directions: int,
    n_bins: int,
    shrinkage: float,
    official: bool = False,
) -> Scores:
    """Score images by one crop position at one level: the whole method.

    Parameters
    ----------
    train_elements, elements : (n_train, channels, n_elements), (n_images, channels, n_elements)
        Sets of the normal training images and of the images to score.
    seed_key : (seed, rep, level, n_crops, crop), see `random_directions`
    n_directions, n_bins : numbers of random directions, and of thresholds of each
    shrinkage : of the covariance, in (0, 1], see `fit_whitening`
    official : the authors' numerics: ranges of the images' own first 32, C^-1 for C^(-1/2)

    Returns
    -------
    (n_images,), float64, higher = more anomalous
    """
    directions = random_directions(n_directions, elements.shape[1], seed_key).to(elements.device)
    histograms = fit_histograms(directions, train_elements[:N_RANGE_SETS], n_bins)
    model = fit_crop_model(histograms, histograms.describe(train_elements), shrinkage, official)
    if official:
        histograms = fit_histograms(directions, elements[:N_RANGE_SETS], n_bins)
    return score_elements(model, elements, histograms).cpu().numpy()


# ---------------------------------------------------------------- set descriptors


def random_directions(n_directions: int, channels: int, seed_key: tuple[int, ...]) -> Tensor:
    """Sample random directions (n_directions, channels), standard normal, always on the CPU.

    Equal keys give equal numbers on every device, in any order and any split of the work.
    """
    k = int(np.random.SeedSequence(list(seed_key)).generate_state(1)[0])
    return torch.randn(n_directions, channels, generator=torch.Generator().manual_seed(k))


@dataclass(frozen=True)
class Histograms:
    """Cumulative histograms along random directions, which turn sets into descriptors."""

    directions: Tensor  # (n_directions, channels)
    low: Tensor  # (n_directions,), the range of each direction
    high: Tensor
    n_bins: int  # thresholds of each direction

    def describe(self, elements: Tensor) -> Tensor:
        """Describe sets (n_sets, channels, n_elements): (n_sets, n_directions * n_bins)."""
        n_values = len(self.directions) * elements.shape[2]  # of one set
        chunks = elements.split(max(1, VALUES_PER_CHUNK[elements.device.type] // n_values))
        ranges = self.low, self.high, self.n_bins
        projected = (project(self.directions, chunk) for chunk in chunks)
        return torch.cat([cumulative_histogram(values, *ranges) for values in projected])


def fit_histograms(directions: Tensor, elements: Tensor, n_bins: int) -> Histograms:
    """Fit the histogram ranges on (the first 32) sets (n_sets, channels, n_elements)."""
    return Histograms(directions, *fit_ranges(project(directions, elements)), n_bins)


def project(directions: Tensor, elements: Tensor) -> Tensor:
    """Project every element of every set on every direction: P f.

    Directions (n_directions, channels) and elements (n_sets, channels, n_elements) give float32,
    (n_sets, n_directions, n_elements). On a CPU a set's bytes do not depend on the other sets.
    """
    channels = elements.shape[1]
    if directions.shape[1] != channels:
        raise ValueError(f"directions must have {channels} channels, got {directions.shape[1]}")
    if elements.device.type != "cpu":
        return torch.matmul(directions, elements)
    if channels >= MANY_CHANNELS and torch.backends.mkldnn.is_available():
        images, kernels = elements[..., None], directions[..., None, None]
        return torch.mkldnn_convolution(images, kernels, None, [0, 0], [1, 1], [1, 1], 1).squeeze(3)
    shape = len(elements), len(directions), elements.shape[2]
    values = torch.from_numpy(np.empty(shape, np.float32))  # new memory by huge pages
    for set_elements, set_values in zip(elements, values, strict=True):
        torch.mm(directions, set_elements, out=set_values)
    return values


def fit_ranges(values: Tensor) -> Tensor:
    """Fit the range of every direction: 1 % and 99 % quantiles over the elements of all sets.

    `values` (n_sets, n_directions, n_elements) are of (the first 32) training sets. Returns low and
    high, (2, n_directions), float32, quantiles with linear interpolation.
    """
    if values.device.type != "cpu":
        pooled = values.transpose(0, 1).flatten(1)  # (directions, sets * elements)
        return torch.stack([_selected_quantile(pooled, fraction) for fraction in RANGE])
    parts = np.array_split(values.numpy(), 4 * torch.get_num_threads(), axis=1)  # some empty
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy releases the GIL
        quantiles = np.concatenate(list(threads.map(_sorted_quantiles, parts)), axis=1)
    return torch.from_numpy(quantiles).float()


def _sorted_quantiles(values: NDArray[np.float32]) -> Scores:
    """Return the range of every direction on a CPU; np.quantile's, which takes twice as long."""
    rows, quantiles = np.concatenate(values, axis=1), []  # a copy (directions, sets * elements)
    rows.sort()  # numpy sorts by SIMD; its np.partition does not, or is slow where many are equal
    for fraction in RANGE:
        position = fraction * (rows.shape[1] - 1)
        around = rows[:, [math.floor(position), math.ceil(position)]]
        quantiles.append(np.quantile(around, [position % 1.0], axis=1))
    return np.concatenate(quantiles)


def _selected_quantile(pooled: Tensor, fraction: float) -> Tensor:
    """Return a quantile of every row on a GPU, linear between the two values around it."""
    position = fraction * (pooled.shape[1] - 1)
    below, is_high = math.floor(position), fraction > 0.5
    n_outer = pooled.shape[1] - below if is_high else min(below + 2, pooled.shape[1])
    around = pooled.topk(n_outer, dim=1, largest=is_high).values[:, -2:]  # kthvalue is slower
    return torch.lerp(around.amin(1), around.amax(1), position - below)


def cumulative_histogram(values: Tensor, low: Tensor, high: Tensor, n_bins: int) -> Tensor:
    """Describe every set by the fraction of its elements below evenly spaced thresholds.

    Thresholds are low + (high - low) (q + 1) / (n_bins + 1), q = 0 .. n_bins - 1. The order of the
    elements is ignored on purpose. A direction whose range has no width gives zeros.

    Parameters
    ----------
    values : (n_sets, n_directions, n_elements), elements projected on the directions, no unit
    low, high : (n_directions,), range of each direction, from training sets only
    n_bins : number of thresholds

    Returns
    -------
    (n_sets, n_directions * n_bins), float32, in [0, 1]; the bins of one direction are neighbours
    """
    n_sets, n_directions, n_elements = values.shape
    if low.shape != (n_directions,) or high.shape != (n_directions,):
        raise ValueError(f"ranges must be of {n_directions} directions, got {tuple(low.shape)}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    fractions = torch.empty(n_sets, n_directions, n_bins, device=values.device)
    below = torch.empty_like(values, dtype=FLAG_TYPE[values.device.type])  # reused: 0. or 1.
    steps = torch.arange(1, n_bins + 1, device=values.device) / (n_bins + 1)
    for q, thresholds in enumerate(low + (high - low) * steps[:, None]):
        torch.lt(values, thresholds[:, None], out=below)
        fractions[:, :, q] = below.sum(2, dtype=torch.float32)
    fractions *= ((high > low) / n_elements)[:, None]
    return fractions.flatten(1)


# ---------------------------------------------------------------- whitening and distance


@dataclass(frozen=True)
class WhitenedNeighbours:
    """The inverse of a shrunk covariance, kept exact in the span of its training descriptors.

    With centred training descriptors Y (n, p), Gram matrix G = Y Y', mean variance
    m = trace(G) / (n p), shrinkage s and c = n s m / (1 - s), Woodbury's identity gives
    C^-1 = 1/(s m) (I - Y' A Y) with A = (c I + G)^-1 = L'^-1 L^-1, L the Cholesky factor. The
    squared matrix C^-2 (the authors' code) has A + c A A in place of A, 1/(s m)^2 in front.
    Nothing of size p x p is formed.
    """

    mean: Tensor  # (p,), float64
    centred: Tensor  # (n', p'), Y padded with zeros, see `_padded`
    projector: Tensor  # L^-1: maps Y (x - mean) to coordinates of what the training span explains
    train_norms: Tensor  # (n',), squared norms of the training descriptors, see `_squared_norms`
    ridge: float  # c
    scale: float  # 1/(s m), its square for C^-2; 1 where training descriptors do not vary at all
    n_train: int

    def squared_norms(self, queries: Tensor) -> Tensor:
        """Return (n_queries,) squared whitened distances to the training mean, float64."""
        centred = _padded(queries - self.mean)
        norms = _squared_norms(centred, centred @ self.centred.T @ self.projector.T)
        return self.scale * norms[: len(queries)].clamp(min=0.0)

    def nearest(self, queries: Tensor) -> Tensor:
        """Return (n_queries,) squared whitened distances to the nearest training descriptor."""
        centred, nearest = _padded(queries - self.mean, QUERY_BLOCK["cpu"]), []
        last = self.projector[-len(self.centred) :]  # I - A G = c A, its square for C^-2
        for block in centred.split(QUERY_BLOCK[queries.device.type]):  # on a CPU of one shape
            products = block @ self.centred.T  # (block, training descriptors)
            coords = products @ self.projector.T
            norms = _squared_norms(block, coords)[:, None] + self.train_norms
            inner = self.ridge * coords[:, -len(last) :] @ last if len(last) else products
            nearest.append((norms - 2.0 * inner)[:, : self.n_train].amin(1))
        return self.scale * torch.cat(nearest)[: len(queries)].clamp(min=0.0)


def _squared_norms(centred: Tensor, coords: Tensor) -> Tensor:
    """Return the squared norm of each row, less the part that the training span explains."""
    return centred.square().sum(1) - coords.square().sum(1)


def _padded(rows: Tensor, block: int = BLOCK) -> Tensor:
    """Pad rows with zeros to multiples of `block` by BLOCK: equal shapes give equal bytes."""
    return functional.pad(rows, (0, -rows.shape[1] % BLOCK, 0, -len(rows) % block))


def fit_whitening(
    train_descriptors: Tensor, shrinkage: float, full_inverse: bool = False
) -> WhitenedNeighbours:
    """Fit the shrunk covariance C = (1 - s) S + s trace(S)/p I, S the maximum-likelihood estimate.

    Exact in O(n^2 p) for n descriptors of length p; paper: section on the Mahalanobis distance.

    Parameters
    ----------
    train_descriptors : (n, p), at least 2
    shrinkage : s in (0, 1]; 1 is the Euclidean distance up to a constant
    full_inverse : whiten by C^-1 (what the authors' code does) instead of C^(-1/2)
    """
    n_train, length = train_descriptors.shape
    if n_train < 2:
        raise ValueError(f"train_descriptors must be at least 2, got {n_train}")
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must be above 0 and at most 1, got {shrinkage}")
    mean = train_descriptors.double().mean(0)
    centred = _padded(train_descriptors - mean)
    gram = centred @ centred.T
    mean_variance = float(gram.trace()) / (n_train * length)
    if mean_variance < NO_VARIANCE or shrinkage == 1.0:  # no covariance is left
        scale = 1.0 / mean_variance if mean_variance >= NO_VARIANCE else 1.0
        ridge, projector = math.inf, gram.new_empty(0, len(gram))  # a view would keep `gram`
    else:
        scale = 1.0 / (shrinkage * mean_variance)
        ridge = n_train * shrinkage * mean_variance / (1.0 - shrinkage)  # c
        identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        factor = torch.linalg.cholesky(gram + ridge * identity)
        projector = torch.linalg.solve_triangular(factor, identity, upper=False)
        if full_inverse:  # (I - Y'AY)^2 = I - Y'(2A - AGA)Y, and AG = I - cA
            projector = torch.cat([projector, math.sqrt(ridge) * projector.T @ projector])
    scale, norms = scale**2 if full_inverse else scale, _squared_norms(centred, gram @ projector.T)
    return WhitenedNeighbours(mean, centred, projector, norms, ridge, scale, n_train)


@dataclass(frozen=True)
class CropModel:
    """One crop position, fitted on its training images."""

    histograms: Histograms
    train_descriptors: Tensor  # (n_train, n_directions * n_bins)
    neighbours: WhitenedNeighbours  # the same, whitened


def fit_crop_model(
    histograms: Histograms, train_descriptors: Tensor, shrinkage: float, official: bool = False
) -> CropModel:
    """Fit a crop position on the descriptors of its training images, see `fit_whitening`."""
    neighbours = fit_whitening(train_descriptors, shrinkage, full_inverse=official)
    return CropModel(histograms, train_descriptors, neighbours)


def score_elements(
    model: CropModel, elements: Tensor, histograms: Histograms | None = None
) -> Tensor:
    """Score sets (n, channels, n_elements): squared whitened distance to the nearest training set.

    `histograms`, by default the model's, are those of the images' own ranges in the authors' code.
    """
    return model.neighbours.nearest((histograms or model.histograms).describe(elements))


# ---------------------------------------------------------------- ensemble


def pool_crops(crop_scores: Scores, pool: str = "mean") -> Scores:
    """Pool the crop scores of an image: as a g x g map, bicubic to 4 x 4, mean.

    `crop_scores` (g * g, n_images) are of one grid, row by row; `pool` "max" (ours) takes the
    highest crop score in place of the map's mean. Returns (n_images,), float64.
    """
    side = math.isqrt(len(crop_scores))
    if side * side != len(crop_scores):
        raise ValueError(f"crop_scores must be of a square grid, got {len(crop_scores)} crops")
    if pool == "max":
        return crop_scores.max(0)
    maps = torch.from_numpy(np.ascontiguousarray(crop_scores.T)).reshape(-1, 1, side, side)
    if side != ENSEMBLE_SIDE:
        maps = functional.interpolate(maps, 2 * [ENSEMBLE_SIDE], mode="bicubic")
    return maps.mean(dim=(1, 2, 3)).numpy()


def normalise_scores(scores: Scores, valid_scores: Scores) -> Scores:
    """Divide scores by the mean over validation images (+ 1e-5), add 1e-5; shapes (n,), (m,)."""
    return scores / (valid_scores.mean() + SCORE_EPSILON) + SCORE_EPSILON


def combine_grids(grids_test: list[Scores], grids_valid: list[Scores]) -> Scores:
    """Combine the grids of one level: each normalised by its validation images, then the mean.

    `grids_test` and `grids_valid` hold `pool_crops` of each grid. Returns (n_test,), about 1 for an
    image like the validation images.
    """
    pairs = zip(grids_test, grids_valid, strict=True)
    return np.mean([normalise_scores(test, valid) for test, valid in pairs], axis=0)


def ensemble_scores(
    network_levels: list[Scores], pixel_reps: list[Scores], lambda_factor: float
) -> Scores:
    """Combine levels: mean of the network's + lambda_factor * median of the raw-pixel repetitions.

    Both lists hold outputs of `combine_grids`; one may be empty, raw pixels alone are not weighted.
    Returns (n_test,), float64, higher = more anomalous.
    """
    if not pixel_reps:
        return np.mean(network_levels, axis=0)
    pixels = np.median(pixel_reps, axis=0)
    return np.mean(network_levels, axis=0) + lambda_factor * pixels if network_levels else pixels
