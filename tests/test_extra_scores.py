"""Another method's scores: normalised, weighted, added; never turned round."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from toy_scores import ensemble, load_toy, write_data_set

from sinbad import ensembles, errors

Array = NDArray[np.float64]


def extra_csv(path: Path, valid: list[float], test: list[float]) -> Path:
    """Write another method's scores of the toy pushpins_loco, below some folder."""
    lines = [f"pushpins/validation/good/{i:03d}.png,{v}" for i, v in enumerate(valid)]
    kinds = ["good"] * 4 + ["logical_anomalies"] * 3
    numbers = [*range(4), *range(3)]
    lines += [
        f"/else/where/pushpins/test/{kind}/{i:03d}.png,{value}"
        for kind, i, value in zip(kinds, numbers, test, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


VALID, TEST = [1.0, 2.0, 4.5], [1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0]


def test_extra_scores_are_normalised_weighted_and_added(tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "pushpins_loco")
    path = extra_csv(tmp_path / "other.csv", VALID, TEST)
    by_mean = ensembles.add_extra_scores(scores, ensembles.read_extra_scores(path, 0.5, "mean"))
    expected = np.array(TEST) / (2.5 + 1e-5) + 1e-5
    np.testing.assert_allclose(by_mean.extra["other"], expected, rtol=1e-12)
    np.testing.assert_allclose(by_mean.final, scores.ensemble + 0.5 * expected, rtol=1e-12)
    by_std = ensembles.add_extra_scores(scores, ensembles.read_extra_scores(path, 0.5, "std"))
    expected = (np.array(TEST) - 2.5) / np.std(VALID)
    np.testing.assert_allclose(by_std.extra["other"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("valid", "test"),
    [
        ([-v for v in VALID], TEST),
        (VALID, [-0.1, *TEST[1:]]),
        ([0.0] * 3, TEST),
        ([-1.0, 2.0, 3.0], TEST),
    ],
)
def test_extra_scores_that_the_mean_would_turn_round(
    valid: list[float], test: list[float], tmp_path: Path
) -> None:
    scores = load_toy(tmp_path, "pushpins_loco")
    path = extra_csv(tmp_path / "other.csv", valid, test)
    with pytest.raises(errors.UserError, match="pass --extra_norm std"):
        ensembles.add_extra_scores(scores, ensembles.read_extra_scores(path, 1.0, "mean"))
    if len(set(valid)) > 1:
        extra = ensembles.add_extra_scores(
            scores, ensembles.read_extra_scores(path, 1.0, "std")
        ).extra["other"]
        assert np.argsort(extra).tolist() == np.argsort(test).tolist()
    else:
        with pytest.raises(errors.UserError, match="must vary over the validation images"):
            ensembles.add_extra_scores(scores, ensembles.read_extra_scores(path, 1.0, "std"))


@pytest.mark.parametrize("lowest", [0.0, 0.001])
def test_extra_scores_below_one_are_divided_by_their_mean(lowest: float, tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "pushpins_loco")
    test = [lowest, 0.1, 0.2, 0.3, 0.9, 0.8, 0.7]
    path = extra_csv(tmp_path / "other.csv", [lowest, 0.2, 0.4], test)
    extra = ensembles.add_extra_scores(
        scores, ensembles.read_extra_scores(path, 1.0, "mean")
    ).extra["other"]
    expected = np.array(test) / ((lowest + 0.6) / 3 + 1e-5) + 1e-5
    np.testing.assert_allclose(extra, expected, rtol=1e-12)


def test_negative_extra_scores_at_a_great_weight_through_the_script(tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    test = [-10.2, -10.3, -10.4, -10.5, -5.0, -4.9, -4.8]
    path = extra_csv(tmp_path / "other.csv", [-10.0, -10.1, -10.4], test)
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--rep_num_224", "2", "--extra_scores", str(path), "--extra_weight", "1000"]
    with pytest.raises(errors.UserError, match="--extra_norm std"):
        ensemble(version, tmp_path / "out", *flags)
    ensemble(version, tmp_path / "out", *flags, "--extra_norm", "std")
    values = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert values["data_sets"]["pushpins_loco"]["auroc"]["ensemble + other"] == 1.0
    assert values["made_from"]["extra scores"]["norm"] == ["std"]


@pytest.mark.parametrize("folder", ["validation", "validation/good"])
@pytest.mark.parametrize("before", ["", "/else/where/", "pushpins/"])
def test_extra_scores_of_other_layouts(before: str, folder: str, tmp_path: Path) -> None:
    """Paths of VisA's depth and of validation images without a folder of their own."""
    paths = [f"Data/Images/{'Normal' if i < 4 else 'Anomaly'}/{i:04d}.JPG" for i in range(7)]
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=paths)
    lines = [f"{before}pushpins/{name},{v}" for name, v in zip(paths, TEST, strict=True)]
    lines += [f"{before}cable/{folder}/0.png,77", "other/Data/Images/Normal/0000.JPG,88"]
    path = tmp_path / "other.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        errors.UserError, match="so a class without that folder takes none"
    ) as caught:
        ensembles.add_extra_scores(scores, ensembles.read_extra_scores(path, 1.0, "mean"))
    assert "\n" not in str(caught.value)
    lines += [f"{before}pushpins/{folder}/{i}.png,{v}" for i, v in enumerate(VALID)]
    path.write_text("\n".join(lines), encoding="utf-8")
    extra = ensembles.add_extra_scores(
        scores, ensembles.read_extra_scores(path, 1.0, "mean")
    ).extra["other"]
    np.testing.assert_allclose(extra, np.array(TEST) / (2.5 + 1e-5) + 1e-5, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "must hold lines"),
        ("pushpins/test/good/9.png,high\n", "line 1 must be"),
        ("9.png,1\n", "line 1 must be"),
        ("pushpins/test/good/000.png,1\n", "must hold every test image of pushpins_loco"),
        ("score,image_path\n1,a/b/c/d.png\nnan,a/b/c/e.png\n", "line 3 must be"),
    ],
)
def test_bad_extra_scores(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(errors.UserError, match=line):
        ensembles.add_extra_scores(
            load_toy(tmp_path, "pushpins_loco"), ensembles.read_extra_scores(path, 1.0, "mean")
        )
    lines = extra_csv(path, VALID, TEST).read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if "/val" not in line), encoding="utf-8")
    with pytest.raises(errors.UserError, match=re.escape("got none of pushpins/validation/")):
        ensembles.add_extra_scores(
            load_toy(tmp_path, "pushpins_loco"), ensembles.read_extra_scores(path, 1.0, "mean")
        )
