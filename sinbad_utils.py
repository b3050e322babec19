"""SINBAD on one page: from the elements of images, at one crop position, to anomaly scores.

An image (or a time series) is a *set* of elements: places of a feature map, pixels, time steps.
`score_crop` is the paper's algorithm; below it stand the functions that it calls, in the order it
calls them, then how the scores of crops, grids, levels and repetitions are joined.

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

FIT_SETS = 32  # training sets that the ranges are fitted on
LOW_QUANTILE, HIGH_QUANTILE = 0.01, 0.99
ENSEMBLE_SIDE = 4  # side of the map that the crop scores of a grid are resized to
SCORE_EPSILON = 1e-5  # added to the validation mean, and to the normalised score
MANY_CHANNELS = 64  # from here on oneDNN's product (a convolution) is the faster one on a CPU
BLOCK = 32  # rows of one product of descriptors
NO_VARIANCE = 1e-24  # mean variance of descriptors that differ by rounding only

Scores = NDArray[np.float64]


def score_crop(
    train_elements: Tensor,
    elements: Tensor,
    key: tuple[int, ...],
    n_directions: int,
    n_bins: int,
    shrinkage: float,
    official: bool = False,
) -> Scores:
    """Score images by one crop position at one level: the whole method.

    Parameters
    ----------
    train_elements, elements : (n_train, channels, n_elements), (n_images, channels, n_elements)
        Sets of the normal training images and of the images in question.
    key : tuple of int
        (seed, rep, level, n_crops, crop), see `random_directions`.
    n_directions, n_bins : random directions, and thresholds of each
    shrinkage : of the covariance, in (0, 1]
    official : the authors' code: ranges of the images' own first 32, C^-1 in place of C^(-1/2)

    Returns
    -------
    (n_images,), float64, higher = more anomalous
    """
    directions = random_directions(n_directions, elements.shape[1], key).to(elements.device)
    train_values, values = project(directions, train_elements), project(directions, elements)
    train_range = fit_ranges(train_values[:FIT_SETS])
    own_range = fit_ranges(values[:FIT_SETS]) if official else train_range
    train_descriptors = cumulative_histogram(train_values, *train_range, n_bins)
    descriptors = cumulative_histogram(values, *own_range, n_bins)
    whitening = fit_whitening(train_descriptors, shrinkage, squared=official)
    return nearest_distances(whitening, descriptors)


# ---------------------------------------------------------------- set descriptors


def random_directions(n_directions: int, channels: int, key: tuple[int, ...]) -> Tensor:
    """Draw random directions (n_directions, channels), standard normal, always on the CPU.

    `key` tells what they belong to: equal keys give equal numbers on every device, in any order and
    any split of the work.
    """
    k = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
    return torch.randn(n_directions, channels, generator=torch.Generator().manual_seed(k))


def project(directions: Tensor, elements: Tensor) -> Tensor:
    """Project every element of every set on every direction: P f.

    On a CPU one by one: the bytes of a set's values do not depend on how many sets come along.

    Parameters
    ----------
    directions : (n_directions, channels)
    elements : (n_sets, channels, n_elements)

    Returns
    -------
    (n_sets, n_directions, n_elements), float32
    """
    if directions.shape[1] != elements.shape[1]:
        raise ValueError(
            f"directions must have {elements.shape[1]} channels as the elements, "
            f"got {directions.shape[1]}"
        )
    if elements.device.type != "cpu":
        return torch.matmul(directions, elements)
    values = torch.empty(len(elements), len(directions), elements.shape[2])
    many = elements.shape[1] >= MANY_CHANNELS
    for one_set, out in zip(elements, values, strict=True):
        if many:
            out.copy_(functional.conv1d(one_set[None], directions[:, :, None])[0])
        else:
            torch.mm(directions, one_set, out=out)
    return values


def fit_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the range of every direction: 1 % and 99 % quantiles over the elements of all sets.

    Parameters
    ----------
    values : (n_sets, n_directions, n_elements), of (the first 32) training sets

    Returns
    -------
    low, high : (n_directions,), float32, quantiles with linear interpolation
    """
    pooled = values.transpose(0, 1).flatten(1)  # (directions, sets * elements)
    if pooled.device.type != "cpu":
        return _selected_quantile(pooled, LOW_QUANTILE), _selected_quantile(pooled, HIGH_QUANTILE)
    parts = np.array_split(pooled.numpy(), min(len(pooled), 4 * torch.get_num_threads()))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy lets go of the GIL
        found = threads.map(lambda p: np.quantile(p, [LOW_QUANTILE, HIGH_QUANTILE], axis=1), parts)
        low, high = torch.from_numpy(np.concatenate(list(found), axis=1)).float()
    return low, high


