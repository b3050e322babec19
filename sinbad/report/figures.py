"""Figures of ensembled scores: distributions, ROC curves, AUROC per crop grid, images with maps.

Colours are those of Okabe and Ito and matplotlib's cividis and YlOrRd, readable by the colour
blind; what a colour means is also shown by a marker, a line style or a word.
"""

import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, font_manager, style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_curve

import sinbad_utils
from sinbad import images, loco, score_files
from sinbad.report import maps, metrics, tables

log = logging.getLogger(__name__)

DPI = 150
WIDTH = 1600 / DPI  # inches
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "SimHei")
FONTS += ("Microsoft YaHei", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic")
NORMAL = "normal"
ANOMALOUS = "anomalous"  # images of a data set without anomaly types
STYLES = {  # colour and marker
    NORMAL: ("#0072B2", "o"),
    "logical": ("#D55E00", "^"),
    "structural": ("#CC79A7", "s"),
    ANOMALOUS: ("#D55E00", "D"),
}
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CURVE_MARKERS = "o^sDvPX"
CURVE_STYLES = {"loco": "-", "struct": (0, (4, 2))}
N_EXTREMES = 4  # most, and least, anomalous images shown of a data set
THUMBNAIL = 480  # pixels, long side of an image
# Of a map over its image: yellow to dark red, clear where the score is low. Darker is higher in
# grey too, because the image below is faded.
OVERLAY = ListedColormap(colormaps["YlOrRd"](np.linspace(0.1, 1.0, 256)))
OVERLAY.colors[:, 3] = np.linspace(0.0, 0.85, 256)  # opacity, in [0, 1]
FADED = 0.4  # contrast of that image
OVERLAY_NOTE = "overlay: crop score / mean of the validation images at the same position"
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


def report_figures(sets: Sequence[score_files.SubsetScores], dataset_dir: Path) -> dict[str, bytes]:
    """Return file name -> PNG of every figure of a report; equal scores give equal bytes.

    Figures of images are skipped, with one log line, where `dataset_dir` lacks the images.
    """
    pngs = {
        "score_distributions.png": png_of(distribution_figure, sets),
        "roc_curves.png": png_of(roc_figure, sets),
        "auroc_by_grid.png": png_of(grid_figure, sets),
    }
    skipped = []
    for scores in sets:
        folder = dataset_dir / loco.split_mvtype(scores.mvtype)[0]
        shown = [i for ids in extreme_images(scores.final).values() for i in ids]
        if all((folder / scores.image_paths[i]).is_file() for i in shown):
            pngs[f"images_{scores.mvtype}.png"] = png_of(extremes_figure, scores, dataset_dir)
        else:
            skipped.append(scores.mvtype)
    if skipped:
        names = ", ".join(skipped)
        log.info(f"note: no figures of images for {names}: the images are not in {dataset_dir}")
    return pngs


def png_of(plot: Callable[..., Figure], *arguments: object) -> bytes:
    """Plot a figure in one style, whatever the user's, as PNG without matplotlib's version.

    Names are shown as they are ($ starts no formula); logs a line if no font has their characters.
    """
    rc = {
        "font.size": 9,
        "font.family": [font for font in FONTS if font in font_manager.get_font_names()],
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
    }
    file = io.BytesIO()
    with style.context(["default", rc]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plot(*arguments).savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    if any("missing from font" in str(warning.message) for warning in caught):
        log.info("note: no font here has all characters of the names; install e.g. fonts-noto-cjk")
    return file.getvalue()


def type_name(mvtype: str) -> str:
    """Return the name of the anomaly type of a data set."""
    return loco.KIND_NAMES.get(loco.split_mvtype(mvtype)[1], ANOMALOUS)


def set_log_ticks(axis: Axis) -> None:
    """Put the ticks of a logarithmic axis at 1, 2, 5, 10 and so on, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------- scores


def distribution_figure(sets: Sequence[score_files.SubsetScores]) -> Figure:
    """Plot the scores of all images: one panel per category, one row per anomaly type."""
    categories = metrics.group_by_category(sets)
    n_columns = min(2, len(categories))
    n_rows = math.ceil(len(categories) / n_columns)
    figure = Figure((WIDTH, 0.8 + 2.0 * n_rows))
    for number, (category, members) in enumerate(categories.items(), start=1):
        axes = figure.add_subplot(n_rows, n_columns, number)
        _plot_distributions(axes, members)
        axes.set_title(tables.legible(category), fontweight="bold")
    figure.suptitle("Anomaly scores of the test images (bar: median)", x=0.01, ha="left")
    figure.supxlabel("image-level anomaly score (no unit, higher = more anomalous)")
    figure.supylabel("test images by type")
    return figure


def _plot_distributions(axes: Axes, members: list[score_files.SubsetScores]) -> None:
    """Plot the scores of one category; the normal images are those of its first data set."""
    groups = {NORMAL: members[0].final[members[0].labels == 0]}
    names = [f"{NORMAL}\nn = {len(groups[NORMAL])}"]
    for scores in members:
        name = type_name(scores.mvtype)
        groups[name] = scores.final[scores.labels == 1]
        value = metrics.percent([metrics.auroc(scores.labels, scores.final)])
        names.append(f"{name}\nn = {len(groups[name])}\nAUROC (%) {value}")
    for row, (name, values) in enumerate(groups.items()):
        colour, marker = STYLES[name]
        spread = np.arange(len(values)) * GOLDEN_RATIO % 1.0 * 0.6 - 0.3  # not random
        if len(values):
            axes.vlines(np.median(values), row - 0.4, row + 0.4, "0.3", linewidth=2, zorder=1)
        axes.scatter(np.sort(values), row + spread, 18, colour, marker, alpha=0.7, linewidths=0)
    everything = np.concatenate(list(groups.values()))
    if 0.0 < everything.min() < everything.max() / 8.0:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis)
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def roc_figure(sets: Sequence[score_files.SubsetScores]) -> Figure:
    """Plot the ROC curves of all data sets: a colour and marker per category, structural dashed."""
    figure = Figure((8.0, max(5.0, 1.0 + 0.2 * len(sets))))
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], ":", color="0.5", linewidth=1, label="chance: 50.0")
    categories = list(metrics.group_by_category(sets))
    for scores in sets:
        category, kind = loco.split_mvtype(scores.mvtype)
        value = metrics.auroc(scores.labels, scores.final)
        rates = ([], []) if value is None else roc_curve(scores.labels, scores.final)[:2]
        name = f"{tables.legible(category)}, {type_name(scores.mvtype)}"
        number = categories.index(category) % len(CURVE_COLOURS)
        axes.plot(
            *(100.0 * np.asarray(rate) for rate in rates),
            color=CURVE_COLOURS[number],
            linestyle=CURVE_STYLES.get(kind, "-."),
            marker=CURVE_MARKERS[number],
            markersize=5,
            markevery=(0.05 * number, 0.25),  # of the axes' diagonal
            label=f"{name}: {metrics.percent([value])}",
        )
    axes.set(xlabel="false-positive rate (%)", ylabel="true-positive rate (%)")
    axes.set_title("Image-level ROC curves")
    axes.grid(alpha=0.3)
    axes.set_box_aspect(1)
    figure.legend(
        loc="outside right upper", title="image-level AUROC (%)", frameon=False, handlelength=4
    )
    return figure


def _grid_columns(scores: score_files.SubsetScores) -> dict[str, sinbad_utils.Scores]:
    """Return the columns of `grid_figure`: crop grids, then levels and ensembles."""
    grids = {}
    for (level, n_crops), grid in scores.ensemble.grids.items():
        ratio = grid.geometry and grid.geometry.grid.ratio
        name = f"level {level}\n{n_crops} crop{'s' * (n_crops > 1)}"
        grids[name if ratio is None else f"{name}\nratio {ratio:g}"] = grid.test
    columns = metrics.score_columns(scores).items()
    return grids | {textwrap.fill(tables.legible(name), 10): values for name, values in columns}


def grid_figure(sets: Sequence[score_files.SubsetScores]) -> Figure:
    """Plot AUROC as numbers on colours: one row per data set, one column per crop grid."""
    columns = [_grid_columns(scores) for scores in sets]
    aurocs = [
        [metrics.auroc(scores.labels, column) for column in row.values()]
        for scores, row in zip(sets, columns, strict=True)
    ]
    values = 100 * np.array(aurocs, dtype=float)  # NaN where it is not defined
    longest = max(len(scores.mvtype) for scores in sets)
    n_rows, n_columns = values.shape
    figure = Figure((1.5 + 0.09 * longest + 0.66 * n_columns, 1.3 + 0.33 * n_rows))
    axes = figure.subplots()
    image = axes.imshow(values, "cividis", vmin=50, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text, colour = metrics.percent([aurocs[row][column]]), "w" if value <= 75 else "k"
        axes.text(column, row, text, ha="center", va="center", c=colour)
    if sets[0].ensemble.grids:
        axes.axvline(len(sets[0].ensemble.grids) - 0.5, color="white", linewidth=5)
    axes.set_xticks(range(n_columns), columns[0], fontsize=7)
    axes.set_yticks(range(n_rows), [tables.legible(scores.mvtype) for scores in sets])
    axes.set(xlabel="crop grids of a level; levels and ensembles", ylabel="test subset")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="AUROC (%)", extend="min", fraction=0.05)
    axes.set_title("Image-level AUROC (%) per level and crop grid")
    return figure


# ---------------------------------------------------------------- images


class CaptionedImage(NamedTuple):
    """An image with its overlay map (height, width), a caption and the caption's colour."""

    image: Image.Image
    overlay: NDArray[np.float64]
    caption: str
    colour: str


def extreme_images(final: sinbad_utils.Scores) -> dict[str, list[int]]:
    """Return up to four of the most and of the least anomalous images, none of them twice."""
    order = np.argsort(-final, kind="stable").tolist()
    n_most = min(N_EXTREMES, (len(order) + 1) // 2)
    least = order[n_most:][::-1][:N_EXTREMES]
    rows = {"most anomalous": order[:n_most], "least anomalous": least}
    return {name: ids for name, ids in rows.items() if ids}


def load_captioned(
    scores: score_files.SubsetScores, index: int, dataset_dir: Path
) -> CaptionedImage:
    """Read an image, reduced in size, with its map; the caption has score, label and name."""
    path = Path(scores.image_paths[index])
    name = type_name(scores.mvtype) if scores.labels[index] else NORMAL
    file_name = textwrap.fill(tables.legible(f"{path.parent.name}/{path.name}"), 36)
    caption = f"score {scores.final[index]:.2f}, label: {name}\n{file_name}"
    image = images.open_image(dataset_dir / loco.split_mvtype(scores.mvtype)[0] / path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    overlay = maps.overlay_map(scores.ensemble.grids, index, image.size)
    return CaptionedImage(image, overlay, caption, STYLES[name][0])


def extremes_figure(scores: score_files.SubsetScores, dataset_dir: Path) -> Figure:
    """Plot the most and the least anomalous images of a data set with their overlays."""
    extremes = extreme_images(scores.final).items()
    rows = {name: [load_captioned(scores, i, dataset_dir) for i in ids] for name, ids in extremes}
    return image_rows_figure(f"{tables.legible(scores.mvtype)}: test images by score", rows)


def heatmap(image: Image.Image, grids: maps.Grids, index: int) -> tuple[Image.Image, float]:
    """Return an image beside the same with its overlay, and the overlay's value in full red.

    `index` is the image's place in the crop grids.
    """
    item = CaptionedImage(image, maps.overlay_map(grids, index, image.size), "", "")
    scale = overlay_scale([item])
    return Image.fromarray(both_views(item, scale, axis=1)), scale.vmax


def overlay_scale(items: Sequence[CaptionedImage]) -> LogNorm:
    """Return the colour scale of some overlays: from 1, clear, to the highest, at least 2."""
    highest = max(float(item.overlay.max()) for item in items)
    return LogNorm(1.0, max(2.0, highest), clip=True)


def image_rows_figure(title: str, rows: dict[str, list[CaptionedImage]]) -> Figure:
    """Plot named rows of images, each beside (wide ones above) the same image with its overlay."""
    scale = overlay_scale([item for row in rows.values() for item in row])
    views = [[both_views(item, scale) for item in row] for row in rows.values()]
    n_columns = max(map(len, views))
    slot = (WIDTH - 1.0) / n_columns  # inches
    aspects = [max(len(view) / view.shape[1] for view in row) for row in views]
    heights = np.minimum(slot * np.array(aspects), 6.0)
    width = (heights / aspects).max()
    figure = Figure((n_columns * width + 1.0, 0.6 + heights.sum() + 0.5 * len(rows)))
    panels = figure.subplots(len(rows), n_columns, squeeze=False, height_ratios=heights)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for row_panels, (name, row), row_views in zip(panels, rows.items(), views, strict=True):
        row_panels[0].set_ylabel(name, fontweight="bold")
        for panel, item, view in zip(row_panels, row, row_views, strict=False):
            panel.imshow(view)
            panel.set_title(item.caption, fontsize=8, color=item.colour)
    figure.suptitle(f"{title}\n{OVERLAY_NOTE}", x=0.01, ha="left", fontsize=10)
    bar = figure.colorbar(ScalarMappable(scale, OVERLAY), ax=panels, fraction=0.02, pad=0.01)
    bar.set_label("crop score / validation mean (no unit)")
    set_log_ticks(bar.ax.yaxis)
    return figure


def both_views(item: CaptionedImage, scale: LogNorm, axis: int | None = None) -> NDArray[np.uint8]:
    """Return an image, and the same faded and grey under its overlay, (height, width, 3).

    They are joined along `axis`, by default the shorter one.
    """
    plain = np.asarray(item.image)
    grey = 255.0 - FADED * (255.0 - np.asarray(item.image.convert("L"))[:, :, None])
    colours = OVERLAY(scale(item.overlay))  # (height, width, RGBA), in [0, 1]
    opacity = colours[:, :, 3:]
    covered = (grey * (1.0 - opacity) + 255.0 * colours[:, :, :3] * opacity).astype(np.uint8)
    if axis is None:
        axis = 1 if len(plain) > plain.shape[1] else 0
    gap = np.full_like(plain, 255)[:, :12] if axis else np.full_like(plain, 255)[:12]
    return np.concatenate([plain, gap, covered], axis)
