"""Time series: against a slow textbook version, invariances, results, real data."""

import csv
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

import sinbad_utils
from sinbad import errors, uea
from sinbad_time_series import (
    PUBLISHED,
    count_dilations,
    main,
    score_class,
    score_seed,
    window_elements,
)

REPOSITORY = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("UEA_DIR", REPOSITORY.parent / "shared/data/uea"))
CPU = torch.device("cpu")

needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "RacketSports").is_dir() or not (REAL_DATA / "NATOPS").is_dir(),
    reason=f"RacketSports and NATOPS of the UEA archive are not in {REAL_DATA} (or set UEA_DIR)",
)


# ---------------------------------------------------------------- the textbook


def project_series(series: torch.Tensor, directions: torch.Tensor, n: int) -> torch.Tensor:
    """Project the elements of series that are padded with 0."""
    zeros = torch.zeros(series.shape[1])
    return sinbad_utils.project(directions, window_elements(series, zeros, n))


def textbook_descriptor(
    series: Array, directions: Array, low: Array, high: Array, n_quantiles: int
) -> Array:
    """Compute DESIGN.md's descriptor of one series with loops."""
    values = textbook_values(series, directions)
    descriptor = []
    for j in range(len(directions)):
        for q in range(n_quantiles):
            threshold = low[j] + (high[j] - low[j]) * (q + 1) / (n_quantiles + 1)
            descriptor.append(np.sum(values[j] < threshold) / values.shape[1])
    return np.array(descriptor)


