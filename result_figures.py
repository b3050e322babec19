"""Pictures of ensembled scores: distributions, ROC curves, AUROC per crop grid, sheets of images.

Colours are those of Okabe and Ito and matplotlib's cividis and YlOrRd, readable by the colour
blind; what a colour tells is also said by a marker, a line style or a word.
"""

import io
import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_curve

from anomaly_maps import image_map
from command_line import say
from ensembles import DataSetScores
from loco_datasets import KIND_NAMES, split_mvtype
from loco_folders import open_image
from result_files import write_atomic
from result_metrics import auroc, columns_of
from result_tables import NOTHING, percent
from sinbad_utils import Scores

DPI = 150
WIDTH = 1600 / DPI  # inches
STYLE = ["default", {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}]
GOOD = "good"
LOOKS = {GOOD: ("#0072B2", "o"), "logical": ("#D55E00", "^"), "structural": ("#CC79A7", "s")}
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CURVE_MARKERS = ("", "o", "s", "^")  # the colours' first, second, ... turn
N_SHOWN = 4  # most, and least, anomalous images of a sheet
THUMBNAIL = 480  # pixels, long side of an image in a sheet
LOG_FROM = 8.0  # scores that differ by more than this factor get a logarithmic scale
MOST_OPAQUE = 0.65  # of an overlay, share
N_COLOURS = 256
ABOUT_COLOURS = (
    "colour: mean score of the crops that cover a place; an image's highest is its score"
)
# Inches: room for a title, of a letter, of a panel and its labels, of a ROC curve and of a cell.
TITLE, LETTER, PANEL, PANEL_LEFT = 0.4, 0.085, 2.2, 1.3
ROC_LEFT, ROC_SIDE, CELL = 0.6, 4.6, (0.66, 0.33)
# Inches of a sheet: margins, room for a caption, between things, width of a bar, of the highest.
LEFT, RIGHT, TOP, CAPTION, GAP, BAR, TALLEST = 0.35, 0.75, 0.42, 0.45, 0.06, 0.13, 3.6
AUROC_COLOURS = "cividis"
CHANCE, PERFECT = 50.0, 100.0  # percent
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


def write_figures(out: Path, sets: Sequence[DataSetScores], dataset_dir: Path | None) -> list[Path]:
    """Draw every picture and write it as PNG; equal scores give equal bytes.

    Parameters
    ----------
    out : folder, made if missing
    sets : data sets with their scores
    dataset_dir : folder of the classes' images; without them the sheets are left out

    Returns
    -------
    The files written
    """
    drawings = {
        "score_distributions": lambda: distribution_figure(sets),
        "roc_curves": lambda: roc_figure(sets),
        "auroc_by_grid": lambda: grid_figure(sets),
    }
    without = []
    for scores in sets:
        if has_images(scores, dataset_dir):
            drawings[f"images_{scores.mvtype}"] = lambda s=scores: sheet_figure(s, dataset_dir)
        else:
            without.append(scores.mvtype)
    if without:
        say(
            f"note: no sheets of images for {', '.join(without)}: their images are not in "
            f"{dataset_dir or 'a --dataset_dir'}"
        )
    paths = []
    with style.context(STYLE):
        for name, draw in drawings.items():
            paths.append(out / f"{name}.png")
            write_atomic(paths[-1], png_bytes(draw()))
    return paths


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as PNG without the version of what drew it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def _share(figure: Figure, left: float, top: float) -> tuple[float, float]:
    """Return a place in inches from the top left corner as shares of the figure."""
    width, height = figure.get_size_inches()
    return left / width, 1.0 - top / height


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes; place and size in inches from the top left corner."""
    corner = _share(figure, left, top + height)
    return figure.add_axes((*corner, *(np.array([width, height]) / figure.get_size_inches())))


# ---------------------------------------------------------------- scores


def distribution_figure(sets: Sequence[DataSetScores]) -> Figure:
    """Draw every image's final score: a panel a class, a row for good and each kind of anomaly."""
    classes: dict[str, list[DataSetScores]] = defaultdict(list)
    for scores in sets:
        classes[split_mvtype(scores.mvtype)[0]].append(scores)
    n_columns = min(2, len(classes))
    pitch = WIDTH / n_columns  # inches from panel to panel
    figure = Figure((WIDTH, TITLE + PANEL * math.ceil(len(classes) / n_columns) + 0.3))
    for number, (class_name, own) in enumerate(classes.items()):
        row, column = divmod(number, n_columns)
        left, top = column * pitch + PANEL_LEFT, TITLE + row * PANEL + 0.3
        axes = axes_at(figure, left, top, pitch - PANEL_LEFT - 0.15, PANEL - 0.65)
        _draw_distributions(axes, own)
        axes.set_title(class_name, loc="left", fontweight="bold")
    figure.text(
        *_share(figure, 0.1, 0.1), "Scores of the test images; a bar is the median", va="top"
    )
    figure.supxlabel("final anomaly score of an image (no unit, higher = more anomalous)")
    return figure


