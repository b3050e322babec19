"""The figures of README and docs: that they are plotted, which images and direction they show."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_to_matrices
import sinbad_single_layer
from demo import make_dataset
from imgs import make_figures

IM_SIZE = "64"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the outputs of a tiny demo: images, matrices, scores of levels 7 and 14."""
    folder = tmp_path_factory.mktemp("demo")
    few = ["--n_train", "3", "--n_valid", "2", "--n_test", "2", "--scale", "0.06"]
    make_dataset.main(["--out_dir", str(folder / "dataset"), *few])
    paths = ["--dataset_dir", str(folder / "dataset"), "--out_dir", str(folder / "matrices")]
    data_to_matrices.main([*paths, "--im_size", IM_SIZE])
    sinbad_single_layer.main(
        [
            *("--mvtype", "juice_bottle", "pushpins", "--pyramid_level", "7", "14"),
            *("--crop_size_ratio", ".7", ".99", "--net", "resnet18", "--weights", "random"),
            *("--data_dir", str(folder / "matrices"), "--results_dir", str(folder / "results")),
            *("--initial_res", IM_SIZE, "--version_name", "demo", "--device", "cpu"),
        ]
    )
    return folder


def plot(demo: Path, out: Path) -> dict[str, bytes]:
    """Plot the figures and return their bytes."""
    out.mkdir()
    for name in ("ablation", "scaling", "cpu", "gpu"):
        shutil.copy(Path(__file__).parents[1] / f"results/{name}.csv", out)
    flags = ["--demo_dir", str(demo), "--rep_num_224", "0", "--weights", "random"]
    make_figures.main([*flags, "--results_dir", str(out), "--out", str(out)])
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_equal_scores_give_equal_bytes(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pngs = plot(demo, tmp_path / "one")
    names = ["LOCO_demo_fig.png", "ablation.png", "cost.png", "histograms_fig.png"]
    assert sorted(pngs) == names
    assert sorted(capsys.readouterr().out.split()) == [str(tmp_path / "one" / n) for n in names]
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "one" / name).convert("RGB"))
        assert pixels.shape[1] > 1000
        assert (pixels != 255).any(2).mean() > 0.04
    assert plot(demo, tmp_path / "two") == pngs


def test_the_ablation_is_plotted_from_its_rows_alone(tmp_path: Path) -> None:
    head = 'changed,value,rep,"ROC-AUC, %","CPU seconds, 5 reps"'
    values = {"training images": ("80", "10", "4"), "crop_size_ratio": (".25 .5 .7 .99", ".5")}
    rows = [f"{name},{v},{rep},9{rep},7" for name in values for v in values[name] for rep in (0, 1)]
    nets = ("resnet18", "tf_efficientnet_lite0")
    both = [f"network,{head}", *(f"{net},{row}" for net in nets for row in rows)]
    for n_nets, lines in ((1, [head, *rows]), (2, both)):
        (tmp_path / "ablation.csv").write_text("\n".join(["# made by hand", *lines]))
        flags = ["--only", "ablation", "--results_dir", str(tmp_path), "--demo_dir", "none"]
        make_figures.main([*flags, "--out", str(tmp_path / "out")])
        upper, lower = np.split(
            np.array(make_figures.ablation_figure(tmp_path / "ablation.csv").axes), 2
        )
        assert [len(panel.lines) for panel in upper] == [n_nets, n_nets]
        assert all(panel.get_xlabel() for panel in lower)
        ticks = [[label.get_text() for label in panel.get_xticklabels()] for panel in lower]
        assert ticks == [["4", "10", "80"], [".5", "all four"]]
    assert {path.name for path in tmp_path.iterdir()} == {"ablation.csv", "ablation.png"}


def test_the_cost_is_plotted_from_its_rows() -> None:
    folder = Path(make_figures.__file__).parents[1] / "results"
    *panels, devices = make_figures.cost_figure(folder).axes
    rows = make_figures.read_rows(folder / "scaling.csv")
    for panel, what in zip(panels, make_figures.SIZES, strict=True):
        expected = {float(r["number"]): float(r["seconds"]) for r in rows if r["what"] == what}
        scoring, _ = panel.lines
        assert dict(zip(*scoring.get_data(), strict=True)) == expected
    widths = [bar.get_width() for bar in devices.patches]
    assert len(widths) == 6
    assert all(
        scoring > forward for scoring, forward in zip(widths[::2], widths[1::2], strict=True)
    )


def test_the_images_shown_are_those_of_median_and_of_lowest_score() -> None:
    scores: Any = SimpleNamespace(labels=np.array([0, 1, 1, 0, 1]), final=np.arange(5)[::-1])
    shown = [make_figures.image_at(scores, *which) for which in ((0,), (1,), (1, 0))]
    assert shown == [3, 2, 4]


def test_the_direction_shown_is_the_one_furthest_outside_the_training_images() -> None:
    rng = np.random.default_rng(0)
    train = rng.uniform(0.4, 0.6, (6, 5, 3)).astype(np.float32)
    inside = train.mean(0)
    above, below = inside.copy(), inside.copy()
    above[3, 1], below[2, 0] = 0.9, 0.1
    above[1, 2] = 0.7  # outside too, but less
    assert make_figures.most_telling_direction(train, above) == 3
    assert make_figures.most_telling_direction(train, below) == 2
