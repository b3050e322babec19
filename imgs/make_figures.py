"""Plot the README's two figures from the demo: what the method sees, and what it finds.

Reads   DEMO_DIR/{dataset,matrices,results}, DEMO_DIR/tf_efficientnet_lite0.pth   (from make demo)
Writes  OUT/histograms_fig.png, OUT/LOCO_demo_fig.png

    python imgs/make_figures.py --out demo/out/tables
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sinbad_utils
from sinbad import atomic, backbones, cli, ensembles, errors, loco, matrices
from sinbad.report import figures

CATEGORIES = ("juice_bottle", "pushpins")  # of the demo
SHOWN = "juice_bottle_loco"  # the data set of histograms_fig.png
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
    arrays = matrices.load_matrices(data_dir, scores.mvtype)
    side = loco.crop_side(arrays.im_size, RATIO)
    corner = loco.crop_corners(arrays.im_size, RATIO, loco.CROP_NUM_EDGE)[0]
    net = scores.ensemble.grids[LEVEL, 1].settings["net"]
    backbone = backbones.build_backbone(net, backbones.load_weights(net, weights), (LEVEL,))
    extractor = backbones.FeatureExtractor(backbone, torch.device("cpu"))
    pool = matrices.ImagePool([arrays], extractor.device)
    train_ids, test_ids = (pool.ids[scores.mvtype, split] for split in ("train", "test"))
    shown = [image_at(scores, label) for label in (0, 1)]
    ids = train_ids + [test_ids[index] for index in shown]
    elements = extractor.extract(
        pool.gather(ids, corner, images.nearest_source(side, backbones.INPUT_SIDE))
    )[LEVEL]
    key = (0, 0, LEVEL, 1, 0)  # as when scoring
    directions = sinbad_utils.random_directions(
        loco.NETWORK_SETTINGS.n_projections, elements.shape[1], key
    )
    values = sinbad_utils.project(directions, elements)
    low, high = sinbad_utils.fit_ranges(values[: min(sinbad_utils.N_RANGE_SETS, len(train_ids))])
    described = sinbad_utils.cumulative_histogram(values, low, high, loco.N_QUANTILES)
    shares = described.unflatten(1, (-1, loco.N_QUANTILES)).numpy()  # (images, directions, bins)
    chosen = most_telling_direction(shares[: len(train_ids)], shares[-1])
    steps = np.arange(1, loco.N_QUANTILES + 1) / (loco.N_QUANTILES + 1)
    thresholds = low[chosen].item() + (high - low)[chosen].item() * steps
    height, width = (min(side, arrays.settings[name]) for name in ("height", "width"))
    images = {
        scores.image_paths[index]: arrays.images["test"][index][:, :height, :width]
        for index in shown
    }
    shown_values = values[len(train_ids) :, chosen].numpy()  # (images shown, elements)
    return _plot_sets(images, side, shown_values, thresholds, shares[:, chosen])


def _plot_sets(
    images: dict[str, Pixels], side: int, values: Numbers, thresholds: Numbers, shares: Numbers
) -> Figure:
    """Plot one row per image: pixels, elements coloured by value, histogram, cumulative one."""
    height, width = next(iter(images.values())).shape[1:]
    widths = np.array([HEIGHT * width / height] * 2 + [HISTOGRAM_WIDTH, CUMULATIVE_WIDTH])
    figure = Figure((widths.sum() + 1.5, len(images) * (HEIGHT + 0.8) + 0.7))
    figure.suptitle(TITLE, x=0.01, ha="left")
    scale = Normalize(values.min(), values.max())
    bars = np.linspace(values.min(), values.max(), N_BARS + 1)
    train, edge = shares[: -len(images)], math.isqrt(values.shape[1])
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
        cumulative.plot(thresholds, shares[len(train) + number], **line)
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--demo_dir", type=Path, default=Path("demo/out"), help="output folder of the demo")
    add(
        "--weights",
        help="weights of the scores' network; default: DEMO_DIR/tf_efficientnet_lite0.pth",
    )
    add("--rep_num_224", type=cli.integer_from(0), default=20, help="raw-pixel repetitions")
    add("--out", type=Path, default=Path("imgs"), help="folder of the figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the scores, plot both figures."""
    args = parse_args(argv)
    version = str(args.demo_dir / "results/demo_pyramid_lvl_#")
    options = ensembles.EnsembleOptions(
        version, version, loco.PAPER_LEVELS, 0, args.rep_num_224, loco.LAMBDA_FACTOR
    )
    mvtypes = [f"{category}_{kind}" for category in CATEGORIES for kind in loco.KINDS]
    sets = {mvtype: ensembles.load_data_set(options, mvtype) for mvtype in mvtypes}
    weights = args.weights or str(args.demo_dir / "tf_efficientnet_lite0.pth")
    data_dir = args.demo_dir / "matrices"
    plots = {
        "histograms_fig": lambda: histograms_figure(sets[SHOWN], data_dir, weights),
        "LOCO_demo_fig": lambda: demo_figure(sets, args.demo_dir / "dataset"),
    }
    for name, plot in plots.items():
        atomic.atomic_write(args.out / f"{name}.png", figures.png_of(plot))
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    errors.run_script(main)
