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
    crops, by_position = rng.uniform(0.5, 3.0, (2, n_crops, N_TEST))
    return ensembles.GridScores(crops.mean(0), crops.mean(0), crops, by_position, settings)


def keyed(*grids: ensembles.GridScores) -> maps.Grids:
    """Return grids as those of a data set."""
    return {(14, i): grid for i, grid in enumerate(grids)}


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
def test_maps_against_a_loop_over_pixels(size: tuple[int, int]) -> None:
    grids = [grid_of(ratio) for ratio in (0.25, 0.5, 0.7, 0.99)]
    values = maps.image_map(keyed(*grids), 1.7, 3, size)
    assert (values.shape, values.dtype) == (size[::-1], np.float32)
    assert values.max() == np.float32(1.7)
    slow = filled(slow_map([(grid, grid.crops[:, 3], 1.0) for grid in grids], size))
    np.testing.assert_allclose(values, slow / slow.max() * 1.7, rtol=1e-6)
    weighted = [(g, g.own[:, 3], 1.0 / g.settings["crop_size_ratio"] ** 2) for g in grids]
    expected = filled(slow_map(weighted, size))
    np.testing.assert_allclose(maps.overlay_map(keyed(*grids), 3, size), expected, rtol=1e-12)


@pytest.mark.parametrize(("ratio", "crop_num_edge"), [(0.3, 4), (0.9, 4), (0.45, 1)])
def test_pixels_outside_all_crops(ratio: float, crop_num_edge: int) -> None:
    grid = grid_of(ratio, crop_num_edge)
    slow = filled(slow_map([(grid, grid.crops[:, 1], 1.0)], (64, 38)))
    values = maps.image_map(keyed(grid), 1.7, 1, (64, 38))
    np.testing.assert_allclose(values, slow / slow.max() * 1.7, rtol=1e-6)


def test_an_overlay_shows_crops_that_are_unlike_those_at_their_own_position() -> None:
    """A crop that always scores high is no sign of anything; maps in files show it all the same."""
    grid = replace(grid_of(0.5), own=np.ones((9, N_TEST)))
    grid.crops[:], grid.crops[0] = 1.0, 9.0
    grid.own[8] = 3.0
    y, x = np.unravel_index(maps.overlay_map(keyed(grid), 5, (64, 38)).argmax(), (38, 64))
    assert y >= 19
    assert x >= 48
    assert maps.image_map(keyed(grid), 1.7, 5, (64, 38)).argmax() == 0


def test_constant_maps() -> None:
    grid = grid_of(0.5)
    even = keyed(replace(grid, crops=np.full_like(grid.crops, 1.7)))
    for grids in (even, {}):  # without grids: raw pixels alone
        values = maps.image_map(grids, 1.3, 2, (50, 30))
        np.testing.assert_array_equal(values, np.full((30, 50), np.float32(1.3)))


@pytest.mark.parametrize("final_score", [-3.0, -1.0, 0.0, 0.5, 4.0])
def test_the_maximum_is_the_final_score_whatever_its_sign(final_score: float) -> None:
    grids = keyed(grid_of(0.5))
    values = maps.image_map(grids, final_score, 1, (50, 30))
    assert values.max() == np.float32(final_score)
    assert values.argmax() == maps.image_map(grids, 1.0, 1, (50, 30)).argmax()
    assert values.min() < values.max()


def test_authors_scores_have_no_maps() -> None:
    grids = keyed(replace(grid_of(0.5), settings={}))
    with pytest.raises(errors.UserError, match=r"positions of their crops, got no .* authors' own"):
        maps.image_map(grids, 1.0, 0, (50, 30))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "path", ["test/../../x.png", "/test/good/0.png", "train/good/0.png", "test/0001"]
)
def test_paths_stay_below_the_maps_folder(path: str, tmp_path: Path) -> None:
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=[path] * N_TEST)
    with pytest.raises(errors.UserError, match="must be test/<type>/<image>"):
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
            expected = maps.image_map(scores.grids, scores.final[index], index, image.size)
            np.testing.assert_array_equal(np.asarray(image), expected)
    both = maps.map_paths(maps_dir, sets, tmp_path / "images")
    assert len(both) == 4 + 3 + 3  # the normal images once


def test_two_images_with_one_stem_have_two_maps(tmp_path: Path) -> None:
    paths = image_paths("pushpins_loco")
    paths[1] = "test/good/000.jpg"
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=paths)
    map_paths = list(maps.map_paths(tmp_path, [scores], tmp_path / "no"))
    names = [path.name for path in map_paths if path.parent.name == "good"]
    assert names == ["000.png.tiff", "000.jpg.tiff", "002.png.tiff", "003.png.tiff"]
    assert map_paths[-1] == tmp_path / "pushpins/test/logical_anomalies/002.tiff"


@pytest.mark.parametrize(
    "how", ["same", "inside", "around", "links to the category", "linked category"]
)
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
    elif how == "links to the category":
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


def test_an_unknown_size(tmp_path: Path) -> None:
    scores = load_toy(tmp_path, "cable_loco")
    with pytest.raises(errors.UserError, match=r"--dataset_dir must hold cable/test/good/000\.png"):
        maps.write_maps(tmp_path / "maps", [scores], tmp_path / "images")
    image = tmp_path / "images/cable/test/good/000.png"
    image.parent.mkdir(parents=True)
    image.write_text("no image", encoding="utf-8")
    with pytest.raises(errors.UserError, match=r"000\.png must be a complete image"):
        maps.write_maps(tmp_path / "maps", [scores], tmp_path / "images")