def _draw_distributions(axes: Axes, own: list[DataSetScores]) -> None:
    """Draw the scores of one class; the good images are those of its first data set."""
    groups = {GOOD: own[0].final[own[0].labels == 0]}
    names = [f"good\nn = {len(groups[GOOD])}"]
    for scores in own:
        kind = KIND_NAMES[split_mvtype(scores.mvtype)[1]]
        groups[kind] = scores.final[scores.labels == 1]
        value = percent([auroc(scores.labels, scores.final)])
        names.append(f"{kind}\nn = {len(groups[kind])}\nAUROC (%) {value}")
    for row, (kind, values) in enumerate(groups.items()):
        colour, marker = LOOKS[kind]
        heights = np.arange(len(values)) * GOLDEN_RATIO % 1.0 * 0.6 - 0.3  # spread, not random
        if len(values):
            axes.vlines(np.median(values), row - 0.4, row + 0.4, "0.3", linewidth=2, zorder=1)
        axes.scatter(
            np.sort(values), row + heights, 18, colour, marker=marker, alpha=0.7, linewidths=0
        )
    everything = np.concatenate(list(groups.values()))
    if 0.0 < everything.min() < everything.max() / LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def roc_figure(sets: Sequence[DataSetScores]) -> Figure:
    """Draw the ROC curves of all data sets; a colour a class, dashed for structural anomalies."""
    longest = max(len(scores.mvtype) for scores in sets) + len("structural: 100.0") - len("struct")
    figure = Figure((ROC_LEFT + ROC_SIDE + 0.75 + LETTER * longest, TITLE + ROC_SIDE + 0.5))
    axes = axes_at(figure, ROC_LEFT, TITLE, ROC_SIDE, ROC_SIDE)
    axes.plot([0, 100], [0, 100], color="0.7", linewidth=1)
    classes = list(dict.fromkeys(split_mvtype(scores.mvtype)[0] for scores in sets))
    for scores in sets:
        class_name, kind = split_mvtype(scores.mvtype)
        turn, position = divmod(classes.index(class_name), len(CURVE_COLOURS))
        value = auroc(scores.labels, scores.final)
        curve = ([], []) if value is None else roc_curve(scores.labels, scores.final)[:2]
        axes.plot(
            *(100.0 * np.asarray(share) for share in curve),
            color=CURVE_COLOURS[position],
            marker=CURVE_MARKERS[turn % len(CURVE_MARKERS)],
            markersize=4,
            linestyle="-" if kind == "loco" else (0, (4, 2)),
            label=f"{class_name}, {KIND_NAMES[kind]}: {percent([value])}",
        )
    axes.set_xlabel("good images called anomalous (%)")
    axes.set_ylabel("anomalous images found (%)")
    axes.set_title("ROC curves of the final scores", loc="left")
    axes.grid(alpha=0.3)
    at = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.03)}
    axes.legend(**at, title="AUROC (%)", frameon=False)
    return figure


