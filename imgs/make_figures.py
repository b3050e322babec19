"""Plot the figures of the README (from the demo), and those of measured rows.

Reads   DEMO_DIR/{dataset,matrices,results}, DEMO_DIR/tf_efficientnet_lite0.pth   (from make demo)
        RESULTS_DIR/{ablation,scaling,cpu,gpu}.csv   (from benchmarks/)
Writes  OUT/histograms_fig.png, OUT/LOCO_demo_fig.png, RESULTS_DIR/{ablation,cost}.png

    python imgs/make_figures.py --out demo/out/tables
    python imgs/make_figures.py --only ablation cost
"""

import argparse
import csv
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
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
X_TITLES = {  # of the ablation's columns
    "n_projections": "random projections (number)",
    "n_quantiles": "histogram bins (number)",
    "shrinkage_factor": "shrinkage (no unit)",
    "crop_size_ratio": "crop side / image side",
    "training images": "training images (number)",
}
USUAL = {"n_projections": "1000", "n_quantiles": "5", "shrinkage_factor": ".1"}
USUAL |= {"crop_size_ratio": ".25 .5 .7 .99", "training images": "80"}
LINES = {  # colour, marker, line style, name
    "resnet18": ("#0072B2", "o", "-", "ResNet-18, level 14"),
    "tf_efficientnet_lite0": ("#D55E00", "^", "--", "EfficientNet-Lite0"),
}

SIZES = {  # what is changed in a panel of the cost -> its axis title
    "images": "images (number)",
    "crops of an image": "crops per image (number)",
    "directions": "random directions (number)",
}
TIME_STYLES = {  # column of the rows -> line or bar
    "seconds": {
        "color": "#0072B2",
        "marker": "o",
        "linestyle": "-",
        "hatch": "",
        "label": "scoring",
    },
    "seconds, forward pass alone": {
        "color": "#E69F00",
        "marker": "^",
        "linestyle": "--",
        "hatch": "///",
        "label": "forward pass alone",
    },
}
GPU_ROWS = "LOCO, scoring, seconds", "LOCO, bare network, seconds"
DEVICES = {  # name -> file, precision, images, rows of scoring and of the forward pass alone
    "2 CPU cores, fp32": (
        "cpu.csv",
        "fp32",
        384,
        "384 images, everything, seconds",
        "384 images, bare network, seconds",
    ),
    "H100, tf32\n(earlier code)": ("gpu.csv", "tf32", 3644, *GPU_ROWS),
    "H100, bf16\n(earlier code)": ("gpu.csv", "bf16", 3644, *GPU_ROWS),
}
POINTS = {"xycoords": "data", "textcoords": "offset points"}


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
    elements = extractor.extract(pool.gather([(ids, position.corner, source)]))[LEVEL]
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
    figure = Figure((widths.sum() + 2.2, len(images) * (HEIGHT + 0.8) + 0.7))
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
        shown = cells.imshow(grid, "viridis", norm=scale, extent=(0, side, side, 0))
        figure.colorbar(shown, ax=cells, label="projection (no unit)", fraction=0.1)
        cells.set(xlim=(0, width), ylim=(height, 0))
        plain.set_axis_off()
        cells.set_axis_off()
        histogram.hist(values[number], bars, color=colour, alpha=0.8)
        dashes = {"color": "0.2", "linestyle": (0, (3, 2)), "linewidth": 1, "label": "bin edges"}
        histogram.vlines(thresholds, 0, 1, transform=histogram.get_xaxis_transform(), **dashes)
        histogram.legend(loc="upper right")
        histogram.set(xlabel="projection (no unit)", ylabel="number of elements")
        spread = (train.min(0), train.max(0))
        cumulative.fill_between(thresholds, *spread, color="0.8", label="training images")
        line = {"color": colour, "marker": marker, "label": f"this image, {name}"}
        cumulative.plot(thresholds, fractions[len(train) + number], **line)
        cumulative.set(ylim=(-0.03, 1.03), xlabel="bin edge: projection (no unit)")
        cumulative.set_ylabel("fraction of elements below")
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


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a file of measured rows, whose first line says how they were made."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:]))


def ablation_figure(path: Path) -> Figure:
    """Plot AUROC and CPU time against one changed setting per column, one line per network."""
    rows = read_rows(path)
    for row in rows:
        row.setdefault("network", "resnet18")
    changed = list(dict.fromkeys(row["changed"] for row in rows))
    figure = Figure((11.0, 4.6))
    panels = figure.subplots(2, len(changed), sharex="col", sharey="row", height_ratios=(5, 3))
    for name, (upper, lower) in zip(changed, panels.T, strict=True):
        _plot_setting(upper, lower, name, [row for row in rows if row["changed"] == name])
        lower.set_xlabel(X_TITLES.get(name, name))
    panels[0, 0].set_ylabel("image-level AUROC (%)")
    panels[1, 0].set_ylabel("CPU time of\n5 repetitions (s)")
    panels[1, 0].set_ylim(bottom=0)
    figure.suptitle("juice_bottle (a part), logical anomalies", x=0.01, ha="left")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    return figure


