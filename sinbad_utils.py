"""The paper's maths, seeding and devices: what the image and the time-series scripts share.

An image (or a series) is a *set* of elements. `random_directions` -> `project` -> `fit_ranges` ->
`cumulative_histogram` turn a set into one descriptor; `fit_whitening` and `nearest_distances` turn
descriptors into anomaly scores; `normalise_scores` and `ensemble_scores` join the scores of crops,
grids, levels and repetitions. Every formula stands once, here.

Source: "Set Features for Fine-grained Anomaly Detection", arXiv 2302.12245 and 2311.14773.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from command_line import UserError

FIT_SETS = 32  # training sets that the ranges are fitted on
LOW_QUANTILE, HIGH_QUANTILE = 0.01, 0.99
ENSEMBLE_SIDE = 4  # side of the map that the crop scores of a grid are resized to
SCORE_EPSILON = 1e-5  # added to the validation mean, and to the normalised score
LAMBDA_FACTOR = 0.1  # weight of the raw-pixel level in the ensemble

# From this many channels on, oneDNN's product (a convolution) is the faster one on a CPU.
MANY_CHANNELS = 64
# Rows longer than this are narrowed before a quantile is selected, with the help of a sample.
LONG_ROW, SAMPLED, SAMPLE_MARGIN = 1 << 17, 4096, 0.01

Scores = NDArray[np.float64]
Values = NDArray[np.float32]


# ---------------------------------------------------------------- devices


def choose_device(name: str) -> torch.device:
    """Return the device named `auto` (CUDA if present), `cpu`, `cuda` or `cuda:<i>`.

    Raises
    ------
    UserError
        If the device is not one of these, or is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    form = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if form is None:
        raise UserError(f"device must be auto, cpu, cuda or cuda:<i>, got {name}; see --help")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(form[1] or 0) >= count:
        raise UserError(
            f"device must be on this machine ({count} CUDA devices), got {name}; pass --device cpu"
        )
    return torch.device(name)


# ---------------------------------------------------------------- set descriptors


def random_directions(n_directions: int, channels: int, key: tuple[int, ...]) -> Tensor:
    """Draw the random directions of one descriptor, always on the CPU.

    Parameters
    ----------
    n_directions, channels : int
        Shape of the result.
    key : tuple of int
        What the directions belong to: (seed, rep, level, n_crops, crop) for images. Equal keys give
        equal numbers on every device, in any order and any split of the work.

    Returns
    -------
    (n_directions, channels), float32, standard normal
    """
    k = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
    return torch.randn(n_directions, channels, generator=torch.Generator().manual_seed(k))


def project(directions: Tensor, elements: Tensor) -> Tensor:
    """Project every element of every set on every direction: P f.

    On the CPU the sets are multiplied one by one: then the bytes of a set's values do not depend
    on how many sets come along.

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
    values : (n_sets, n_directions, n_elements)
        Projected elements of (the first 32) training sets.

    Returns
    -------
    low, high : (n_directions,), float32
        Quantiles with linear interpolation.
    """
    pooled = values.transpose(0, 1).flatten(1)  # (directions, sets * elements)
    return _quantile(pooled, LOW_QUANTILE), _quantile(pooled, HIGH_QUANTILE)


def _quantile(pooled: Tensor, share: float) -> Tensor:
    """Return a quantile of every row, linear between the two values around it."""
    n_values = pooled.shape[1]
    position = share * (n_values - 1)
    below = math.floor(position)
    if pooled.device.type == "cpu":  # numpy selects where torch would sort: ten times faster
        rows = pooled.numpy()
        if n_values > LONG_ROW:
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy lets go of the GIL
                found = threads.map(lambda row: _neighbours(*_narrowed(row, below)), rows)
                pairs = np.concatenate(list(found), axis=1)
        else:
            pairs = _neighbours(rows, below)
        lower, upper = torch.from_numpy(pairs.reshape(2, -1))
    else:
        lower, upper = _tail_neighbours(pooled, below)
    return torch.lerp(lower, upper, position - below)


