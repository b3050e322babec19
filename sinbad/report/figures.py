"""Pictures of ensembled scores: distributions, ROC curves, AUROC per crop grid, sheets of images.

Colours are those of Okabe and Ito and matplotlib's cividis and YlOrRd, readable by the colour
blind; what a colour tells is also said by a marker, a line style or a word.
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
from sinbad import ensembles, images, loco
from sinbad.report import maps, metrics, tables

log = logging.getLogger(__name__)

DPI = 150
WIDTH = 1600 / DPI  # inches
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Microsoft YaHei",
    "Hiragino Sans GB",
    "Yu Gothic",
    "Malgun Gothic",
)
GOOD = "good"
OTHER = "anomalous"  # images of a data set that knows no kinds
LOOKS = {
    GOOD: ("#0072B2", "o"),
    "logical": ("#D55E00", "^"),
    "structural": ("#CC79A7", "s"),
    OTHER: ("#D55E00", "D"),
}
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CURVE_STYLES = {"loco": "-", "struct": (0, (4, 2))}
N_SHOWN = 4  # most, and least, anomalous images of a sheet
THUMBNAIL = 480  # pixels, long side of an image in a sheet
# Of a map over its image: yellow to red, clear where the score is low.
OVERLAY = ListedColormap(colormaps["YlOrRd"](np.linspace(0.1, 0.85, 256)))
OVERLAY.colors[:, 3] = np.linspace(0.0, 0.65, 256)  # opacity, share
ABOUT_COLOURS = "colour: score of the crops at a place over that of validation images there"
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


def draw_figures(sets: Sequence[ensembles.DataSetScores], dataset_dir: Path) -> dict[str, bytes]:
    """Return file name -> PNG of every picture; equal scores give equal bytes.

    Sheets of images are left out where `dataset_dir` lacks the images; a line says so.
    """
    pictures = {
        "score_distributions.png": png_of(distribution_figure, sets),
        "roc_curves.png": png_of(roc_figure, sets),
        "auroc_by_grid.png": png_of(grid_figure, sets),
    }
    without = []
    for scores in sets:
        folder = dataset_dir / loco.split_mvtype(scores.mvtype)[0]
        shown = [i for images in extreme_images(scores.final).values() for i in images]
        if all((folder / scores.image_paths[i]).is_file() for i in shown):
            pictures[f"images_{scores.mvtype}.png"] = png_of(sheet_figure, scores, dataset_dir)
        else:
            without.append(scores.mvtype)
    if without:
        names = ", ".join(without)
        log.info(f"note: no sheets of images for {names}: their images are not in {dataset_dir}")
    return pictures


def png_of(draw: Callable[..., Figure], *of: object) -> bytes:
    """Draw a figure in our style, whatever the user's, as PNG without the version of what drew it.

    Names are drawn as they are ($ is no formula); says if no font here has their characters.
    """
    look = {
        "font.size": 9,
        "font.family": [font for font in FONTS if font in font_manager.get_font_names()],
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
    }
    file = io.BytesIO()
    with style.context(["default", look]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(*of).savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    if any("missing from font" in str(warning.message) for warning in caught):
        log.info("note: no font here has all characters of the names; install e.g. fonts-noto-cjk")
    return file.getvalue()


def kind_name(mvtype: str) -> str:
    """Return what the anomalous images of a data set are called."""
    return loco.KIND_NAMES.get(loco.split_mvtype(mvtype)[1], OTHER)


def mark_1_2_5(axis: Axis) -> None:
    """Put the ticks of a logarithmic axis at 1, 2, 5, 10 and so on, written plainly."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------- scores


def distribution_figure(sets: Sequence[ensembles.DataSetScores]) -> Figure:
    """Draw every image's final score: a panel a class, a row for good and each kind of anomaly."""
    classes = metrics.group_by_class(sets)
    n_columns = min(2, len(classes))
    n_rows = math.ceil(len(classes) / n_columns)
    figure = Figure((WIDTH, 0.8 + 2.0 * n_rows))
    for place, (class_name, own) in enumerate(classes.items(), start=1):
        axes = figure.add_subplot(n_rows, n_columns, place)
        _draw_distributions(axes, own)
        axes.set_title(tables.legible(class_name), fontweight="bold")
    figure.suptitle("Scores of the test images; a bar is the median", x=0.01, ha="left")
    figure.supxlabel("final anomaly score of an image (no unit, higher = more anomalous)")
    return figure


