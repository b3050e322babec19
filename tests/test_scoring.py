"""Crops in full batches: equal to `score_crop` byte for byte; each image is forwarded once."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IM_SIZE
from runs import N_PROJECTIONS, read, score
from torch import Tensor

import sinbad_utils
from sinbad import (
    backbones,
    crops,
    devices,
    errors,
    image_pool,
    images,
    loco,
    matrices,
    scoring,
    settings,
)

CPU = torch.device("cpu")
VALUES = settings.Settings(
    initial_res=IM_SIZE, batch_size=4, num_workers=1, n_projections=N_PROJECTIONS
)


def load_pool(data_dir: Path, *mvtypes: str) -> tuple[image_pool.ImagePool, dict]:
    """Return the pool of some test subsets, and the numbers of each split's images."""
    subsets = [matrices.load_matrices(data_dir, name) for name in mvtypes]
    return matrices.pool_subsets(subsets, CPU, 1)


def pixel_task(ratio: float, rep: int = 0) -> scoring.GridTask:
    """Return the task of a crop grid of the raw pixels."""
    return scoring.GridTask(ratio, scoring.Repetition(224, 0, rep))


def test_corners_of_a_grid_row_by_row() -> None:
    assert crops.CropGrid(64, 0.7, 4).corners == [(0, 0), (0, 16), (16, 0), (16, 16)]
    places = [(y, x) for y in (0, 256, 512) for x in (0, 256, 512)]
    assert crops.CropGrid(1024, 0.5, 4).corners == places
    assert len(crops.CropGrid(1024, 0.25, 4)) == 16
    sides = [crops.CropGrid(1024, ratio, 4).side for ratio in (0.7, 0.99, 0.999)]
    assert sides == [716, 1013, 1022]
    assert crops.CropGrid(8, 0.13, 8).corners == [(y, x) for y in range(8) for x in range(8)]
    for ratio, edges in ((0.12, 8), (0.5, 9)):
        with pytest.raises(errors.UserError, match="at least 1 pixel"):
            _ = crops.CropGrid(8, ratio, edges).corners


def test_batches_are_full_and_may_span_segments() -> None:
    position = scoring.CropPosition(crops.CropGrid(64, 0.7, 4), 0, (0, 0), ())
    segments = [scoring.Segment(position, (7, 8, 9)) for _ in range(3)]
    batches = [
        [(segments.index(segment), ids) for segment, ids in batch]
        for batch in scoring.full_batches(segments, 4)
    ]
    assert batches == [[(0, [7, 8, 9]), (1, [7])], [(1, [8, 9]), (2, [7, 8])], [(2, [9])]]