def _plot_setting(upper: Axes, lower: Axes, name: str, rows: list[dict[str, str]]) -> None:
    """Plot the rows of one setting: AUROC above, CPU time below."""

    def order(value: str) -> tuple[bool, float]:  # numbers, then all crop grids together
        return " " in value, float(value.split()[0])

    values = sorted({row["value"] for row in rows}, key=order)
    for net in dict.fromkeys(row["network"] for row in rows):
        colour, marker, line_style, label = LINES[net]
        of_net = [row for row in rows if row["network"] == net]
        at = np.array([values.index(row["value"]) for row in of_net])
        aurocs = np.array([float(row["ROC-AUC, %"]) for row in of_net])
        seconds = np.array([float(row["CPU seconds, 5 reps"]) for row in of_net])
        points = {"facecolors": "none", "edgecolors": colour, "marker": marker}
        upper.scatter(at, aurocs, 16, **points, linewidths=0.8, label=f"{label}: one repetition")
        line = {"color": colour, "linestyle": line_style}
        x = np.unique(at)
        medians = [np.median(aurocs[at == place]) for place in x]
        upper.plot(x, medians, **line, label=f"{label}: median")
        lower.plot(x, [seconds[at == place][0] for place in x], **line, marker=marker)
    for panel in (upper, lower):
        if name in USUAL:
            place = values.index(USUAL[name])
            label = "value while another setting is changed"
            panel.axvspan(place - 0.25, place + 0.25, color="0.9", zorder=0, label=label)
        panel.grid(axis="y", alpha=0.3)
    lower.set_xticks(range(len(values)), ["all four" if " " in v else v for v in values])


def cost_figure(folder: Path) -> Figure:
    """Plot wall times against one size per panel, then on devices; of scoring, and its network."""
    rows = read_rows(folder / "scaling.csv")
    figure = Figure((11.0, 3.2))
    *panels, devices = figure.subplots(1, len(SIZES) + 1, width_ratios=[*[1] * len(SIZES), 1.2])
    for panel, (what, title) in zip(panels, SIZES.items(), strict=True):
        chosen = sorted((int(row["number"]), row) for row in rows if row["what"] == what)
        sizes = [size for size, _ in chosen]
        for column, style in TIME_STYLES.items():
            line = {name: style[name] for name in ("color", "marker", "linestyle", "label")}
            panel.plot(sizes, [float(row[column]) for _, row in chosen], **line)
        panel.set(xlabel=title, xticks=sizes, xlim=(0, 1.1 * sizes[-1]))
        panel.set_ylim(0, 1.1 * max(float(row["seconds"]) for _, row in chosen))
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("wall time (s)")
    _plot_devices(devices, folder)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _plot_devices(panel: Axes, folder: Path) -> None:
    """Plot the wall time per image on each device, of all levels of wide_resnet50_2."""
    for place, (file, precision, n_images, *names) in enumerate(DEVICES.values()):
        value = {
            row["what"]: float(row["value"])
            for row in read_rows(folder / file)
            if (row["network"], row["precision"]) == ("wide_resnet50_2", precision)
        }
        for name, offset, style in zip(names, (-0.2, 0.2), TIME_STYLES.values(), strict=True):
            width, bar = 1000 * value[name] / n_images, {"color": style["color"], "height": 0.4}
            panel.barh(place + offset, width, **bar, hatch=style["hatch"], edgecolor="white")
            panel.annotate(f"{width:,.1f}", (width, place + offset), (3, 0), va="center", **POINTS)
    panel.set_yticks(range(len(DEVICES)), DEVICES)
    panel.set(xlabel="wall time per image (ms)", xscale="log")
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.margins(x=0.35)
    panel.invert_yaxis()


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
    names = ("histograms", "demo", "ablation", "cost")
    about = "figures; ablation and cost need no demo"
    add("--only", nargs="+", choices=names, default=names, help=about)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read scores and rows, plot the figures."""
    args = parse_args(argv)
    folder = str(args.demo_dir / "results/demo_pyramid_lvl_#")
    selection = score_files.Selection(folder, folder, settings.PAPER_LEVELS, 0, args.rep_num_224)

    @functools.cache
    def subset(name: str) -> score_files.SubsetScores:
        return score_files.load_subset(selection, name, settings.Settings())

    def demo() -> Figure:
        names = [f"{category}_{kind}" for category in CATEGORIES for kind in loco.KINDS]
        return demo_figure({name: subset(name) for name in names}, args.demo_dir / "dataset")

    weights = args.weights or str(args.demo_dir / "tf_efficientnet_lite0.pth")
    data_dir = args.demo_dir / "matrices"
    plots = {
        "histograms": lambda: histograms_figure(subset(SHOWN), data_dir, weights),
        "demo": demo,
        "ablation": lambda: ablation_figure(args.results_dir / "ablation.csv"),
        "cost": lambda: cost_figure(args.results_dir),
    }
    paths = {name: args.out / f"{name}_fig.png" for name in plots}
    paths["demo"] = args.out / "LOCO_demo_fig.png"
    paths |= {name: args.results_dir / f"{name}.png" for name in ("ablation", "cost")}
    for name in args.only:
        atomic.atomic_write(paths[name], figures.png_of(plots[name]))
        print(paths[name])


if __name__ == "__main__":
    errors.run_script(main)