def _draw_distributions(axes: Axes, own: list[ensembles.DataSetScores]) -> None:
    """Draw the scores of one class; the good images are those of its first data set."""
    groups = {GOOD: own[0].final[own[0].labels == 0]}
    names = [f"good\nn = {len(groups[GOOD])}"]
    for scores in own:
        kind = kind_name(scores.mvtype)
        groups[kind] = scores.final[scores.labels == 1]
        value = metrics.percent([metrics.auroc(scores.labels, scores.final)])
        names.append(f"{kind}\nn = {len(groups[kind])}\nAUROC (%) {value}")
    for row, (kind, values) in enumerate(groups.items()):
        colour, marker = LOOKS[kind]
        spread = np.arange(len(values)) * GOLDEN_RATIO % 1.0 * 0.6 - 0.3  # not random
        if len(values):
            axes.vlines(np.median(values), row - 0.4, row + 0.4, "0.3", linewidth=2, zorder=1)
        axes.scatter(np.sort(values), row + spread, 18, colour, marker, alpha=0.7, linewidths=0)
    everything = np.concatenate(list(groups.values()))
    if 0.0 < everything.min() < everything.max() / 8.0:
        axes.set_xscale("log")
        mark_1_2_5(axes.xaxis)
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def roc_figure(sets: Sequence[ensembles.DataSetScores]) -> Figure:
    """Draw the ROC curves of all data sets; a colour a class, dashed for structural anomalies."""
    figure = Figure((8.0, max(5.0, 1.0 + 0.2 * len(sets))))
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="0.7", linewidth=1)
    classes = list(dict.fromkeys(loco.split_mvtype(scores.mvtype)[0] for scores in sets))
    for scores in sets:
        class_name, kind = loco.split_mvtype(scores.mvtype)
        value = metrics.auroc(scores.labels, scores.final)
        curve = ([], []) if value is None else roc_curve(scores.labels, scores.final)[:2]
        axes.plot(
            *(100.0 * np.asarray(share) for share in curve),
            color=CURVE_COLOURS[classes.index(class_name) % len(CURVE_COLOURS)],
            linestyle=CURVE_STYLES.get(kind, ":"),
            label=f"{tables.legible(class_name)}, {kind_name(scores.mvtype)}: {metrics.percent([value])}",
        )
    axes.set(xlabel="good images called anomalous (%)", ylabel="anomalous images found (%)")
    axes.set_title("ROC curves of the final scores")
    axes.grid(alpha=0.3)
    axes.set_box_aspect(1)
    figure.legend(loc="outside right upper", title="AUROC (%)", frameon=False)
    return figure


def _columns(scores: ensembles.DataSetScores) -> dict[str, sinbad_utils.Scores]:
    """Return what the map of AUROC has a column for: crop grids, then levels and ensembles."""
    grids = {}
    for (level, n_crops), grid in scores.grids.items():
        ratio = grid.settings.get("crop_size_ratio")
        name = f"level {level}\n{n_crops} crop{'s' * (n_crops > 1)}"
        grids[name if ratio is None else f"{name}\nratio {ratio:g}"] = grid.test
    own = metrics.columns_of(scores).items()
    return grids | {textwrap.fill(tables.legible(name), 10): values for name, values in own}


def grid_figure(sets: Sequence[ensembles.DataSetScores]) -> Figure:
    """Draw AUROC in percent as numbers on colours: a row a data set, a column a crop grid."""
    columns = [_columns(scores) for scores in sets]
    shares = [
        [metrics.auroc(scores.labels, own) for own in of_set.values()]
        for scores, of_set in zip(sets, columns, strict=True)
    ]
    values = 100 * np.array(shares, dtype=float)  # NaN where there is none
    longest = max(len(scores.mvtype) for scores in sets)
    n_rows, n_columns = values.shape
    figure = Figure((1.5 + 0.09 * longest + 0.66 * n_columns, 1.3 + 0.33 * n_rows))
    axes = figure.subplots()
    image = axes.imshow(values, "cividis", vmin=50, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "w" if value <= 75 else "k"
        axes.text(
            column, row, metrics.percent([shares[row][column]]), ha="center", va="center", c=colour
        )
    if sets[0].grids:
        axes.axvline(len(sets[0].grids) - 0.5, color="white", linewidth=5)
    axes.set_xticks(range(n_columns), columns[0], fontsize=7)
    axes.set_yticks(range(n_rows), [tables.legible(scores.mvtype) for scores in sets])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="AUROC (%)", extend="min", fraction=0.05)
    axes.set_title("AUROC in percent")
    return figure


# ---------------------------------------------------------------- images


