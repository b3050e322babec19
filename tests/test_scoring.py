"""The stream: equal to `score_crop` byte for byte, and its parts against obvious ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IM_SIZE
from runs import N_DIRECTIONS, score

import sinbad_single_layer
import sinbad_utils
from sinbad import backbones, loco, matrices, score_files, score_plans, scoring


def test_corners_of_a_grid_row_by_row() -> None:
    assert loco.crop_corners(64, 0.7, 4) == [(0, 0), (0, 16), (16, 0), (16, 16)]
    places = [(y, x) for y in (0, 256, 512) for x in (0, 256, 512)]
    assert loco.crop_corners(1024, 0.5, 4) == places
    assert loco.crop_corners(1024, 0.99, 4) == [(0, 0)]
    assert len(loco.crop_corners(1024, 0.25, 4)) == 16
    assert (loco.crop_side(1024, 0.7), loco.crop_side(1024, 0.999)) == (716, 1022)


@pytest.mark.parametrize("official", [False, True])
def test_ranges_are_fitted_on_the_first_32_images(official: bool) -> None:
    splits = {"train": range(40), "valid": range(40, 75), "test": [3, *range(75, 110)]}
    ids = {("a_loco", split): list(own) for split, own in splits.items()}
    pool = matrices.ImagePool([], torch.device("cpu"))
    pool.ids = {**ids, ("a_struct", "train"): list(range(40))}
    pool.ids |= {("a_struct", split): [110, 111] for split in ("valid", "test")}
    groups = scoring.range_groups(pool, ["a_loco", "a_struct"], official)
    for split, own in splits.items():
        group = groups["a_loco", split]
        assert group.fit_ids == tuple((own if official else splits["train"])[:32])
        assert set(own) <= set(group.members)
        assert sorted(group.members.values()) == list(range(len(group.members)))
        assert len(group.members) == (len(own) if official else 112)
    assert groups["a_loco", "train"] is groups["a_struct", "train"]
    assert (groups["a_struct", "test"] is groups["a_struct", "train"]) != official


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
def test_descriptors_do_not_depend_on_when_images_come(
    order: list[int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.VALUES_AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    elements = torch.randn(7, 3, 50, generator=generator)
    directions = [torch.randn(6, 3, generator=generator) for _ in range(2)]
    group = scoring.RangeGroup(
        (3, 1, 4), {3: 0, 1: 1, 4: 2, 0: 3, 6: 4, 5: 5}
    )  # 2 is another group's
    builder = scoring.DescriptorBuilder(group, directions, 5)
    for part in (order[:2], order[2:4], order[4:]):
        batch = elements[part].clone()
        builder.add(part, batch)
        batch.zero_()  # what is kept is a copy
    assert not builder.waiting
    for draw, own in enumerate(directions):
        values = sinbad_utils.project(own, elements)
        expected = sinbad_utils.cumulative_histogram(
            values, *sinbad_utils.fit_ranges(values[[3, 1, 4]]), 5
        )
        assert torch.equal(builder.descriptors(draw, [0, 5, 4]), expected[[0, 5, 4]])
        assert torch.equal(
            builder.descriptors(draw, [3, 1, 4, 0, 6, 5]), expected[[3, 1, 4, 0, 6, 5]]
        )


def test_how_much_is_worked_on_at_a_time() -> None:
    builder = scoring.DescriptorBuilder(scoring.RangeGroup((0,), {0: 0}), [torch.ones(2, 3)], 5)
    assert builder.described.shape == (1, 1, 10)
    n = scoring.VALUES_AT_ONCE["cpu"]
    assert [builder._step(k) for k in (n + 1, n, n // 2, n // 3)] == [1, 1, 2, 3]


def test_only_consecutive_numbers_are_a_slice() -> None:
    for numbers in ([], [0], [4], [2, 3, 4]):
        found = scoring.as_index(numbers)
        assert isinstance(found, slice)
        assert list(range(9))[found] == numbers
    for numbers in ([3, 2], [1, 3], [2, 2]):
        assert scoring.as_index(numbers) == numbers


def test_batches_are_full_and_may_span_jobs() -> None:
    jobs = [scoring.CropJob([], crop, 3, (0, 0), 9, False) for crop in range(3)]
    found = [
        [(job.crop, ids) for job, ids in batch]
        for batch in scoring.full_batches(jobs, [7, 8, 9], 4)
    ]
    assert found == [
        [(0, [7, 8, 9]), (1, [7])],
        [(1, [8, 9]), (2, [7, 8])],
        [(2, [9])],
    ]
    whole = [[ids for _, ids in batch] for batch in scoring.full_batches(jobs[:2], [7, 8], 2)]
    assert whole == [[[7, 8]], [[7, 8]]]


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
def elements(data_dir: Path) -> list[dict[str, dict[int, torch.Tensor]]]:
    """Return, for each crop of four, split -> level -> the elements of pushpins_struct's images."""
    backbone = backbones.build_backbone(
        "resnet18", backbones.load_weights("resnet18", "random"), (7, 14)
    )
    extractor = backbones.FeatureExtractor(backbone, torch.device("cpu"))
    images = matrices.load_matrices(data_dir, "pushpins_struct").images
    source, found = images.nearest_source(loco.crop_side(IM_SIZE, 0.7), 224), []
    for corner in loco.crop_corners(IM_SIZE, 0.7, 4):
        of_crop = {}
        for split, pixels in images.items():
            crops = torch.from_numpy(
                np.stack([matrices.crop_pixels(i, corner, source) for i in pixels])
            )
            # Full batches of another order: a crop's features do not depend on its neighbours.
            padded = torch.cat([crops, crops.new_zeros(-len(crops) % 5, *crops.shape[1:])])
            parts = [
                extractor.extract(batch) | {224: backbones.pixel_elements(batch)}
                for batch in padded.split(5)
            ]
            of_crop[split] = {
                level: torch.cat([part[level] for part in parts])[: len(crops)]
                for level in (7, 14, 224)
            }
        found.append(of_crop)
    return found


