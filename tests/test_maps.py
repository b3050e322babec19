"""Anomaly maps: against a loop over pixels and crops, and through their files."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from toy_scores import image_paths, load_toy

from sinbad import ensembles, errors, loco
from sinbad.report import maps

Array = NDArray[np.float64]
N_TEST = 7


def grid_of(ratio: float, crop_num_edge: int = 4, side: int = 64) -> ensembles.GridScores:
    """Return a grid with random crop scores of a data set of wide images (5 : 3)."""
    n_crops = len(loco.crop_corners(side, ratio, crop_num_edge))
    matrices = {"width": side, "height": side * 3 // 5}
    settings = {
        "initial_res": side,
        "crop_size_ratio": ratio,
        "crop_num_edge": crop_num_edge,
        "matrices": matrices,
    }
    rng = np.random.default_rng(n_crops)
    crops, own = rng.uniform(0.5, 3.0, (2, n_crops, N_TEST))
    return ensembles.GridScores(crops.mean(0), crops.mean(0), crops, own, settings)


def scores_with(root: Path, *grids: ensembles.GridScores) -> ensembles.DataSetScores:
    """Return toy scores whose crop grids are these."""
    scores = load_toy(root, "pushpins_loco")
    return replace(scores, grids={(14, i): grid for i, grid in enumerate(grids)})


def slow_map(
    grids: list[tuple[ensembles.GridScores, Array, float]], size: tuple[int, int]
) -> Array:
    """Return the weighted mean over covering crops, pixel by pixel; nan where there is none."""
    width, height = size
    means = np.full((height, width), np.nan)
    for y in range(height):
        for x in range(width):
            total = weights = 0.0
            for grid, values, weight in grids:
                fitted, side = grid.settings["matrices"], grid.settings["initial_res"]
                crop_side = math.floor(side * grid.settings["crop_size_ratio"])
                edge = grid.settings["crop_num_edge"]
                in_y = math.floor((y + 0.5) * fitted["height"] / height)
                in_x = math.floor((x + 0.5) * fitted["width"] / width)
                corners = loco.crop_corners(side, grid.settings["crop_size_ratio"], edge)
                for (top, left), value in zip(corners, values, strict=True):
                    if 0 <= in_y - top < crop_side and 0 <= in_x - left < crop_side:
                        total, weights = total + weight * value, weights + weight
            if weights:
                means[y, x] = total / weights
    return means


def filled(means: Array) -> Array:
    """Give every pixel without value that of the nearest that has one."""
    known, result = np.argwhere(~np.isnan(means)), means.copy()
    for y, x in np.argwhere(np.isnan(means)):
        near = known[np.square(known - (y, x)).sum(1).argmin()]
        result[y, x] = means[near[0], near[1]]
    return result


@pytest.mark.parametrize("size", [(64, 38), (25, 15), (70, 42)])
def test_maps_against_a_loop_over_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    grids = [grid_of(ratio) for ratio in (0.25, 0.5, 0.7, 0.99)]
    scores = scores_with(tmp_path, *grids)
    found = maps.image_map(scores, 3, size)
    assert (found.shape, found.dtype) == (size[::-1], np.float32)
    assert found.max() == np.float32(scores.final[3])
    slow = filled(slow_map([(grid, grid.crops[:, 3], 1.0) for grid in grids], size))
    np.testing.assert_allclose(found, slow / slow.max() * scores.final[3], rtol=1e-6)
    weighted = [(g, g.own[:, 3], 1.0 / g.settings["crop_size_ratio"] ** 2) for g in grids]
    expected = filled(slow_map(weighted, size))
    np.testing.assert_allclose(maps.overlay_map(scores, 3, size), expected, rtol=1e-12)


@pytest.mark.parametrize(("ratio", "crop_num_edge"), [(0.3, 4), (0.9, 4), (0.45, 1)])
def test_pixels_outside_all_crops(ratio: float, crop_num_edge: int, tmp_path: Path) -> None:
    grid = grid_of(ratio, crop_num_edge)
    scores = scores_with(tmp_path, grid)
    slow = filled(slow_map([(grid, grid.crops[:, 1], 1.0)], (64, 38)))
    found = maps.image_map(scores, 1, (64, 38))
    np.testing.assert_allclose(found, slow / slow.max() * scores.final[1], rtol=1e-6)


def test_an_overlay_shows_the_place_that_is_out_of_its_own_ordinary(tmp_path: Path) -> None:
    """A crop that always scores high is no sign of anything; maps in files show it all the same."""
    scores = load_toy(tmp_path, "pushpins_loco", levels=(7,), rep_num_224=0)
    grid = replace(grid_of(0.5), own=np.ones((9, N_TEST)))
    grid.crops[:], grid.crops[0] = 1.0, 9.0
    grid.own[8] = 3.0
    scores = replace(scores, grids={(7, 9): grid})
    wrong = np.unravel_index(maps.overlay_map(scores, 5, (64, 38)).argmax(), (38, 64))
    assert wrong[0] >= 19
    assert wrong[1] >= 48
    assert maps.image_map(scores, 5, (64, 38)).argmax() == 0


def test_constant_maps(tmp_path: Path) -> None:
    grid = grid_of(0.5)
    even = scores_with(tmp_path, replace(grid, crops=np.full_like(grid.crops, 1.7)))
    for scores in (even, scores_with(tmp_path)):  # without grids: raw pixels alone
        expected = np.full((30, 50), np.float32(scores.final[2]))
        np.testing.assert_array_equal(maps.image_map(scores, 2, (50, 30)), expected)


def test_maximum_of_scores_that_are_not_positive(tmp_path: Path) -> None:
    scores = scores_with(tmp_path, grid_of(0.5))
    lower = replace(scores, final=np.array([-3.0, 0.0, 1.0, 2.0, -1.0, 0.5, 4.0]))
    for index in range(N_TEST):
        found, before = (
            maps.image_map(lower, index, (50, 30)),
            maps.image_map(scores, index, (50, 30)),
        )
        assert found.max() == np.float32(lower.final[index])
        assert found.argmax() == before.argmax()
        assert found.min() < found.max()


def test_authors_scores_have_no_maps(tmp_path: Path) -> None:
    scores = scores_with(tmp_path, replace(grid_of(0.5), settings={}))
    with pytest.raises(
        errors.UserError, match=r"pushpins_loco must hold the settings .* authors' own"
    ):
        maps.image_map(scores, 0, (50, 30))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "path", ["test/../../x.png", "/test/good/0.png", "train/good/0.png", "test/0001"]
)
def test_paths_stay_below_the_maps_folder(path: str, tmp_path: Path) -> None:
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=[path] * N_TEST)
    with pytest.raises(errors.UserError, match="must be test/<kind>/<image>"):
        maps.write_maps(tmp_path / "maps", [scores], tmp_path / "none")
    assert not (tmp_path / "maps").exists()


def test_files_read_back(tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "pushpins_loco")
    for path in image_paths("pushpins_loco"):
        image = tmp_path / "images" / "pushpins" / path
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50 + 5 * int(path[-5]), 30)).save(image)
    sets = [scores, load_toy(tmp_path, "pushpins_struct")]
    maps_dir = tmp_path / "maps"
    for _ in range(2):  # the second time over existing files
        written = maps.write_maps(maps_dir, sets[:1], tmp_path / "images", 2)
    assert sorted(p for p in maps_dir.rglob("*") if not p.is_dir()) == sorted(written)
    for index, path in enumerate(image_paths("pushpins_loco")):
        with Image.open(maps_dir / "pushpins" / path.replace(".png", ".tiff")) as image:
            assert (image.mode, image.format) == ("F", "TIFF")
            assert image.size == (50 + 5 * int(path[-5]), 30)
            np.testing.assert_array_equal(
                np.asarray(image), maps.image_map(scores, index, image.size)
            )
    both = maps.map_paths(maps_dir, sets, tmp_path / "images")
    assert len(both) == 4 + 3 + 3  # the good images once


def test_two_images_with_one_stem_have_two_maps(tmp_path: Path) -> None:
    paths = image_paths("pushpins_loco")
    paths[1] = "test/good/000.jpg"
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=paths)
    found = [
        path.relative_to(tmp_path) for path in maps.map_paths(tmp_path, [scores], tmp_path / "no")
    ]
    good = [path.name for path in found if path.parent.name == "good"]
    assert good == ["000.png.tiff", "000.jpg.tiff", "002.png.tiff", "003.png.tiff"]
    assert str(found[-1]) == "pushpins/test/logical_anomalies/002.tiff"


@pytest.mark.parametrize("how", ["same", "inside", "around", "links to the class", "linked class"])
def test_maps_never_lie_among_the_images(how: str, tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "pushpins_loco")
    dataset, maps_dir = tmp_path / "images", tmp_path / "maps"
    image = dataset / "pushpins" / "test" / "good" / "000.tiff"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"an image")
    if how == "same":
        maps_dir = dataset
    elif how == "inside":
        maps_dir = dataset / "maps"
    elif how == "around":
        dataset = (tmp_path / "images").rename(tmp_path / "pushpins")
        maps_dir = tmp_path
    elif how == "links to the class":
        maps_dir.mkdir()
        (maps_dir / "pushpins").symlink_to(dataset / "pushpins")
    else:
        maps_dir.mkdir()
        (dataset / "pushpins").rename(maps_dir / "pushpins")
        (dataset / "pushpins").symlink_to(maps_dir / "pushpins")
    before = sorted(tmp_path.rglob("*.tiff"))
    with pytest.raises(errors.UserError, match="maps_dir must lie outside the images"):
        maps.write_maps(maps_dir, [scores], dataset)
    assert sorted(tmp_path.rglob("*.tiff")) == before


def test_size_that_is_not_known(tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "cable_loco")
    with pytest.raises(errors.UserError, match=r"--dataset_dir must hold cable/test/good/000\.png"):
        maps.write_maps(tmp_path / "maps", [scores], tmp_path / "images")
    image = tmp_path / "images/cable/test/good/000.png"
    image.parent.mkdir(parents=True)
    image.write_text("no image", encoding="utf-8")
    with pytest.raises(errors.UserError, match=r"000\.png must be an image"):
        maps.write_maps(tmp_path / "maps", [scores], tmp_path / "images")
