"""Anomaly maps: against a loop over pixels and crops, and through their files."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anomaly_maps import image_map, map_cells, write_maps
from command_line import UserError
from ensembles import DataSetScores, GridScores
from loco_datasets import crop_corners

Array = NDArray[np.float64]
N_TEST = 4
IMAGE_PATHS = [f"test/{kind}/00{i}.png" for kind in ("good", "logical_anomalies") for i in (0, 1)]


def grid_of(ratio: float, crop_num_edge: int = 4, side: int = 64, seed: int = 0) -> GridScores:
    """Return a grid with random crop scores of a data set of wide images (5 : 3)."""
    n_crops = len(crop_corners(side, ratio, crop_num_edge))
    settings = {
        "initial_res": side,
        "crop_size_ratio": ratio,
        "crop_num_edge": crop_num_edge,
        "matrices": {"width": side, "height": side * 3 // 5},
    }
    crops = np.random.default_rng([seed, n_crops]).uniform(0.5, 3.0, (n_crops, N_TEST))
    return GridScores(crops.mean(0), crops, settings)


def scores_of(
    grids: dict[tuple[int, int], GridScores], mvtype: str = "cable_loco"
) -> DataSetScores:
    """Return the scores of four images, two of them anomalous."""
    final = np.array([0.9, 1.25, 2.0, 7.5])
    kind = "structural" if mvtype.endswith("_struct") else "logical"
    paths = [path.replace("logical", kind) for path in IMAGE_PATHS]
    levels = {level: final for level, _ in grids} or {224: final}
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    resnet = final if grids else None
    return DataSetScores(mvtype, labels, paths, grids, levels, resnet, final, {}, final)


def slow_map(grids: list[GridScores], index: int, size: tuple[int, int], final: float) -> Array:
    """Return the map of one image, pixel by pixel; uncovered pixels take the nearest's value."""
    width, height = size
    covering = [[[] for _ in range(width)] for _ in range(height)]
    for grid in grids:
        fitted, side = grid.settings["matrices"], grid.settings["initial_res"]
        crop_side = math.floor(side * grid.settings["crop_size_ratio"])
        corners = crop_corners(
            side, grid.settings["crop_size_ratio"], grid.settings["crop_num_edge"]
        )
        for y in range(height):
            for x in range(width):
                matrix_y = math.floor((y + 0.5) * fitted["height"] / height)
                matrix_x = math.floor((x + 0.5) * fitted["width"] / width)
                for (top, left), scores in zip(corners, grid.crops, strict=True):
                    if 0 <= matrix_y - top < crop_side and 0 <= matrix_x - left < crop_side:
                        covering[y][x].append(scores[index])
    means = np.array([[np.mean(c) if c else np.nan for c in row] for row in covering])
    known = np.argwhere(~np.isnan(means))
    filled = means.copy()
    for y, x in np.argwhere(np.isnan(means)):
        near = known[np.square(known - (y, x)).sum(1).argmin()]
        filled[y, x] = means[near[0], near[1]]
    return filled / filled.max() * final


@pytest.mark.parametrize("size", [(64, 38), (25, 15), (70, 42)])
def test_maps_against_a_loop_over_pixels(size: tuple[int, int]) -> None:
    grids = {
        (level, len(grid.crops)): grid
        for level, side in ((7, 64), (14, 96))  # a level may be of larger matrices
        for grid in (grid_of(ratio, side=side, seed=level) for ratio in (0.25, 0.5, 0.7, 0.99))
    }
    scores = scores_of(grids)
    found = image_map(scores, 3, size)
    assert found.shape == size[::-1]
    assert found.dtype == np.float32
    assert found.max() == np.float32(scores.final[3])
    expected = slow_map(list(grids.values()), 3, size, scores.final[3])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("ratio", "crop_num_edge"), [(0.3, 4), (0.9, 4), (0.45, 1)])
def test_pixels_right_and_below_of_all_crops(ratio: float, crop_num_edge: int) -> None:
    grid = grid_of(ratio, crop_num_edge)
    found = image_map(scores_of({(14, len(grid.crops)): grid}), 1, (64, 38))
    np.testing.assert_allclose(found, slow_map([grid], 1, (64, 38), 1.25), rtol=1e-6)
    end = crop_corners(64, ratio, crop_num_edge)[-1][1] + math.floor(64 * ratio)
    np.testing.assert_array_equal(found[:, end:], found[:, end - 1 : end].repeat(64 - end, 1))