def _columns(scores: DataSetScores) -> dict[str, Scores]:
    """Return what the map of AUROC has a column for: crop grids, then levels and ensembles."""
    grids = {}
    for (level, n_crops), grid in scores.grids.items():
        ratio = grid.settings.get("crop_size_ratio")
        name = f"level {level}\n{n_crops} crop{'s' * (n_crops > 1)}"
        grids[name if ratio is None else f"{name}\nratio {ratio:g}"] = grid.joined
    return grids | {textwrap.fill(name, 10): values for name, values in columns_of(scores).items()}


def grid_figure(sets: Sequence[DataSetScores]) -> Figure:
    """Draw AUROC in percent as numbers on colours: a row a data set, a column a crop grid."""
    columns = {scores.mvtype: _columns(scores) for scores in sets}
    names = list(dict.fromkeys(name for own in columns.values() for name in own))
    names.sort(key=lambda name: "crop" not in name)  # stable: grids first
    values = np.full((len(sets), len(names)), np.nan)
    for row, scores in enumerate(sets):
        for name, single in columns[scores.mvtype].items():
            value = auroc(scores.labels, single)
            values[row, names.index(name)] = np.nan if value is None else 100.0 * value
    left = 0.2 + LETTER * max(len(scores.mvtype) for scores in sets)
    width, height = CELL[0] * len(names), CELL[1] * len(sets)
    figure = Figure((left + width + GAP + BAR + 0.7, TITLE + height + 0.6))
    axes = axes_at(figure, left, TITLE, width, height)
    image = axes.imshow(values, AUROC_COLOURS, vmin=CHANCE, vmax=PERFECT, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = NOTHING if np.isnan(value) else f"{value:.1f}"
        light = np.isnan(value) or value > (CHANCE + PERFECT) / 2.0
        axes.text(column, row, text, ha="center", va="center", color="k" if light else "w")
    n_grids = sum("crop" in name for name in names)
    if 0 < n_grids < len(names):
        axes.axvline(n_grids - 0.5, color="white", linewidth=5)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yticks(range(len(sets)), [scores.mvtype for scores in sets])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes_at(figure, left + width + GAP, TITLE, BAR, height)
    figure.colorbar(image, bar, label="AUROC (%)", extend="min", extendfrac=0.03)
    axes.set_title("AUROC in percent", loc="left")
    return figure


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class Picture:
    """An image with its anomaly map, a caption of two lines and the colour of the first."""

    image: Image.Image
    overlay: NDArray[np.float32]
    caption: str
    colour: str


def extreme_images(final: Scores) -> dict[str, list[int]]:
    """Return up to four of the most and of the least anomalous images, none of them twice."""
    order = np.argsort(-final, kind="stable").tolist()
    n_most = min(N_SHOWN, (len(order) + 1) // 2)
    least = order[n_most:][::-1][:N_SHOWN]
    chosen = {"most anomalous": order[:n_most], "least anomalous": least}
    return {name: images for name, images in chosen.items() if images}


def has_images(scores: DataSetScores, dataset_dir: Path | None) -> bool:
    """Tell whether the files of a sheet's images are there."""
    if dataset_dir is None:
        return False
    folder = dataset_dir / split_mvtype(scores.mvtype)[0]
    wanted = [i for images in extreme_images(scores.final).values() for i in images]
    return all((folder / scores.image_paths[i]).is_file() for i in wanted)


def load_picture(scores: DataSetScores, index: int, dataset_dir: Path) -> Picture:
    """Read an image, made smaller, and its anomaly map; the caption tells score and true label."""
    class_name, kind = split_mvtype(scores.mvtype)
    path = Path(scores.image_paths[index])
    image = open_image(dataset_dir / class_name / path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    name = KIND_NAMES[kind] if scores.labels[index] else GOOD
    caption = f"score {scores.final[index]:.2f}, label: {name}\n{path.parent.name}/{path.name}"
    return Picture(image, image_map(scores, index, image.size), caption, LOOKS[name][0])


def sheet_figure(scores: DataSetScores, dataset_dir: Path) -> Figure:
    """Draw the most and the least anomalous images of a data set with their overlays."""
    rows = {
        name: [load_picture(scores, i, dataset_dir) for i in images]
        for name, images in extreme_images(scores.final).items()
    }
    scale = shared_scale([picture.overlay for row in rows.values() for picture in row])
    return picture_rows(f"{scores.mvtype}: test images by score", rows, dict.fromkeys(rows, scale))


def shared_scale(values: Sequence[NDArray[np.floating]]) -> Normalize:
    """Return the linear scale from the lowest to the highest of several maps' values."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return Normalize(low, high) if low < high else Normalize(low - 0.5, high + 0.5)


def overlay_colours() -> ListedColormap:
    """Return the colours of a map over its image: yellow to red, clear where the score is low."""
    colours = colormaps["YlOrRd"](np.linspace(0.1, 0.85, N_COLOURS))  # (colours, RGBA)
    colours[:, 3] = np.linspace(0.0, MOST_OPAQUE, N_COLOURS)
    return ListedColormap(colours)


def picture_rows(
    title: str, rows: dict[str, list[Picture]], scales: dict[str, Normalize]
) -> Figure:
    """Draw rows of images, each beside (wide ones above) itself with its map, and a colour bar.

    Parameters
    ----------
    title : one line above all
    rows : name of a row -> its pictures, of about the same aspect
    scales : name of a row -> what its colours mean
    """
    n_slots = max(len(row) for row in rows.values())
    slot = (WIDTH - LEFT - RIGHT) / max(3, n_slots)
    width = LEFT + max(2, n_slots) * slot + RIGHT
    tiles = {name: _tile(row[0].image, slot) for name, row in rows.items()}
    heights = {name: h if beside else 2 * h + GAP for name, (_, h, beside) in tiles.items()}
    figure = Figure((width, TOP + sum(CAPTION + own for own in heights.values()) + GAP))
    figure.text(*_share(figure, GAP, GAP), title, va="top", fontsize=11, fontweight="bold")
    figure.text(*_share(figure, GAP, 5 * GAP), ABOUT_COLOURS, va="top")
    colours = overlay_colours()
    top = TOP
    for name, row in rows.items():
        top += CAPTION
        *tile, beside = tiles[name]
        step = (tile[0] + GAP, 0.0) if beside else (0.0, tile[1] + GAP)
        for number, picture in enumerate(row):
            left = LEFT + number * slot
            plain = axes_at(figure, left, top, *tile)
            covered = axes_at(figure, left + step[0], top + step[1], *tile)
            for axes in (plain, covered):
                axes.set_axis_off()
            plain.imshow(picture.image)
            covered.imshow(picture.image.convert("L"), "gray", vmin=0, vmax=255)
            covered.imshow(picture.overlay, colours, norm=scales[name])
            first, _, second = picture.caption.partition("\n")
            at = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 8}
            plain.annotate(second, (0, 1), (0, 3), **at)
            plain.annotate(first, (0, 1), (0, 13), **at, color=picture.colour, fontweight="bold")
        middle = _share(figure, LEFT / 2, top + heights[name] / 2)
        figure.text(*middle, name, rotation=90, ha="center", va="center", fontweight="bold")
        bar = axes_at(figure, width - RIGHT + GAP, top, BAR, heights[name])
        figure.colorbar(ScalarMappable(scales[name], colours), bar, label="crop score")
        top += heights[name]
    return figure


def _tile(image: Image.Image, slot: float) -> tuple[float, float, bool]:
    """Return width and height of an image in a slot (inches), and whether its map lies beside."""
    beside = image.height > image.width
    width = slot - 2 * GAP if not beside else slot / 2 - 1.5 * GAP
    return width, min(width * image.height / image.width, TALLEST), beside
