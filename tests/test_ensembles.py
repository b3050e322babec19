"""The ensemble: the authors' numbers through their files, and that unlike scores never join."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from toy_scores import RATIOS, Edit, ensemble, load_toy, options_of, write_data_set, write_file

import calc_anom_ensm
from sinbad import ensembles, errors, loco

GOLDEN = Path(__file__).parent / "golden"
MVTYPES = ("pushpins_loco", "screw_bag_struct")
N_REPS = 5

Array = NDArray[np.float64]


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
        files = {f"14/0/{n}_crop": f"{mvtype}_14_{n}" for n in (16, 9, 4, 1)}
        files |= {f"7/0/{n}_crop": f"{mvtype}_7_{n}" for n in (16, 9, 4, 1)}
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
    rows = ensemble(version, tmp_path, "--rep_num_224", str(N_REPS))
    values = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    for mvtype in MVTYPES:
        own = [row for row in rows if row["data_set"] == mvtype]
        for column, name in (("score", "final_scores"), ("level_224", "median_224")):
            found = np.array([float(row[column]) for row in own])
            np.testing.assert_allclose(found, golden[f"{mvtype}_{name}"], rtol=1e-6)
        assert [float(row["label"]) for row in own] == golden["labels"].tolist()
        roc = values["data_sets"][mvtype]["auroc"]["ensemble"]
        assert roc == pytest.approx(float(golden[f"{mvtype}_roc"]), abs=1e-12)
    captured = capsys.readouterr()
    assert f"{100 * float(golden['pushpins_loco_roc']):.1f}" in captured.out
    warnings = [line for line in captured.err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "warning: 26 of 26 files of scores carry no record" in warnings[0]


def test_lambda_factor_weighs_the_raw_pixels(
    version: str, golden: dict[str, Array], tmp_path: Path
) -> None:
    flags = ["--mvtype", "pushpins_loco", "--rep_num_224", str(N_REPS), "--lambda_factor"]
    scores = [
        np.array([float(row["score"]) for row in ensemble(version, tmp_path, *flags, factor)])
        for factor in ("0", "0.5")
    ]
    expected = 0.5 * golden["pushpins_loco_median_224"]
    np.testing.assert_allclose(scores[1] - scores[0], expected, rtol=1e-6)


def test_the_same_command_twice_gives_the_same_bytes(version: str, tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        ensemble(version, tmp_path / name, "--rep_num_224", "2")
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert {"table.md", "table.csv", "metrics.json", "scores.csv"} <= found[0].keys()
    assert found[0] == found[1]


# ---------------------------------------------------------------- crop norm and pool


@pytest.mark.parametrize("norm", ["grid", "crop"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_crop_norm_and_pool_against_loops(norm: str, pool: str, tmp_path: Path) -> None:
    scores = load_toy(
        tmp_path, "pushpins_loco", levels=(7,), rep_num_224=0, crop_norm=norm, crop_pool=pool
    )
    file = next(f for f in scores.files if len(f.scores.test) == 1)
    one = file.scores  # of a grid of one crop mean and maximum are the crop itself
    crop = one.test[0]
    mean = one.valid[0].mean()
    if norm == "crop":
        crop, mean = crop / (mean + 1e-5), mean / (mean + 1e-5)
    expected = crop / (mean + 1e-5) + 1e-5
    grid = scores.grids[7, 1]
    np.testing.assert_allclose(grid.crops[0], expected, rtol=1e-12)
    nine = next(f for f in scores.files if len(f.scores.test) == 9).scores
    means = nine.valid.mean(1)
    for i in range(len(scores.labels)):
        crops = [nine.test[c, i] / (means[c] + 1e-5) for c in range(9)]
        np.testing.assert_allclose(scores.grids[7, 9].own[:, i], crops, rtol=1e-12)
        if pool == "max":
            highest = max(crops if norm == "crop" else nine.test[:, i])
            assert scores.grids[7, 9].test[i] == pytest.approx(highest, rel=1e-12)
    other = "crop" if norm == "grid" else "grid"
    again = ensembles.load_data_set(
        options_of(tmp_path, levels=(7,), rep_num_224=0, crop_norm=other, crop_pool=pool),
        "pushpins_loco",
    )
    assert not np.allclose(again.final, scores.final, rtol=1e-3)


def test_flags_reach_the_ensemble_and_its_record(tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--rep_num_224", "2", "--crop_norm", "crop", "--crop_pool", "max"]
    rows = ensemble(version, tmp_path / "out", *flags)
    expected = ensembles.load_data_set(
        options_of(tmp_path, crop_norm="crop", crop_pool="max"), "pushpins_loco"
    ).final
    assert [float(row["score"]) for row in rows] == expected.tolist()
    record = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert record["made_from"]["report"]["crop_pool"] == ["max"]


# ---------------------------------------------------------------- what belongs together


CHANGES: dict[str, Any] = {
    "net": "resnet34",
    "weights_sha256": "def",
    "seed": 1,
    "official": True,
    "precision": "bf16",
    "images_sha256": "other",
    "n_images": {"train": 8, "valid": 3, "test": 7},
    "n_projections": 11,
    "n_quantiles": 4,
    "shrinkage_factor": 0.2,
    "crop_num_edge": 5,
    "initial_res": 128,
    "matrices": {"width": 1, "height": 1, "pillow": "13.0.0"},
}


def changing(**settings: object) -> Edit:
    """Return an edit of a record."""
    return lambda record: record.update(settings)


@pytest.mark.parametrize("name", CHANGES)
def test_grids_of_a_level_that_differ(name: str, tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    edit = changing(**{name: CHANGES[name]})
    path = write_file(tmp_path, "pushpins_loco", 14, RATIOS[1], edit=edit)
    with pytest.raises(errors.UserError, match=f"must be alike in {name}, got ") as caught:
        ensembles.load_data_set(options_of(tmp_path), "pushpins_loco")
    assert str(path) in str(caught.value)
    assert str(caught.value).count(".npz") == 2


OF_LEVEL = ("n_projections", "n_quantiles", "shrinkage_factor")
OF_ALL_LEVELS = [name for name in CHANGES if name not in OF_LEVEL]


@pytest.mark.parametrize("name", OF_ALL_LEVELS)
@pytest.mark.parametrize("level", [14, loco.PIXEL_LEVEL])
def test_levels_that_differ(name: str, level: int, tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    ratios = (0.999,) if level == loco.PIXEL_LEVEL else RATIOS
    for rep in (0, 1) if level == loco.PIXEL_LEVEL else (0,):
        for ratio in ratios:
            edit = changing(**{name: CHANGES[name]})
            write_file(tmp_path, "pushpins_loco", level, ratio, rep, edit)
    options = options_of(tmp_path)
    if level == loco.PIXEL_LEVEL and name in ("net", "weights_sha256", "precision"):
        ensembles.load_data_set(options, "pushpins_loco")  # raw pixels see no network
    else:
        with pytest.raises(errors.UserError, match=f"must be alike in {name}, got "):
            ensembles.load_data_set(options, "pushpins_loco")


def test_levels_have_their_own_descriptor(tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    for ratio in RATIOS:
        edit = changing(n_projections=77, n_quantiles=3, shrinkage_factor=0.7)
        write_file(tmp_path, "pushpins_loco", 14, ratio, edit=edit)
    ensembles.check_runs(
        {"rep 0": [ensembles.load_data_set(options_of(tmp_path), "pushpins_loco")]}
    )


def test_repetitions_of_raw_pixels_that_differ(tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    write_file(tmp_path, "pushpins_loco", loco.PIXEL_LEVEL, 0.999, 1, changing(n_projections=20))
    with pytest.raises(errors.UserError, match=r"alike in n_projections, got 10 in .* and 20 in"):
        ensembles.load_data_set(options_of(tmp_path), "pushpins_loco")


OF_ALL_SETS = [n for n in CHANGES if n not in ("images_sha256", "n_images", "matrices")]


@pytest.mark.parametrize("name", [*OF_ALL_SETS, "pillow"])
def test_data_sets_of_one_report_that_differ(name: str, tmp_path: Path) -> None:
    def edit(settings: dict[str, Any]) -> None:
        if name == "pillow":
            settings["matrices"]["pillow"] = "12.2.0"
        elif name in settings:
            settings[name] = CHANGES[name]

    write_data_set(tmp_path, "pushpins_loco")
    write_data_set(tmp_path, "boxes_loco", edit=edit)
    options = options_of(tmp_path)
    sets = [ensembles.load_data_set(options, mvtype) for mvtype in ("pushpins_loco", "boxes_loco")]
    with pytest.raises(errors.UserError, match=f"must be alike in {name}, got .*boxes_loco"):
        ensembles.check_runs({"rep 0": sets})


def test_data_sets_of_other_crop_grids(tmp_path: Path) -> None:
    first = load_toy(tmp_path, "pushpins_loco")
    for level in (7, 14):
        write_file(tmp_path, "boxes_loco", level, RATIOS[0])
    second = ensembles.load_data_set(options_of(tmp_path, rep_num_224=0), "boxes_loco")
    with pytest.raises(errors.UserError, match="must be alike in numbers of crops, got"):
        ensembles.check_runs({"rep 0": [first, second]})


def test_runs_may_differ_in_seed_alone(tmp_path: Path) -> None:
    runs = {}
    for seed, more in ((0, {}), (1, {}), (2, {"official": True})):
        root = tmp_path / str(seed)
        write_data_set(root, "pushpins_loco", edit=changing(seed=seed, **more))
        runs[f"seed {seed}"] = [ensembles.load_data_set(options_of(root), "pushpins_loco")]
    with pytest.raises(errors.UserError, match=r"alike in official, got False in .* and True in"):
        ensembles.check_runs(runs)
    del runs["seed 2"]
    ensembles.check_runs(runs)


@pytest.mark.parametrize("what", ["labels", "image_paths"])
def test_images_in_another_order(what: str, tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    path = write_file(tmp_path, "pushpins_loco", loco.PIXEL_LEVEL, 0.999, 1)
    with np.load(path) as archive:
        arrays = dict(archive)
    if what == "labels":
        np.save(path.with_name("lbl.npy"), np.load(path.with_name("lbl.npy"))[::-1])
    else:
        np.savez(path, **{**arrays, "image_paths": arrays["image_paths"][::-1]})
    with pytest.raises(errors.UserError, match=f"alike in {what}, got .*rep_num_0.*rep_num_1"):
        ensembles.load_data_set(options_of(tmp_path), "pushpins_loco")


@pytest.mark.parametrize("how", ["no #", "symbolic link", "copy"])
def test_a_level_read_twice(how: str, tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    seven, fourteen = (tmp_path / f"ver1_pyramid_lvl_{level}" for level in (7, 14))
    changes = {"version": str(seven)} if how == "no #" else {}
    match = "must be read once, got .* for level 7 and .* for level 14"
    if how != "no #":
        shutil.rmtree(fourteen)
    if how == "symbolic link":
        fourteen.symlink_to(seven)
    elif how == "copy":
        shutil.copytree(seven, fourteen)
        match = "must hold scores of pyramid_level 14, got 7"
    else:
        match = "must hold scores of pyramid_level 14, got 7|" + match
    with pytest.raises(errors.UserError, match=match):
        ensembles.load_data_set(options_of(tmp_path, **changes), "pushpins_loco")


def test_the_authors_level_read_twice(version: str) -> None:
    seven = version.replace("#", "7")
    options = options_of(Path(), version=seven, rep_num_224=0)
    with pytest.raises(errors.UserError, match="must be read once"):
        ensembles.load_data_set(options, "pushpins_loco")


def test_a_repetition_that_is_another_ones_copy_or_link(tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    pixels = tmp_path / f"ver1_pyramid_lvl_{loco.PIXEL_LEVEL}"
    shutil.rmtree(pixels / "rep_num_1")
    shutil.copytree(pixels / "rep_num_0", pixels / "rep_num_1")
    with pytest.raises(errors.UserError, match="must hold scores of rep rep_num_1, got rep_num_0"):
        ensembles.load_data_set(options_of(tmp_path), "pushpins_loco")


def test_a_repetition_missing_of_one_data_set_is_named(tmp_path: Path) -> None:
    for rep in (0, 1):
        write_data_set(tmp_path, "pushpins_loco", rep)
    write_data_set(tmp_path, "pushpins_struct", 0)
    version = str(tmp_path / "ver1_pyramid_lvl_#")
    flags = ["--mvtype", "pushpins", "--rep", "0-1", "--rep_num_224", "2"]
    with pytest.raises(errors.UserError, match=r"rep_num_1/pushpins_struct must hold .* --rep 1`"):
        ensemble(version, tmp_path / "out", *flags)
    write_data_set(tmp_path, "pushpins_struct", 1)
    ensemble(version, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "scores_rep_1.csv").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_data_set(tmp_path, "pushpins_loco")
    with pytest.raises(errors.UserError, match=r"level 224 --rep 2`, or ask for fewer"):
        ensembles.load_data_set(options_of(tmp_path, rep_num_224=3), "pushpins_loco")
    with pytest.raises(errors.UserError, match="must name a level"):
        ensembles.load_data_set(options_of(tmp_path, rep_num_224=0, levels=()), "pushpins_loco")
    with pytest.raises(
        errors.UserError, match="version must hold scores of cable_loco, got none in"
    ):
        ensembles.find_mvtypes([options_of(tmp_path)], ["cable_loco"])
    assert ensembles.find_mvtypes([options_of(tmp_path)], ["all"]) == ["pushpins_loco"]
    folder = tmp_path / "ver1_pyramid_lvl_224/rep_num_0/pushpins_loco"
    shutil.copy(folder / "63.00_lvl_anom_maps.npz", folder / "64.00_lvl_anom_maps.npz")
    with pytest.raises(errors.UserError, match=r"must hold one file .* got 63.* and 64"):
        ensembles.load_data_set(options_of(tmp_path), "pushpins_loco")
    with pytest.raises(errors.UserError, match="pyramid_level must be of the network, got 224"):
        calc_anom_ensm.main(["--pyramid_level", "7", "224", "--out", str(tmp_path)])
