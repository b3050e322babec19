"""Figures of a report: which are written, that they decode, that equal scores give equal bytes."""

import io
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import toy_scores
from PIL import Image

from sinbad import loco, score_files
from sinbad.report import figures

DPI = 40
SCORE_FIGURES = ["score_distributions.png", "roc_curves.png", "auroc_by_grid.png"]


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plot with fewer pixels: the layout is in inches."""
    monkeypatch.setattr(figures, "DPI", DPI)


def write_images(root: Path, names: list[str], size: tuple[int, int] = (85, 50)) -> Path:
    """Write noise under the names of test images of pushpins; return the data set's folder."""
    for number, name in enumerate(names):
        path = root / "images" / "pushpins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, "PNG")
    return root / "images"


def check_figures(pngs: dict[str, bytes], names: list[str]) -> None:
    """Check that exactly these figures are given, and that each shows something."""
    assert list(pngs) == names
    for content in pngs.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG"
            assert "Software" not in image.info
            assert 3 * DPI < image.width <= 13 * DPI
            assert 1.2 * DPI <= image.height <= 15 * DPI
            assert len(set(image.convert("L").tobytes())) > 20


def test_equal_scores_give_equal_bytes(tmp_path: Path) -> None:
    sets = [toy_scores.load_toy(tmp_path, f"pushpins_{kind}") for kind in loco.KINDS]
    names = [name for scores in sets for name in scores.image_paths]
    dataset = write_images(tmp_path, names)
    pngs = figures.report_figures(sets, dataset)
    expected = ["images_pushpins_loco.png", "images_pushpins_struct.png"]
    check_figures(pngs, [*SCORE_FIGURES, *expected])
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):  # the user's style
        assert figures.report_figures(sets, dataset) == pngs
        assert matplotlib.rcParams["font.size"] == 20


def test_many_data_sets_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = toy_scores.load_toy(tmp_path)
    grids = {k: replace(grid, geometry=None) for k, grid in first.ensemble.grids.items()}
    first = replace(first, ensemble=replace(first.ensemble, grids=grids))  # as the authors'
    names = [f"class_with_a_long_name_{i}_{kind}" for i in range(10) for kind in loco.KINDS]
    sets = [replace(first, mvtype=name) for name in names]
    check_figures(figures.report_figures(sets, tmp_path), SCORE_FIGURES)
    (message,) = capsys.readouterr().err.splitlines()
    assert "no figures of images for class_with_a_long_name_0_loco, " in message


def test_one_test_image_and_raw_pixels_alone(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, toy_scores.image_paths("pushpins_loco"))
    names = [*SCORE_FIGURES, "images_pushpins_loco.png"]
    for file in toy_scores.make_files(tmp_path):
        test, labels, paths = file.test[:, 4:5], file.labels[4:5], file.image_paths[4:5]
        score_files.write_scores(replace(file, test=test, labels=labels, image_paths=paths))
    check_figures(figures.report_figures([toy_scores.load(tmp_path)], dataset), names)
    pixels = toy_scores.load_toy(tmp_path, levels=())
    check_figures(figures.report_figures([pixels], dataset), names)


def test_names_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """$ is no formula, and where no font has the characters one line says so."""
    stems = ["a$1_$2", "a|b", "漢字", "n\udcff", "$x^{", "\\f", "7"]
    names = [f"test/good/{stem}.png" for stem in stems]
    scores = replace(toy_scores.load_toy(tmp_path), image_paths=names)
    dataset = write_images(tmp_path, names)
    pngs = figures.report_figures([scores], dataset)
    check_figures(pngs, [*SCORE_FIGURES, "images_pushpins_loco.png"])
    assert not recwarn.list
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) <= 1
    assert all("no font here has all characters" in message for message in messages)
    captions = [figures.load_captioned(scores, i, dataset).caption for i in range(len(names))]
    shown = [name.removeprefix("test/").replace("\udcff", "\\udcff") for name in names]
    assert [caption.splitlines()[1] for caption in captions] == shown
    texts: list[matplotlib.text.Text] = []

    def plot() -> matplotlib.figure.Figure:
        figure = figures.extremes_figure(scores, dataset)
        texts.extend(figure.findobj(matplotlib.text.Text))
        return figure

    figures.png_of(plot)
    assert texts
    assert not any(text.get_parse_math() for text in texts)


def test_a_heatmap_needs_grids_alone(tmp_path: Path) -> None:
    scores = toy_scores.load_toy(tmp_path)
    image = Image.new("RGB", (60, 30), (200, 10, 10))
    views = [figures.heatmap(image, scores.ensemble.grids, index) for index in (0, 5)]
    (first, red), (second, other_red) = views
    assert first.size == second.size == (60 + 12 + 60, 30)  # beside, though the image is wide
    assert first.tobytes() != second.tobytes()
    assert min(red, other_red) == 2.0


@pytest.mark.parametrize("pixel", [0, 120, 255])
def test_a_higher_score_is_darker_in_grey_on_any_image(pixel: int) -> None:
    image = Image.new("RGB", (80, 20), (pixel, pixel, pixel))
    overlay = np.tile(np.geomspace(2, 10, 80), (20, 1))  # below 2 it is nearly clear
    item = figures.CaptionedImage(image, overlay, "", "k")
    view = figures.both_views(item, figures.LogNorm(1.0, 10.0, clip=True))
    shades = np.asarray(Image.fromarray(view).convert("L"))[-1].astype(int)
    assert (np.diff(shades) <= 1).all()
    assert shades[0] - shades[-1] > 60


def test_curves_of_categories_differ_without_colour(tmp_path: Path) -> None:
    names = ["pushpins_loco", "pushpins_struct", "screw_bag_loco", "screw_bag_struct"]
    axes = figures.roc_figure([toy_scores.load_toy(tmp_path, name) for name in names]).axes[0]
    looks = {(line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(names) + 1  # and chance


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
def test_an_image_is_beside_or_above_its_overlay(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 10, 10))
    overlay = np.ones(size[::-1])
    overlay[:10, :10] = 4.0
    item = figures.CaptionedImage(image, overlay, "", "k")
    view = figures.both_views(item, figures.LogNorm(1.0, 4.0, clip=True))
    wide = (size[1] * 2 + 12, size[0], 3) if size[0] > size[1] else (size[1], size[0] * 2 + 12, 3)
    assert view.shape == wide
    covered = view[-size[1] :, -size[0] :]
    faded = 255 - figures.FADED * (255 - np.asarray(image.convert("L"))[0, 0])
    assert np.ptp(covered[20:, 20:]) <= 1  # as the validation images: clear
    assert abs(covered[30, 30, 0] - faded) <= 1
    assert covered[5, 5, 0] > covered[5, 5, 2] + 50  # red where the score is high


def test_no_image_is_shown_twice() -> None:
    for n_images in range(1, 12):
        final = np.random.default_rng(n_images).permutation(n_images).astype(float)
        rows = figures.extreme_images(final)
        shown = [i for images in rows.values() for i in images]
        assert len(shown) == len(set(shown)) == min(n_images, 8)
        assert final[rows["most anomalous"][0]] == n_images - 1
        if n_images > 1:
            assert final[rows["least anomalous"][0]] == 0
