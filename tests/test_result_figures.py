"""Pictures of a report: which are drawn, that they decode, that equal scores give equal bytes."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import COUNTS, files_below
from PIL import Image

import result_figures
from ensembles import DataSetScores, GridScores
from loco_datasets import KINDS, split_mvtype
from result_figures import extreme_images, write_figures
from sinbad_utils import Scores

DPI = 40
SCORE_PICTURES = ["score_distributions", "roc_curves", "auroc_by_grid"]


def scores_of(mvtype: str, grids: bool = True) -> DataSetScores:
    """Return scores of the test images that conftest draws, or of as many of another class."""
    parts = ["test/good", f"test/{KINDS[split_mvtype(mvtype)[1]]}"]
    paths = [f"{part}/{i:03d}.png" for part in parts for i in range(COUNTS[part])]
    rng = np.random.default_rng(len(mvtype))
    labels = np.array([float("good" not in path) for path in paths])
    final = 1.0 + labels + rng.uniform(0.0, 1.5, len(paths))
    crops = rng.uniform(0.5, 2.0, (9, len(paths)))
    settings = {
        "initial_res": 64,
        "crop_size_ratio": 0.5,
        "crop_num_edge": 4,
        "matrices": {"width": 64, "height": 37},
    }
    return DataSetScores(
        mvtype,
        labels,
        paths,
        {(7, 9): GridScores(crops.mean(0), crops, settings)} if grids else {},
        {7: crops.mean(0), 224: final} if grids else {224: final},
        crops.mean(0) if grids else None,
        final,
        {},
        final,
    )


def select(scores: DataSetScores, images: list[int]) -> DataSetScores:
    """Return the scores of some of the images."""

    def own(values: Scores) -> Scores:
        return values[..., images]

    return replace(
        scores,
        labels=own(scores.labels),
        image_paths=[scores.image_paths[i] for i in images],
        grids={
            key: replace(grid, joined=own(grid.joined), crops=own(grid.crops))
            for key, grid in scores.grids.items()
        },
        levels={level: own(values) for level, values in scores.levels.items()},
        resnet=None if scores.resnet is None else own(scores.resnet),
        ensemble=own(scores.ensemble),
        final=own(scores.final),
    )


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw with fewer pixels: the layout is in inches."""
    monkeypatch.setattr(result_figures, "DPI", DPI)


def check_pictures(paths: list[Path], names: list[str]) -> None:
    """Check that exactly these pictures are there, and that each shows something."""
    assert [path.stem for path in paths] == names
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert "Software" not in image.info
            assert 3 * DPI < image.width <= 13 * DPI
            assert 1.2 * DPI <= image.height <= 15 * DPI
            assert len(set(image.convert("L").tobytes())) > 20


def test_equal_scores_give_equal_bytes(dataset_dir: Path, tmp_path: Path) -> None:
    sets = [scores_of("pushpins_loco"), scores_of("pushpins_struct")]
    names = [*SCORE_PICTURES, "images_pushpins_loco", "images_pushpins_struct"]
    paths = write_figures(tmp_path, sets, dataset_dir)
    check_pictures(paths, names)
    first = files_below(tmp_path)
    (tmp_path / "roc_curves.png").write_bytes(b"half a picture")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):  # a user's own
        write_figures(tmp_path, sets, dataset_dir)
        assert matplotlib.rcParams["font.size"] == 20
    assert files_below(tmp_path) == first


def test_twenty_data_sets_without_images_or_settings(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = []
    for number in range(10):
        for kind in KINDS:
            scores = scores_of(f"class_with_a_long_name_{number}_{kind}")
            bare = {key: replace(grid, settings={}) for key, grid in scores.grids.items()}
            sets.append(replace(scores, grids=bare))
    check_pictures(write_figures(tmp_path, sets, dataset_dir), SCORE_PICTURES)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no sheets of images for class_with_a_long_name_0_loco, " in said[0]


def test_one_test_image(dataset_dir: Path, tmp_path: Path) -> None:
    one = select(scores_of("pushpins_struct"), [4])
    check_pictures(
        write_figures(tmp_path, [one], dataset_dir), [*SCORE_PICTURES, "images_pushpins_struct"]
    )


def test_raw_pixels_alone(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [scores_of(name, grids=False) for name in ("pushpins_loco", "cable_loco")]
    check_pictures(
        write_figures(tmp_path, sets, dataset_dir), [*SCORE_PICTURES, "images_pushpins_loco"]
    )
    assert "no sheets of images for cable_loco: " in capsys.readouterr().err


def test_no_image_is_shown_twice() -> None:
    for n_images in range(1, 12):
        final = np.random.default_rng(n_images).permutation(n_images).astype(float)
        chosen = extreme_images(final)
        shown = [i for images in chosen.values() for i in images]
        assert len(shown) == len(set(shown)) == min(n_images, 8)
        assert final[chosen["most anomalous"][0]] == n_images - 1
        if n_images > 1:
            assert final[chosen["least anomalous"][0]] == 0
