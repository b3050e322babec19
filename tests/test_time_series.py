"""Time series: against a slow textbook version, invariances, results, real data."""

import csv
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from uea_toy import CLASSES, Array, make_series, run, ts_text, write_toy

import sinbad_time_series
import sinbad_utils
from sinbad import errors, uea

SHARED = Path(__file__).parents[2] / "shared/data/uea"
REAL_DATA = Path(os.environ.get("UEA_DIR", SHARED))
CPU = torch.device("cpu")
NO_PADDING = np.zeros(2, np.float32)


# ---------------------------------------------------------------- the textbook


def textbook_values(series: Array, directions: Array) -> Array:
    """Project each time step's windows on each direction: (directions, steps)."""
    channels, n_steps = series.shape
    padded = np.pad(series, ((0, 0), (40, 40)))
    elements = []  # one row per value of an element, all steps
    for dilation in range(1, min(n_steps // 9, 10) + 1):
        for channel in range(channels):
            for k in range(-4, 5):
                start = 40 + k * dilation
                elements.append(padded[channel, start : start + n_steps])
    return directions @ np.array(elements)


def textbook_descriptor(values: Array, low: Array, high: Array, n_quantiles: int) -> Array:
    """Compute DESIGN.md's descriptor of one series (directions, steps) with loops."""
    descriptor = []
    for j in range(len(values)):
        for q in range(n_quantiles):
            threshold = low[j] + (high[j] - low[j]) * (q + 1) / (n_quantiles + 1)
            descriptor.append(np.sum(values[j] < threshold) / values.shape[1])
    return np.array(descriptor)


def textbook_scores(normal: Array, test: Array, directions: Array, n_quantiles: int) -> Array:
    """Score by a p x p LedoitWolf covariance and its inverse."""
    values, test_values = (
        [textbook_values(series.astype(float), directions) for series in split]
        for split in (normal, test)
    )
    low, high = np.quantile(np.concatenate(values, axis=1), [0.01, 0.99], axis=1)
    descriptors, test_descriptors = (
        np.array([textbook_descriptor(series, low, high, n_quantiles) for series in split])
        for split in (values, test_values)
    )
    fitted = LedoitWolf().fit(descriptors)
    centred = test_descriptors - fitted.location_
    inverse = np.linalg.inv(fitted.covariance_)
    return np.array([descriptor @ inverse @ descriptor for descriptor in centred])


@pytest.mark.parametrize("n_steps", [9, 20, 31])
def test_scores_equal_the_textbook(n_steps: int) -> None:
    generator = np.random.default_rng(n_steps)
    normal = np.float32(generator.normal(size=(7, 2, n_steps)))
    test = np.float32(generator.normal(size=(5, 2, n_steps)) * 1.5)
    directions = sinbad_utils.random_directions(6, n_steps // 9 * 2 * 9, seed_key=(3,))
    expected = textbook_scores(normal, test, directions.double().numpy(), 4)
    values = [
        sinbad_time_series.project_series(series, NO_PADDING, directions)
        for series in (normal, test)
    ]
    np.testing.assert_allclose(sinbad_time_series.score_class(*values, 4), expected, rtol=1e-6)


def test_roc_auc_of_a_data_set_equals_the_textbook(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, (14, 20), missing=True)
    paths = uea.find_files(folder, "Toy")
    data = uea.load_time_series(paths)
    assert data.train.shape == (18, 2, 20)
    train, test = (  # in units where 0 is 0
        split - data.padding[:, None] for split in (data.train, data.test)
    )
    directions = sinbad_utils.random_directions(7, 2 * 2 * 9, seed_key=(5,)).double().numpy()
    expected = {}
    for label in CLASSES:
        scores = textbook_scores(train[data.train_labels == label], test, directions, 4)
        expected[label] = pytest.approx(100 * roc_auc_score(data.test_labels != label, scores))
    data = data._replace(train=train, test=test, padding=NO_PADDING)
    assert sinbad_time_series.score_seed(data, 5, 7, 4, CPU) == expected


def test_a_small_signal_on_a_large_offset_scores_as_the_textbook(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = ["up", "down"] * 8
    spread = np.array([1.0, 1.3] * 8).reshape(16, 1, 1)
    splits = {}
    (tmp_path / "Toy").mkdir()
    for split in ("TRAIN", "TEST"):
        # so long that the padding, 0, is outside the range of the 1 % and 99 % quantiles
        series = generator.normal(size=(16, 1, 9000)) * spread
        splits[split] = series + generator.normal(size=(16, 1, 1)) + 1e6
        values = (",".join(map(repr, channel[0].tolist())) for channel in splits[split])
        rows = [":".join(pair) for pair in zip(values, labels, strict=True)]
        (tmp_path / f"Toy/Toy_{split}.ts").write_text("\n".join(["@data", *rows]))
    data = uea.load_time_series(uea.find_files(tmp_path, "Toy"))
    directions = sinbad_utils.random_directions(6, 90, seed_key=(0,))
    is_normal = data.train_labels == "up"
    normal, test = (
        sinbad_time_series.project_series(split, data.padding, directions)
        for split in (data.train[is_normal], data.test)
    )
    expected = textbook_scores(
        splits["TRAIN"][is_normal], splits["TEST"], directions.double().numpy(), 4
    )
    np.testing.assert_allclose(sinbad_time_series.score_class(normal, test, 4), expected, rtol=0.02)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize(("n_steps", "expected"), [(9, 1), (17, 1), (18, 2), (90, 10), (400, 10)])
def test_number_of_dilations(n_steps: int, expected: int) -> None:
    assert sinbad_time_series.count_dilations(n_steps) == expected


def test_order_of_the_elements_is_ignored() -> None:
    values = torch.randn(9, 5, 30, generator=torch.Generator().manual_seed(0))
    shuffled = values[:, :, torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    scores, shuffled_scores = (
        sinbad_time_series.score_class(array[:6], array, 4) for array in (values, shuffled)
    )
    np.testing.assert_array_equal(scores, shuffled_scores)


def test_batches_of_series_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    series = np.float32(np.random.default_rng(0).normal(size=(150, 2, 20)))
    labels = np.array(["a", "b", "c"] * 50)
    data = uea.TimeSeriesDataset(series, series[:90], labels, labels[:90], NO_PADDING)
    expected = sinbad_time_series.score_seed(data, 0, 5, 4, CPU)
    monkeypatch.setattr("sinbad_time_series.SERIES_PER_BATCH", 7)
    assert sinbad_time_series.score_seed(data, 0, 5, 4, CPU) == expected


def test_padding_stands_around_each_series() -> None:
    series = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([5.0, -3.0])
    plain = sinbad_time_series.window_elements(series, torch.zeros(2))
    shifted = sinbad_time_series.window_elements(series + shift[:, None], shift)
    by_channel = shift.repeat_interleave(9).repeat(2)[:, None]
    torch.testing.assert_close(shifted - by_channel, plain)


@pytest.mark.parametrize("n_normal", [2, 3])
def test_very_few_normal_series_give_finite_scores(n_normal: int) -> None:
    values = torch.randn(8, 5, 30, generator=torch.Generator().manual_seed(0))
    scores = sinbad_time_series.score_class(values[:n_normal], values, 4)
    assert np.isfinite(scores).all()
    assert scores[:n_normal].max() < scores[n_normal:].min()


def test_equal_normal_series_give_finite_scores() -> None:
    values = torch.randn(4, 5, 30, generator=torch.Generator().manual_seed(0))
    scores = sinbad_time_series.score_class(values[:1].repeat(3, 1, 1), values, 4)
    assert np.isfinite(scores).all()
    assert scores[0] < 1e-9 < scores[1:].min()


# ---------------------------------------------------------------- results


def test_results_agree_and_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "data")
    text = run(folder, tmp_path / "a", "--seeds", "0-1", "4")
    table = capsys.readouterr().out
    assert run(folder, tmp_path / "b", "--seeds", "0-1", "4") == text
    assert (tmp_path / "a/Toy.json").read_bytes() == (tmp_path / "b/Toy.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["Toy.csv", "Toy.json"]
    rows = list(csv.DictReader(text.splitlines()))
    order = itertools.product(["0", "1", "4"], sorted(CLASSES))
    assert [(row["seed"], row["class"]) for row in rows] == list(order)
    values = np.array([float(row["roc_auc_percent"]) for row in rows]).reshape(3, 3)
    result = json.loads((tmp_path / "a/Toy.json").read_text())
    assert result["mean"] == pytest.approx(values.mean())
    assert result["std"] == pytest.approx(values.mean(1).std(ddof=1))
    assert result["mean_of_each_seed"] == pytest.approx(values.mean(1))
    assert list(result["classes"].values()) == values.T.tolist()
    assert (result["seeds"], result["published"]) == ([0, 1, 4], None)
    settings = {"n_projections": 7, "n_quantiles": 4, "window": 9, "max_dilations": 10}
    assert result["settings"] == settings
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("Toy/*")}
    assert result["files"] == digests
    cells = next(line for line in table.splitlines() if "**mean**" in line).split("|")
    assert float(cells[3]) == pytest.approx(values.mean(), abs=0.051)


def test_a_run_computes_what_it_is_asked_for(tmp_path: Path) -> None:
    folder, out = write_toy(write_toy(tmp_path / "data"), name="Other"), tmp_path / "out"
    both = run(folder, out, "--seeds", "0", "3").splitlines()
    run(folder, out, "--dataset", "Other", "--seeds", "0")
    assert (out / "Toy.csv").read_text().splitlines() == both
    alone = run(folder, out, "--seeds", "3").splitlines()  # whatever lies there
    assert alone == [both[0], *both[4:]]
    assert (out / "Other.csv").exists()


def test_a_data_set_is_written_before_the_next_is_read(tmp_path: Path) -> None:
    folder = write_toy(write_toy(tmp_path / "data"), name="Other")
    (folder / "Other/Other_TEST.ts").write_text("")
    with pytest.raises(errors.UserError, match=r"Other_TEST\.ts, line 1"):
        run(folder, tmp_path / "out", "--dataset", "Toy", "Other")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Toy.csv", "Toy.json"]


def test_a_wrong_out_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinbad_time_series.score_seed", None)  # it would be a TypeError
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(write_toy(tmp_path / "data"), tmp_path / "file/out")


def test_all_names_the_papers_data_sets_and_spoken_digits_keep_20_to_50_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(sinbad_time_series.PUBLISHED.values()) == [98.1, 96.1, 99.7, 92.3, 97.8]
    for name in (*sinbad_time_series.PUBLISHED, "Toy"):
        write_toy(tmp_path, name=name)
    pairs = [
        (values[:, :n_steps], label)
        for n_steps in (18, 19, 20, 50, 51, 60, 70)
        for values, label in make_series(n_steps, 2, (70, 70))
    ]
    for path in (tmp_path / "SpokenArabicDigits").iterdir():
        path.write_text(ts_text(pairs))
    run(tmp_path, tmp_path / "out", "--dataset", "Toy", "all", "NATOPS")
    shown = capsys.readouterr()
    assert "12 training and 12 test series of 3 classes, 2 channels, 50 steps" in shown.err
    means = [line.split("|") for line in shown.out.splitlines() if "**mean**" in line]
    expected = {"Toy": "-"} | {k: str(v) for k, v in sinbad_time_series.PUBLISHED.items()}
    assert [(cells[1].strip(), cells[5].strip()) for cells in means] == list(expected.items())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch have one thread: several that wait for each other would count as busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.skipif(
    not (REAL_DATA / "RacketSports").is_dir() or not (REAL_DATA / "NATOPS").is_dir(),
    reason=f"RacketSports and NATOPS of the UEA archive are not in {REAL_DATA} (or set UEA_DIR)",
)
def test_real_results_are_near_the_published(one_thread: None, tmp_path: Path) -> None:
    started = time.process_time()  # others may be busy on the same cores
    flags = ["--dataset_dir", str(REAL_DATA), "--dataset", "RacketSports", "NATOPS"]
    flags += ["--seeds", "0-1", "--out", str(tmp_path), "--device", "cpu"]
    sinbad_time_series.main(flags)
    assert time.process_time() - started < 20
    for name, mean in (("RacketSports", 91.9), ("NATOPS", 96.1)):  # of 10 seeds, each +- 0.2
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["mean"] == pytest.approx(mean, abs=0.8)
