"""Inputs that once lost or spoiled a result."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from runs import score

import sinbad_detector
from data_to_matrices import make_matrices
from sinbad import errors
from sinbad.report import figures


def test_an_image_of_a_scored_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    flags = ["score", "--detector", str(tmp_path / "d.npz"), str(tmp_path)]
    with pytest.raises(errors.UserError, match="is an input"):
        sinbad_detector.main([*flags, "--out", str(tmp_path / "a.png")])


def test_no_memory_on_a_cpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as end:
        errors.run_script(main, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: not enough memory")


def test_a_heatmap_that_cannot_be_drawn_loses_no_score(
    tmp_path: Path, dataset_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = dataset_dir / "pushpins/train/good", dataset_dir / "pushpins/test/good"
    detector, scores, report = (tmp_path / name for name in ("d.npz", "s.csv", "report"))
    network = "--net test_resnet --weights random --initial_res 64 --pyramid_level 14 --device cpu"
    words = [*network.split(), "--crop_size_ratio", ".99", "--n_projections", "5"]
    sinbad_detector.main(["fit", "--train_dir", str(train), "--out", str(detector), *words])
    heatmap, calls = figures.heatmap, iter(range(9))

    def broken(*arguments: object) -> object:
        if next(calls) == 1:
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        return heatmap(*arguments)

    monkeypatch.setattr(figures, "heatmap", broken)
    flags = ["--detector", str(detector), "--out", str(scores), "--report", str(report)]
    command = ["score", *flags, "--false_alarms", ".5", "--device", "cpu", str(test)]
    assert sinbad_detector.main(command) == 1
    n_images = len(list(test.iterdir()))
    assert len(scores.read_text().splitlines()) == 1 + n_images
    assert len(list((report / "pictures").iterdir())) == 2 * (n_images - 1)
    text = (report / "index.html").read_text()
    assert (text.count("<tr data-"), text.count("<img")) == (n_images, n_images - 1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_that_are_training_images_are_named(
    split: str, tmp_path: Path, dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(dataset_dir, tmp_path / "images")) / "pushpins"
    shutil.copy(images / "train/good/000.png", images / split / "good/001.png")
    make_matrices(images.parent, tmp_path / "m", ["pushpins_loco"], 64)
    score(tmp_path / "m", tmp_path / "r", "--mvtype", "pushpins_loco", "--pyramid_level", "224")
    said = "1 training images" if split == "train" else "1 test images"
    assert f"warning: {said} of pushpins_loco are" in capsys.readouterr().err