def _tail_neighbours(pooled: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the values of `rank` (from 0) and the next rank in every row; sorts nothing.

    A radix selection leaves the shorter tail that holds both, and among its values the two wanted
    are the innermost.
    """
    n_values = pooled.shape[1]
    following = min(rank + 1, n_values - 1)
    is_low = rank < n_values / 2
    n_tail = following + 1 if is_low else n_values - rank
    tail = pooled.topk(n_tail, dim=1, largest=not is_low, sorted=False).values
    pair = tail.topk(following - rank + 1, dim=1, largest=is_low, sorted=False).values
    return pair.amin(1), pair.amax(1)


def _neighbours(rows: Values, rank: int) -> Values:
    """Return the values of `rank` (from 0) and the next rank in every row; (2, n_rows)."""
    parted = np.partition(rows, rank, axis=1)
    upper = parted[:, rank + 1 :] if rank + 1 < rows.shape[1] else parted[:, rank:]
    return np.stack([parted[:, rank], upper.min(1)])


def _narrowed(row: Values, rank: int) -> tuple[Values, int]:
    """Leave out of a long row (n,) the side that a sample shows to be far from `rank`; exact.

    Returns
    -------
    The values left, (1, n_left), and what `rank` is among them
    """
    n_values = len(row)
    sample = np.sort(row[:: n_values // SAMPLED])
    in_lower_half = rank < n_values / 2
    margin = SAMPLE_MARGIN if in_lower_half else -SAMPLE_MARGIN
    bound = sample[round((rank / n_values + margin) * (len(sample) - 1))]
    left = row[row <= bound if in_lower_half else row >= bound]
    rank_left = rank if in_lower_half else rank - (n_values - len(left))
    enough = 0 <= rank_left < len(left) - 1
    return (left[None], rank_left) if enough else (row[None], rank)


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
    n_bins : int
        Number of thresholds.

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


# ---------------------------------------------------------------- whitening and scores


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
    centred : (n, p), float64
        Y.
    scale : float
        1/(s m), its square for C^-2; 1 where the training descriptors do not vary at all.
    in_span : (n, n), for C^-2 (2 n, n), float64
        Maps Y (x - mean) to coordinates whose squared length is what the span takes away.
    """

    mean: Tensor
    centred: Tensor
    scale: float
    in_span: Tensor

    def squared_distances(self, queries: Tensor, references: Tensor) -> Tensor:
        """Return (n_queries, n_references) squared whitened distances, float64."""
        queries_c, references_c = queries.double() - self.mean, references.double() - self.mean
        whole = _squared_differences(queries_c, references_c)
        taken = _squared_differences(
            queries_c @ self.centred.T @ self.in_span.T,
            references_c @ self.centred.T @ self.in_span.T,
        )
        return self.scale * (whole - taken).clamp(min=0.0)


def _squared_differences(queries: Tensor, references: Tensor) -> Tensor:
    """Return all squared Euclidean distances by one matrix product."""
    squares = queries.square().sum(1)[:, None] + references.square().sum(1)[None, :]
    return squares - 2.0 * queries @ references.T


def fit_whitening(train_descriptors: Tensor, shrinkage: float, squared: bool = False) -> Whitening:
    """Fit the shrunk covariance C = (1 - s) S + s trace(S)/p I, S the ML estimate.

    Exact in O(n^2 p) for n descriptors of length p; paper: section on the Mahalanobis distance.

    Parameters
    ----------
    train_descriptors : (n, p)
    shrinkage : float
        s in (0, 1]; 1 is the Euclidean distance up to a constant.
    squared : bool
        Whiten by C^-1 (what the authors' code does) instead of C^(-1/2).

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
    centred = descriptors - mean
    gram = centred @ centred.T
    mean_variance = float(gram.trace()) / (n_train * length)
    if mean_variance < 1e-24 or shrinkage == 1.0:  # rounding of equal shares, or no covariance
        scale = 1.0 / mean_variance if mean_variance >= 1e-24 else 1.0
        nothing = torch.zeros(0, n_train, dtype=torch.float64, device=gram.device)
        return Whitening(mean, centred, scale**2 if squared else scale, nothing)
    scale = 1.0 / (shrinkage * mean_variance)
    ridge = n_train * shrinkage * mean_variance / (1.0 - shrinkage)  # c
    identity = torch.eye(n_train, dtype=torch.float64, device=gram.device)
    factor = torch.linalg.cholesky(gram + ridge * identity)
    in_span = torch.linalg.solve_triangular(factor, identity, upper=False)
    if squared:  # (I - Y'AY)^2 = I - Y'(2A - AGA)Y, and AG = I - cA
        in_span = torch.cat([in_span, math.sqrt(ridge) * in_span.T @ in_span])
        scale = scale**2
    return Whitening(mean, centred, scale, in_span)


def nearest_distances(whitening: Whitening, queries: Tensor, train_descriptors: Tensor) -> Scores:
    """Score sets by the squared whitened distance to the nearest training set.

    Returns
    -------
    (n_queries,), float64, higher = more anomalous
    """
    distances = whitening.squared_distances(queries, train_descriptors)
    return distances.min(1).values.cpu().numpy()


# ---------------------------------------------------------------- ensemble


def grid_scores(crop_scores: Scores) -> Scores:
    """Join the crop scores of an image: as a g x g map, bicubic to 4 x 4, mean.

    Parameters
    ----------
    crop_scores : (g * g, n_images)
        One grid's scores, crops row by row.

    Returns
    -------
    (n_images,), float64
    """
    side = math.isqrt(len(crop_scores))
    if side * side != len(crop_scores):
        raise ValueError(f"crop_scores must be of a square grid, got {len(crop_scores)} crops")
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
    grids_test, grids_valid : list of (n_crops, n_images)
        Crop scores of each grid.

    Returns
    -------
    (n_test,), float64; about 1 for an image like the validation images
    """
    normalised = [
        normalise_scores(grid_scores(test), grid_scores(valid))
        for test, valid in zip(grids_test, grids_valid, strict=True)
    ]
    return np.mean(normalised, axis=0)


def ensemble_scores(
    resnet_levels: list[Scores], pixel_reps: list[Scores], lambda_factor: float
) -> Scores:
    """Join levels: mean of the ResNet levels + lambda_factor * median of the raw-pixel repetitions.

    Parameters
    ----------
    resnet_levels, pixel_reps : list of (n_test,)
        Outputs of `level_scores`; one of the lists may be empty. Raw pixels alone are not weighted.

    Returns
    -------
    (n_test,), float64, higher = more anomalous
    """
    if not pixel_reps:
        return np.mean(resnet_levels, axis=0)
    pixels = np.median(pixel_reps, axis=0)
    return np.mean(resnet_levels, axis=0) + lambda_factor * pixels if resnet_levels else pixels
