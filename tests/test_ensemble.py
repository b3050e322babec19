"""The ensemble: against the authors' numbers, as arrays and through their files, and loops."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from numpy.typing import NDArray

import calc_anom_ensm
from sinbad_utils import ensemble_scores, grid_scores, level_scores, normalise_scores

Array = NDArray[np.float64]
MVTYPES = ("pushpins_loco", "screw_bag_struct")
LEVELS = (7, 14)
GRIDS = (16, 9, 4, 1)
N_REPS = 5


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(GOLDEN / "ensemble_official.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def version(golden: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Lay the golden scores out as the authors' scripts do; return the path with its #."""
    root = tmp_path_factory.mktemp("upstream")
    for mvtype in MVTYPES:
        for level in LEVELS:
            folder = root / f"ver1_pyramid_lvl_{level}" / "rep_num_0" / mvtype
            for n_crops in GRIDS:
                name = f"{mvtype}_{level}_{n_crops}"
                _save(folder, f"{n_crops}_crop_anom_maps.npz", name, golden)
        for rep in range(N_REPS):
            folder = root / "ver1_pyramid_lvl_224" / f"rep_num_{rep}" / mvtype
            _save(folder, "1022.00_lvl_anom_maps.npz", f"{mvtype}_224_rep{rep}", golden)
    return str(root / "ver1_pyramid_lvl_#")


def _save(folder: Path, file_name: str, name: str, golden: dict[str, Array]) -> None:
    """Write one file of scores and the labels beside it, under the authors' names."""
    folder.mkdir(parents=True, exist_ok=True)
    test, valid = golden[f"{name}_test"], golden[f"{name}_valid"]
    np.savez(folder / file_name, anom_map_test=test, anom_map_valid=valid)
    np.save(folder / "lbl.py.npy", golden["labels"])


def slow_bicubic(image: Array, size: int) -> Array:
    """Cubic convolution with a = -.75, pixel centres aligned, borders repeated (cv2's)."""
    side, a = len(image), -0.75

    def weight(distance: float) -> float:
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    result = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = ((i + 0.5) * side / size - 0.5 for i in (row, column))
            for v in range(math.floor(y) - 1, math.floor(y) + 3):
                for u in range(math.floor(x) - 1, math.floor(x) + 3):
                    pixel = image[min(max(v, 0), side - 1), min(max(u, 0), side - 1)]
                    result[row, column] += weight(y - v) * weight(x - u) * pixel
    return result


def split_of(golden: dict[str, Array], names: list[str]) -> tuple[list[Array], list[Array]]:
    return [golden[f"{n}_test"] for n in names], [golden[f"{n}_valid"] for n in names]


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_grid_scores_against_a_slow_bicubic(side: int) -> None:
    crop_scores = np.random.default_rng(side).random((side * side, 5))
    expected = [slow_bicubic(column.reshape(side, side), 4).mean() for column in crop_scores.T]
    np.testing.assert_allclose(grid_scores(crop_scores), expected, rtol=1e-12)


def test_grid_that_is_not_square() -> None:
    with pytest.raises(ValueError, match="square grid, got 6 crops"):
        grid_scores(np.ones((6, 3)))


def test_normalised_scores() -> None:
    found = normalise_scores(np.array([2.0, 4.0]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(found, [2 / 2.00001 + 1e-5, 4 / 2.00001 + 1e-5], rtol=1e-12)


@pytest.mark.parametrize("mvtype", MVTYPES)
def test_arrays_equal_the_authors(mvtype: str, golden: dict[str, Array]) -> None:
    levels = [
        level_scores(*split_of(golden, [f"{mvtype}_{level}_{n}" for n in GRIDS]))
        for level in LEVELS
    ]
    reps = [level_scores(*split_of(golden, [f"{mvtype}_224_rep{r}"])) for r in range(N_REPS)]
    median = ensemble_scores([], reps, 0.1)
    np.testing.assert_allclose(median, golden[f"{mvtype}_median_224"], rtol=1e-6)
    final = ensemble_scores(levels, reps, 0.1)
    np.testing.assert_allclose(final, golden[f"{mvtype}_final_scores"], rtol=1e-6)
    without = ensemble_scores(levels, [], 0.1)
    np.testing.assert_allclose(without + 0.1 * median, final, rtol=1e-12)


def test_order_of_grids_and_repetitions_does_not_matter(golden: dict[str, Array]) -> None:
    tests, valids = split_of(golden, [f"pushpins_loco_7_{n}" for n in GRIDS])
    np.testing.assert_allclose(
        level_scores(tests[::-1], valids[::-1]), level_scores(tests, valids), rtol=1e-12
    )


def test_files_laid_out_as_the_authors_give_their_numbers(
    version: str, golden: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--version", version, "--version_224", version, "--rep_num_224", str(N_REPS)]
    calc_anom_ensm.main(["--mvtype", *MVTYPES, *flags, "--out", str(tmp_path)])
    with open(tmp_path / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for mvtype in MVTYPES:
        own = [row for row in rows if row["data_set"] == mvtype]
        scores = np.array([float(row["score"]) for row in own])
        np.testing.assert_allclose(scores, golden[f"{mvtype}_final_scores"], rtol=1e-6)
        median = np.array([float(row["level_224"]) for row in own])
        np.testing.assert_allclose(median, golden[f"{mvtype}_median_224"], rtol=1e-6)
        assert [float(row["label"]) for row in own] == golden["labels"].tolist()
        roc = metrics["data_sets"][mvtype]["auroc"]["ensemble"]
        assert roc == pytest.approx(float(golden[f"{mvtype}_roc"]), abs=1e-12)
    printed = capsys.readouterr().out
    assert "pushpins_loco" in printed
    assert f"{100 * float(golden['pushpins_loco_roc']):.1f}" in printed


def test_lambda_factor_weighs_the_raw_pixels(
    version: str, golden: dict[str, Array], tmp_path: Path
) -> None:
    flags = ["--version", version, "--version_224", version, "--rep_num_224", str(N_REPS)]
    for factor in ("0", "0.5"):
        out = ["--out", str(tmp_path / factor), "--lambda_factor", factor]
        calc_anom_ensm.main(["--mvtype", "pushpins_loco", *flags, *out])
    scores = {}
    for factor in ("0", "0.5"):
        with open(tmp_path / factor / "scores.csv") as file:
            scores[factor] = np.array([float(row["score"]) for row in csv.DictReader(file)])
    added = scores["0.5"] - scores["0"]
    np.testing.assert_allclose(added, 0.5 * golden["pushpins_loco_median_224"], rtol=1e-6)


def test_ensembling_twice_gives_the_same_bytes(version: str, tmp_path: Path) -> None:
    flags = ["--version", version, "--version_224", version, "--rep_num_224", str(N_REPS)]
    found = []
    for name in ("first", "second"):
        calc_anom_ensm.main(["--mvtype", "pushpins_loco", *flags, "--out", str(tmp_path / name)])
        files = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.suffix != ".png"}
        found.append(files)
    assert {"table.md", "table.csv", "metrics.json", "scores.csv"} <= found[0].keys()
    assert found[0] == found[1]
