"""Measuring the numbers of the pages: on tiny images, by the same functions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_class

from benchmarks import make_results
from sinbad import detectors
from sinbad.settings import Settings

PARTS = ("train/good", "validation/good", "test/good", "test/logical_anomalies")


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return flags for a tiny category, whose network has random weights."""
    draw_class(tmp_path / "loco/juice_bottle", (50, 100))
    monkeypatch.setattr(make_results, "weights_of", lambda *_: "random")
    paths = {"--loco_dir": "loco", "--work": "work", "--out": "out"}
    return [word for flag, name in paths.items() for word in (flag, str(tmp_path / name))]


def test_verdicts_are_those_of_a_detector(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_results, "SIZES", [(4, 0), (4, 4)])
    monkeypatch.setattr(make_results, "RATES", (0.2, 0.4))
    args = make_results.parse_args(["--only", "verdicts", "--n_splits", "2", *words])
    _, *rows = make_results.measure_verdicts(args)
    assert len(rows) == 4
    assert len({tuple(row[4:]) for row in rows}) > 1
    normal_parts = [sorted((tmp_path / "loco/juice_bottle" / part).iterdir()) for part in PARTS]
    anomalous, normal = normal_parts.pop(), np.concatenate(normal_parts)
    network = {"net": "resnet18", "weights": "random", "device": "cpu", "batch_size": 4}
    values = Settings((14,), (0.99,), **network)
    for n_train, n_valid, split, n_normal, *counts in rows:
        order = np.random.default_rng(split).permutation(normal)
        train, valid, rest = np.split(order, [n_train, n_train + n_valid])
        assert n_normal == len(rest)
        detector = detectors.Detector.fit(train, valid, replace(values, seed=split))
        expected = [
            sum(prediction.is_anomalous for prediction in detector.score(part, rate))
            for rate in (0.2, 0.4)
            for part in (rest, anomalous)
        ]
        assert counts == expected


def test_the_ablation_has_a_row_for_each_repetition(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_results, "CHANGES", {"crop_size_ratio": ".99"})
    args = make_results.parse_args(["--only", "ablation", *words])
    head, *rows = make_results.measure_ablation(args)
    assert [row[:3] for row in rows] == [["crop_size_ratio", ".99", rep] for rep in range(5)]
    assert all(0 <= float(row[3]) <= 100 for row in rows)
    assert len(head) == len(rows[0])
