"""Draw the README's two pictures from the demo: what the method sees, and what it finds.

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

CLASSES = ("juice_bottle", "pushpins")  # of the demo
SHOWN = "juice_bottle_loco"  # the data set of histograms_fig.png
LEVEL, RATIO = 14, 0.99  # and its elements: a level, the crop that is the whole image
TITLE = (
    "Demo data (drawings): what SINBAD sees. An image is a set of elements\nEach element is a "
    "place of the feature map, coloured by its projection on one direction: of 1000 random ones "
    "that\nalong which the anomalous image is furthest outside the training ones."
)
Pixels, Numbers = NDArray[np.uint8], NDArray[np.floating]
HEIGHT, HISTOGRAM_WIDTH, SHARES_WIDTH = 2.2, 3.4, 3.0  # inches of a panel
N_BARS = 32


def image_at(scores: ensembles.DataSetScores, label: int, share: float = 0.5) -> int:
    """Return the test image of a label below which this share of its kind scores: the median."""
    images = np.flatnonzero(scores.labels == label)
    order = images[np.argsort(scores.final[images], kind="stable")]
    return int(order[int((len(order) - 1) * share)])


def most_telling_direction(train: Numbers, anomalous: Numbers) -> int:
    """Return the direction whose shares of an image lie furthest outside the training images'.

    Parameters
    ----------
    train : (n_train, n_directions, n_quantiles)
    anomalous : (n_directions, n_quantiles)
    """
    outside = np.maximum(anomalous - train.max(0), train.min(0) - anomalous)
    return int(outside.max(1).argmax())


def histograms_figure(scores: ensembles.DataSetScores, data_dir: Path, weights: str) -> Figure:
    """Draw a normal and an anomalous image, each of median score, as sets."""
    arrays = matrices.load_matrices(data_dir, scores.mvtype)
    side = loco.crop_side(arrays.im_size, RATIO)
    corner = loco.crop_corners(arrays.im_size, RATIO, loco.CROP_NUM_EDGE)[0]
    net = scores.grids[LEVEL, 1].settings["net"]
    backbone = backbones.build_backbone(net, backbones.load_weights(net, weights), (LEVEL,))
    extractor = backbones.FeatureExtractor(backbone, torch.device("cpu"))
    pool = matrices.ImagePool([arrays], extractor.device)
    train_ids, test_ids = (pool.ids[scores.mvtype, split] for split in ("train", "test"))
    shown = [image_at(scores, label) for label in (0, 1)]
    ids = train_ids + [test_ids[index] for index in shown]
    elements = extractor.extract(
        pool.gather(ids, corner, images.nearest_source(side, backbones.INPUT_SIDE))
    )[LEVEL]
    key = (0, 0, LEVEL, 1, 0)  # that of the scores
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
    own_values = values[len(train_ids) :, chosen].numpy()  # (images shown, elements)
    return _draw_sets(images, side, own_values, thresholds, shares[:, chosen])


def _draw_sets(
    images: dict[str, Pixels], side: int, values: Numbers, thresholds: Numbers, shares: Numbers
) -> Figure:
    """Draw a row an image: pixels, elements coloured by value, histogram, cumulative shares."""
    height, width = next(iter(images.values())).shape[1:]
    widths = np.array([HEIGHT * width / height] * 2 + [HISTOGRAM_WIDTH, SHARES_WIDTH])
    figure = Figure((widths.sum() + 1.5, len(images) * (HEIGHT + 0.8) + 0.7))
    figure.suptitle(TITLE, x=0.01, ha="left")
    scale = Normalize(values.min(), values.max())
    bars = np.linspace(values.min(), values.max(), N_BARS + 1)
    train, edge = shares[: -len(images)], math.isqrt(values.shape[1])
    rows = figure.subplots(len(images), 4, width_ratios=widths)
    for number, (path, pixels) in enumerate(images.items()):
        (picture, cells, histogram, cumulative), kind = rows[number], ("good", "logical")[number]
        colour, marker = figures.LOOKS[kind]
        picture.imshow(pixels.transpose(1, 2, 0))
        at = {"xycoords": "axes fraction", "textcoords": "offset points"}
        title = picture.annotate(path, (0, 1), (0, 5), **at, color=colour, fontweight="bold")
        title.set_in_layout(False)  # it may reach over the next panel
        grid = values[number].reshape(edge, edge)
        cells.imshow(grid, "viridis", norm=scale, extent=(0, side, side, 0))
        cells.set(xlim=(0, width), ylim=(height, 0))
        picture.set_axis_off()
        cells.set_axis_off()
        histogram.hist(values[number], bars, color=colour, alpha=0.8)
        for threshold in thresholds:
            histogram.axvline(threshold, color="0.35", linestyle=(0, (3, 2)), linewidth=1)
        histogram.set(xlabel="projection (no unit); dashed: thresholds", ylabel="elements")
        spread = (train.min(0), train.max(0))
        cumulative.fill_between(thresholds, *spread, color="0.8", label="training images")
        own = {"color": colour, "marker": marker, "label": f"this image, {kind}"}
        cumulative.plot(thresholds, shares[len(train) + number], **own)
        cumulative.set(ylim=(-0.03, 1.03), xlabel="threshold", ylabel="share of elements below")
        cumulative.legend(frameon=False, loc="lower right")
    return figure


def demo_figure(sets: dict[str, ensembles.DataSetScores], dataset_dir: Path) -> Figure:
    """Draw of every class the images of median score of each kind, and the hardest logical one."""
    rows: dict[str, list[figures.Picture]] = {}
    for class_name in CLASSES:
        own = {kind: sets[f"{class_name}_{kind}"] for kind in loco.KINDS}
        chosen = [(own["loco"], image_at(own["loco"], 0))]
        chosen += [(scores, image_at(scores, 1)) for scores in own.values()]
        chosen.append((own["loco"], image_at(own["loco"], 1, 0)))
        rows[class_name] = [figures.load_picture(s, index, dataset_dir) for s, index in chosen]
    title = "of each kind the image of median score; last, the logical anomaly of lowest score"
    return figures.picture_rows(f"Demo data (drawings): {title}", rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--demo_dir", type=Path, default=Path("demo/out"), help="what the demo wrote")
    add("--weights", help="of the scores; default: DEMO_DIR/tf_efficientnet_lite0.pth")
    add("--rep_num_224", type=cli.integer_from(0), default=20, help="raw-pixel repetitions")
    add("--out", type=Path, default=Path("imgs"), help="folder of the pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the scores, draw both pictures."""
    args = parse_args(argv)
    version = str(args.demo_dir / "results/demo_pyramid_lvl_#")
    options = ensembles.EnsembleOptions(
        version, version, loco.PAPER_LEVELS, 0, args.rep_num_224, loco.LAMBDA_FACTOR
    )
    mvtypes = [f"{class_name}_{kind}" for class_name in CLASSES for kind in loco.KINDS]
    sets = {mvtype: ensembles.load_data_set(options, mvtype) for mvtype in mvtypes}
    weights = args.weights or str(args.demo_dir / "tf_efficientnet_lite0.pth")
    matrices = args.demo_dir / "matrices"
    drawers = {
        "histograms_fig": lambda: histograms_figure(sets[SHOWN], matrices, weights),
        "LOCO_demo_fig": lambda: demo_figure(sets, args.demo_dir / "dataset"),
    }
    for name, draw in drawers.items():
        atomic.atomic_write(args.out / f"{name}.png", figures.png_of(draw))
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    errors.run_script(main)
