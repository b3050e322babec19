"""Plot the figures of the README (from the demo) and of docs/ablation.md (from its rows).

Reads   DEMO_DIR/{dataset,matrices,results}, DEMO_DIR/tf_efficientnet_lite0.pth   (from make demo)
        RESULTS_DIR/ablation.csv   (from benchmarks/make_results.py)
Writes  OUT/histograms_fig.png, OUT/LOCO_demo_fig.png, RESULTS_DIR/ablation.png

    python imgs/make_figures.py --out demo/out/tables
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sinbad_utils
from sinbad import (
    atomic,
    backbones,
    cli,
    errors,
    images,
    loco,
    matrices,
    score_files,
    scoring,
    settings,
)
from sinbad.report import figures

CATEGORIES = ("juice_bottle", "pushpins")  # of the demo
SHOWN = "juice_bottle_loco"  # the test subset of histograms_fig.png
LEVEL, RATIO = 14, 0.99  # its feature level, and the crop that covers the whole image
TITLE = (
    "Synthetic images: what SINBAD sees. An image is a set of elements.\nEach element is a spatial "
    "position of the feature map, coloured by its projection on one of 1000 random directions:\n"
    "the one along which the anomalous image is furthest outside the training images."
)
Pixels, Numbers = NDArray[np.uint8], NDArray[np.floating]
HEIGHT, HISTOGRAM_WIDTH, CUMULATIVE_WIDTH = 2.2, 3.4, 3.0  # inches of a panel
N_BARS = 32


def image_at(scores: score_files.SubsetScores, label: int, quantile: float = 0.5) -> int:
    """Return the test image of a label whose score is this quantile of theirs."""
    images = np.flatnonzero(scores.labels == label)
    order = images[np.argsort(scores.final[images], kind="stable")]
    return int(order[int((len(order) - 1) * quantile)])


def most_telling_direction(train: Numbers, anomalous: Numbers) -> int:
    """Return the direction along which an image is furthest outside the training images.

    Parameters
    ----------
    train : (n_train, n_directions, n_bins), fractions of elements in [0, 1]
    anomalous : (n_directions, n_bins), those of the image
    """
    outside = np.maximum(anomalous - train.max(0), train.min(0) - anomalous)
    return int(outside.max(1).argmax())


def histograms_figure(scores: score_files.SubsetScores, data_dir: Path, weights: str) -> Figure:
    """Plot a normal and an anomalous image, each of median score, as sets."""
    subset = matrices.load_matrices(data_dir, scores.mvtype)
    net = next(file.recorded["net"] for file in scores.files if file.level == LEVEL)
    values = settings.Settings((LEVEL,), (RATIO,), initial_res=subset.im_size, net=net)
    backbone = backbones.build_backbone(net, backbones.load_weights(net, weights), (LEVEL,))
    extractor = backbones.FeatureExtractor(backbone, torch.device("cpu"))
    pool, numbers = matrices.pool_subsets([subset], extractor.device, values.n_workers)
    train_ids, test_ids = (numbers[scores.mvtype, split] for split in ("train", "test"))
    shown = [image_at(scores, label) for label in (0, 1)]
    grid, repetition = values.grid(RATIO), scoring.Repetition(LEVEL, 0, 0)
    position = scoring.CropPosition(grid, 0, grid.corners[0], (repetition,))
    source = images.nearest_source(grid.side, backbones.INPUT_SIDE)
    ids = [*train_ids, *(test_ids[index] for index in shown)]
    elements = extractor.extract(pool.gather(ids, position.corner, source))[LEVEL]
    directions = scoring.directions_at(position, repetition, elements.shape[1], values)
    n_fitted = min(sinbad_utils.N_RANGE_SETS, len(train_ids))
    histograms = sinbad_utils.fit_histograms(directions, elements[:n_fitted], values.n_quantiles)
    fractions = histograms.describe(elements).unflatten(1, (-1, values.n_quantiles)).numpy()
    chosen = most_telling_direction(fractions[: len(train_ids)], fractions[-1])
    low, high = histograms.low[chosen].item(), histograms.high[chosen].item()
    thresholds = np.linspace(low, high, values.n_quantiles + 2)[1:-1]
    height, width = (min(grid.side, subset.settings[name]) for name in ("height", "width"))
    pixels = {
        scores.image_paths[index]: subset.images["test"][index][:, :height, :width]
        for index in shown
    }
    projected = sinbad_utils.project(directions[[chosen]], elements[len(train_ids) :])[:, 0]
    return _plot_sets(pixels, grid.side, projected.numpy(), thresholds, fractions[:, chosen])


def _plot_sets(
    images: dict[str, Pixels], side: int, values: Numbers, thresholds: Numbers, fractions: Numbers
) -> Figure:
    """Plot one row per image: pixels, elements coloured by value, histogram, cumulative one."""
    height, width = next(iter(images.values())).shape[1:]
    widths = np.array([HEIGHT * width / height] * 2 + [HISTOGRAM_WIDTH, CUMULATIVE_WIDTH])
    figure = Figure((widths.sum() + 1.5, len(images) * (HEIGHT + 0.8) + 0.7))
    figure.suptitle(TITLE, x=0.01, ha="left")
    scale = Normalize(values.min(), values.max())
    bars = np.linspace(values.min(), values.max(), N_BARS + 1)
    train, edge = fractions[: -len(images)], math.isqrt(values.shape[1])
    rows = figure.subplots(len(images), 4, width_ratios=widths)
    for number, (path, pixels) in enumerate(images.items()):
        (plain, cells, histogram, cumulative), name = rows[number], ("normal", "logical")[number]
        colour, marker = figures.STYLES[name]
        plain.imshow(pixels.transpose(1, 2, 0))
        position = {"xycoords": "axes fraction", "textcoords": "offset points"}
        title = plain.annotate(path, (0, 1), (0, 5), **position, color=colour, fontweight="bold")
        title.set_in_layout(False)  # it may reach over the next panel
        grid = values[number].reshape(edge, edge)
        cells.imshow(grid, "viridis", norm=scale, extent=(0, side, side, 0))
        cells.set(xlim=(0, width), ylim=(height, 0))
        plain.set_axis_off()
        cells.set_axis_off()
        histogram.hist(values[number], bars, color=colour, alpha=0.8)
        for threshold in thresholds:
            histogram.axvline(threshold, color="0.35", linestyle=(0, (3, 2)), linewidth=1)
        histogram.set(xlabel="projection (no unit); dashed: bin edges", ylabel="elements")
        spread = (train.min(0), train.max(0))
        cumulative.fill_between(thresholds, *spread, color="0.8", label="training images")
        line = {"color": colour, "marker": marker, "label": f"this image, {name}"}
        cumulative.plot(thresholds, fractions[len(train) + number], **line)
        cumulative.set(ylim=(-0.03, 1.03), xlabel="bin edge", ylabel="fraction of elements below")
        cumulative.legend(frameon=False, loc="lower right")
    return figure


def demo_figure(sets: dict[str, score_files.SubsetScores], dataset_dir: Path) -> Figure:
    """Plot per category and image type the image of median score, and the hardest logical one."""
    rows: dict[str, list[figures.CaptionedImage]] = {}
    for category in CATEGORIES:
        logical, structural = (sets[f"{category}_{kind}"] for kind in ("loco", "struct"))
        shown = [(logical, image_at(logical, 0)), (logical, image_at(logical, 1))]
        shown += [(structural, image_at(structural, 1)), (logical, image_at(logical, 1, 0))]
        rows[category] = [figures.load_captioned(s, index, dataset_dir) for s, index in shown]
    title = "images of median score of each type; last, the logical anomaly with the lowest score"
    return figures.image_rows_figure(f"Synthetic images: {title}", rows)


def ablation_figure(path: Path) -> Figure:
    """Plot one panel per setting changed: a point per repetition, a line through the medians."""
    settings_changed: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first says how it was made
    for name, value, _, auroc, seconds in list(csv.reader(lines))[1:]:
        label = f"{'all' if ' ' in value else value}\n{seconds} s"
        settings_changed[name][label].append(float(auroc))
    figure = Figure((11.0, 3.2))
    panels = figure.subplots(1, len(settings_changed), sharey=True)
    for panel, (name, aurocs) in zip(panels, settings_changed.items(), strict=True):
        panel.plot([np.median(values) for values in aurocs.values()], color="#0072B2")
        panel.plot(list(aurocs.values()), "o", color="#0072B2", markersize=4, alpha=0.6)
        panel.set_xticks(range(len(aurocs)), aurocs, fontsize=7)
        panel.set_title(name, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("ROC-AUC (%)")
    title = "juice_bottle (a part), logical; ResNet-18, level 14. Point: one repetition of the "
    figure.suptitle(f"{title}random projections, line: median, s: CPU time", x=0.01, ha="left")
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--demo_dir", type=Path, default=Path("demo/out"), help="output folder of the demo")
    add(
        "--weights",
        help="weights of the scores' network; default: DEMO_DIR/tf_efficientnet_lite0.pth",
    )
    add("--rep_num_224", type=cli.int_at_least(0), default=20, help="raw-pixel repetitions")
    add("--results_dir", type=Path, default=Path("results"), help="folder of measured rows")
    add("--out", type=Path, default=Path("imgs"), help="folder of the README's figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read scores and rows, plot the figures."""
    args = parse_args(argv)
    folder = str(args.demo_dir / "results/demo_pyramid_lvl_#")
    selection = score_files.Selection(folder, folder, settings.PAPER_LEVELS, 0, args.rep_num_224)
    mvtypes = [f"{category}_{kind}" for category in CATEGORIES for kind in loco.KINDS]
    sets = {name: score_files.load_subset(selection, name, settings.Settings()) for name in mvtypes}
    weights = args.weights or str(args.demo_dir / "tf_efficientnet_lite0.pth")
    data_dir, rows = args.demo_dir / "matrices", args.results_dir / "ablation.csv"
    plots = {
        args.out / "histograms_fig.png": lambda: histograms_figure(sets[SHOWN], data_dir, weights),
        args.out / "LOCO_demo_fig.png": lambda: demo_figure(sets, args.demo_dir / "dataset"),
        rows.with_suffix(".png"): lambda: ablation_figure(rows),
    }
    for path, plot in plots.items():
        atomic.atomic_write(path, figures.png_of(plot))
        print(path)


if __name__ == "__main__":
    errors.run_script(main)
