"""Set descriptors and whitening: against slow loops, the authors' numbers, and invariances."""

import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import sinbad_utils

Array = NDArray[np.float64]
CASES = ("resnet_like", "pixels")
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[np.float64]]:
    with np.load(GOLDEN / "set_features_official.npz") as archive:
        return dict(archive)


def tensors(seed: int, *shape: int) -> Tensor:
    """Return seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_quantile(numbers: list[float], share: float) -> float:
    """Linear interpolation between the sorted numbers at position share * (n - 1)."""
    ordered = sorted(numbers)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def slow_descriptor(one_set: Array, low: Array, high: Array, n_bins: int) -> list[float]:
    """DESIGN section 3, element by element; one_set is (directions, elements)."""
    shares = []
    for direction, elements in enumerate(one_set):
        for q in range(n_bins):
            width = high[direction] - low[direction]
            threshold = low[direction] + width * (q + 1) / (n_bins + 1)
            n_below = sum(1 for value in elements if value < threshold)
            shares.append(n_below / len(elements) if width > 0 else 0.0)
    return shares


def slow_scores(train: Array, queries: Array, shrinkage: float, power: float) -> list[float]:
    """Whiten by C^-power, C the p x p shrunk covariance, then search the nearest one."""
    p = train.shape[1]
    covariance = np.cov(train.T, bias=True).reshape(p, p)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / p * np.eye(p)
    metric = np.linalg.matrix_power(np.linalg.inv(shrunk), round(2 * power))
    return [min((query - t) @ metric @ (query - t) for t in train) for query in queries]


# ---------------------------------------------------------------- directions


def test_directions_follow_the_rule_of_the_design() -> None:
    key = (5, 3, 14, 9, 7)  # seed, rep, level, n_crops, crop
    k = int(np.random.SeedSequence([5, 3, 14, 9, 7]).generate_state(1)[0])
    expected = torch.randn(6, 4, generator=torch.Generator().manual_seed(k))
    assert torch.equal(sinbad_utils.random_directions(6, 4, key), expected)


def test_directions_depend_on_every_part_of_the_key_and_on_nothing_else() -> None:
    key = (0, 1, 2, 3, 4)
    torch.manual_seed(1)
    first = sinbad_utils.random_directions(6, 4, key)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(sinbad_utils.random_directions(6, 4, key), first)
    torch.manual_seed(1)
    sinbad_utils.random_directions(6, 4, key)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    for part in range(5):
        other = tuple(n + (i == part) for i, n in enumerate(key))
        assert not torch.equal(sinbad_utils.random_directions(6, 4, other), first)


def test_directions_are_standard_normal() -> None:
    numbers = sinbad_utils.random_directions(1000, 100, (0, 0, 7, 1, 0))
    assert abs(float(numbers.mean())) < 0.01
    assert abs(float(numbers.std()) - 1.0) < 0.01


# ---------------------------------------------------------------- descriptors


def test_projection_is_the_sum_over_channels() -> None:
    directions, elements = tensors(0, 5, 3), tensors(1, 2, 3, 4)
    values = sinbad_utils.project(directions, elements)
    assert values.shape == (2, 5, 4)
    for s in range(2):
        for d in range(5):
            for e in range(4):
                expected = sum(float(directions[d, c] * elements[s, c, e]) for c in range(3))
                assert float(values[s, d, e]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("channels", [3, 64, 1024])
@pytest.mark.parametrize("n_elements", [1, 49, 200])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_projection_of_a_set_does_not_depend_on_the_other_sets(
    channels: int, n_elements: int, n_threads: int
) -> None:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        directions, elements = tensors(0, 20, channels), tensors(1, 20, channels, n_elements)
        values = sinbad_utils.project(directions, elements)
        exact = torch.matmul(directions.double(), elements.double())
        np.testing.assert_allclose(values, exact, atol=1e-6 * channels)
        for part in (slice(0, 1), slice(1, 3), slice(2, 10), slice(3, 20)):
            assert torch.equal(sinbad_utils.project(directions, elements[part]), values[part])
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize("n_elements", [1, 2, 7, 60, 5000])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gpu_selects_the_ranges_that_a_cpu_does(n_elements: int, tied: bool) -> None:
    values = tensors(n_elements, 3, 5, n_elements)
    values = values.round() if tied else values
    pooled = values.transpose(0, 1).flatten(1)
    for actual, share in zip(sinbad_utils.fit_ranges(values), (0.01, 0.99), strict=True):
        np.testing.assert_allclose(
            sinbad_utils._selected_quantile(pooled, share), actual, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("n_values", [1, 2, 3, 100, 101, 201])  # of 101 the shares are exact
def test_a_gpu_selects_quantiles_of_few_values(n_values: int) -> None:
    pooled = tensors(n_values, 4, n_values)
    for share in (0.01, 0.99):
        actual = sinbad_utils._selected_quantile(pooled, share)
        expected = np.quantile(pooled.numpy(), share, axis=1)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_score_crop_is_the_steps_one_after_the_other() -> None:
    train, images = tensors(0, 40, 6, 20), tensors(1, 5, 6, 20) + 0.5
    key, n_directions, n_bins, shrinkage = (0, 0, 14, 4, 2), 30, 5, 0.1
    actual = sinbad_utils.score_crop(train, images, key, n_directions, n_bins, shrinkage)
    directions = sinbad_utils.random_directions(n_directions, 6, key).double().numpy()
    values = {n: np.einsum("dc,nce->nde", directions, e) for n, e in (("t", train), ("i", images))}
    pooled = values["t"][:32].transpose(1, 0, 2).reshape(n_directions, -1)
    low, high = np.quantile(pooled, 0.01, axis=1), np.quantile(pooled, 0.99, axis=1)
    steps = np.arange(1, n_bins + 1) / (n_bins + 1)
    thresholds = low[:, None] + (high - low)[:, None] * steps  # (directions, bins)
    described = {
        name: (projected[:, :, None, :] < thresholds[:, :, None])
        .mean(3)
        .reshape(len(projected), -1)
        for name, projected in values.items()
    }
    covariance = np.cov(described["t"].T, bias=True)
    p = len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / p * np.eye(p)
    difference = described["i"][:, None] - described["t"][None]
    distances = np.einsum("qtp,pr,qtr->qt", difference, np.linalg.inv(shrunk), difference)
    np.testing.assert_allclose(actual, distances.min(1), rtol=1e-4)


@pytest.mark.parametrize("n_elements", [1, 2, 7, 60])
def test_ranges_are_interpolated_quantiles(n_elements: int) -> None:
    values = tensors(2, 5, 4, n_elements)
    low, high = sinbad_utils.fit_ranges(values)
    for direction in range(4):
        numbers = values[:, direction].flatten().tolist()
        assert float(low[direction]) == pytest.approx(slow_quantile(numbers, 0.01), abs=1e-6)
        assert float(high[direction]) == pytest.approx(slow_quantile(numbers, 0.99), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 1), (2, 5, 1), (3, 40, 67), (1, 2, 101), (32, 10, 999)])
@pytest.mark.parametrize("decimals", [0, 7])
def test_ranges_are_those_of_numpy_to_the_bit(shape: tuple[int, ...], decimals: int) -> None:
    values = tensors(5, *shape).round(decimals=decimals)
    before = values.clone()
    expected = np.quantile(values.numpy(), (0.01, 0.99), axis=(0, 2)).astype(np.float32)
    np.testing.assert_array_equal(sinbad_utils.fit_ranges(values), expected)
    assert torch.equal(values, before)


@pytest.mark.parametrize("n_bins", [1, 5])
def test_histogram_against_loops(n_bins: int) -> None:
    values = tensors(3, 4, 6, 30)
    low, high = sinbad_utils.fit_ranges(values[:3])
    actual = sinbad_utils.cumulative_histogram(values, low, high, n_bins)
    assert actual.shape == (4, 6 * n_bins)
    for one_set, descriptor in zip(values.double().numpy(), actual.tolist(), strict=True):
        expected = slow_descriptor(one_set, low.double().numpy(), high.double().numpy(), n_bins)
        assert descriptor == pytest.approx(expected, abs=1e-6)


def test_histogram_counts_strictly_below() -> None:
    values = torch.tensor([[[0.0, 1.0, 1.0, 2.0]]])
    actual = sinbad_utils.cumulative_histogram(values, torch.tensor([0.0]), torch.tensor([2.0]), 1)
    assert actual.tolist() == [[0.25]]  # the two ones lie on the threshold


@pytest.mark.parametrize("n_bins", [1, 5])
def test_a_gpu_counts_as_a_cpu_does(n_bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensors(5, 3, 8, 5000).mul(4.0).round()  # many lie on thresholds
    values[0, :, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    low, high = torch.full((2, 8), -3.0)
    high += 6.0
    high[1], low[2], high[3], low[4] = low[1], torch.nan, torch.inf, -torch.inf
    expected = sinbad_utils.cumulative_histogram(values, low, high, n_bins)
    monkeypatch.setitem(sinbad_utils.FLAG_TYPE, "cpu", sinbad_utils.FLAG_TYPE["cuda"])
    actual = sinbad_utils.cumulative_histogram(values, low, high, n_bins)
    assert sinbad_utils.FLAG_TYPE["cpu"].itemsize == 2
    assert torch.equal(actual, expected)
    assert expected.count_nonzero() > 12 * n_bins


@pytest.mark.parametrize("squared", [False, True])
def test_longer_products_give_the_same_distances(
    squared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, queries = tensors(0, 40, 70), tensors(1, 100, 70)
    distances = []
    for n_rows in (8, sinbad_utils.QUERY_BLOCK["cuda"]):
        monkeypatch.setitem(sinbad_utils.QUERY_BLOCK, "cpu", n_rows)
        distances.append(sinbad_utils.fit_whitening(train, 0.1, squared).nearest(queries))
    np.testing.assert_allclose(distances[1], distances[0], rtol=1e-10)


def test_range_without_width_gives_zeros() -> None:
    values = tensors(4, 3, 2, 10)
    values[:2, 0] = 0.5  # constant over the training sets, not over the third set
    low, high = sinbad_utils.fit_ranges(values[:2])
    actual = sinbad_utils.cumulative_histogram(values, low, high, 3)
    assert torch.equal(actual[:, :3], torch.zeros(3, 3))
    assert (actual[:, 3:] > 0).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 40), st.integers(1, 6))
def test_order_and_duplication_of_elements_do_not_matter(
    seed: int, n_sets: int, n_elements: int, n_bins: int
) -> None:
    values = tensors(seed, n_sets, 5, n_elements)
    low, high = sinbad_utils.fit_ranges(values)
    actual = sinbad_utils.cumulative_histogram(values, low, high, n_bins)
    order = torch.randperm(n_elements, generator=torch.Generator().manual_seed(seed))
    shuffled = values[:, :, order]
    assert all(
        torch.equal(a, b)
        for a, b in zip(sinbad_utils.fit_ranges(shuffled), (low, high), strict=True)
    )
    assert torch.equal(sinbad_utils.cumulative_histogram(shuffled, low, high, n_bins), actual)
    assert torch.equal(
        sinbad_utils.cumulative_histogram(values.repeat(1, 1, 2), low, high, n_bins), actual
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_descriptors_do_not_depend_on_the_split_of_the_sets(seed: int, cut: int) -> None:
    directions, elements = tensors(seed, 7, 20), tensors(seed + 1, 10, 20, 49)

    def describe(some: Tensor) -> Tensor:
        return sinbad_utils.cumulative_histogram(
            sinbad_utils.project(directions, some), low, high, 5
        )

    low, high = sinbad_utils.fit_ranges(sinbad_utils.project(directions, elements))
    parts = torch.cat([describe(elements[:cut]), describe(elements[cut:])])
    assert torch.equal(parts, describe(elements))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_descriptors_equal_the_authors(case: str, split: str, golden: dict[str, Array]) -> None:
    sets = torch.from_numpy(golden[f"{case}_{split}_sets"])
    values = sinbad_utils.project(torch.from_numpy(golden[f"{case}_projections"]), sets)
    low, high = sinbad_utils.fit_ranges(values[:32])
    np.testing.assert_allclose(low, golden[f"{case}_{split}_low"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(high, golden[f"{case}_{split}_high"], rtol=1e-4, atol=1e-5)
    actual = sinbad_utils.cumulative_histogram(values, low, high, 5).numpy()
    expected = golden[f"{case}_{split}_descriptors"]
    # A value within rounding of a threshold may fall on either side: one element, rarely.
    assert np.abs(actual - expected).max() < 1.01 / sets.shape[2]
    assert (np.abs(actual - expected) > 1e-6).mean() < 1e-3


def test_bad_descriptor_inputs() -> None:
    values = tensors(0, 2, 3, 4)
    ends = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"ranges must be of 3 directions, got \(2,\)"):
        sinbad_utils.cumulative_histogram(values, torch.zeros(2), torch.ones(2), 5)
    with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
        sinbad_utils.cumulative_histogram(values, *ends, 0)
    with pytest.raises(ValueError, match="directions must have 3 channels, got 2"):
        sinbad_utils.project(torch.zeros(5, 2), values)


# ---------------------------------------------------------------- whitening


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shrinkage", [0.01, 0.1, 0.7, 1.0])
@pytest.mark.parametrize(("n_train", "length"), [(8, 30), (40, 6), (2, 5)])
def test_whitening_equals_the_p_by_p_inverse(
    n_train: int, length: int, shrinkage: float, squared: bool
) -> None:
    mixing = tensors(9, length, length).double()
    train = tensors(5, n_train, length).double() @ mixing
    queries = tensors(6, 7, length).double() @ mixing + 1.0
    actual = sinbad_utils.fit_whitening(train, shrinkage, squared).nearest(queries)
    power = 1.0 if squared else 0.5
    expected = slow_scores(train.numpy(), queries.numpy(), shrinkage, power)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_norms_are_distances_to_the_training_mean(shrinkage: float) -> None:
    train, queries = tensors(5, 12, 7).double(), tensors(6, 5, 7).double()
    actual = sinbad_utils.fit_whitening(train, shrinkage).squared_norms(queries)
    covariance = np.cov(train.numpy().T, bias=True)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / 7 * np.eye(7)
    difference = queries.numpy() - train.numpy().mean(0)
    expected = [d @ np.linalg.inv(shrunk) @ d for d in difference]
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_full_shrinkage_is_euclidean_up_to_a_constant() -> None:
    train, queries = tensors(7, 9, 20), tensors(8, 4, 20)
    actual = sinbad_utils.fit_whitening(train, 1.0).nearest(queries)
    plain = [min(float((q - t).double().square().sum()) for t in train) for q in queries]
    variance = float(train.double().var(0, unbiased=False).mean())
    np.testing.assert_allclose(actual, np.array(plain) / variance, rtol=1e-6)


@pytest.mark.parametrize("scale", [50.0, 1e-6])
def test_a_training_image_is_at_distance_zero_and_scale_does_not_matter(scale: float) -> None:
    train, queries = tensors(7, 9, 20).double(), tensors(8, 4, 20).double()
    whitening = sinbad_utils.fit_whitening(train, 0.1)
    assert whitening.nearest(train).abs().max() < 1e-9
    larger = sinbad_utils.fit_whitening(train * scale, 0.1)
    np.testing.assert_allclose(
        larger.nearest(queries * scale),
        whitening.nearest(queries),
        rtol=1e-9,
    )


def test_equal_training_descriptors_give_finite_scores() -> None:
    train = torch.full((5, 8), 0.3)
    queries = torch.stack([train[0], train[0] + 0.5])
    actual = sinbad_utils.fit_whitening(train, 0.1).nearest(queries)
    assert actual[0] == pytest.approx(0.0, abs=1e-9)
    assert actual[1] == pytest.approx(8 * 0.25, rel=1e-5)


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_authors(case: str, split: str, golden: dict[str, Array]) -> None:
    train = torch.from_numpy(golden[f"{case}_train_descriptors"])
    queries = torch.from_numpy(golden[f"{case}_{split}_descriptors"])
    whitening = sinbad_utils.fit_whitening(
        train, float(golden[f"{case}_shrinkage"]), full_inverse=True
    )
    actual = whitening.nearest(queries)
    np.testing.assert_allclose(actual, golden[f"{case}_{split}_scores"], rtol=1e-5)


@pytest.mark.parametrize("shrinkage", [-0.1, 0.0, 1.01])
def test_shrinkage_outside_its_range(shrinkage: float) -> None:
    with pytest.raises(ValueError, match=f"at most 1, got {shrinkage}"):
        sinbad_utils.fit_whitening(tensors(0, 4, 3), shrinkage)


def test_whitening_of_one_descriptor() -> None:
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        sinbad_utils.fit_whitening(tensors(0, 1, 3), 0.1)