def test_raw_pixels_are_not_padded(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, ids = load_pool(data_dir, "pushpins_loco")
    train, sizes, elements = ids["pushpins_loco", "train"], [], backbones.pixel_elements

    def record(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return elements(pixels)

    monkeypatch.setattr(backbones, "pixel_elements", record)
    scorer = scoring.CropScorer(pool, replace(VALUES, batch_size=256), None)
    list(scorer.score_grids([pixel_task(0.99)], train, [[0]]))
    assert sizes == [len(train) + 1]


@pytest.mark.parametrize("official", [False, True])
def test_splits_with_the_same_ranges_are_scored_together(official: bool) -> None:
    valid, test = list(range(40, 75)), [3, *range(75, 110)]
    struct = [*test[:32], 110, 111]  # the same first 32 images
    groups = scoring.range_groups([valid, test, struct], official)
    assert [group.splits for group in groups] == ([[0], [1, 2]] if official else [[0, 1, 2]])
    images_of_test = groups[-1].image_ids
    assert set(images_of_test) == {*test, *struct, *(() if official else valid)}
    assert len(images_of_test) == len(set(images_of_test))
    scores = np.arange(len(images_of_test), dtype=float)
    by_split = groups[-1].by_split(scores, [valid, test, struct])
    for number in groups[-1].splits:
        split = [valid, test, struct][number]
        assert [images_of_test[int(score)] for score in by_split[number]] == split


@pytest.fixture(scope="module")
def streams(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return whether the numerics are the authors' -> folder of scores of all levels at once."""
    asked = ["--mvtype", "pushpins", "--pyramid_level", "7", "14", "224", "--rep", "0-1"]
    asked += ["--crop_size_ratio", ".7", ".99"]
    folders = {official: tmp_path_factory.mktemp("scores") for official in (False, True)}
    for official, folder in folders.items():
        score(data_dir, folder, *asked, *["--official"] * official)
    return folders


@pytest.fixture(scope="module")
def elements(data_dir: Path) -> list[dict[str, dict[int, Tensor]]]:
    """Return, for each crop of four, split -> level -> the elements of pushpins_struct's images."""
    weights = backbones.load_weights("resnet18", "random")
    backbone = backbones.build_backbone("resnet18", weights, (7, 14))
    extractor = backbones.FeatureExtractor(backbone, CPU)
    grid = crops.CropGrid(IM_SIZE, 0.7, 4)
    source = images.nearest_source(grid.side, 224)
    by_crop = []
    for corner in grid.corners:
        by_split = {}
        for split, array in matrices.load_matrices(data_dir, "pushpins_struct").images.items():
            pixels = torch.from_numpy(
                np.stack([image_pool.crop_pixels(image, corner, source) for image in array])
            )
            # Full batches of another order: a crop's features do not depend on its neighbours.
            padded = torch.cat([pixels, pixels.new_zeros(-len(pixels) % 5, *pixels.shape[1:])])
            parts = [
                extractor.extract(batch) | {224: backbones.pixel_elements(batch)}
                for batch in padded.split(5)
            ]
            by_split[split] = {
                level: torch.cat([part[level] for part in parts])[: len(pixels)]
                for level in (7, 14, 224)
            }
        by_crop.append(by_split)
    return by_crop


@pytest.mark.parametrize("official", [False, True], ids=["ours", "official"])
@pytest.mark.parametrize("level", [7, 14, 224])
def test_the_stream_gives_the_bytes_of_score_crop(
    level: int,
    official: bool,
    streams: dict[bool, Path],
    elements: list[dict[str, dict[int, Tensor]]],
) -> None:
    rep, name = 1, "44.00_lvl" if level == 224 else "4_crop"
    folder = streams[official] / f"ver1_pyramid_lvl_{level}/rep_num_{rep}/pushpins_struct"
    file = read(folder / f"{name}_anom_maps.npz")
    for crop, by_split in enumerate(elements):
        key, shrinkage = (0, rep, level, 4, crop), 1.0 if level == 224 else 0.1
        for split, scores in (("test", file.test), ("valid", file.valid)):
            sets = by_split["train"][level], by_split[split][level]
            expected = sinbad_utils.score_crop(*sets, key, N_PROJECTIONS, 5, shrinkage, official)
            np.testing.assert_array_equal(scores[crop], expected)


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize("order", [range(7), range(6, -1, -1)])
def test_scores_do_not_depend_on_batches_chunks_and_order(
    order: Sequence[int], chunk: int, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, ids = load_pool(data_dir, "pushpins_loco")
    train, test = ids["pushpins_loco", "train"], ids["pushpins_loco", "test"]

    def scores_of(batch_size: int, split: list[int]) -> np.ndarray:
        scorer = scoring.CropScorer(pool, replace(VALUES, batch_size=batch_size), None)
        ((_, (scores,)),) = scorer.score_grids([pixel_task(0.7)], train, [split])
        return scores

    expected = scores_of(4, test)
    monkeypatch.setitem(sinbad_utils.VALUES_PER_CHUNK, "cpu", chunk)
    order = [i for i in order if i < len(test)]
    actual = scores_of(3, [test[i] for i in order])
    np.testing.assert_array_equal(actual, expected[:, order])


def test_each_image_is_forwarded_once_at_each_position_outside_the_padding(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, ids = load_pool(data_dir, "pushpins_loco", "pushpins_struct")
    sizes, pixel_elements = [], backbones.pixel_elements

    def counted(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return pixel_elements(batch)

    monkeypatch.setattr(backbones, "pixel_elements", counted)
    released: list[None] = []
    monkeypatch.setattr(pool, "drop_page_cache", lambda: released.append(None))
    scorer = scoring.CropScorer(pool, replace(VALUES, batch_size=1), None)
    splits = [ids[f"pushpins_{kind}", s] for kind in ("loco", "struct") for s in ("valid", "test")]
    tasks = [pixel_task(0.25, rep) for rep in (0, 1)]
    results = dict(scorer.score_grids(tasks, ids["pushpins_loco", "train"], splits))
    assert len(released) == sum(sizes)  # else the process grows with the images it has read
    assert sum(sizes) == 12 * len(pool)  # 16 positions, the last row is padding: 48 > 37 pixels
    for task in tasks:
        valid, _, valid_again, _ = results[task]
        np.testing.assert_array_equal(valid, valid_again)
        assert (valid[12:] == 0).all()
        assert (valid[:12] > 0).any(1).all()


def test_a_training_image_that_is_also_scored_is_scored(data_dir: Path) -> None:
    pool, ids = load_pool(data_dir, "pushpins_loco")
    train = ids["pushpins_loco", "train"]
    ((_, (scores,)),) = scoring.CropScorer(pool, VALUES, None).score_grids(
        [pixel_task(0.99)], train, [train]
    )
    assert np.abs(scores).max() < 1e-9


def test_nan_features_name_image_and_level_before_anything_is_fitted(data_dir: Path) -> None:
    pool, ids = load_pool(data_dir, "pushpins_loco")
    backbone = backbones.build_backbone(
        "resnet18", backbones.load_weights("resnet18", "random"), (14,)
    )
    extractor = backbones.FeatureExtractor(backbone, CPU)
    extract, n_batches = extractor.extract, 0

    def broken(batch: Tensor) -> dict[int, Tensor]:
        nonlocal n_batches
        n_batches += 1
        elements = extract(batch)[14].clone()
        elements[1, 0, 0] = torch.nan
        return {14: elements}

    extractor.extract = broken
    scorer = scoring.CropScorer(pool, VALUES, extractor)
    task = scoring.GridTask(0.99, scoring.Repetition(14, 0, 0))
    train, test = ids["pushpins_loco", "train"], ids["pushpins_loco", "test"]
    with pytest.raises(errors.UserError, match=r"train/good/001\.png at level 14 \(1 of 5 images"):
        list(scorer.score_grids([task], train, [test]))
    assert n_batches == 2  # of 5 training images


def test_one_training_image_is_not_enough(data_dir: Path) -> None:
    pool, _ = load_pool(data_dir, "pushpins_loco")
    scorer = scoring.CropScorer(pool, VALUES, None)
    with pytest.raises(errors.UserError, match="training images must be at least 2, got 1"):
        list(scorer.score_positions([pixel_task(0.7)], [0], [[1]]))
    assert list(scorer.score_positions([pixel_task(0.7)], [0, 1], [[2]]))


def test_the_core_knows_no_files_of_scores() -> None:
    code = "import sys, sinbad.detectors; print(*(m for m in sys.modules if 'score_' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("sizes", [(40,), (31, 1, 8), (5,) * 8, (32, 8)], ids=str)
def test_ranges_are_fitted_on_32_images_however_they_come(
    sizes: tuple[int, ...], official: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(40, 6, 49, generator=generator) for _ in range(2))
    test[32:] *= 9.0
    train[32:] *= 9.0  # their values must not widen the ranges
    repetition = scoring.Repetition(7, 3, 1)
    position = scoring.CropPosition(crops.CropGrid(64, 0.7, 4), 2, (16, 0), (repetition,))
    values = settings.Settings(n_projections=20, official=official)
    batches = [iter([{7: part} for part in sets.split(sizes)]) for sets in (train, test)]
    in_parts = devices.Halving()
    models = scoring.fit_models(batches[0], 40, position, values, in_parts)
    scores = scoring.score_images(batches[1], models, 40, official, in_parts)[repetition]
    expected = sinbad_utils.score_crop(train, test, (3, 1, 7, 4, 2), 20, 5, 0.1, official)
    np.testing.assert_array_equal(scores, expected)


def test_steps_after_the_network_are_halved_while_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = ({7: torch.randn(40, 6, 49, generator=generator)} for _ in range(2))
    repetition = scoring.Repetition(7, 0, 0)
    position = scoring.CropPosition(crops.CropGrid(64, 0.99, 4), 0, (0, 0), (repetition,))
    values = settings.Settings(n_projections=20)

    def scores_of(in_parts: devices.Halving) -> np.ndarray:
        models = scoring.fit_models(iter([train]), 40, position, values, in_parts)
        return scoring.score_images(iter([test]), models, 40, True, in_parts)[repetition]

    expected = scores_of(devices.Halving())
    project, selected = sinbad_utils.project, sinbad_utils.fit_ranges

    def limited_project(directions: Tensor, elements: Tensor) -> Tensor:
        if len(directions) * len(elements) > 32 * 10:
            raise torch.OutOfMemoryError
        return project(directions, elements)

    def limited_ranges(projected: Tensor) -> tuple[Tensor, Tensor]:
        if projected.shape[1] > 5:
            raise torch.OutOfMemoryError
        return selected(projected)

    monkeypatch.setattr(sinbad_utils, "project", limited_project)
    monkeypatch.setattr(sinbad_utils, "fit_ranges", limited_ranges)
    np.testing.assert_array_equal(scores_of(devices.Halving()), expected)
    said = [line.split("too small for ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == [  # each once
        "20 directions at once, going on with 10",
        "10 directions at once, going on with 5",
        "40 crops at once, going on with 20",
        "20 crops at once, going on with 10",
    ]


@pytest.mark.parametrize(
    ("n_workers", "batch_bytes", "resident", "expected"),
    [
        (1, 1, False, 2),
        (3, 1, False, 3),
        (9, 1 << 26, False, 8),
        (9, 1 << 29, False, 2),
        (9, 1, True, 2),
    ],
)
def test_as_many_batches_are_gathered_at_once_as_threads_and_memory_allow(
    n_workers: int,
    batch_bytes: int,
    resident: bool,
    expected: int,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, _ = load_pool(data_dir, "pushpins_loco")
    pool.resident = torch.zeros(()) if resident else None
    scorer = scoring.CropScorer(pool, replace(VALUES, num_workers=n_workers), None)
    scorer.batch_size = max(1, batch_bytes // (3 * 224**2))
    n_started, lock, all_started = 0, threading.Lock(), threading.Event()

    def gather(batch: scoring.Batch) -> Tensor:
        nonlocal n_started
        with lock:
            n_started += 1
            if n_started == min(n_workers, expected):
                all_started.set()
        assert all_started.wait(20)  # these are gathered at the same time
        return torch.zeros(1)

    monkeypatch.setattr(scorer, "_gather", gather)
    gathered = scorer._gathered(iter([[] for _ in range(30)]))
    next(gathered)
    assert n_started <= expected
    assert len(list(gathered)) == 29


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux counts its threads there")
def test_gathering_threads_start_no_threads_of_openmp(data_dir: Path) -> None:
    """With more of them than processors, all of them sleep between any two operations."""
    pool, _ = load_pool(data_dir, "pushpins_loco")
    scorer = scoring.CropScorer(pool, VALUES, None)
    here, there, *_ = scorer._positions([pixel_task(0.7)])
    ids = tuple(range(8))
    batch = [(scoring.Segment(here, ids), list(ids)), (scoring.Segment(there, ids), [3, 1])]
    with ThreadPoolExecutor(1) as thread:
        thread.submit(int).result()  # it runs
        n_threads = len(os.listdir("/proc/self/task"))
        pixels = thread.submit(scorer._gather, batch).result()
        assert len(os.listdir("/proc/self/task")) <= n_threads
    assert pixels.shape == (10, 3, 224, 224)


def test_the_next_category_is_loaded_while_one_is_scored(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{category}_loco" for category in list(loco.LOCO_CLASSES)[:4]]
    for name in names:
        shutil.copytree(data_dir / "pushpins_loco", tmp_path / name)
    loaded = [threading.Event() for _ in names]
    pools, load = [], matrices.pool_subsets
    score_positions = scoring.CropScorer.score_positions
    n_alive = []

    def load_and_tell(*args: object) -> tuple[image_pool.ImagePool, dict]:
        pool, ids = load(*args)
        n_alive.append(sum(other() is not None for other in pools))
        pools.append(weakref.ref(pool))
        loaded[len(pools) - 1].set()
        return pool, ids

    def wait_and_score(scorer: scoring.CropScorer, *args: object) -> Iterator:
        n_scored = [other() for other in pools].index(scorer.pool) + 1
        assert all(event.wait(20) for event in loaded[: n_scored + 1])
        assert not any(event.is_set() for event in loaded[n_scored + 1 :])
        return score_positions(scorer, *args)

    monkeypatch.setattr(matrices, "pool_subsets", load_and_tell)
    monkeypatch.setattr(scoring.CropScorer, "score_positions", wait_and_score)
    score(tmp_path, tmp_path / "out", "--mvtype", *names, "--pyramid_level", "224")
    assert len(list((tmp_path / "out").rglob("*.npz"))) == len(names)
    assert n_alive == [0, 1, 1, 1]


def test_nothing_of_a_batch_outlives_its_crop_position(data_dir: Path) -> None:
    """Small tensors that are kept pin the heap between the large ones of each forward pass."""
    pool, ids = load_pool(data_dir, "pushpins_loco")
    scorer = scoring.CropScorer(pool, replace(VALUES, batch_size=1), None)
    train, test = ids["pushpins_loco", "train"], ids["pushpins_loco", "test"]
    n_tensors = []
    gc.collect()
    gc.freeze()  # older objects are not searched
    for _ in scorer.score_positions([pixel_task(0.25)], train, [test]):
        gc.collect()
        n_tensors.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    gc.unfreeze()
    assert len(n_tensors) == 16
    # 10 batches each; the last four positions are padding; batches are gathered ahead in threads.
    assert max(n_tensors[8:12]) < max(n_tensors[1:4]) + 5
