"""What tests of wrong input share: a place to write, the scripts' arguments, the one error line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import IM_SIZE, Place

import calc_anom_ensm
import data_to_matrices
import sinbad_single_layer
from sinbad import errors, score_files

Case = tuple[Callable[..., None], list[str]]


def matrices_case(place: Place, images: Path, *flags: str) -> Case:
    paths = ["--dataset_dir", str(images), "--out_dir", str(place.out)]
    return data_to_matrices.main, [*paths, "--im_size", "32", *flags]


def scores_case(place: Place, *flags: str, data: Path | None = None) -> Case:
    """Level 14 with random weights, unless later flags say otherwise."""
    return sinbad_single_layer.main, [
        *("--data_dir", str(data or place.matrices), "--results_dir", str(place.out)),
        *("--mvtype", "pushpins_loco", "--initial_res", str(IM_SIZE), "--device", "cpu"),
        *("--net", "resnet18", "--weights", "random", "--n_projections", "4"),
        *("--pyramid_level", "14", *flags),
    ]


def fails(case: Case, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a case as its script would; return its one error line."""
    main, argv = case
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        errors.run_script(main, argv)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])  # the last line; notes may come before it
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


def write_scores(place: Place, level: int, n_crops: int, n_test: int = 4) -> None:
    """Write scores of one grid into place.root / "runs"."""
    root = place.root / "runs"
    rng = np.random.default_rng(n_crops)
    labels = np.array([0.0, 1.0] * (n_test // 2))
    paths = [f"test/{i}.png" for i in range(n_test)]
    folder = root / f"v_pyramid_lvl_{level}" / "rep_num_0" / "pushpins_loco"
    path = folder / f"{n_crops}_crop_anom_maps.npz"
    arrays = rng.random((n_crops, n_test)), rng.random((n_crops, 3)), labels
    score_files.write_scores(score_files.ScoreFile(path, level, *arrays, paths, {}))


def ensemble_case(place: Place, *flags: str) -> Case:
    version = str(place.root / "runs" / "v_pyramid_lvl_#")
    named = ["--version", version, "--version_224", version, "--mvtype", "pushpins_loco"]
    return calc_anom_ensm.main, [*named, "--out", str(place.out), "--rep_num_224", "0", *flags]
