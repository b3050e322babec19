"""CUDA equals the CPU, and itself; skipped where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_below
from runs import read

import sinbad_single_layer
import sinbad_utils
from sinbad import detectors
from sinbad.settings import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--mvtype",
    "pushpins",
    "--net",
    "resnet18",
    "--weights",
    "random",
    "--initial_res",
    "64",
    "--crop_size_ratio",
    ".5",
    ".99",
    "--n_projections",
    "50",
    "--rep",
    "0-1",
]


def score(data_dir: Path, out: Path, *flags: str) -> dict[str, np.ndarray]:
    """Score pushpins at three levels; return relative path -> crop scores, test then validation."""
    words = [*FLAGS, "--data_dir", str(data_dir), "--results_dir", str(out), *flags]
    sinbad_single_layer.main([*words, "--pyramid_level", "7", "14"])
    words += ["--shrinkage_factor", "1", "--crop_size_ratio", ".999"]
    sinbad_single_layer.main([*words, "--pyramid_level", "224"])
    files = [out / name for name in files_below(out) if name.endswith(".npz")]
    return {str(path.relative_to(out)): both_splits(path) for path in files}


def both_splits(path: Path) -> np.ndarray:
    """Return the crop scores of a file, test then validation."""
    file = read(path)
    return np.concatenate([file.test, file.valid], axis=1)


@pytest.fixture(scope="module")
def on_cpu(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Return the scores that the CPU computes."""
    return score(data_dir, tmp_path_factory.mktemp("cpu"), "--device", "cpu")


def test_each_step_is_the_cpus() -> None:
    generator = torch.Generator().manual_seed(0)
    elements = torch.randn(40, 30, 49, generator=generator)
    directions = torch.randn(20, 30, generator=generator)
    values = sinbad_utils.project(directions, elements)
    torch.testing.assert_close(
        sinbad_utils.project(directions.cuda(), elements.cuda()).cpu(), values
    )
    low, high = sinbad_utils.fit_ranges(values)
    for actual, expected in zip(sinbad_utils.fit_ranges(values.cuda()), (low, high), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-6)
    described = sinbad_utils.cumulative_histogram(values, low, high, 5)
    actual = sinbad_utils.cumulative_histogram(values.cuda(), low.cuda(), high.cuda(), 5)
    assert torch.equal(actual.cpu(), described)
    for squared in (False, True):
        expected = sinbad_utils.fit_whitening(described[:20], 0.1, squared).nearest(described[20:])
        whitening = sinbad_utils.fit_whitening(described[:20].cuda(), 0.1, squared)
        actual = whitening.nearest(described[20:].cuda()).cpu()
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


@pytest.mark.parametrize("official", [False, True])
def test_the_page_scores_as_on_the_cpu(official: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    train, images = (torch.randn(n, 64, 49, generator=generator) for n in (40, 12))
    method = (0, 0, 7, 1, 0), 200, 5, 0.1, official
    expected = sinbad_utils.score_crop(train, images, *method)
    np.testing.assert_allclose(
        sinbad_utils.score_crop(train.cuda(), images.cuda(), *method), expected, rtol=2e-3
    )


def test_scores_are_the_cpus_and_the_same_in_every_run(
    data_dir: Path, tmp_path: Path, on_cpu: dict[str, np.ndarray]
) -> None:
    actual = score(data_dir, tmp_path / "a", "--device", "cuda")
    again = score(data_dir, tmp_path / "b", "--device", "cuda")
    assert actual.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        np.testing.assert_array_equal(actual[name], again[name])
        np.testing.assert_allclose(actual[name], expected, rtol=5e-2)
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_images_that_stay_in_memory_give_the_same_bytes(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = score(data_dir, tmp_path / "resident", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    for name, scores in score(data_dir, tmp_path / "mapped", "--device", "cuda").items():
        np.testing.assert_array_equal(scores, actual[name])


@pytest.mark.parametrize("flags", [["--precision", "tf32"], ["--precision", "bf16"], ["--compile"]])
def test_faster_ways_rank_alike(
    flags: list[str], data_dir: Path, tmp_path: Path, on_cpu: dict[str, np.ndarray]
) -> None:
    actual = score(data_dir, tmp_path, "--device", "cuda", *flags)
    pairs = [(actual[name].ravel(), on_cpu[name].ravel()) for name in on_cpu]
    assert min(np.corrcoef(*pair)[0, 1] for pair in pairs) > 0.9


def test_a_gpu_with_little_memory_gets_smaller_batches(
    data_dir: Path, tmp_path: Path, on_cpu: dict[str, np.ndarray]
) -> None:
    """In a process of its own: the limit would stay."""
    code = (
        "import torch, sys, sinbad_single_layer\n"
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        "torch.cuda.set_per_process_memory_fraction(400e6 / total)\n"
        "sinbad_single_layer.main(sys.argv[1:])\n"
    )
    words = [*FLAGS, "--data_dir", data_dir, "--results_dir", tmp_path, "--device", "cuda"]
    words += ["--pyramid_level", "7", "14"]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert "GPU memory is too small for 256 crops at once, going on with 128" in run.stderr
    for path in run.stdout.split():
        name = str(Path(path).relative_to(tmp_path))
        np.testing.assert_allclose(both_splits(Path(path)), on_cpu[name], rtol=5e-2)


def test_a_detector_fitted_on_a_gpu_is_the_cpus(dataset_dir: Path, tmp_path: Path) -> None:
    options = {"net": "resnet18", "weights": "random", "initial_res": 64, "n_projections": 50}
    options["rep_num_224"] = 3
    train, test = (
        sorted((dataset_dir / "pushpins" / part).iterdir()) for part in ("train/good", "test/good")
    )
    scores = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.npz"
        values = Settings(**options, device=device)
        detectors.Detector.fit(train, values=values).save(path)
        for scored_on in ("cpu", "cuda"):
            predictions = detectors.Detector.load(path, device=scored_on).score(test, 0.5)
            scores.append([prediction.score for prediction in predictions])
    for actual in scores[1:]:
        np.testing.assert_allclose(actual, scores[0], rtol=2e-2)
