"""The whole pipeline in one command: the step-by-step scripts' bytes, seeds, odd data sets."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COUNTS, IM_SIZE, draw_class, draw_image, files_below
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import calc_anom_ensm
import data_to_matrices
import reproduce_paper
import sinbad_single_layer
from sinbad import errors, layouts, settings
from sinbad.report import metrics

NET = ["--net", "test_resnet", "--weights", "random", "--initial_res", str(IM_SIZE)]
N_PROJECTIONS = 20
PAPER_DEFAULTS = settings.BACKBONE_DEFAULTS
FEW = ["--pyramid_level", "14", "224", "--rep_num_224", "2", "--no-figures"]


def reproduce(dataset_dir: Path, folder: Path, *flags: str) -> None:
    """Run the script with everything that it writes below `folder`."""
    reproduce_paper.main(
        [
            *("--dataset_dir", str(dataset_dir), "--data_dir", str(folder / "matrices")),
            *("--results_dir", str(folder / "results"), "--out", str(folder / "out")),
            *("--device", "cpu", *NET, *FEW, *flags),
        ]
    )


@pytest.fixture(scope="module", autouse=True)
def small_settings() -> Iterator[None]:
    """Take fewer crops and directions than the paper, to be quick."""
    few = replace(PAPER_DEFAULTS, crop_ratios=(0.7, 0.99), n_projections=N_PROJECTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinbad.settings.BACKBONE_DEFAULTS", few)
        yield


@pytest.fixture(scope="module")
def folder(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what one run with two seeds wrote."""
    folder = tmp_path_factory.mktemp("paper")
    reproduce(dataset_dir, folder, "--seeds", "0", "1")
    return folder


def test_bytes_equal_those_of_the_steps(dataset_dir: Path, folder: Path, tmp_path: Path) -> None:
    matrices, results = tmp_path / "matrices", tmp_path / "results"
    data_to_matrices.main(
        [
            *("--dataset_dir", str(dataset_dir), "--out_dir", str(matrices)),
            *("--im_size", str(IM_SIZE)),
        ]
    )
    paths = ["--data_dir", str(matrices), "--results_dir", str(results), "--device", "cpu"]
    resnet = ["--pyramid_level", "14", "--crop_size_ratio", ".7", ".99"]
    resnet += ["--n_projections", str(N_PROJECTIONS)]
    for seed, version in (("0", "ver1"), ("1", "ver1_seed1")):
        run = [*paths, *NET, "--mvtype", "pushpins", "--seed", seed, "--version_name", version]
        sinbad_single_layer.main([*run, *resnet])
        sinbad_single_layer.main([*run, "--pyramid_level", "224", "--rep", "0-1"])
    assert files_below(matrices) == files_below(folder / "matrices")
    assert files_below(results) == files_below(folder / "results")
    calc_anom_ensm.main(
        [
            *("--version", str(results / "ver1_pyramid_lvl_#"), "--pyramid_level", "14"),
            *("--version_224", str(results / "ver1_pyramid_lvl_#"), "--rep_num_224", "2"),
            *("--out", str(tmp_path / "out"), "--no-figures"),
        ]
    )
    ours = (folder / "out" / "scores_seed_0.csv").read_bytes()
    assert (tmp_path / "out" / "scores.csv").read_bytes() == ours


