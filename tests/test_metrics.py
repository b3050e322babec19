"""Metrics against loops, by hand, and their means."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from toy_scores import load_toy

from sinbad.report import metrics

LABELS = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
SCORES = np.array([1.0, 2.0, 3.0, 5.0, 4.0, 6.0, 5.0])


def test_auroc_against_all_pairs() -> None:
    pairs = [(g, b) for g in SCORES[LABELS == 0] for b in SCORES[LABELS == 1]]
    wins = sum(1.0 if b > g else 0.5 if b == g else 0.0 for g, b in pairs)
    assert metrics.auroc(LABELS, SCORES) == pytest.approx(wins / len(pairs))
    assert metrics.auroc_against(SCORES[:4], SCORES[4:]) == pytest.approx(wins / len(pairs))
    assert metrics.auroc(np.zeros(3), SCORES[:3]) is None


def test_f1_is_the_greatest_over_all_thresholds() -> None:
    found = []
    for threshold in SCORES:
        called = threshold <= SCORES
        hits = (called & (LABELS == 1)).sum()
        found.append(2 * hits / (called.sum() + (LABELS == 1).sum()))
    assert metrics.f1_max(LABELS, SCORES) == pytest.approx(max(found))
    assert max(found) > np.median(found) > min(found)
    assert found[0] != max(found) != found[-1]


def test_the_interval_holds_95_of_100_samples() -> None:
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(0, 1, 60), rng.normal(1, 1, 60)])
    labels = np.repeat([0.0, 1.0], 60)
    low, high = metrics.bootstrap_interval(labels, scores)
    drawn = []
    for _ in range(1000):
        good, bad = rng.choice(scores[:60], 60), rng.choice(scores[60:], 60)
        drawn.append((good[:, None] < bad).mean())
    inside = np.mean([low <= value <= high for value in drawn])
    assert 0.93 < inside < 0.97
    assert low < metrics.auroc(labels, scores) < high  # type: ignore[operator]
    assert np.mean([value < low for value in drawn]) > 0.01
    assert np.mean([value > high for value in drawn]) > 0.01


def test_the_interval_is_of_the_2_5_and_the_97_5_percentile() -> None:
    labels, scores = np.repeat([0.0, 1.0], [30, 20]), np.random.default_rng(1).normal(0, 1, 50)
    rng, sampled = np.random.default_rng(0), []
    for _ in range(1000):
        good, bad = rng.choice(scores[:30], 30), rng.choice(scores[30:], 20)
        wins = (good[:, None] < bad) + (good[:, None] == bad) / 2
        sampled.append(wins.mean())
    found = metrics.bootstrap_interval(labels, scores)
    expected = np.interp([0.025 * 999, 0.975 * 999], range(1000), sorted(sampled))
    assert found == pytest.approx(expected, rel=1e-9)


def test_pooled_is_of_both_kinds_and_not_their_mean(tmp_path: Path) -> None:
    sets = [load_toy(tmp_path, f"pushpins_{kind}") for kind in ("loco", "struct")]
    final = [np.array([0.0, 1, 2, 3, 2.5, 9, 9]), np.array([0.0, 1, 2, 3, 0.5, 0.6, 1.5])]
    sets = [replace(own, final=values) for own, values in zip(sets, final, strict=True)]
    bad = [*final[0][4:], *final[1][4:]]
    expected = np.mean([g < b for g in final[0][:4] for b in bad])
    assert metrics.pooled_auroc(sets) == pytest.approx(expected)
    others = replace(sets[1], final=np.where(sets[1].labels == 0, 99.0, sets[1].final))
    assert metrics.pooled_auroc([sets[0], others]) == pytest.approx(
        expected
    )  # good ones of the first
    assert metrics.pooled_auroc(sets[:1]) is None
    found = metrics.all_metrics(sets, {})["classes"]["pushpins"]["pooled_auroc"]
    assert found == pytest.approx(expected)


def test_means_are_of_classes_first_and_then_of_kinds(tmp_path: Path) -> None:
    names = ["pushpins_loco", "pushpins_struct", "boxes_loco"]
    values = metrics.all_metrics([load_toy(tmp_path, name) for name in names], {})
    own = {name: values["data_sets"][name]["auroc"]["level 7"] for name in names}
    found = values["mean"]["auc_roc_by_column"]["level 7"]
    logical = (own["pushpins_loco"] + own["boxes_loco"]) / 2
    assert found["logical_anomalies"] == pytest.approx(logical)
    assert found["mean"] == pytest.approx((logical + own["pushpins_struct"]) / 2)
    assert values["classes"]["boxes"]["classification"]["auc_roc"]["mean"] is None
    assert values["classes"]["boxes"]["pooled_auroc"] is None


def test_figures_of_a_data_set(tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "pushpins_loco")
    values = metrics.all_metrics([scores], {"pushpins_loco": {"bent": [4, 6]}})
    entry = values["data_sets"]["pushpins_loco"]
    good, bent = scores.final[:4], scores.final[[4, 6]]
    expected = np.mean([g < b for g in good for b in bent])
    assert entry["auroc_by_defect"]["bent"] == {"auroc": pytest.approx(expected), "n_images": 2}
    precision = average_precision_score(scores.labels, scores.final)
    assert entry["average_precision"] == pytest.approx(precision)
    counts = {"n_train": 9, "n_validation": 3, "n_good": 4, "n_anomalous": 3}
    assert counts.items() <= entry.items()
    assert [*entry["auroc"]][2:] == ["level 224", "network levels", "ensemble"]
    grid = scores.grids[14, 9].test
    assert entry["auroc_by_grid"]["level 14, 9 crops"] == metrics.auroc(scores.labels, grid)


def test_network_levels_have_a_column_where_there_are_several(tmp_path: Path) -> None:
    one = load_toy(tmp_path, "pushpins_loco", levels=(7,))
    extra = replace(one, extra={"other": np.arange(7.0)}, final=-one.ensemble)
    columns = metrics.columns_of(extra)
    names = ["level 7", "level 224", "ensemble", "extra other", "ensemble + other"]
    assert list(columns) == names
    values = [one.levels[7], one.levels[224], one.ensemble, np.arange(7.0), -one.ensemble]
    for found, expected in zip(columns.values(), values, strict=True):
        np.testing.assert_array_equal(found, expected)
    both = load_toy(tmp_path, "pushpins_loco", rep_num_224=0)
    assert list(metrics.columns_of(both)) == ["level 7", "level 14", "network levels", "ensemble"]
    np.testing.assert_array_equal(metrics.columns_of(both)["network levels"], both.network)


def test_another_kind_of_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A class whose anomalies are of no known kind: its mean is its own, nothing is pooled."""
    scores = load_toy(tmp_path, "pushpins_loco")
    monkeypatch.setattr("sinbad.loco.split_mvtype", lambda name: ("pushpins", "all"))
    found = metrics.all_metrics([scores], {})["classes"]["pushpins"]
    means = found["classification"]["auc_roc"]
    assert means["mean"] == metrics.auroc(scores.labels, scores.final)
    assert len(means) == 2
    assert found["pooled_auroc"] is None


def test_percent_of_no_value_one_and_several() -> None:
    assert metrics.percent([None]) == "-"
    assert metrics.percent([0.8884]) == "88.8"
    assert metrics.percent([0.9, 0.92]) == "91.0 +- 1.4"
