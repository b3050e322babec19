"""The detector: the ensemble's scores to the byte, files, verdicts, wrong input."""

import csv
import doctest
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import draw_image
from PIL import Image

import calc_anom_ensm
import data_to_matrices
import sinbad_detector
import sinbad_single_layer
import sinbad_utils
from sinbad import __version__, detectors, devices, errors, stored_models
from sinbad.settings import Settings

ROOT = Path(__file__).parents[1]
SMALL = {
    "net": "test_resnet",
    "device": "cpu",
    "weights": "random",
    "initial_res": 64,
    "n_projections": 20,
    "batch_size": 4,
    "pyramid_level": (14, 28, 224),
    "rep_num_224": 3,
    "crop_size_ratio": (0.7, 0.99),
}


def flags_of(options: dict[str, object]) -> list[str]:
    """Return options as flags."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def class_dir(dataset_dir: Path) -> Path:
    """Return the folder of a class with train, validation and test images."""
    return dataset_dir / "pushpins"


@pytest.fixture(scope="module")
def detector(class_dir: Path) -> detectors.Detector:
    """Return a detector with validation images."""
    train, valid = (sorted((class_dir / s / "good").iterdir()) for s in ("train", "validation"))
    return detectors.Detector.fit(train, valid, Settings(**SMALL))


def test_images(class_dir: Path) -> list[Path]:
    """Return good and logical test images in the order of the data set."""
    kinds = ("good", "logical_anomalies")
    return [path for kind in kinds for path in sorted((class_dir / "test" / kind).iterdir())]


test_images.__test__ = False


def test_scores_are_those_of_the_step_by_step_ensemble_to_the_byte(
    detector: detectors.Detector, class_dir: Path, tmp_path: Path
) -> None:
    root = str(class_dir.parent)
    data_to_matrices.main(
        [
            "--dataset_dir",
            root,
            "--out_dir",
            str(tmp_path / "m"),
            "--im_size",
            "64",
            "--mvtype",
            "pushpins_loco",
        ]
    )
    common = ["--mvtype", "pushpins_loco", "--data_dir", str(tmp_path / "m")]
    common += ["--results_dir", str(tmp_path / "r"), "--device", "cpu", "--initial_res", "64"]
    common += ["--n_projections", "20", "--batch_size", "4", "--net", "test_resnet"]
    common += ["--weights", "random"]
    grids = ["--crop_size_ratio", ".7", ".99"]
    sinbad_single_layer.main([*common, "--pyramid_level", "14", "28", *grids])
    sinbad_single_layer.main([*common, "--pyramid_level", "224", "--rep", "0-2"])
    version = str(tmp_path / "r/ver1_pyramid_lvl_#")
    calc_anom_ensm.main(
        [
            "--mvtype",
            "pushpins_loco",
            "--pyramid_level",
            "14",
            "28",
            "--version",
            version,
            "--version_224",
            version,
            "--rep_num_224",
            "3",
            "--dataset_dir",
            root,
            "--no-figures",
            "--out",
            str(tmp_path / "t"),
        ]
    )
    rows = list(csv.DictReader((tmp_path / "t/scores.csv").open()))
    verdicts = detector.score(test_images(class_dir), 0.5)
    assert [float(row["score"]) for row in rows] == [verdict.score for verdict in verdicts]
    for level in (14, 28, 224):
        level_scores = [prediction.levels[level] for prediction in verdicts]
        assert [float(row[f"level_{level}"]) for row in rows] == level_scores


def test_a_picture_scores_alone_what_it_scores_among_others(
    detector: detectors.Detector, class_dir: Path
) -> None:
    images = test_images(class_dir)
    together = detector.score(images, 0.5)
    assert [detector.score([path], 0.5)[0] for path in images] == together
    opened = [Image.open(path) for path in images]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    for pictures in (opened, arrays):
        assert [v.score for v in detector.score(pictures, 0.5)] == [v.score for v in together]


def test_saved_and_loaded_in_a_fresh_process(
    detector: detectors.Detector, class_dir: Path, tmp_path: Path
) -> None:
    train, valid = class_dir / "train/good", class_dir / "validation/good"
    fit = ["fit", "--train_dir", str(train), "--valid_dir", str(valid), "--device", "cpu"]
    for name in "ab":
        sinbad_detector.main([*fit, "--out", str(tmp_path / f"{name}.npz"), *flags_of(SMALL)])
    detector.save(tmp_path / "c.npz")
    assert len({(tmp_path / f"{name}.npz").read_bytes() for name in "abc"}) == 1
    command = [sys.executable, "sinbad_detector.py", "score", "--detector", str(tmp_path / "a.npz")]
    command += [str(path) for path in test_images(class_dir)]
    command += ["--out", str(tmp_path / "s.csv"), "--json", str(tmp_path / "s.json")]
    command += ["--false_alarms", ".5", "--device", "cpu", "--report", str(tmp_path / "report")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    verdicts = detector.score(test_images(class_dir), 0.5)
    assert [float(row["score"]) for row in rows] == [verdict.score for verdict in verdicts]
    assert [row["is_anomalous"] == "1" for row in rows] == [
        verdict.is_anomalous for verdict in verdicts
    ]
    records = json.loads((tmp_path / "s.json").read_text())
    assert [record["p_value"] for record in records] == [verdict.p_value for verdict in verdicts]
    assert len(list((tmp_path / "report/pictures").iterdir())) == 2 * len(rows)


def test_calibration_scores_that_are_equal_count_as_high(
    class_dir: Path, detector: detectors.Detector
) -> None:
    valid = sorted((class_dir / "validation/good").iterdir())
    scores = np.array([prediction.score for prediction in detector.score(valid, 0.3)])
    np.testing.assert_array_equal(scores, detector.calibration)
    p_values = [prediction.p_value for prediction in detector.score(valid, 0.3)]
    assert p_values == [(1 + (scores >= score).sum()) / (len(valid) + 1) for score in scores]


@pytest.mark.parametrize("n_elements", [255, 256, 65535])
def test_counts_of_full_sets_fit_their_type(n_elements: int) -> None:
    histograms = sinbad_utils.Histograms(torch.ones(2, 3), torch.zeros(2), torch.ones(2), 1)
    descriptors = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    model = sinbad_utils.fit_crop_model(histograms, descriptors, 1.0)
    stored = stored_models.StoredModels.of([model], n_elements)
    np.testing.assert_array_equal(stored.counts[0], descriptors * n_elements)


def test_counts_are_whole_numbers_that_give_the_descriptors_back(
    detector: detectors.Detector,
) -> None:
    for (level, _, _), stored in detector.stored.items():
        assert stored.counts.dtype == (np.uint8 if level == 14 else np.uint16)
        channels = 3  # of no consequence for the descriptors
        model = stored.fit(0, torch.ones(20, channels), detector.values.at_level(level))
        exact = torch.from_numpy(stored.counts[0].astype(np.float64)) / stored.n_elements
        np.testing.assert_allclose(model.train_descriptors, exact, atol=1e-7)
        again = stored_models.StoredModels.of([model], stored.n_elements)
        np.testing.assert_array_equal(again.counts[0], stored.counts[0])


def test_a_scored_detector_keeps_no_training_descriptors_but_its_counts(
    detector: detectors.Detector, class_dir: Path
) -> None:
    detector.score(test_images(class_dir)[:1], 0.5)
    assert detector._models
    for model in detector._models.values():
        tensors = [part for part in vars(model.neighbours).values() if torch.is_tensor(part)]
        assert not len(model.neighbours.centred)
        assert not len(model.train_descriptors)
        # A view would keep the whole of another tensor.
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in tensors)


def test_what_fitting_freed_goes_back_to_the_system_once(
    detector: detectors.Detector,
    class_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_models = []
    detector.save(tmp_path / "detector.npz")
    loaded = detectors.Detector.load(tmp_path / "detector.npz", device="cpu")
    monkeypatch.setattr(
        devices, "give_freed_memory_back", lambda: n_models.append(len(loaded._models))
    )
    for _ in range(2):
        loaded.score(test_images(class_dir)[:1], 0.5)
    assert n_models == [len(loaded._models)]


def test_one_picture_is_no_full_batch_on_a_gpu(
    detector: detectors.Detector, class_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, sizes = test_images(class_dir)[:2], []
    (expected,) = detector.score(images[:1], 0.5)
    extract = detector.extractor.extract

    def record(crops: torch.Tensor) -> dict[int, torch.Tensor]:
        sizes.append(len(crops))
        return extract(crops)

    monkeypatch.setattr(detector.extractor, "extract", record)
    monkeypatch.setattr(detector, "values", replace(detector.values, batch_size=256))
    n_crops = len({key[1:] for key in detector.stored if key[0] != 224})
    for device, options, n_images, expected_sizes in (
        ("cpu", {}, 1, [256]),
        ("cuda", {}, 1, [n_crops]),
        ("cuda", {}, 2, [2 * n_crops]),
        ("cuda", {"batch_size": 4}, 1, [4] * math.ceil(n_crops / 4)),
        ("cuda", {"compile": True}, 1, [256]),  # compiled for one shape
    ):
        monkeypatch.setattr(detector, "device", torch.device(device))  # computed on the CPU
        with monkeypatch.context() as patch:
            patch.setattr(detector, "values", replace(detector.values, **options))
            prediction, *_ = detector.score(images[:n_images], 0.5)
        assert sizes == expected_sizes
        assert prediction.score == pytest.approx(expected.score, rel=1e-5)
        sizes.clear()


# ---------------------------------------------------------------- verdicts


def test_folds_score_each_picture_by_the_others() -> None:
    descriptors = torch.rand(11, 12, generator=torch.Generator().manual_seed(0))
    scores = detectors.Folds(np.arange(11), 4, seed=3).score(descriptors, 0.1)
    fold_of = np.random.default_rng(3).permutation(11) % 4
    for i in range(11):
        others = descriptors[torch.from_numpy(fold_of != fold_of[i])]
        expected = sinbad_utils.fit_whitening(others, 0.1).nearest(descriptors[i : i + 1])
        np.testing.assert_array_equal(scores[i], expected[0])


def test_without_validation_pictures_the_training_pictures_calibrate(class_dir: Path) -> None:
    train = sorted((class_dir / "train/good").iterdir())
    entry = detectors.Detector.fit(train, values=Settings(**SMALL))
    assert len(entry.calibration) == len(train)
    assert (entry.calibration > 0).all()
    (seen,) = entry.score(train[:1], 0.5)
    assert seen.score < entry.calibration.min()  # a training picture is its own neighbour


def test_threshold_and_p_value_agree(detector: detectors.Detector) -> None:
    detector.calibration, before = np.arange(1.0, 20.0), detector.calibration
    try:
        assert detector.threshold(0.05) == 19.0
        assert detector.threshold(0.1) == 18.0
        for score in (17.5, 18.0, 18.5, 19.0, 19.5):
            p_value = (1 + (detector.calibration >= score).sum()) / 20
            for rate in (0.05, 0.1, 0.15):
                assert (p_value <= rate) == (score > detector.threshold(rate))
        with pytest.raises(
            errors.UserError,
            match=r"1 / \(19 \+ 1\) for a calibration set of 19 images.* it takes 99 normal images",
        ):
            detector.threshold(0.01)
        detector.calibration = np.arange(1.0, 19.0)
        with pytest.raises(errors.UserError, match="it takes 19 normal images"):
            detector.threshold(0.05)
    finally:
        detector.calibration = before


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_false_alarms_are_at_most_as_promised(detector: detectors.Detector, rate: float) -> None:
    rng, before, alarms = np.random.default_rng(0), detector.calibration, []
    try:
        for _ in range(2000):
            scores = rng.gamma(2.0, size=40)
            detector.calibration = scores[1:]
            alarms.append(scores[0] > detector.threshold(rate))
    finally:
        detector.calibration = before
    noise = 3 * math.sqrt(rate / 2000)
    assert rate - 2 / 40 - noise < np.mean(alarms) < rate + noise


# ---------------------------------------------------------------- wrong input


def test_a_broken_picture_has_a_row_and_the_others_are_scored(
    detector: detectors.Detector,
    class_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    detector.save(tmp_path / "d.npz")
    good = test_images(class_dir)[0]
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:100])
    Image.new("RGB", (50, 10)).save(tmp_path / "flat.png")
    pictures = [str(tmp_path / name) for name in ("broken.png", "flat.png", "none.png")]
    argv = ["score", "--detector", str(tmp_path / "d.npz"), *pictures, str(good), "--device", "cpu"]
    assert sinbad_detector.main([*argv, "--false_alarms", ".5"]) == 1
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [bool(row["error"]) for row in rows] == [True, True, True, False]
    assert "must be a complete image file" in rows[0]["error"]
    assert "must have the aspect" in rows[1]["error"]
    assert "No such file" in rows[2]["error"]
    assert float(rows[3]["score"]) == detector.score([good], 0.5)[0].score


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut", "must be a complete file of sinbad_detector.py fit"),
        ("scores", "must be a complete file of sinbad_detector.py fit"),
        ("format", "must be a detector of format 1, got 99"),
        ("weights", "weights must be those that .*; pass --weights"),
        ("missing", "No such file"),
        ("folder", "must hold images that Pillow reads, got an empty folder"),
        ("rate", "it takes 99 normal images"),
    ],
)
def test_wrong_input_is_one_line(
    detector: detectors.Detector,
    class_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
    message: str,
) -> None:
    path, picture, flags = tmp_path / "d.npz", test_images(class_dir)[0], ["--false_alarms", ".5"]
    detector.save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif case == "scores":
        np.savez(path, anom_map_test=np.ones(3))
    elif case == "format":
        about = json.loads(str(arrays["about"])) | {"format": 99}
        np.savez(path, **{**arrays, "about": np.array(json.dumps(about))})
    elif case == "weights":
        torch.manual_seed(1)
        torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
        flags += ["--weights", str(tmp_path / "w.pth")]
    elif case == "missing":
        path.unlink()
    elif case == "folder":
        picture = tmp_path / "empty"
        picture.mkdir()
    elif case == "rate":
        flags = ["--false_alarms", ".01"]
    argv = ["score", "--detector", str(path), str(picture), "--device", "cpu", *flags]
    with pytest.raises(SystemExit) as caught:
        errors.run_script(sinbad_detector.main, argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


def test_too_few_and_repeated_images(class_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = sorted((class_dir / "train/good").iterdir())
    values = Settings(**{**SMALL, "pyramid_level": (224,), "rep_num_224": 1})
    for images in (train[:3], [train[0]] * 9):
        with pytest.raises(errors.UserError, match="training images must be at least 4"):
            detectors.Detector.fit(images, values=values)
    detectors.Detector.fit(train, train[:2], values)
    assert "warning: 2 validation images are training images too" in capsys.readouterr().err
    with pytest.raises(errors.UserError, match=r"be \(height, width, 3\) of uint8, got \(4, 4\)"):
        detectors.Detector.fit([np.zeros((4, 4))] * 4, values=values)


def test_equal_training_images_lie_in_one_fold_and_count_once(
    class_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = sorted((class_dir / "train/good").iterdir())
    values = Settings(**{**SMALL, "pyramid_level": (224,), "rep_num_224": 1, "folds": 2})
    detector = detectors.Detector.fit([*train, *train], values=values)
    assert "warning: 5 training images are repeated" in capsys.readouterr().err
    assert len(detector.calibration) == len(train)
    assert detector.calibration.min() > 0.1  # in another fold its double would be its neighbour


def test_training_images_asked_about_are_named(
    class_dir: Path, detector: detectors.Detector, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (sorted((class_dir / s / "good").iterdir()) for s in ("train", "test"))
    detector.score([*train[:2], *test[:3]], 0.3)
    assert "warning: 2 images score 0: they are training images" in capsys.readouterr().err
    detector.score(test[:3], 0.3)
    assert "score 0" not in capsys.readouterr().err


def test_an_image_whose_features_are_nan_is_named_by_its_path(
    class_dir: Path, detector: detectors.Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = sorted((class_dir / "test/good").iterdir())[:2]

    extract = detector.extractor.extract

    def second_is_nan(pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        elements = extract(pixels)
        row = torch.arange(len(pixels))[:, None, None]
        return elements | {14: elements[14].masked_fill(row == 1, math.nan)}

    monkeypatch.setattr(detector.extractor, "extract", second_is_nan)
    with pytest.raises(errors.UserError, match=re.escape(f"for image {test[1]} at level 14")):
        detector.score(test, 0.3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"crop_size_ratio": (0.5, 0.33)}, r"got 0\.5 and 0\.33, both of 9 crops"),
        ({"folds": 1}, "folds must be a whole number of at least 2, got 1"),
        ({"n_quantiles": 2.5}, "n_quantiles must be a whole number of at least 1, got 2.5"),
        ({"shrinkage_factor": math.nan}, "shrinkage_factor must be above 0 to 1, got nan"),
        ({"pyramid_level": ()}, "pyramid_level must hold a value"),
        ({"official": True}, "official numerics are not supported by a detector"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_are_checked_in_python_too(
    class_dir: Path, bad: dict[str, object], message: str
) -> None:
    train = sorted((class_dir / "train/good").iterdir())
    with pytest.raises(errors.UserError, match=message):
        detectors.Detector.fit(train, values=Settings(**{**SMALL, **bad}))


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan, -0.1])
def test_rates_are_checked_in_python_too(detector: detectors.Detector, rate: float) -> None:
    with pytest.raises(errors.UserError, match="false_alarms must be above 0 and below 1"):
        detector.score([], rate)


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_a_file_with_a_missing_position_or_nan_is_damaged(
    detector: detectors.Detector, tmp_path: Path, damage: str
) -> None:
    detector.save(tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz") as archive:
        arrays = dict(archive)
    name = next(name for name in arrays if name.startswith("ranges_"))
    if damage == "missing":
        del arrays[name]
    else:
        arrays[name][0, 0, 0] = np.nan
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(errors.UserError, match="must be a complete file"):
        detectors.Detector.load(tmp_path / "d.npz", device="cpu")


@pytest.mark.parametrize("version", [None, "0.9"])
def test_a_detector_of_any_version_is_loaded(
    detector: detectors.Detector, tmp_path: Path, version: str | None
) -> None:
    assert detector.metadata["sinbad"] == __version__
    detector.save(tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz") as archive:
        arrays = dict(archive)
    record = json.loads(str(arrays["about"]))
    record["about"] = {k: v for k, v in record["about"].items() if k != "sinbad"}
    record["about"] |= {"sinbad": version} if version else {}
    np.savez(tmp_path / "d.npz", **{**arrays, "about": np.array(json.dumps(record))})
    loaded = detectors.Detector.load(tmp_path / "d.npz", device="cpu")
    assert loaded.metadata.get("sinbad") == version
    assert loaded.calibration.tolist() == detector.calibration.tolist()


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    normal_images = [draw_image("train/good", number) for number in range(10)]
    noise = np.random.default_rng(0).integers(0, 256, (50, 85, 3))
    Image.fromarray(noise.astype(np.uint8)).save("doubtful.png")
    page = str(ROOT / "docs/detector.md")
    failed, tried = doctest.testfile(page, False, globs={"normal_images": normal_images})
    assert (failed, tried) == (0, 8)
