"""The ensemble: against slow loops, the authors' numbers through their files, consistent scores."""

import itertools
import json
import math
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_scores
from numpy.typing import NDArray

import calc_anom_ensm
from sinbad import ensembles, score_files, settings

GOLDEN = Path(__file__).parent / "golden"
MVTYPES = ("pushpins_loco", "screw_bag_struct")
N_REPS = 5
PIXEL = settings.PIXEL_LEVEL

Array = NDArray[np.float64]


# ---------------------------------------------------------------- arrays


def bicubic_mean(crop_map: Array) -> float:
    """Return the mean of a g x g map resized to 4 x 4: cubic convolution, a = -0.75."""

    def weight(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    side, total = len(crop_map), 0.0
    for y, x in itertools.product(range(4), range(4)):
        at_y, at_x = ((place + 0.5) * side / 4 - 0.5 for place in (y, x))
        for j, i in itertools.product(range(-1, 3), range(-1, 3)):
            row, column = math.floor(at_y) + j, math.floor(at_x) + i
            inside = crop_map[min(max(row, 0), side - 1), min(max(column, 0), side - 1)]
            total += inside * weight(at_y - row) * weight(at_x - column)
    return total / 16


def slow_grid(scores: ensembles.CropScores, norm: str, pool: str) -> Array:
    """Return the normalised scores of one grid, image by image."""
    means = [np.mean(row) + 1e-5 for row in scores.valid]
    pooled: dict[str, list[float]] = {"valid": [], "test": []}
    for split, values in pooled.items():
        for column in getattr(scores, split).T:
            crops = (
                [v / m for v, m in zip(column, means, strict=True)] if norm == "crop" else column
            )
            side = math.isqrt(len(crops))
            crop_map = np.array(crops).reshape(side, side)
            values.append(bicubic_mean(crop_map) if pool == "mean" else max(crops))
    return np.array(pooled["test"]) / (np.mean(pooled["valid"]) + 1e-5) + 1e-5


@pytest.mark.parametrize("norm", ["grid", "crop"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_an_ensemble_of_arrays_against_loops(norm: str, pool: str) -> None:
    rng = np.random.default_rng(0)
    parts = [
        ensembles.CropScores(level, rng.uniform(0, 9, (n, 6)), rng.uniform(1, 3, (n, 5)))
        for level, n in [
            (14, 16),
            (14, 9),
            (14, 1),
            (7, 4),
            (7, 1),
            (PIXEL, 1),
            (PIXEL, 1),
            (PIXEL, 1),
        ]
    ]
    values = settings.Settings(crop_norm=norm, crop_pool=pool, lambda_factor=0.3)
    ensemble = ensembles.combine(parts, values)
    by_level: dict[int, list[Array]] = {}
    for part in parts:
        by_level.setdefault(part.level, []).append(slow_grid(part, norm, pool))
    levels = {level: np.mean(grids, axis=0) for level, grids in by_level.items()}
    levels[PIXEL] = np.median(by_level[PIXEL], axis=0)
    assert list(ensemble.levels) == [14, 7, PIXEL]
    for level, expected in levels.items():
        np.testing.assert_allclose(ensemble.levels[level], expected, rtol=1e-9)
    network = (levels[14] + levels[7]) / 2
    np.testing.assert_allclose(ensemble.network, network, rtol=1e-9)
    np.testing.assert_allclose(ensemble.final, network + 0.3 * levels[PIXEL], rtol=1e-9)
    for (level, n_crops), grid in ensemble.grids.items():
        part = next(p for p in parts if (p.level, len(p.test)) == (level, n_crops))
        means = np.array([np.mean(row) for row in part.valid])[:, None] + 1e-5
        np.testing.assert_allclose(grid.relative, part.test / means, rtol=1e-12)
        divided = part.test / means if norm == "crop" else part.test
        expected = divided / (grid.valid.mean() + 1e-5) + 1e-5
        np.testing.assert_allclose(grid.crops, expected, rtol=1e-12)
    alone = ensembles.combine(parts[5:], values)  # raw pixels alone are not weighted
    np.testing.assert_array_equal(alone.final, ensemble.levels[PIXEL])
    assert alone.network is None
    for wrong in ([], [parts[0], parts[0]]):
        with pytest.raises(ValueError, match="crop_scores must "):
            ensembles.combine(wrong, values)


def test_a_position_without_any_variation_takes_the_mean_of_its_grid() -> None:
    test, valid = np.full((4, 2), 3.0), np.full((4, 5), 2.0)
    valid[1] = 0.0
    values = settings.Settings(crop_norm="crop")
    grid = ensembles.combine([ensembles.CropScores(7, test, valid)], values).grids[7, 4]
    np.testing.assert_allclose(grid.relative[:, 0], [1.5, 2.0, 1.5, 1.5], rtol=1e-4)


# ---------------------------------------------------------------- the authors' numbers


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(GOLDEN / "ensemble_official.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def version(golden: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Lay the golden scores out as the authors' scripts do; return the path with its #."""
    root = tmp_path_factory.mktemp("upstream")
    for mvtype in MVTYPES:
        grids = itertools.product((14, 7), (16, 9, 4, 1))
        files = {f"{level}/0/{n}_crop": f"{mvtype}_{level}_{n}" for level, n in grids}
        files |= {f"224/{rep}/1022.00_lvl": f"{mvtype}_224_rep{rep}" for rep in range(N_REPS)}
        for place, name in files.items():
            level, rep, file_name = place.split("/")
            folder = root / f"ver1_pyramid_lvl_{level}" / f"rep_num_{rep}" / mvtype
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {f"anom_map_{part}": golden[f"{name}_{part}"] for part in ("test", "valid")}
            np.savez(folder / f"{file_name}_anom_maps.npz", **arrays)
            np.save(folder / "lbl.py.npy", golden["labels"])
    return str(root / "ver1_pyramid_lvl_#")


def test_files_laid_out_as_the_authors_give_their_numbers(
    version: str, golden: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = toy_scores.ensemble(version, tmp_path, "--rep_num_224", str(N_REPS))
    values = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    for mvtype in MVTYPES:
        subset_rows = [row for row in rows if row["data_set"] == mvtype]
        for column, name in (("score", "final_scores"), ("level_224", "median_224")):
            scores = np.array([float(row[column]) for row in subset_rows])
            np.testing.assert_allclose(scores, golden[f"{mvtype}_{name}"], rtol=1e-6)
        assert [float(row["label"]) for row in subset_rows] == golden["labels"].tolist()
        roc = values["data_sets"][mvtype]["auroc"]["ensemble"]
        assert roc == pytest.approx(float(golden[f"{mvtype}_roc"]), abs=1e-12)
    captured = capsys.readouterr()
    assert f"{100 * float(golden['pushpins_loco_roc']):.1f}" in captured.out
    (warning,) = (line for line in captured.err.splitlines() if line.startswith("warning"))
    assert "warning: 26 of 26 files of scores carry no record" in warning


def test_flags_reach_the_ensemble_and_its_record(tmp_path: Path) -> None:
    toy_scores.write_subset(tmp_path)
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--rep_num_224", "2", "--crop_norm", "crop", "--crop_pool", "max"]
    contents = []
    for out in (tmp_path / "first", tmp_path / "second"):
        rows = toy_scores.ensemble(version, out, *flags, "--lambda_factor", "0.5")
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    values = replace(toy_scores.VALUES, crop_norm="crop", crop_pool="max", lambda_factor=0.5)
    expected = toy_scores.load(tmp_path, values=values).final
    assert [float(row["score"]) for row in rows] == expected.tolist()
    report = json.loads(contents[0]["metrics.json"])["made_from"]["report"]
    assert (report["crop_pool"], report["lambda_factor"]) == (["max"], [0.5])
    assert {"table.md", "table.csv", "metrics.json", "scores.csv"} <= contents[0].keys()
    assert contents[0] == contents[1]  # equal runs, equal bytes


# ---------------------------------------------------------------- consistent settings


def change(file: score_files.ScoreFile, name: str) -> score_files.ScoreFile:
    """Return a file of scores that differs in one name of EQUAL_IN."""
    arrays = {
        "labels": {"labels": file.labels[::-1]},
        "image_paths": {"image_paths": file.image_paths[::-1]},
        "number of validation images": {"valid": file.valid[:, 1:]},
        "numbers of crops": {"test": file.test[:1], "valid": file.valid[:1]},
    }
    if name in arrays:
        return replace(file, **arrays[name])
    value: object = "another"
    if name in ("matrices", "pillow"):
        value = toy_scores.MATRICES | {"width" if name == "matrices" else name: "another"}
        name = "matrices"
    return replace(file, record={"settings": file.recorded | {name: value}})


# A file, and files as far from it as a scope reaches, and beyond it: folder, subset, level, ratio.
FIRST = ("a", "pushpins_loco", 14, 0.5)
WITHIN = {
    settings.ALL_FILES: ("b", "boxes_loco", PIXEL, 0.999),
    settings.BACKBONE_FILES: ("b", "boxes_loco", 7, 0.5),
    settings.LEVEL_FILES: ("b", "boxes_loco", 14, 0.5),
    settings.RUN_FILES: ("a", "boxes_loco", PIXEL, 0.999),
    score_files.GRID_FILES: ("b", "boxes_loco", 14, 0.5),
    score_files.SUBSET_FILES: ("b", "pushpins_loco", PIXEL, 0.999),
}
BEYOND = {
    settings.BACKBONE_FILES: ("a", "pushpins_loco", PIXEL, 0.999),
    settings.LEVEL_FILES: ("a", "pushpins_loco", 7, 0.5),
    settings.RUN_FILES: ("b", "pushpins_loco", 14, 0.5),
    score_files.GRID_FILES: ("a", "pushpins_loco", 14, 0.99),
    score_files.SUBSET_FILES: ("a", "boxes_loco", 14, 0.5),
}
NAMES = [(scope, name) for scope, names in score_files.EQUAL_IN.items() for name in names]


def runs_of(
    place: tuple[str, str, int, float], name: str
) -> dict[str, list[score_files.ScoreFile]]:
    """Return FIRST and, at another place, a file that differs in a name; a folder is a run."""
    runs: dict[str, list[score_files.ScoreFile]] = {"a": [], "b": []}
    for root, *rest in (FIRST, place):
        runs[root].append(toy_scores.make_file(Path(root), *rest))
    runs[place[0]][-1] = change(runs[place[0]][-1], name)
    return runs


@pytest.mark.parametrize(("scope", "name"), NAMES)
def test_files_that_differ_are_refused_within_a_scope(scope: str, name: str) -> None:
    runs = runs_of(WITHIN[scope], name)
    with toy_scores.refused(f"must be consistent in {name}, got ") as caught:
        score_files.check_consistent(runs)
    assert all(str(file.path) in str(caught.value) for files in runs.values() for file in files)


@pytest.mark.parametrize(("scope", "name"), [pair for pair in NAMES if pair[0] in BEYOND])
def test_files_may_differ_beyond_a_scope(scope: str, name: str) -> None:
    score_files.check_consistent(runs_of(BEYOND[scope], name))


def test_all_that_is_recorded_is_compared() -> None:
    names = {name for _, name in NAMES} | {"mvtype", "pyramid_level", "rep"}
    assert toy_scores.make_file(Path()).recorded.keys() <= names


def test_inconsistent_grids_repetitions_subsets_and_runs(tmp_path: Path) -> None:
    """Through files: what `load_subset` and `check_runs` hand to the comparison."""
    for level, ratio, rep in ((14, toy_scores.RATIOS[1], 0), (PIXEL, 0.999, 1)):
        root = tmp_path / str(level)
        toy_scores.write_subset(root)
        file = toy_scores.make_file(root, "pushpins_loco", level, ratio, rep, n_quantiles=4)
        score_files.write_scores(file)
        with toy_scores.refused("consistent in n_quantiles, got 5 in .* and 4 in"):
            toy_scores.load(root)
    runs = {}
    for seed in (0, 1):
        toy_scores.write_subset(tmp_path / f"run_{seed}", seed=seed)
        runs[f"seed {seed}"] = [toy_scores.load(tmp_path / f"run_{seed}")]
    score_files.check_runs(runs)  # runs may differ in the seed
    with toy_scores.refused(r"consistent in seed, got 0 in .* and 1 in .*run_1"):
        score_files.check_runs({"rep 0": [*runs["seed 0"], *runs["seed 1"]]})


# ---------------------------------------------------------------- folders of scores


SAME_FILE = r"\(level 7\) and .* \(level 14\) are the same file; put # in --version"


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("no #", SAME_FILE),
        ("link", SAME_FILE),
        ("copy", "must hold scores of pyramid_level 14, got 7"),
        ("copied repetition", "must hold scores of rep rep_num_1, got rep_num_0"),
    ],
)
def test_scores_that_are_read_twice(how: str, match: str, tmp_path: Path) -> None:
    toy_scores.write_subset(tmp_path)
    source, target = (tmp_path / f"ver1_pyramid_lvl_{level}" for level in (7, 14))
    changes = {"version": str(source)} if how == "no #" else {}
    if how == "copied repetition":
        source, target = (tmp_path / f"ver1_pyramid_lvl_224/rep_num_{rep}" for rep in (0, 1))
    shutil.rmtree(target)
    if how == "link":
        target.symlink_to(source)
    else:
        shutil.copytree(source, target)
    with toy_scores.refused(match):
        toy_scores.load(tmp_path, **changes)


def test_an_authors_level_that_is_read_twice(version: str) -> None:
    with toy_scores.refused(SAME_FILE):
        toy_scores.load(Path(), version=version.replace("#", "7"), rep_num_224=0)


def test_a_repetition_that_one_subset_lacks_is_named(tmp_path: Path) -> None:
    for mvtype, rep in (("pushpins_loco", 0), ("pushpins_loco", 1), ("pushpins_struct", 0)):
        toy_scores.write_subset(tmp_path, mvtype, rep)
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--mvtype", "pushpins", "--rep", "0-1", "--rep_num_224", "2"]
    with toy_scores.refused(r"rep_num_1/pushpins_struct must hold .* --rep 1`"):
        toy_scores.ensemble(version, tmp_path / "out", *flags)
    toy_scores.write_subset(tmp_path, "pushpins_struct", 1)
    toy_scores.ensemble(version, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "scores_rep_1.csv").exists()


def test_missing_scores_are_named(tmp_path: Path) -> None:
    toy_scores.write_subset(tmp_path)
    with toy_scores.refused(r"level 224 --rep 2`, or ask for fewer"):
        toy_scores.load(tmp_path, rep_num_224=3)
    with toy_scores.refused("must name a level"):
        toy_scores.load(tmp_path, rep_num_224=0, levels=())
    selection = toy_scores.select(tmp_path)
    with toy_scores.refused("version must hold scores of cable_loco, got none in"):
        score_files.find_mvtypes([selection], ["cable_loco"])
    assert score_files.find_mvtypes([selection], ["all"]) == ["pushpins_loco"]
    folder = tmp_path / "ver1_pyramid_lvl_224/rep_num_0/pushpins_loco"
    shutil.copy(folder / "63.00_lvl_anom_maps.npz", folder / "64.00_lvl_anom_maps.npz")
    with toy_scores.refused(r"must hold one file .* got 63.* and 64"):
        toy_scores.load(tmp_path)
    with toy_scores.refused("pyramid_level must be of the network, got 224"):
        calc_anom_ensm.main(["--pyramid_level", "7", "224", "--out", str(tmp_path)])


def test_an_error_of_the_system_is_no_damage(tmp_path: Path) -> None:
    file = toy_scores.make_file(tmp_path)
    score_files.write_scores(file)
    score_files.read_scores(file.path, 14)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            score_files.read_scores(file.path, 14)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_labels_are_written_where_they_differ_from_those_present(tmp_path: Path) -> None:
    file = toy_scores.make_file(tmp_path)
    score_files.write_scores(file)
    labels = file.path.with_name("lbl.npy")
    os.utime(labels, (1, 1))
    score_files.write_scores(file)
    assert labels.stat().st_mtime == 1
    labels.write_bytes(labels.read_bytes()[:-1])
    score_files.write_scores(file)
    np.testing.assert_array_equal(np.load(labels), file.labels)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = toy_scores.make_file(tmp_path)
    score_files.write_scores(file)
    content = file.path.read_bytes()
    for start in range(1, 2000, 97):
        for damaged in (content[start:], content[:-start], content[:start] + content[start + 50 :]):
            file.path.write_bytes(damaged)
            with toy_scores.refused("9_crop_anom_maps.npz must be a complete file of scores"):
                score_files.read_scores(file.path, 14)
