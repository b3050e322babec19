"""Pictures of a report: which are drawn, that they decode, that equal scores give equal bytes."""

import io
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from toy_scores import image_paths, load_toy

from sinbad import ensembles
from sinbad.report import figures

DPI = 40
SCORE_PICTURES = ["score_distributions.png", "roc_curves.png", "auroc_by_grid.png"]


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw with fewer pixels: the layout is in inches."""
    monkeypatch.setattr(figures, "DPI", DPI)


def draw_images(root: Path, names: list[str], size: tuple[int, int] = (85, 50)) -> Path:
    """Draw noise under the names of test images of pushpins; return the data set's folder."""
    for number, name in enumerate(names):
        path = root / "images" / "pushpins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, "PNG")
    return root / "images"


def check_pictures(found: dict[str, bytes], names: list[str]) -> None:
    """Check that exactly these pictures are there, and that each shows something."""
    assert list(found) == names
    for content in found.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG"
            assert "Software" not in image.info
            assert 3 * DPI < image.width <= 13 * DPI
            assert 1.2 * DPI <= image.height <= 15 * DPI
            assert len(set(image.convert("L").tobytes())) > 20


def test_equal_scores_give_equal_bytes(tmp_path: Path) -> None:
    sets = [load_toy(tmp_path, f"pushpins_{kind}") for kind in ("loco", "struct")]
    names = [name for own in sets for name in own.image_paths]
    dataset = draw_images(tmp_path, names)
    found = figures.draw_figures(sets, dataset)
    sheets = ["images_pushpins_loco.png", "images_pushpins_struct.png"]
    check_pictures(found, [*SCORE_PICTURES, *sheets])
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):  # a user's own
        assert figures.draw_figures(sets, dataset) == found
        assert matplotlib.rcParams["font.size"] == 20


def test_many_data_sets_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = load_toy(tmp_path, "pushpins_loco")
    bare = {key: replace(grid, settings={}) for key, grid in first.grids.items()}
    names = [f"class_with_a_long_name_{i}_{kind}" for i in range(10) for kind in ("loco", "struct")]
    sets = [replace(first, mvtype=name, grids=bare) for name in names]
    check_pictures(figures.draw_figures(sets, tmp_path), SCORE_PICTURES)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no sheets of images for class_with_a_long_name_0_loco, " in said[0]


def select(scores: ensembles.DataSetScores, images: list[int]) -> ensembles.DataSetScores:
    """Return the scores of some of the images."""
    grids = {
        key: replace(g, test=g.test[images], crops=g.crops[:, images], own=g.own[:, images])
        for key, g in scores.grids.items()
    }
    own = {n: getattr(scores, n)[images] for n in ("labels", "network", "ensemble", "final")}
    levels = {level: values[images] for level, values in scores.levels.items()}
    paths = [scores.image_paths[i] for i in images]
    return replace(scores, image_paths=paths, grids=grids, levels=levels, **own)


def test_one_test_image_and_raw_pixels_alone(tmp_path: Path) -> None:
    dataset = draw_images(tmp_path, image_paths("pushpins_loco"))
    sheet = [*SCORE_PICTURES, "images_pushpins_loco.png"]
    one = select(load_toy(tmp_path, "pushpins_loco"), [4])
    check_pictures(figures.draw_figures([one], dataset), sheet)
    pixels = load_toy(tmp_path, "pushpins_loco", levels=())
    check_pictures(figures.draw_figures([pixels], dataset), sheet)


def test_names_of_all_kinds_are_drawn_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """$ is no formula, and where no font has the characters one line says so."""
    stems = ["a$1_$2", "a|b", "漢字", "n\udcff", "$x^{", "\\f", "7"]
    names = [f"test/good/{stem}.png" for stem in stems]
    scores = replace(load_toy(tmp_path, "pushpins_loco"), image_paths=names)
    dataset = draw_images(tmp_path, names)
    check_pictures(
        figures.draw_figures([scores], dataset), [*SCORE_PICTURES, "images_pushpins_loco.png"]
    )
    assert not recwarn.list
    said = capsys.readouterr().err.splitlines()
    assert len(said) <= 1
    assert all("no font here has all characters" in line for line in said)
    captions = [figures.load_picture(scores, i, dataset).caption for i in range(len(names))]
    shown = [name.removeprefix("test/").replace("\udcff", "\\udcff") for name in names]
    assert [caption.splitlines()[1] for caption in captions] == shown
    texts: list[bool] = []
    figures.png_of(lambda: _remember(figures.sheet_figure(scores, dataset), texts))
    assert texts
    assert not any(texts)


def _remember(figure: "matplotlib.figure.Figure", parsed: list[bool]) -> "matplotlib.figure.Figure":
    """Note of every text of a figure whether $ would be a formula."""
    parsed += [text.get_parse_math() for text in figure.findobj(matplotlib.text.Text)]
    return figure


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
def test_an_image_lies_beside_or_above_itself_under_its_map(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 10, 10))
    overlay = np.ones(size[::-1])
    overlay[:10, :10] = 4.0
    picture = figures.Picture(image, overlay, "", "k")
    view = figures.both_views(picture, figures.LogNorm(1.0, 4.0, clip=True))
    wide = (size[1] * 2 + 12, size[0], 3) if size[0] > size[1] else (size[1], size[0] * 2 + 12, 3)
    assert view.shape == wide
    covered = view[-size[1] :, -size[0] :]
    grey = np.asarray(image.convert("L"))[0, 0]
    assert np.ptp(covered[20:, 20:]) <= 1  # as validation images: clear
    assert abs(int(covered[30, 30, 0]) - int(grey)) <= 1
    assert covered[5, 5, 0] > covered[5, 5, 2] + 50  # red where it is out of the ordinary


def test_no_image_is_shown_twice() -> None:
    for n_images in range(1, 12):
        final = np.random.default_rng(n_images).permutation(n_images).astype(float)
        chosen = figures.extreme_images(final)
        shown = [i for images in chosen.values() for i in images]
        assert len(shown) == len(set(shown)) == min(n_images, 8)
        assert final[chosen["most anomalous"][0]] == n_images - 1
        if n_images > 1:
            assert final[chosen["least anomalous"][0]] == 0