def test_gaps_between_crops_take_the_value_of_a_neighbour() -> None:
    grid = grid_of(0.4, 2)  # crops of 25 pixels, 32 apart
    found = image_map(scores_of({(14, 4): grid}), 1, (64, 38))
    expected = slow_map([grid], 1, (64, 38), 1.25)
    np.testing.assert_allclose(found[:25, :25], expected[:25, :25], rtol=1e-6)
    np.testing.assert_allclose(found[32:, 32:57], expected[32:, 32:57], rtol=1e-6)
    assert set(np.unique(found[:25, 25:32])) <= {found[0, 0], found[0, 32]}


def test_equal_crop_scores_give_a_constant_map() -> None:
    grid = grid_of(0.5)
    even = replace(grid, crops=np.full_like(grid.crops, 1.7))
    found = image_map(scores_of({(7, 9): even}), 3, (50, 30))
    np.testing.assert_array_equal(found, np.full((30, 50), np.float32(7.5)))


def test_raw_pixels_alone_give_a_constant_map() -> None:
    found = image_map(scores_of({}), 2, (50, 30))
    np.testing.assert_array_equal(found, np.full((30, 50), np.float32(2.0)))


def test_maximum_of_scores_that_are_not_positive() -> None:
    """Another method's scores may be negative; the most anomalous crop stays the highest."""
    scores = scores_of({(7, 9): grid_of(0.5)})
    lower = replace(scores, final=np.array([-3.0, 0.0, 1.0, 2.0]))
    for index in range(N_TEST):
        found, before = image_map(lower, index, (50, 30)), image_map(scores, index, (50, 30))
        assert found.max() == np.float32(lower.final[index])
        assert found.argmax() == before.argmax()
        assert found.min() < found.max()


def test_authors_scores_have_no_maps(tmp_path: Path) -> None:
    grid = replace(grid_of(0.5), settings={})
    with pytest.raises(UserError, match=r"cable_loco must hold the settings .* authors' own"):
        map_cells(scores_of({(7, 9): grid}), (50, 30))
    nameless = replace(scores_of({}, "pushpins_loco"), image_paths=[f"test/000{i}" for i in "0123"])
    with pytest.raises(UserError, match="must be test/<kind>/<image>, got test/0000"):
        write_maps(tmp_path, [nameless], None)


@pytest.mark.parametrize("path", ["test/../../x.png", "/test/good/0.png", "train/good/0.png"])
def test_paths_stay_below_the_maps_folder(path: str, tmp_path: Path) -> None:
    scores = replace(scores_of({}, "pushpins_loco"), image_paths=[path] * N_TEST)
    with pytest.raises(UserError, match="must be test/<kind>/<image>"):
        write_maps(tmp_path / "maps", [scores], None)
    assert not (tmp_path / "maps").exists()


def test_files_read_back(tmp_path: Path) -> None:
    for path in IMAGE_PATHS:
        image = tmp_path / "images" / "cable" / path
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50 + 5 * int(path[-5]), 30)).save(image)
    grids = {(7, 9): grid_of(0.5), (7, 1): grid_of(0.99)}
    scores = scores_of(grids)
    maps = tmp_path / "maps"
    for _ in range(2):  # the second time over existing files
        written = write_maps(maps, [scores], tmp_path / "images", 2)
    assert sorted(p for p in maps.rglob("*") if not p.is_dir()) == sorted(written)
    assert len(written) == N_TEST
    assert not (maps / ".sinbad_partial").exists()
    for index, path in enumerate(IMAGE_PATHS):
        with Image.open(maps / "cable" / path.replace(".png", ".tiff")) as image:
            assert (image.mode, image.format) == ("F", "TIFF")
            assert image.size == (50 + 5 * int(path[-5]), 30)
            np.testing.assert_array_equal(np.asarray(image), image_map(scores, index, image.size))
            assert np.asarray(image).max() == np.float32(scores.final[index])


def test_good_images_of_both_data_sets_are_written_once(tmp_path: Path) -> None:
    grids = {(7, 9): grid_of(0.5)}
    sets = [scores_of(grids, "pushpins_loco"), scores_of(grids, "pushpins_struct")]
    written = [str(path.relative_to(tmp_path)) for path in write_maps(tmp_path, sets, None)]
    kinds = ("good", "logical_anomalies", "structural_anomalies")
    assert written == [f"pushpins/test/{kind}/00{i}.tiff" for kind in kinds for i in (0, 1)]
    with Image.open(tmp_path / written[0]) as image:
        assert image.size == (1700, 1000)  # LOCO's, as there is no image


def test_size_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dataset_dir must hold cable/test/good/000\.png"):
        write_maps(tmp_path, [scores_of({})], tmp_path)
    image = tmp_path / "cable" / IMAGE_PATHS[0]
    image.parent.mkdir(parents=True)
    image.write_text("no image")
    with pytest.raises(UserError, match=r"000\.png must be an image"):
        write_maps(tmp_path, [scores_of({})], tmp_path)
