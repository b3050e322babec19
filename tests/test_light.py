"""Test images that are darker than the training images: a report and a detector say so."""

import copy
from pathlib import Path

import numpy as np
import pytest
import toy_scores
from conftest import IM_SIZE, draw_class, draw_image
from PIL import Image, ImageEnhance

import reproduce_paper
from sinbad import detectors, settings
from sinbad.report import metrics, tables

PIXELS = settings.Settings(
    (settings.PIXEL_LEVEL,), initial_res=IM_SIZE, rep_num_224=2, device="cpu"
)


def darken(image: Image.Image) -> Image.Image:
    """Return an image as under less light."""
    return ImageEnhance.Brightness(image).enhance(0.5)


def test_a_report_says_that_the_good_test_images_are_further(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    draw_class(tmp_path / "images" / "pushpins")
    paths = {"--dataset_dir": "images", "--data_dir": "data", "--results_dir": "results"}
    words = [word for f, name in paths.items() for word in (f, str(tmp_path / name))]
    words += ["--mvtype", "loco", "--initial_res", str(IM_SIZE), "--pyramid_level", "224"]
    words += ["--rep_num_224", "2", "--no-figures", "--device", "cpu", "--out"]
    reproduce_paper.main([*words, str(tmp_path / "same_light")])
    assert "AUROC below" not in capsys.readouterr().out
    for path in (tmp_path / "images/pushpins/test/good").iterdir():
        darken(Image.open(path)).save(path)
    reproduce_paper.main([*words, str(tmp_path / "dark"), "--overwrite"])
    table = (tmp_path / "dark" / "table.md").read_text()
    (line,) = (line for line in table.splitlines() if "AUROC below" in line)
    assert line in capsys.readouterr().out.splitlines()
    assert line.startswith("pushpins_loco: AUROC below 40 of level 224 (0.0), ensemble (0.0): the ")
    assert "To leave out" not in line  # there is no other level


@pytest.mark.parametrize(
    ("low", "cure"),
    [
        ({"level 224": 0.3}, "without 224 (calc_anom_ensm.py: --rep_num_224 0 for 224)."),
        ({"level 7": 0.3, "level 14": 0.1, "ensemble": 0.399}, "--pyramid_level without 7 and 14."),
        ({"ensemble": 0.3}, "swapped labels?)."),
    ],
)
def test_the_note_names_what_to_leave_out(low: dict[str, float], cure: str, tmp_path: Path) -> None:
    names = "pushpins_loco", "pushpins_struct"
    run = metrics.all_metrics([toy_scores.load_toy(tmp_path, name) for name in names], {})
    for name in names:
        run["data_sets"][name]["auroc"] |= dict.fromkeys(run["data_sets"][name]["auroc"], 0.4)
    assert tables.low_auroc_notes([run]) == []
    run["data_sets"][names[0]]["auroc"] |= low
    (note,) = tables.low_auroc_notes([run])
    shown = ", ".join(f"{column} ({100 * value:.1f})" for column, value in low.items())
    assert note.startswith(f"{names[0]}: AUROC below 40 of {shown}: ")
    assert note.endswith(cure)
    # Of several runs the mean counts.
    other = copy.deepcopy(run)
    other["data_sets"][names[0]]["auroc"] |= dict.fromkeys(low, 0.9)
    assert tables.low_auroc_notes([run, other]) == []


@pytest.fixture(scope="module")
def detector() -> detectors.Detector:
    """Return a detector of raw pixels with a calibration set of 20 images."""
    train, valid = ([draw_image("train/good", i) for i in r] for r in (range(12), range(12, 32)))
    return detectors.Detector.fit(train, valid, PIXELS)


@pytest.mark.parametrize(
    ("n_dark", "n_same", "expected"),
    [(10, 0, ["10 of 10"]), (8, 7, ["8 of 15"]), (6, 6, []), (9, 0, [])],
)
def test_a_detector_says_that_most_images_are_beyond_its_calibration_set(
    n_dark: int,
    n_same: int,
    expected: list[str],
    detector: detectors.Detector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dark = [darken(draw_image("train/good", number)) for number in range(32, 32 + n_dark)]
    highest = np.argsort(detector.calibration)[::-1][:n_same]  # equal to it, not beyond
    same = [draw_image("train/good", 12 + int(number)) for number in highest]
    predictions = detector.score([*dark, *same])
    assert sum(prediction.p_value == 1 / 21 for prediction in predictions) == n_dark
    lines = [text for text in caplog.messages if "score above all 20 of the cal" in text]
    assert [text[: text.index(" images")] for text in lines] == expected
