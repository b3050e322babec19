"""Draw the README's two pictures from the demo data: what the method sees, and what it finds.

Reads   DATASET_DIR/<class>/...           (from make_demo_dataset.py)
        DATA_DIR/<mvtype>/*.npy           (from data_to_matrices.py)
        VERSION/rep_num_0/<mvtype>/       (from sinbad_single_layer.py; # is the pyramid level)
Writes  OUT/histograms_fig.png, OUT/LOCO_demo_fig.png

    python imgs/make_figures.py --out demo/tables

The defaults are what `make demo` leaves where ImageNet weights can be downloaded; after a demo with
random weights: --weights random --version demo/results/random_pyramid_lvl_#.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sinbad.backbones import INPUT_SIDE, FeatureExtractor, build_backbone, load_weights
from sinbad.datasets import (
    CROP_NUM_EDGE,
    KINDS,
    LAMBDA_FACTOR,
    N_QUANTILES,
    NETWORK_SETTINGS,
    crop_corners,
    crop_side,
)
from sinbad.ensembles import DataSetScores, EnsembleOptions, load_data_set
from sinbad.errors import run_script
from sinbad.files import write_whole
from sinbad.flags import ScriptParser, integer_from
from sinbad.matrices import ImagePool, load_matrices, nearest_source
from sinbad.report.figures import LOOKS, Picture, load_picture, picture_rows, png_of
from sinbad_utils import FIT_SETS, cumulative_histogram, fit_ranges, project, random_directions

CLASSES = ("juice_bottle", "pushpins")  # of the demo data
SHOWN = "juice_bottle_loco"  # the data set of histograms_fig.png
RATIO = 0.99  # its crop: the whole image
TITLE = "Demo data (drawings): what SINBAD sees. An image is a set of elements"
ABOUT_DIRECTION = (
    "Each element is a place of the feature map, coloured by its projection on one direction: of "
    "1000 random ones that\nalong which the anomalous image is furthest outside the training ones."
)
HEIGHT, HISTOGRAM_WIDTH, SHARES_WIDTH = 2.2, 3.4, 3.0  # inches of a panel
N_BARS = 32


@dataclass(frozen=True)
class Example:
    """What histograms_fig.png shows of one image.

    Attributes
    ----------
    title : path below the class folder
    kind : "good" or "logical"
    pixels : (height, width, 3), uint8, without padding
    side : of the crop in pixels
    values : (n_elements,), the elements projected on one direction
    shares : (n_quantiles,), shares of them below the thresholds
    """

    title: str
    kind: str
    pixels: NDArray[np.uint8]
    side: int
    values: NDArray[np.float32]
    shares: NDArray[np.float32]


# ---------------------------------------------------------------- what the method sees


def most_telling_direction(train: NDArray[np.float32], anomalous: NDArray[np.float32]) -> int:
    """Return the direction whose shares of an image lie furthest outside the training images'.

    Parameters
    ----------
    train : (n_train, n_directions, n_quantiles)
    anomalous : (n_directions, n_quantiles)
    """
    outside = np.maximum(anomalous - train.max(0), train.min(0) - anomalous)
    return int(outside.max(1).argmax())


def histograms_figure(
    scores: DataSetScores, data_dir: Path, extractor: FeatureExtractor, level: int
) -> Figure:
    """Draw a normal and an anomalous image as sets: elements, projections, cumulative histograms.

    Of the good and of the anomalous test images that of median score is drawn.
    """
    matrices = load_matrices(data_dir, scores.mvtype)
    corner = crop_corners(matrices.im_size, RATIO, CROP_NUM_EDGE)[0]
    side = crop_side(matrices.im_size, RATIO)
    pool = ImagePool([matrices], extractor.device)
    train_ids, test_ids = (pool.ids[scores.mvtype, split] for split in ("train", "test"))
    shown = {kind: image_of_median(scores, label) for label, kind in enumerate(("good", "logical"))}
    ids = train_ids + [test_ids[index] for index in shown.values()]
    elements = extractor.extract(pool.gather(ids, corner, nearest_source(side, INPUT_SIDE)))[level]
    key = (0, 0, level, 1, 0)  # that of the scores
    directions = random_directions(NETWORK_SETTINGS.n_projections, elements.shape[1], key)
    values = project(directions, elements)
    low, high = fit_ranges(values[: min(FIT_SETS, len(train_ids))])
    n_bins = N_QUANTILES
    described = cumulative_histogram(values, low, high, n_bins)
    shares = described.unflatten(1, (-1, n_bins)).numpy()  # (images, directions, bins)
    train = shares[: len(train_ids)]
    chosen = most_telling_direction(train, shares[-1])
    steps = np.arange(1, n_bins + 1) / (n_bins + 1)
    thresholds = low[chosen].item() + (high - low)[chosen].item() * steps
    height, width = (min(side, matrices.settings[name]) for name in ("height", "width"))
    examples = [
        Example(
            scores.image_paths[index],
            kind,
            matrices.images["test"][index][:, :height, :width].transpose(1, 2, 0),
            side,
            values[number, chosen].numpy(),
            shares[number, chosen],
        )
        for number, (kind, index) in enumerate(shown.items(), start=len(train_ids))
    ]
    return draw_examples(examples, thresholds, train[:, chosen])


def draw_examples(
    examples: list[Example], thresholds: NDArray[np.float64], train: NDArray[np.float32]
) -> Figure:
    """Draw a row an image: pixels, elements coloured by value, histogram, cumulative shares.

    Parameters
    ----------
    examples : images of one size
    thresholds : (n_quantiles,)
    train : (n_train, n_quantiles), shares of the training images
    """
    height, width = examples[0].pixels.shape[:2]
    widths = np.array([HEIGHT * width / height] * 2 + [HISTOGRAM_WIDTH, SHARES_WIDTH])
    figure = Figure((widths.sum() + 1.5, len(examples) * (HEIGHT + 0.8) + 0.7))
    figure.suptitle(f"{TITLE}\n{ABOUT_DIRECTION}", x=0.01, ha="left")
    pooled = np.concatenate([example.values for example in examples])
    scale = Normalize(pooled.min(), pooled.max())
    bars = np.linspace(pooled.min(), pooled.max(), N_BARS + 1)
    rows = figure.subplots(len(examples), 4, width_ratios=widths)
    for example, (picture, cells, histogram, cumulative) in zip(examples, rows, strict=True):
        colour, marker = LOOKS[example.kind]
        picture.imshow(example.pixels)
        at = {"xycoords": "axes fraction", "textcoords": "offset points"}
        picture.annotate(example.title, (0, 1), (0, 5), **at, color=colour, fontweight="bold")
        edge = math.isqrt(len(example.values))
        whole = (0, example.side, example.side, 0)
        cells.imshow(example.values.reshape(edge, edge), "viridis", norm=scale, extent=whole)
        cells.set_xlim(0, width)
        cells.set_ylim(height, 0)
        for axes in (picture, cells):
            axes.set_axis_off()
        histogram.hist(example.values, bars, color=colour, alpha=0.8)
        for threshold in thresholds:
            histogram.axvline(threshold, color="0.35", linestyle=(0, (3, 2)), linewidth=1)
        histogram.set(xlabel="projection (no unit); dashed: thresholds", ylabel="elements")
        spread = (train.min(0), train.max(0))
        cumulative.fill_between(thresholds, *spread, color="0.8", label="training images")
        own = {"color": colour, "marker": marker, "label": f"this image, {example.kind}"}
        cumulative.plot(thresholds, example.shares, **own)
        cumulative.set(ylim=(-0.03, 1.03), xlabel="threshold", ylabel="share of elements below")
        cumulative.legend(frameon=False, loc="lower right")
    return figure


# ---------------------------------------------------------------- what the method finds


def image_of_median(scores: DataSetScores, label: int) -> int:
    """Return the test image of a label whose score is the (lower) median of its kind."""
    images = np.flatnonzero(scores.labels == label)
    order = images[np.argsort(scores.final[images], kind="stable")]
    return int(order[(len(order) - 1) // 2])


def demo_figure(sets: dict[str, DataSetScores], dataset_dir: Path) -> Figure:
    """Draw of every class the images of median score: good, and of both kinds of anomalies."""
    rows: dict[str, list[Picture]] = {}
    for class_name in CLASSES:
        own = {kind: sets[f"{class_name}_{kind}"] for kind in KINDS}
        chosen = [(own["loco"], image_of_median(own["loco"], 0))]
        chosen += [(scores, image_of_median(scores, 1)) for scores in own.values()]
        rows[class_name] = [load_picture(s, index, dataset_dir) for s, index in chosen]
    title = "Demo data (drawings): of each kind the image of median score"
    return picture_rows(title, rows)


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--dataset_dir", type=Path, default=Path("demo/dataset"), help="images")
    parser.add_argument("--data_dir", type=Path, default=Path("demo/matrices"), help="matrices")
    parser.add_argument(
        "--version",
        default="demo/results/imagenet_pyramid_lvl_#",
        help="folder of the scores, # for the level",
    )
    parser.add_argument(
        "--pyramid_level",
        type=integer_from(1),
        default=14,
        help="of histograms_fig.png, and the ResNet level of the scores",
    )
    parser.add_argument(
        "--rep_num_224", type=integer_from(0), default=20, help="raw-pixel repetitions"
    )
    parser.add_argument("--net", default="resnet18", help="of the scores")
    parser.add_argument("--weights", default="imagenet", help="of the scores")
    parser.add_argument("--out", type=Path, default=Path("imgs"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the scores, draw both pictures."""
    args = parse_args(argv)
    options = EnsembleOptions(
        args.version, args.version, (args.pyramid_level,), 0, args.rep_num_224, LAMBDA_FACTOR
    )
    mvtypes = [f"{class_name}_{kind}" for class_name in CLASSES for kind in KINDS]
    sets = {mvtype: load_data_set(options, mvtype) for mvtype in mvtypes}
    backbone = build_backbone(args.net, load_weights(args.net, args.weights), (args.pyramid_level,))
    extractor = FeatureExtractor(backbone, torch.device("cpu"))
    figures = {
        "histograms_fig": lambda: histograms_figure(
            sets[SHOWN], args.data_dir, extractor, args.pyramid_level
        ),
        "LOCO_demo_fig": lambda: demo_figure(sets, args.dataset_dir),
    }
    for name, draw in figures.items():
        write_whole(args.out / f"{name}.png", png_of(draw))
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    run_script(main)