class Picture(NamedTuple):
    """An image with its map, a caption and the caption's colour."""

    image: Image.Image
    overlay: NDArray[np.float64]
    caption: str
    colour: str


def extreme_images(final: sinbad_utils.Scores) -> dict[str, list[int]]:
    """Return up to four of the most and of the least anomalous images, none of them twice."""
    order = np.argsort(-final, kind="stable").tolist()
    n_most = min(N_SHOWN, (len(order) + 1) // 2)
    least = order[n_most:][::-1][:N_SHOWN]
    chosen = {"most anomalous": order[:n_most], "least anomalous": least}
    return {name: images for name, images in chosen.items() if images}


def load_picture(scores: ensembles.DataSetScores, index: int, dataset_dir: Path) -> Picture:
    """Read an image, made smaller, and its map; the caption tells score, true label and name."""
    path = Path(scores.image_paths[index])
    image = images.open_image(dataset_dir / loco.split_mvtype(scores.mvtype)[0] / path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    name = kind_name(scores.mvtype) if scores.labels[index] else GOOD
    file_name = textwrap.fill(tables.legible(f"{path.parent.name}/{path.name}"), 36)
    caption = f"score {scores.final[index]:.2f}, label: {name}\n{file_name}"
    return Picture(image, maps.overlay_map(scores, index, image.size), caption, LOOKS[name][0])


def sheet_figure(scores: ensembles.DataSetScores, dataset_dir: Path) -> Figure:
    """Draw the most and the least anomalous images of a data set with their overlays."""
    rows = {
        name: [load_picture(scores, i, dataset_dir) for i in images]
        for name, images in extreme_images(scores.final).items()
    }
    return picture_rows(f"{tables.legible(scores.mvtype)}: test images by score", rows)


def heatmap(
    path: Path, scores: ensembles.DataSetScores, index: int, about: str, is_anomalous: bool
) -> bytes:
    """Return a PNG of a scored picture beside its map; `about` tells score and threshold."""
    image = images.open_image(path)
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    colour = LOOKS["logical" if is_anomalous else GOOD][0]
    title = f"{tables.legible(path.name)}: {'anomalous' if is_anomalous else 'as the good ones'}"
    picture = Picture(image, maps.overlay_map(scores, index, image.size), about, colour)
    return png_of(lambda: picture_rows(title, {"": [picture]}))


def picture_rows(title: str, rows: dict[str, list[Picture]]) -> Figure:
    """Draw named rows of images, each beside (wide ones above) itself under its map."""
    highest = max(float(picture.overlay.max()) for row in rows.values() for picture in row)
    scale = LogNorm(1.0, max(2.0, highest), clip=True)
    views = [[both_views(picture, scale) for picture in row] for row in rows.values()]
    aspects = np.array([len(view) / view.shape[1] for row in views for view in row])
    n_columns = max(map(len, views))
    slot = (WIDTH - 1.0) / n_columns  # inches
    height = np.minimum(slot * aspects, 6.0).max()
    width = np.minimum(slot, height / aspects).max()
    figure = Figure((n_columns * width + 1.0, 0.6 + len(rows) * (height + 0.5)))
    panels = figure.subplots(len(rows), n_columns, squeeze=False)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for of_row, (name, row), own in zip(panels, rows.items(), views, strict=True):
        of_row[0].set_ylabel(name, fontweight="bold")
        for panel, picture, view in zip(of_row, row, own, strict=False):
            panel.imshow(view)
            panel.set_title(picture.caption, fontsize=8, color=picture.colour)
    figure.suptitle(f"{title}\n{ABOUT_COLOURS}", x=0.01, ha="left", fontsize=10)
    bar = figure.colorbar(ScalarMappable(scale, OVERLAY), ax=panels, fraction=0.02, pad=0.01)
    bar.set_label("crop score (1: as validation images)")
    mark_1_2_5(bar.ax.yaxis)
    return figure


def both_views(picture: Picture, scale: LogNorm) -> NDArray[np.uint8]:
    """Return an image, and it in grey under its map, as one (height, width, 3)."""
    plain = np.asarray(picture.image)
    grey = np.asarray(picture.image.convert("L"))[:, :, None]
    colours = OVERLAY(scale(picture.overlay))  # (height, width, RGBA), shares
    opacity = colours[:, :, 3:]
    covered = (grey * (1.0 - opacity) + 255.0 * colours[:, :, :3] * opacity).astype(np.uint8)
    axis = 1 if len(plain) > plain.shape[1] else 0
    gap = np.full_like(plain, 255)[:, :12] if axis else np.full_like(plain, 255)[:12]
    return np.concatenate([plain, gap, covered], axis)