def _selected_quantile(pooled: Tensor, share: float) -> Tensor:
    """Return a quantile of every row on a GPU, linear between the two values around it."""
    position = share * (pooled.shape[1] - 1)
    below, is_high = math.floor(position), share > 0.5
    n_outer = pooled.shape[1] - below if is_high else min(below + 2, pooled.shape[1])
    around = pooled.topk(n_outer, dim=1, largest=is_high).values[:, -2:]  # kthvalue is slower
    return torch.lerp(around.amin(1), around.amax(1), position - below)


def cumulative_histogram(values: Tensor, low: Tensor, high: Tensor, n_bins: int) -> Tensor:
    """Describe every set by the share of its elements below evenly spaced thresholds.

    Thresholds are low + (high - low) (q + 1) / (n_bins + 1), q = 0 .. n_bins - 1. The order of the
    elements is ignored on purpose. A direction whose range has no width gives zeros.

    Parameters
    ----------
    values : (n_sets, n_directions, n_elements)
        Elements projected on the random directions, no unit.
    low, high : (n_directions,)
        Range of each direction, from training sets only.
    n_bins : number of thresholds

    Returns
    -------
    (n_sets, n_directions * n_bins), float32
        Shares in [0, 1]; the bins of one direction are neighbours.

    Raises
    ------
    ValueError
        If the numbers of directions differ, or n_bins < 1.
    """
    n_sets, n_directions, n_elements = values.shape
    if low.shape != (n_directions,) or high.shape != (n_directions,):
        raise ValueError(f"ranges must be of {n_directions} directions, got {tuple(low.shape)}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    shares = torch.empty(n_sets, n_directions, n_bins, device=values.device)
    below = torch.empty_like(values)  # reused: 0. or 1., (sets, directions, elements)
    for q in range(n_bins):
        threshold = low + (high - low) * ((q + 1) / (n_bins + 1))
        torch.lt(values, threshold[:, None], out=below)
        shares[:, :, q] = below.sum(2)
    shares *= ((high > low) / n_elements)[:, None]
    return shares.flatten(1)


# ---------------------------------------------------------------- whitening and distance


@dataclass(frozen=True)
class Whitening:
    """The inverse of a shrunk covariance, kept exact in the span of its training descriptors.

    With centred training descriptors Y (n, p), Gram matrix G = Y Y', mean variance
    m = trace(G) / (n p), shrinkage s and c = n s m / (1 - s), Woodbury's identity gives
    C^-1 = 1/(s m) (I - Y' A Y) with A = (c I + G)^-1 = L'^-1 L^-1, L the Cholesky factor. The
    squared matrix C^-2 (the authors' code) has A + c A A in place of A, 1/(s m)^2 in front.
    Nothing of size p x p is formed.

    Attributes
    ----------
    mean : (p,), float64
    centred : (n', p'), Y padded with zeros, see `_padded`
    in_span : (n', n'), for C^-2 (2 n', n')
        Maps Y (x - mean) to coordinates whose squared length is what the span takes away.
    taken : (n', rows of in_span), these coordinates of the training descriptors
    scale : 1/(s m), its square for C^-2; 1 where the training descriptors do not vary at all
    n_train : n
    """

    mean: Tensor
    centred: Tensor
    in_span: Tensor
    taken: Tensor
    scale: float
    n_train: int

    def squared_norms(self, queries: Tensor) -> Tensor:
        """Return (n_queries,) squared whitened distances to the training mean, float64."""
        centred = _padded(queries.double() - self.mean)
        lengths = _lengths(centred, centred @ self.centred.T @ self.in_span.T)
        return self.scale * lengths[: len(queries)].clamp(min=0.0)

    def squared_distances(self, queries: Tensor) -> Tensor:
        """Return (n_queries, n_train) squared whitened distances to the training descriptors.

        In blocks of one shape: a query's bytes do not depend on how many come along.
        """
        distances, own_lengths = [], _lengths(self.centred, self.taken)
        for block in _padded(queries.double() - self.mean).split(BLOCK):
            products = block @ self.centred.T  # (block, training descriptors)
            taken = products @ self.in_span.T
            lengths = _lengths(block, taken)[:, None] + own_lengths
            distances.append(lengths - 2.0 * (products - taken @ self.taken.T))
        return self.scale * torch.cat(distances)[: len(queries), : self.n_train].clamp(min=0.0)


def _lengths(centred: Tensor, taken: Tensor) -> Tensor:
    """Return the squared length of each row, less what the span takes away."""
    return centred.square().sum(1) - taken.square().sum(1)


def _padded(rows: Tensor) -> Tensor:
    """Pad both sides with zeros to multiples of BLOCK: equal shapes give equal bytes."""
    return functional.pad(rows, (0, -rows.shape[1] % BLOCK, 0, -len(rows) % BLOCK))


def fit_whitening(train_descriptors: Tensor, shrinkage: float, squared: bool = False) -> Whitening:
    """Fit the shrunk covariance C = (1 - s) S + s trace(S)/p I, S the ML estimate.

    Exact in O(n^2 p) for n descriptors of length p; paper: section on the Mahalanobis distance.

    Parameters
    ----------
    train_descriptors : (n, p)
    shrinkage : s in (0, 1]; 1 is the Euclidean distance up to a constant
    squared : whiten by C^-1 (what the authors' code does) instead of C^(-1/2)

    Raises
    ------
    ValueError
        If there are fewer than 2 descriptors or s is outside (0, 1].
    """
    n_train, length = train_descriptors.shape
    if n_train < 2:
        raise ValueError(f"train_descriptors must be at least 2, got {n_train}")
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must be above 0 and at most 1, got {shrinkage}")
    descriptors = train_descriptors.double()
    mean = descriptors.mean(0)
    centred = _padded(descriptors - mean)
    gram = centred @ centred.T
    mean_variance = float(gram.trace()) / (n_train * length)
    if mean_variance < NO_VARIANCE or shrinkage == 1.0:  # no covariance is left
        scale = 1.0 / mean_variance if mean_variance >= NO_VARIANCE else 1.0
        in_span = gram[:0]
    else:
        scale = 1.0 / (shrinkage * mean_variance)
        ridge = n_train * shrinkage * mean_variance / (1.0 - shrinkage)  # c
        identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        factor = torch.linalg.cholesky(gram + ridge * identity)
        in_span = torch.linalg.solve_triangular(factor, identity, upper=False)
        if squared:  # (I - Y'AY)^2 = I - Y'(2A - AGA)Y, and AG = I - cA
            in_span = torch.cat([in_span, math.sqrt(ridge) * in_span.T @ in_span])
    scale = scale**2 if squared else scale
    return Whitening(mean, centred, in_span, gram @ in_span.T, scale, n_train)


def nearest_distances(whitening: Whitening, queries: Tensor) -> Scores:
    """Score sets (n_queries,) by the squared whitened distance to the nearest training set."""
    return whitening.squared_distances(queries).min(1).values.cpu().numpy()


# ---------------------------------------------------------------- ensemble


def grid_scores(crop_scores: Scores, pool: str = "mean") -> Scores:
    """Join the crop scores of an image: as a g x g map, bicubic to 4 x 4, mean.

    Parameters
    ----------
    crop_scores : (g * g, n_images), one grid's, crops row by row
    pool : "mean", or (ours) "max": the highest crop score in place of the map's mean

    Returns
    -------
    (n_images,), float64
    """
    side = math.isqrt(len(crop_scores))
    if side * side != len(crop_scores):
        raise ValueError(f"crop_scores must be of a square grid, got {len(crop_scores)} crops")
    if pool == "max":
        return crop_scores.max(0)
    maps = torch.from_numpy(np.ascontiguousarray(crop_scores.T)).reshape(-1, 1, side, side)
    if side != ENSEMBLE_SIDE:
        size = (ENSEMBLE_SIDE, ENSEMBLE_SIDE)
        maps = functional.interpolate(maps, size=size, mode="bicubic", align_corners=False)
    return maps.mean(dim=(1, 2, 3)).numpy()


def normalise_scores(scores: Scores, valid_scores: Scores) -> Scores:
    """Divide scores by the mean over validation images (+ 1e-5), add 1e-5; shapes (n,), (m,)."""
    return scores / (valid_scores.mean() + SCORE_EPSILON) + SCORE_EPSILON


def level_scores(grids_test: list[Scores], grids_valid: list[Scores]) -> Scores:
    """Join the grids of one level: each normalised by its validation images, then the mean.

    Parameters
    ----------
    grids_test, grids_valid : list of (n_images,), `grid_scores` of each grid

    Returns
    -------
    (n_test,), float64; about 1 for an image like the validation images
    """
    pairs = zip(grids_test, grids_valid, strict=True)
    return np.mean([normalise_scores(test, valid) for test, valid in pairs], axis=0)


def ensemble_scores(
    network_levels: list[Scores], pixel_reps: list[Scores], lambda_factor: float
) -> Scores:
    """Join levels: mean of the network's + lambda_factor * median of the raw-pixel repetitions.

    Parameters
    ----------
    network_levels, pixel_reps : list of (n_test,)
        Outputs of `level_scores`; one of the lists may be empty. Raw pixels alone are not weighted.

    Returns
    -------
    (n_test,), float64, higher = more anomalous
    """
    if not pixel_reps:
        return np.mean(network_levels, axis=0)
    pixels = np.median(pixel_reps, axis=0)
    return np.mean(network_levels, axis=0) + lambda_factor * pixels if network_levels else pixels