def textbook_values(series: Array, directions: Array) -> Array:
    """Project each time step's windows on each direction: (directions, steps)."""
    channels, n_steps = series.shape
    padded = np.pad(series, ((0, 0), (40, 40)))
    elements = []  # one row a value of an element, all steps
    for dilation in range(1, min(n_steps // 9, 10) + 1):
        for channel in range(channels):
            for k in range(-4, 5):
                start = 40 + k * dilation
                elements.append(padded[channel, start : start + n_steps])
    return directions @ np.array(elements)


def textbook_scores(normal: Array, test: Array, directions: Array, n_quantiles: int) -> Array:
    """Score by a p x p LedoitWolf covariance and its inverse."""
    pooled = np.concatenate([textbook_values(one, directions) for one in normal], axis=1)
    low, high = (np.quantile(pooled, share, axis=1) for share in (0.01, 0.99))
    described, test_described = (
        np.array([textbook_descriptor(one, directions, low, high, n_quantiles) for one in series])
        for series in (normal, test)
    )
    fitted = LedoitWolf().fit(described)
    inverse = np.linalg.inv(fitted.covariance_)
    return np.array(
        [(d - fitted.location_) @ inverse @ (d - fitted.location_) for d in test_described]
    )


@pytest.mark.parametrize("n_steps", [9, 20, 31])
def test_scores_equal_the_textbook(n_steps: int) -> None:
    generator = np.random.default_rng(n_steps)
    normal = np.float32(generator.normal(size=(7, 2, n_steps)))
    test = np.float32(generator.normal(size=(5, 2, n_steps)) * 1.5)
    n_dilations = count_dilations(n_steps)
    directions = sinbad_utils.random_directions(6, n_dilations * 2 * 9, seed_key=(3,))
    wanted = textbook_scores(
        normal.astype(float), test.astype(float), directions.double().numpy(), 4
    )
    normal_values, test_values = (
        project_series(torch.from_numpy(series), directions, n_dilations)
        for series in (normal, test)
    )
    scores = score_class(normal_values, test_values, 4)
    np.testing.assert_allclose(scores, wanted, rtol=1e-6)


def test_roc_auc_of_a_data_set_equals_the_textbook(tmp_path: Path) -> None:
    data = uea.load_data_set(uea.find_files(write_toy(tmp_path, (14, 20)), "Toy", "ts"))
    assert data.train.shape == (18, 2, 20)
    data = data._replace(  # in units where 0 is 0
        train=data.train - data.zeros[:, None],
        test=data.test - data.zeros[:, None],
        zeros=np.zeros(2, np.float32),
    )
    directions = sinbad_utils.random_directions(7, 2 * 2 * 9, seed_key=(5,)).double().numpy()
    wanted = [
        100
        * roc_auc_score(
            data.test_labels != name,
            textbook_scores(
                data.train[data.train_labels == name].astype(float),
                data.test.astype(float),
                directions,
                4,
            ),
        )
        for name in sorted(CLASSES)
    ]
    np.testing.assert_allclose(score_seed(data, 5, 7, 4, CPU), wanted)


def test_a_small_signal_on_a_great_offset_scores_as_the_textbook(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "Toy").mkdir()
    splits = {}
    for split in ("TRAIN", "TEST"):
        labels = ["up", "down"] * 8
        spread = [1.0 if label == "up" else 1.3 for label in labels]
        # so long that the padding, 0, is outside the range of the 1 % and 99 % quantiles
        drawn = generator.normal(size=(16, 1, 9000)) * np.reshape(spread, (16, 1, 1))
        drawn += generator.normal(size=(16, 1, 1)) + 1e6
        rows = (
            ",".join(map(repr, one[0].tolist())) + f":{label}"
            for one, label in zip(drawn, labels, strict=True)
        )
        header = "@classLabel true up down\n@data\n"
        (tmp_path / f"Toy/Toy_{split}.ts").write_text(header + "\n".join(rows) + "\n")
        splits[split] = drawn
    data = uea.load_data_set(uea.find_files(tmp_path, "Toy", "ts"))
    directions, zeros = (
        sinbad_utils.random_directions(6, 90, seed_key=(0,)),
        torch.from_numpy(data.zeros),
    )
    train, test = (
        sinbad_utils.project(directions, window_elements(torch.from_numpy(series), zeros, 10))
        for series in (data.train, data.test)
    )
    is_normal = data.train_labels == "up"
    scores = score_class(train[torch.from_numpy(is_normal)], test, 4)
    normal = splits["TRAIN"][is_normal]
    wanted = textbook_scores(normal, splits["TEST"], directions.double().numpy(), 4)
    np.testing.assert_allclose(scores, wanted, rtol=0.02)


@pytest.mark.parametrize(("n_steps", "wanted"), [(9, 1), (17, 1), (18, 2), (90, 10), (400, 10)])
def test_number_of_dilations(n_steps: int, wanted: int) -> None:
    assert count_dilations(n_steps) == wanted


def test_order_of_the_elements_is_ignored() -> None:
    series = torch.randn(9, 2, 30, generator=torch.Generator().manual_seed(0))
    values = project_series(series, sinbad_utils.random_directions(5, 3 * 2 * 9, seed_key=(0,)), 3)
    shuffled = values[:, :, torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert not torch.equal(values, shuffled)
    one, other = (score_class(v[:6], v, 4) for v in (values, shuffled))
    np.testing.assert_array_equal(one, other)


def test_batches_of_series_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.float32(np.random.default_rng(0).normal(size=(150, 2, 20)))
    labels = np.array(["a", "b", "c"] * 50)
    data = uea.DataSet(drawn, drawn[:90], labels, labels[:90], np.zeros(2, np.float32))
    wanted = score_seed(data, 0, 5, 4, CPU)
    monkeypatch.setattr("sinbad_time_series.SERIES_A_BATCH", 7)
    assert score_seed(data, 0, 5, 4, CPU) == wanted


def test_zeros_stand_outside_the_series() -> None:
    series = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([5.0, -3.0])
    plain = window_elements(series, torch.zeros(2), 2)
    shifted = window_elements(series + shift[:, None], shift, 2)
    by_channel = shift.repeat_interleave(9).repeat(2)[:, None]
    torch.testing.assert_close(shifted - by_channel, plain)


def test_elements_do_not_cross_series() -> None:
    series = torch.zeros(2, 1, 9)
    series[1] = 1.0
    elements = window_elements(series, torch.zeros(1), 1)
    assert elements.shape == (2, 9, 9)
    assert elements[0].sum() == 0
    assert elements[1, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]  # four steps of padding


@pytest.mark.parametrize("n_normal", [2, 3])
def test_very_few_normal_series_give_finite_scores(n_normal: int) -> None:
    values = torch.randn(8, 5, 30, generator=torch.Generator().manual_seed(0))
    scores = score_class(values[:n_normal], values, 4)
    assert np.isfinite(scores).all()
    assert scores[:n_normal].max() < scores[n_normal:].min()


def test_equal_normal_series_give_finite_scores() -> None:
    values = torch.randn(4, 5, 30, generator=torch.Generator().manual_seed(0))
    scores = score_class(values[:1].repeat(3, 1, 1), values, 4)
    assert np.isfinite(scores).all()
    assert scores[0] < 1e-9 < scores[1:].min()


# ---------------------------------------------------------------- results


def test_results_agree_and_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "data")
    first = run(folder, tmp_path / "a", "--seeds", "0-1", "4")
    table = capsys.readouterr().out
    assert run(folder, tmp_path / "b", "--seeds", "0-1", "4") == first
    texts = {(tmp_path / out / "time_series.json").read_bytes() for out in "ab"}
    assert len(texts) == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "time_series.csv",
        "time_series.json",
    ]
    rows = list(csv.DictReader(first.splitlines()))
    order = itertools.product(["0", "1", "4"], sorted(CLASSES))
    assert [(row["seed"], row["class"]) for row in rows] == list(order)
    values = np.array([float(row["roc_auc_percent"]) for row in rows]).reshape(3, 3)
    found = json.loads(texts.pop())["datasets"]["Toy"]
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.mean(1).std(ddof=1))
    assert found["published"] is None
    cells = next(line for line in table.splitlines() if "**mean**" in line).split("|")
    assert float(cells[3]) == pytest.approx(values.mean(), abs=0.051)


