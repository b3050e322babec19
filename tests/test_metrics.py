"""Metrics against loops, and their means."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_scores
from sklearn.metrics import average_precision_score

from sinbad import loco
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
    values = []
    for threshold in SCORES:
        predicted = threshold <= SCORES
        hits = (predicted & (LABELS == 1)).sum()
        values.append(2 * hits / (predicted.sum() + (LABELS == 1).sum()))
    assert metrics.f1_max(LABELS, SCORES) == pytest.approx(max(values))
    assert values[0] != max(values) != values[-1]


def test_the_interval_is_of_the_2_5_and_the_97_5_percentile() -> None:
    labels, scores = np.repeat([0.0, 1.0], [30, 20]), np.random.default_rng(1).normal(0, 1, 50)
    rng, aurocs = np.random.default_rng(0), []
    for _ in range(1000):
        normal, anomalous = rng.choice(scores[:30], 30), rng.choice(scores[30:], 20)
        wins = (normal[:, None] < anomalous) + (normal[:, None] == anomalous) / 2
        aurocs.append(wins.mean())
    interval = metrics.bootstrap_interval(labels, scores)
    expected = np.interp([0.025 * 999, 0.975 * 999], range(1000), sorted(aurocs))
    assert interval == pytest.approx(expected, rel=1e-9)


def test_the_pooled_auroc_is_of_both_anomaly_types_and_not_their_mean(tmp_path: Path) -> None:
    sets = [toy_scores.load_toy(tmp_path, f"pushpins_{kind}") for kind in loco.KINDS]
    final = [np.array([0.0, 1, 2, 3, 2.5, 9, 9]), np.array([0.0, 1, 2, 3, 0.5, 0.6, 1.5])]
    sets = [replace(s, final=values) for s, values in zip(sets, final, strict=True)]
    anomalous = [*final[0][4:], *final[1][4:]]
    expected = np.mean([normal < a for normal in final[0][:4] for a in anomalous])
    assert metrics.pooled_auroc(sets) == pytest.approx(expected)
    others = replace(sets[1], final=np.where(sets[1].labels == 0, 99.0, sets[1].final))
    # The normal images are those of the first data set.
    assert metrics.pooled_auroc([sets[0], others]) == pytest.approx(expected)
    assert metrics.pooled_auroc(sets[:1]) is None
    entry = metrics.all_metrics(sets, {})["classes"]["pushpins"]
    assert entry["pooled_auroc"] == pytest.approx(expected)


def test_means_are_of_categories_first_and_then_of_anomaly_types(tmp_path: Path) -> None:
    names = ["pushpins_loco", "pushpins_struct", "boxes_loco"]
    values = metrics.all_metrics([toy_scores.load_toy(tmp_path, name) for name in names], {})
    aurocs = {name: values["data_sets"][name]["auroc"]["level 7"] for name in names}
    means = values["mean"]["auc_roc_by_column"]["level 7"]
    logical = (aurocs["pushpins_loco"] + aurocs["boxes_loco"]) / 2
    assert means["logical_anomalies"] == pytest.approx(logical)
    assert means["mean"] == pytest.approx((logical + aurocs["pushpins_struct"]) / 2)
    assert values["classes"]["boxes"]["classification"]["auc_roc"]["mean"] is None
    mean = values["mean"]
    assert mean["classification"]["auc_roc"] == mean["auc_roc_by_column"]["ensemble"]
    assert values["classes"]["boxes"]["pooled_auroc"] is None


def test_metrics_of_a_data_set(tmp_path: Path) -> None:
    scores = toy_scores.load_toy(tmp_path)
    values = metrics.all_metrics([scores], {"pushpins_loco": {"bent": [4, 6]}})
    entry = values["data_sets"]["pushpins_loco"]
    normal, bent = scores.final[:4], scores.final[[4, 6]]
    expected = np.mean([n < b for n in normal for b in bent])
    assert entry["auroc_by_defect"]["bent"] == {"auroc": pytest.approx(expected), "n_images": 2}
    precision = average_precision_score(scores.labels, scores.final)
    assert entry["average_precision"] == pytest.approx(precision)
    counts = {"n_train": 9, "n_validation": 3, "n_good": 4, "n_anomalous": 3}
    assert counts.items() <= entry.items()
    assert [*entry["auroc"]][2:] == ["level 224", "network levels", "ensemble"]
    grid = scores.ensemble.grids[14, 9].test
    assert entry["auroc_by_grid"]["level 14, 9 crops"] == metrics.auroc(scores.labels, grid)


def test_network_levels_have_a_column_where_there_are_several(tmp_path: Path) -> None:
    single = toy_scores.load_toy(tmp_path, levels=(7,))
    extra = replace(single, extra={"other": np.arange(7.0)}, final=-single.final)
    columns = metrics.score_columns(extra)
    names = ["level 7", "level 224", "ensemble", "extra other", "ensemble + other"]
    assert list(columns) == names
    levels = single.ensemble.levels[7], single.ensemble.levels[224]
    expected = [*levels, single.final, np.arange(7.0), -single.final]
    np.testing.assert_array_equal(list(columns.values()), expected)
    both = toy_scores.load_toy(tmp_path, rep_num_224=0)
    columns = metrics.score_columns(both)
    assert list(columns) == ["level 7", "level 14", "network levels", "ensemble"]
    np.testing.assert_array_equal(columns["network levels"], both.ensemble.network)


def test_a_category_without_anomaly_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its mean is the data set's AUROC, nothing is pooled."""
    scores = toy_scores.load_toy(tmp_path)
    monkeypatch.setattr("sinbad.loco.split_mvtype", lambda name: ("pushpins", "all"))
    entry = metrics.all_metrics([scores], {})["classes"]["pushpins"]
    means = entry["classification"]["auc_roc"]
    assert means["mean"] == metrics.auroc(scores.labels, scores.final)
    assert len(means) == 2
    assert entry["pooled_auroc"] is None


def test_percent_of_no_value_one_and_several() -> None:
    assert metrics.percent([None]) == "-"
    assert metrics.percent([0.8884]) == "88.8"
    assert metrics.percent([0.9, 0.92]) == "91.0 +- 1.4"
