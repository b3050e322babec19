"""Nothing is lost: what is there stays, full and read-only disks, readers that go away."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_places import ensemble_case, fails, matrices_case, scores_case, write_scores
from conftest import IM_SIZE, Place, files_below

import sinbad_detector
from sinbad import atomic, errors

ROOT = Path(__file__).parents[1]


class ArrayMemoryError(MemoryError):
    """Stands for numpy's private kind of it."""


def test_what_was_finished_before_stays_as_it_was(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    good = matrices_case(place, place.drawn, "--mvtype", "pushpins_loco")
    good[0](good[1])
    before = files_below(place.out)
    fails(matrices_case(place, place.drawn, "--im_size", "48"), capsys)
    images = place.images()
    (images / "pushpins/train/good/002.png").write_text("no image")
    fails(matrices_case(place, images, "--overwrite"), capsys)
    assert files_below(place.out) == before


def test_results_and_matrices_of_the_authors_are_not_replaced(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place.out / "ver1_pyramid_lvl_14/rep_num_0/pushpins_loco"
    folder.mkdir(parents=True)
    arrays = {"anom_map_test": np.ones((1, 5)), "anom_map_valid": np.ones((1, 3))}
    np.savez(folder / "1_crop_anom_maps.npz", **arrays)
    np.save(folder / "lbl.py.npy", np.array([0.0, 0.0, 0.0, 1.0, 1.0]))
    before = files_below(place.out)
    assert "file of this collection" in fails(scores_case(place), capsys)
    assert files_below(place.out) == before
    main, argv = scores_case(place, "--overwrite")
    main(argv)
    assert sorted(path.name for path in folder.iterdir()) == ["1_crop_anom_maps.npz", "lbl.py.npy"]
    np.save(folder / "lbl.py.npy", np.zeros(5))
    assert "lbl.py.npy must hold the labels of these" in fails((main, argv), capsys)

    matrices = place.root / "theirs" / "pushpins_loco"
    matrices.mkdir(parents=True)
    np.save(matrices / "train_data.npy", np.zeros((2, 3, 64, 64), np.float32))
    case = matrices_case(place, place.drawn, "--out_dir", str(matrices.parent))
    assert "hold matrices of this script" in fails(case, capsys)
    assert [path.name for path in matrices.iterdir()] == ["train_data.npy"]


def test_scores_of_images_that_have_changed_do_not_count_as_finished(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    images = place.images()
    data = ["--out_dir", str(place.root / "data"), "--mvtype", "pushpins_loco"]
    make, argv = matrices_case(place, images, *data, "--im_size", str(IM_SIZE))
    make(argv)
    score = scores_case(place, "--pyramid_level", "224", data=place.root / "data")
    score[0](score[1])
    before = files_below(place.out)
    good, bad = (images / f"pushpins/test/{part}" for part in ("good", "logical_anomalies"))
    (good / "000.png").write_bytes((bad / "000.png").read_bytes())
    make(argv)
    assert "1 images have changed" in capsys.readouterr().err
    assert "was computed with images_sha256" in fails(score, capsys)
    assert files_below(place.out) == before


@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [
        (">&0", 2, ""),  # a pipe whose reader has gone
        (">/dev/full", 2, "error: the output: No space left on device"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_a_reader_that_goes_away(redirection: str, status: int, words: str) -> None:
    code = "from sinbad.errors import *; run_script(lambda argv: print('x') or log.info('y'), [])"
    reader, pipe = os.pipe()
    os.close(reader)
    command = f"'{sys.executable}' -c \"{code}\" {redirection}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, stdin=pipe, capture_output=True, text=True, env={}
    )
    os.close(pipe)
    assert result.returncode == status
    assert words in result.stderr
    assert "Exception" not in result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), r"error: not enough memory \(none left\); ask for .*\n"),
        (ArrayMemoryError("a (9,)"), r"error: not enough memory \(a \(9,\)\); ask for .*\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), r"error: not enough memory \(CUDA.*\n"),
        (errors.UserError("n must be 1, got 2"), "error: n must be 1, got 2\n"),
        (RuntimeError("a bug"), None),
        (OSError("without a number: a bug"), None),
    ],
)
def test_an_error_is_one_line_unless_it_is_a_bug_or_debug_is_on(
    error: Exception, line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit if line else type(error)) as caught:
        errors.run_script(main, [])
    if line:
        assert caught.value.code == 2
        assert re.fullmatch(line, capsys.readouterr().err)
    with pytest.raises(type(error)):
        errors.run_script(main, ["--debug"])


def test_the_exit_status_is_that_of_main() -> None:
    for returned, status in ((None, 0), (0, 0), (1, 1)):
        with pytest.raises(SystemExit) as caught:
            errors.run_script(lambda argv, n=returned: n, [])
        assert caught.value.code == status


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), MemoryError()]
)
def test_finished_outputs_are_kept_only_by_scripts_that_resume(
    error: BaseException, resumes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit):
        errors.run_script(main, [], resumes)
    assert ("finished outputs are kept" in capsys.readouterr().err) == resumes


# ---------------------------------------------------------------- file systems


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system in memory, or skip the test."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system (root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("script", ["data_to_matrices", "sinbad_single_layer", "calc_anom_ensm"])
def test_read_only_file_system(
    script: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for level in (7, 14):
        write_scores(place, level, 1)
    cases = {
        "data_to_matrices": matrices_case(place, place.drawn),
        "sinbad_single_layer": scores_case(place, "--pyramid_level", "224"),
        "calc_anom_ensm": ensemble_case(place),
    }
    with mounted(place.out, "ro"):
        line = fails(cases[script], capsys)
        assert str(place.out) in line
        assert "Read-only file system; choose a folder that is not read-only" in line
        with pytest.raises(OSError, match=rf"Read-only file system: '{place.out}/missing/file'"):
            atomic.check_writable(place.out / "missing/file")


@pytest.mark.parametrize("script", ["data_to_matrices", "sinbad_single_layer"])
def test_full_disk(
    script: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reps = ["--pyramid_level", "224", "--rep", "0-19", "--crop_size_ratio", ".7"]
    with mounted(place.out, "size=64k"):
        (place.out / "filler").write_bytes(bytes(32 * 1024))
        is_first = script == "data_to_matrices"
        case = matrices_case(place, place.drawn) if is_first else scores_case(place, *reps)
        line = fails(case, capsys)
        assert "No space left on device; free some space" in line
        (place.out / "filler").unlink()
        monkeypatch.setattr("tempfile.tempdir", str(place.out))
        folder = f"error: the folder of temporary files {place.out}: No space left on device; free"
        train = ["--train_dir", str(place.drawn / "pushpins/train/good")]
        fit = ["fit", *train, "--out", str(place.root / "d.npz"), "--pyramid_level", "224"]
        assert folder in fails((sinbad_detector.main, fit), capsys)
        for name in files_below(place.out):  # what is present is complete, nothing is hidden
            assert name.endswith(("_anom_maps.npz", "lbl.npy"))
            np.load(place.out / name)