@pytest.mark.parametrize("official", [False, True], ids=["ours", "official"])
@pytest.mark.parametrize("level", [7, 14, 224])
def test_the_stream_gives_the_bytes_of_score_crop(
    level: int,
    official: bool,
    streams: dict[bool, Path],
    elements: list[dict[str, dict[int, torch.Tensor]]],
) -> None:
    rep, name = 1, "44.00_lvl" if level == 224 else "4_crop"
    folder = streams[official] / f"ver1_pyramid_lvl_{level}/rep_num_{rep}/pushpins_struct"
    found = score_files.read_scores(folder / f"{name}_anom_maps.npz")
    for crop, own in enumerate(elements):
        key, shrinkage = (0, rep, level, 4, crop), 1.0 if level == 224 else 0.1
        for split, scores in (("test", found.test), ("valid", found.valid)):
            sets = own["train"][level], own[split][level]
            expected = sinbad_utils.score_crop(*sets, key, N_DIRECTIONS, 5, shrinkage, official)
            np.testing.assert_array_equal(scores[crop], expected)


def test_only_images_of_the_data_sets_asked_for_are_forwarded(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {
        name: matrices.load_matrices(data_dir, name)
        for name in ("pushpins_loco", "pushpins_struct")
    }
    argv = ["--mvtype", "pushpins", "--initial_res", str(IM_SIZE), "--batch_size", "1"]
    task = score_plans.ScoreTask("pushpins_loco", 224, 0.7, 0, 0, "ver1")
    score_plan = score_plans.ScorePlan.of(sinbad_single_layer.parse_args(argv), [task], data_dir)
    batches, pixel_elements = [], backbones.pixel_elements
    monkeypatch.setattr(
        backbones,
        "pixel_elements",
        lambda crops: batches.append(crops) or pixel_elements(crops),
    )
    jobs = list(scoring.ClassScorer(score_plan, sets, None, torch.device("cpu")).crop_jobs([task]))
    n_images = sum(map(len, sets["pushpins_loco"].images.values()))
    assert len(batches) == n_images * sum(not job.is_empty for job in jobs)