def test_the_same_command_again_computes_nothing_and_gives_the_same_bytes(
    dataset_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_below(folder)

    def never(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("sinbad.scoring.CropScorer", never)
    reproduce(dataset_dir, folder, "--seeds", "0", "1")
    assert files_below(folder) == before


def test_figures_of_two_seeds(folder: Path) -> None:
    runs = json.loads((folder / "out" / "metrics.json").read_text())["runs"]
    assert list(runs) == ["seed 0", "seed 1"]
    values = []
    for name, run in runs.items():
        with open(folder / "out" / f"scores_{name.replace(' ', '_')}.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["data_set"] == "pushpins_loco"]
        labels = np.array([float(row["label"]) for row in rows])
        scores = np.array([float(row["score"]) for row in rows])
        entry = run["data_sets"]["pushpins_loco"]
        assert len(rows) == COUNTS["test/good"] + COUNTS["test/logical_anomalies"]
        assert entry["auroc"]["ensemble"] == pytest.approx(roc_auc_score(labels, scores))
        assert entry["average_precision"] == pytest.approx(average_precision_score(labels, scores))
        by_kind = run["classes"]["pushpins"]["classification"]["auc_roc"]
        assert by_kind["logical_anomalies"] == entry["auroc"]["ensemble"]
        assert by_kind["mean"] == pytest.approx(
            (by_kind["logical_anomalies"] + by_kind["structural_anomalies"]) / 2
        )
        assert run["mean"]["classification"]["auc_roc"] == by_kind
        values.append(100 * entry["auroc"]["level 224"])
    with open(folder / "out" / "table.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["data set"] == "pushpins_loco"
    assert row["level 224"] == f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"
    assert row["SINBAD (2302.12245)"] == "-"  # five training images are not LOCO


def test_the_tasks_are_the_papers() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinbad.settings.BACKBONE_DEFAULTS", PAPER_DEFAULTS)
        values = settings.Settings()
        tasks = reproduce_paper.paper_tasks(["pushpins_loco"], values, [0, 3], "ver1")
        recorded = {level: values.recorded(level) for level in (7, 14, 224)}
    resnet = [(t.level, t.ratio, t.rep) for t in tasks if t.level != 224 and t.version == "ver1"]
    ratios = (0.25, 0.5, 0.7, 0.99)
    assert resnet == [(level, ratio, 0) for level in (7, 14) for ratio in ratios]
    pixels = [(t.ratio, t.rep) for t in tasks if t.level == 224 and t.version == "ver1_seed3"]
    assert pixels == [(0.999, rep) for rep in range(100)]
    assert {t.seed for t in tasks if t.version == "ver1_seed3"} == {3}
    names = "n_projections", "n_quantiles", "shrinkage_factor"
    descriptors = {level: [values[name] for name in names] for level, values in recorded.items()}
    assert descriptors == {7: [1000, 5, 0.1], 14: [1000, 5, 0.1], 224: [10, 5, 1.0]}


def test_percent_of_no_value_one_and_several() -> None:
    assert metrics.percent([None]) == "-"
    assert metrics.percent([0.8884]) == "88.8"
    assert metrics.percent([0.9, 0.92]) == "91.0 +- 1.4"


def test_several_devices_give_the_same_bytes(dataset_dir: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    for name in ("pushpins", "screw_bag"):
        shutil.copytree(dataset_dir / "pushpins", dataset / name)
    with pytest.raises(errors.UserError, match="aspect"):  # pushpins' images under screw_bag's name
        reproduce(dataset, tmp_path / "wrong", "--pyramid_level", "224")
    (dataset / "screw_bag").rename(dataset / "boxes")
    pixels = ["--pyramid_level", "224"]
    reproduce(dataset, tmp_path / "one", *pixels)
    reproduce(dataset, tmp_path / "two", *pixels, "--device", "cpu", "cpu")
    assert files_below(tmp_path / "two") == files_below(tmp_path / "one")


def test_a_failure_is_said_while_other_devices_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said, completed = "the categories that are being scored are completed first", []

    def score(tasks: list[Any], *_: object) -> None:
        if tasks[0].mvtype == "first_loco":
            raise errors.UserError("the first category fails")
        deadline = time.monotonic() + 60.0
        while said not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        completed.append(said in caplog.text)

    monkeypatch.setattr(reproduce_paper, "score_and_save", score)
    monkeypatch.setattr(reproduce_paper, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    values = settings.Settings(pyramid_level=(224,), rep_num_224=1)
    tasks = reproduce_paper.paper_tasks(["first_loco", "other_loco"], values, [0], "ver1")
    with pytest.raises(errors.UserError, match="the first category fails"):
        reproduce_paper.score_on_devices(tasks, values, ["cpu"] * 2, tmp_path, tmp_path, False)
    assert completed == [True]


# ---------------------------------------------------------------- odd data sets


def test_a_class_without_structural_images(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset_dir / "pushpins", tmp_path / "dataset/pushpins")
    shutil.rmtree(tmp_path / "dataset/pushpins/test/structural_anomalies")
    reproduce(tmp_path / "dataset", tmp_path, "--pyramid_level", "224")
    captured = capsys.readouterr()
    assert "pushpins_struct skipped" in captured.err
    assert "pushpins_loco" in captured.out
    assert "pushpins_struct" not in captured.out
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    by_kind = values["mean"]["classification"]["auc_roc"]
    assert by_kind["structural_anomalies"] is None
    assert by_kind["mean"] is None
    assert values["mean"]["pooled_auroc"] is None


@pytest.mark.parametrize("left", ["no folder", "no image"])
def test_a_class_without_validation_images(left: str, dataset_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset_dir / "pushpins", tmp_path / "dataset/pushpins")
    folder = tmp_path / "dataset/pushpins/validation/good"
    shutil.rmtree(folder)
    if left == "no image":
        folder.mkdir()
    with pytest.raises(errors.UserError, match="validation/good"):
        reproduce(tmp_path / "dataset", tmp_path)
    assert not (tmp_path / "matrices").exists()


def test_three_training_images_one_test_image_of_a_kind_and_a_class_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_dir = tmp_path / "dataset" / "cables"
    draw_class(class_dir)
    for part, n_left in (("train/good", 3), ("test/good", 1), ("test/logical_anomalies", 1)):
        for path in sorted((class_dir / part).iterdir())[n_left:]:
            path.unlink()
    reproduce(tmp_path / "dataset", tmp_path, "--pyramid_level", "224")
    captured = capsys.readouterr()
    assert "cables_loco" in captured.out
    assert "LOCO:" not in captured.err  # no counts to compare with
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert values["data_sets"]["cables_loco"]["n_good"] == 1
    assert values["data_sets"]["cables_loco"]["auroc"]["ensemble"] in (0.0, 1.0)


# ---------------------------------------------------------------- defects and other methods


def write_masks(class_dir: Path) -> None:
    """Write the ground truth of two logical images: image 0 shows both defects, image 1 one."""
    config = [
        {"defect_name": "too_many", "pixel_value": 255},
        {"defect_name": "too_few", "pixel_value": 254},
        {"defect_name": "never_seen", "pixel_value": 253},
    ]
    (class_dir / "defects_config.json").write_text(json.dumps(config))
    for image, values in ((0, (255, 254)), (1, (254,))):
        folder = class_dir / "ground_truth/logical_anomalies" / f"{image:03d}"
        folder.mkdir(parents=True)
        for number, value in enumerate(values):
            mask = draw_image("train/good", 0).convert("L").point(lambda _: 0)
            mask.putpixel((5, 5), value)
            mask.save(folder / f"{number:03d}.png")


def test_auroc_per_defect(dataset_dir: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset_dir / "pushpins", tmp_path / "dataset/pushpins")
    class_dir = tmp_path / "dataset/pushpins"
    paths = [f"test/good/{i:03d}.png" for i in range(3)]
    paths += [f"test/logical_anomalies/{i:03d}.png" for i in range(2)]
    assert layouts.defect_images(class_dir, paths) == {}
    write_masks(class_dir)
    assert layouts.defect_images(class_dir, paths) == {"too_many": [3], "too_few": [3, 4]}
    mixed = Path(shutil.copytree(class_dir, tmp_path / "black_and_white"))
    for mask in mixed.glob("ground_truth/*/*/*.png"):
        Image.open(mask).point(lambda value: 255 * (value > 0)).save(mask)
    assert layouts.defect_images(mixed, paths) == {}
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    reproduce(tmp_path / "dataset", tmp_path)
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)][:5]
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = roc_auc_score([0, 0, 0, 1], scores[:4])
    by_defect = values["data_sets"]["pushpins_loco"]["auroc_by_defect"]
    assert by_defect["too_many"] == {"auroc": pytest.approx(expected), "n_images": 1}
    assert "too_few" in (tmp_path / "out" / "defects.csv").read_text()


def test_a_damaged_defects_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "defects_config.json").write_text('[{"defect_name": "x"}]')
    with pytest.raises(errors.UserError, match=r"defects_config.json must list pixel_value"):
        layouts.defect_images(tmp_path, [])


def extra_lines(folder: Path) -> list[tuple[str, float]]:
    """Make up another method's scores for all images of pushpins, validation included."""
    with open(folder / "out" / "scores_seed_0.csv", newline="") as file:
        images = [row["image_path"] for row in csv.DictReader(file)]
    images += [f"pushpins/validation/good/{i:03d}.png" for i in range(3)]
    return [(image, 1.0 + i) for i, image in enumerate(dict.fromkeys(images))]


def test_extra_scores_are_normalised_weighted_and_added(
    folder: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    lines = extra_lines(folder)
    path = tmp_path / "efficientad.csv"
    path.write_text("".join(f"/else/where/{image},{score}\n" for image, score in lines))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    reproduce(dataset_dir, tmp_path, "--extra_scores", str(path), "--extra_weight", "0.5")
    by_image = dict(lines)
    valid_mean = np.mean([score for image, score in lines if "/validation/" in image])
    with open(folder / "out" / "scores_seed_0.csv", newline="") as file:
        plain = list(csv.DictReader(file))
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        both = list(csv.DictReader(file))
    for row, before in zip(both, plain, strict=True):
        extra = by_image[row["image_path"]] / (valid_mean + 1e-5) + 1e-5
        assert float(row["extra_efficientad"]) == pytest.approx(extra, rel=1e-12)
        assert float(row["score"]) == pytest.approx(float(before["score"]) + 0.5 * extra)
    header = (tmp_path / "out" / "table.csv").read_text().splitlines()[0]
    assert "ensemble,extra efficientad,ensemble + efficientad" in header


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--extra_scores", "none.csv"], "none.csv"),
        (["--version_name", "a#b"], "must be without #"),
        (["--crop_num_edge", "1"], "0.7 and 0.99, which both write 1_crop"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_stop_before_the_long_work(
    flags: list[str], line: str, dataset_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises((errors.UserError, OSError), match=line):
        reproduce(dataset_dir, tmp_path, *flags)
    assert not (tmp_path / "matrices").exists()


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda lines: lines[1:], "must hold every test image of pushpins"),
        (lambda lines: lines[:-3], "must hold the validation images"),
        (lambda lines: [*lines, ("pushpins/test/good/9.png", "high")], "line 11 must be"),
        (lambda lines: [*lines, ("9.png", 1.0)], "line 11 must be"),
        (lambda lines: [], "must hold lines"),
    ],
)
def test_bad_extra_scores(
    edit: object, line: str, folder: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.csv"
    path.write_text("".join(f"{image},{score}\n" for image, score in edit(extra_lines(folder))))  # type: ignore[operator]
    shutil.copytree(folder / "matrices", tmp_path / "matrices")
    shutil.copytree(folder / "results", tmp_path / "results")
    with pytest.raises(errors.UserError, match=line):
        reproduce(dataset_dir, tmp_path, "--extra_scores", str(path))
    assert not list((tmp_path / "out").glob("*"))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from reproduce_paper import start_worker\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, context, start_worker) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it lives
        parent.kill()
    end = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(worker, 0)
            time.sleep(0.05)