def test_seeds_do_not_depend_on_each_other(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "data")
    both = run(folder, tmp_path / "a", "--seeds", "0", "3").splitlines()
    alone = run(folder, tmp_path / "b", "--seeds", "3").splitlines()
    assert both[4:] == alone[1:]
    assert both[1:4] != alone[1:]


def test_spoken_digits_keep_20_to_50_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "SpokenArabicDigits"
    drawn = [
        (one[:, :n], label)
        for n in (18, 19, 20, 50, 51, 60, 70)
        for one, label in make_series(n, 2, (70, 70))
    ]
    folder.mkdir()
    for split in ("TRAIN", "TEST"):
        (folder / f"{folder.name}_{split}.ts").write_text(ts_text(drawn))
    run(tmp_path, tmp_path / "out", "--dataset", folder.name)
    shown = capsys.readouterr().err
    assert "12 training and 12 test series of 3 classes, 2 channels, 50 steps" in shown
    assert list(PUBLISHED.values()) == [98.1, 96.1, 99.7, 92.3, 97.8]


def test_a_run_goes_on_where_another_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_toy(write_toy(tmp_path / "data"), name="Other")
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(folder, whole, "--dataset", "Toy", "Other", "--seeds", "0-2")
    run(folder, out, "--seeds", "0")
    run(folder, out, "--dataset", "Other", "--seeds", "0-2")
    assert "Toy" in (out / "time_series.csv").read_text()  # of the run before
    capsys.readouterr()
    run(folder, out, "--dataset", "Toy", "Other", "--seeds", "0-2")
    assert "Toy: 1 seeds are in" in capsys.readouterr().err
    for name in ("time_series.csv", "time_series.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    monkeypatch.setattr("sinbad_time_series.score_seed", None)  # nothing is computed again
    run(folder, out, "--dataset", "Toy", "Other", "--seeds", "0-2")


def test_results_of_other_settings_or_files_are_not_mixed(tmp_path: Path) -> None:
    folder, out = write_toy(tmp_path / "data"), tmp_path / "out"
    before = run(folder, out)
    with pytest.raises(
        errors.UserError, match=r"n_quantiles must be 4, that of .*, got 5; .*overwrite"
    ):
        run(folder, out, "--n_quantiles", "5")
    assert (out / "time_series.csv").read_text() == before
    path = folder / "Toy/Toy_TEST.ts"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(
        errors.UserError, match=r"files must be those .*Toy_TRAIN\.ts and Toy_TEST\.ts"
    ):
        run(folder, out)
    assert run(folder, out, "--overwrite", "--n_quantiles", "5") != before
    (out / "time_series.json").write_text("[]")
    with pytest.raises(errors.UserError, match="must be a file of this version"):
        run(folder, out)
    assert run(folder, out, "--overwrite").startswith("dataset,class,seed")


# ---------------------------------------------------------------- the archive's own files


@needs_real_data
def test_real_formats_are_the_same_to_the_bit() -> None:
    loaded: list[uea.DataSet] = [
        uea.load_data_set(uea.find_files(REAL_DATA, "RacketSports", suffix))
        for suffix in ("ts", "arff")
    ]
    ts, arff = loaded
    assert ts.train.shape == (151, 6, 30)
    assert ts.train.tobytes() == arff.train.tobytes()
    assert ts.test.tobytes() == arff.test.tobytes()
    assert score_seed(ts, 0, 20, 20, CPU) == score_seed(arff, 0, 20, 20, CPU)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch have one thread: several that wait for each other would count as busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@needs_real_data
def test_real_results_are_near_the_published(one_thread: None, tmp_path: Path) -> None:
    started = time.process_time()  # others may be busy on the same cores
    main(
        [
            "--dataset_dir",
            str(REAL_DATA),
            "--dataset",
            "RacketSports",
            "NATOPS",
            "--seeds",
            "0-1",
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
    )
    assert time.process_time() - started < 20
    found = json.loads((tmp_path / "time_series.json").read_text())["datasets"]
    assert found["RacketSports"]["mean"] == pytest.approx(91.9, abs=0.8)  # 10 seeds: 91.9 +- 0.17
    assert found["NATOPS"]["mean"] == pytest.approx(96.1, abs=0.8)  # 10 seeds: 96.1 +- 0.16
