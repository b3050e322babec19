"""The page of a detector's predictions: one HTML file and the folder of its pictures.

It opens from disk: no server, no network, no library. Pictures are written as images are scored,
so memory does not grow with them.
"""

import base64
import hashlib
import html
import io
import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import quote

from sinbad import atomic, detectors, ensembles, errors, images, settings
from sinbad.report import tables

log = logging.getLogger(__name__)

INDEX, PICTURES = "index.html", "pictures"  # in the report's folder
SIDE = 960  # pixels, long side of an image in the larger picture
THUMBNAIL = 160  # CSS pixels, long side of an image in its row
DENSITY = 1.5  # pixels of a thumbnail's file per CSS pixel
MAX_NAME = 50  # characters of an image's name in its pictures', of 4 bytes at most (limit: 255)
BAR = 3.0  # thresholds, the highest score that a bar shows
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442")  # of the levels in a bar
VERDICTS = ("anomalous", "normal", "error")

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self'; \
style-src '$style_hash'; script-src '$script_hash'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<dl>
$facts
</dl>
<details><summary>What the columns show</summary><ul>
$notes
</ul></details>
<form hidden>
$choices
  <input type="search" name="q" placeholder="search by name" aria-label="search by name">
  <output></output>
</form>
<table>
<thead><tr><th></th><th>image</th><th>verdict</th><th>score</th><th>p-value</th>\
$level_headers</tr></thead>
<tbody>
$rows
</tbody>
</table>
<script>$script</script>
</body>
</html>
""")
FACT = Template("<dt>$name</dt><dd>$text</dd>")
CHOICE = Template("""\
  <label><input type="radio" name="verdict" value="$verdict"><span>$verdict $n</span></label>""")
ROW = Template("""\
<tr data-verdict="$verdict"><td>$picture</td>\
<td class="name"><small>$folder</small>$name</td>\
<td><span class="verdict">$verdict</span></td>$values</tr>""")
PICTURE = Template("""\
<a href="$url"><img src="$thumbnail_url" width="$width" height="$height" loading="lazy" \
decoding="async" alt="$alt"></a>""")
BAR_CHART = Template("""\
<svg width="130" height="9" viewBox="0 0 $limit 1" preserveAspectRatio="none">$rects</svg>""")
LEVEL_HEADER = Template("""\
<th><svg width="10" height="10">$rect</svg> level $level</th>""")
RECT = Template('<rect x="$x" width="$width" height="100%" fill="$fill"/>')
STYLE = Template("""
:root { --picture: ${width}px; --row: ${height}px; --anomalous: #b34a00; --normal: #0072b2; }
body { margin: 1rem 1.5rem; font: 14px/1.45 system-ui, sans-serif; color: #222; }
h1 { margin: 0; font-size: 1.5rem; }
dl { margin: .5rem 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt, th, small, summary { color: #666; }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: .3rem 0; max-width: 60rem; }
form, thead { position: sticky; z-index: 1; background: white; }
form { top: 0; height: 3rem; display: flex; gap: .5rem; align-items: center; overflow: auto;
  white-space: nowrap; }
form[hidden] { display: none; }
form input[type=radio] { position: absolute; opacity: 0; }
form span, form input[type=search] { display: block; padding: .3rem .7rem; font: inherit;
  border: 1px solid #bbb; border-radius: .4rem; }
form input[type=search] { width: 16rem; }
form :checked + span { color: white; background: #444; border-color: #444; }
form :focus-visible + span { outline: 2px solid var(--normal); outline-offset: 1px; }
thead { top: 3rem; border-bottom: 2px solid #bbb; }
table, thead, tbody { display: block; min-width: 50rem; }
tr { display: grid; column-gap: 1rem; align-items: center;
  grid-template-columns: var(--picture) minmax(9rem, 1fr) 6.5rem 130px 4rem
    repeat($n_levels, 5.5rem);
  padding: .5rem 0 .5rem .6rem; border-left: 4px solid transparent; }
tbody tr { border-bottom: 1px solid #ddd; content-visibility: auto;
  contain-intrinsic-size: auto calc(var(--row) + 2rem); }
tr[hidden] { display: none; }
th { text-align: left; font-weight: 600; }
th, td { padding: 0; font-variant-numeric: tabular-nums; }
th:nth-child(n+5), td:nth-child(n+5) { text-align: right; }
.name { overflow-wrap: anywhere; font-weight: 600; }
.name small { display: block; font-weight: 400; }
.error { grid-column: 4 / -1; color: #666; overflow-wrap: anywhere; }
.verdict { padding: .15rem .6rem; border-radius: 1rem; color: white; background: #666; }
[data-verdict=anomalous] { border-left-color: var(--anomalous); }
[data-verdict=anomalous] .verdict { background: var(--anomalous); }
[data-verdict=normal] .verdict { background: var(--normal); }
img, td svg { display: block; }
a { display: block; width: max-content; }
a:hover, a:focus-visible { outline: 2px solid var(--normal); }
""")
SCRIPT = """
const form = document.querySelector("form"), count = document.querySelector("output");
const plain = text => text.normalize().toLowerCase();
const rows = Array.from(document.querySelectorAll("tbody tr"), row =>
  ({row, verdict: row.dataset.verdict, name: plain(row.querySelector(".name").textContent)}));

function show() {  // the rows that the form asks for
  const verdict = form.verdict.value, query = plain(form.q.value);
  let shown = 0;
  for (const {row, ...of} of rows) {
    row.hidden = (verdict !== "all" && of.verdict !== verdict) || !of.name.includes(query);
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${rows.length} shown`;
}

function readAddress() {  // index.html#verdict=anomalous&q=name
  const view = new URLSearchParams(location.hash.slice(1));
  form.verdict.value = view.get("verdict") ?? "all";
  form.q.value = view.get("q") ?? "";
  show();
}

form.addEventListener("input", () => {
  history.replaceState(null, "", "#" + new URLSearchParams(new FormData(form)));
  show();
});
form.addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", readAddress);
form.hidden = false;
readAddress();
"""


class Picture(NamedTuple):
    """The files of an image in a report: a larger picture and its thumbnail."""

    name: str
    thumbnail: str
    size: tuple[int, int]  # (width, height) of the thumbnail in CSS pixels
    red: float | None  # the value shown in red, if there is a heatmap


Row = tuple[detectors.Prediction, Picture | None]


def picture_names(number: int, image: Path) -> tuple[str, str]:
    """Return the file names of an image's picture and thumbnail; images are numbered from 1."""
    stem = f"{number:04d}_{image.stem[:MAX_NAME]}"
    return f"{stem}.jpg", f"{stem}.small.jpg"


def check_folder(folder: Path, image_paths: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Make the folder of a report; raise an error if the report cannot be written there.

    UserError if it would lie among the scored images, or holds files other than those of a report
    on the same images and `outputs`, which the same run writes.
    """
    root = folder.resolve()
    pictures = root / PICTURES
    if not {root, pictures}.isdisjoint(path.parent.resolve() for path in image_paths):
        raise errors.UserError(f"report must lie outside the scored folders, got {folder}")
    pictures.mkdir(parents=True, exist_ok=True)
    expected = {root / INDEX, pictures, *(path.resolve() for path in outputs)}
    for number, path in enumerate(image_paths, 1):
        expected |= {pictures / name for name in picture_names(number, path)}
    for path in sorted([*root.iterdir(), *pictures.iterdir()]):
        if path not in expected and not path.name.startswith("."):
            raise errors.UserError(
                f"report must be a folder without other files, got {folder} with "
                f"{path.relative_to(root)}; remove them or choose another folder"
            )
    atomic.check_writable(pictures / picture_names(1, image_paths[0])[0])


class Report:
    """A report that grows with each image: `add` writes its pictures, `write` the page.

    Attributes
    ----------
    n_lost : images whose pictures could not be written
    """

    def __init__(
        self, folder: Path, detector_path: Path, detector: detectors.Detector, false_alarms: float
    ) -> None:
        self.folder, self.detector_path = folder, detector_path
        self.detector, self.false_alarms = detector, false_alarms
        self.rows: list[Row] = []
        self.n_lost = 0

    def add(
        self, prediction: detectors.Prediction, ensemble: ensembles.Ensemble | None, index: int
    ) -> None:
        """Add an image and its place in an ensemble; log an error if its pictures fail."""
        picture = None
        if ensemble is not None:
            path = Path(prediction.path)
            names = picture_names(len(self.rows) + 1, path)
            try:
                picture = write_picture(self.folder / PICTURES, names, path, ensemble, index)
            except (OSError, errors.UserError) as error:  # scores and other pictures are not lost
                log.error(f"could not write the pictures of {path}: {error}")
                self.n_lost += 1
        self.rows.append((prediction, picture))

    def write(self, n_images: int) -> None:
        """Write the page atomically; `n_images` is how many were to be scored."""
        facts = _facts(self.detector_path, self.detector, self.false_alarms)
        if len(self.rows) < n_images:
            facts["Stopped"] = f"after {len(self.rows)} of {n_images} images"
        threshold = self.detector.threshold(self.false_alarms)
        text = page_text(self.rows, facts, threshold, self.detector.values)
        atomic.atomic_write(self.folder / INDEX, text)


def write_picture(
    folder: Path, names: tuple[str, str], path: Path, ensemble: ensembles.Ensemble, index: int
) -> Picture:
    """Write an image beside its heatmap, alone if only raw pixels are scored; and a thumbnail."""
    image, red = images.open_image(path), None
    image.thumbnail((SIDE, SIDE))
    scale = THUMBNAIL / max(image.size)
    if ensemble.grids:
        from sinbad.report import figures  # matplotlib: slow to import, not needed for scores

        image, red = figures.heatmap(image, ensemble.grids, index)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((round(DENSITY * width), round(DENSITY * height)))
    for name, picture in zip(names, (image, small), strict=True):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        atomic.atomic_write(folder / name, file.getvalue())
    return Picture(*names, (width, height), red)


# ---------------------------------------------------------------- HTML


def page_text(
    rows: Sequence[Row], facts: dict[str, str], threshold: float, values: settings.Settings
) -> str:
    """Return the HTML of a page: most anomalous image first, those without a score last.

    Parameters
    ----------
    rows : images in the order they were scored
    facts : name -> text of what is told of the detector, above the table
    threshold : the score above which an image is called anomalous
    values : the detector's settings
    """
    rows = sorted(rows, key=lambda row: (bool(row[0].error), -row[0].score))
    weights = _level_weights(values)
    highest = max((prediction.score for prediction, _ in rows if not prediction.error), default=0.0)
    limit = min(highest, BAR * threshold)  # of the bars
    sizes = [picture.size for _, picture in rows if picture]
    width, height = (max((size[i] for size in sizes), default=THUMBNAIL) for i in (0, 1))
    style = STYLE.substitute(width=width, height=height, n_levels=len(weights))
    common = _common_parts([Path(prediction.path).parent for prediction, _ in rows])
    if common:
        facts = {"Images": f"in {Path(*common)}"} | facts
    counts = Counter(_verdict(prediction) for prediction, _ in rows)
    choices = {"all": len(rows)} | {verdict: counts[verdict] for verdict in VERDICTS}
    levels = zip(weights, itertools.cycle(COLOURS), strict=False)
    rects = {level: RECT.substitute(x=0, width=10, fill=colour) for level, colour in levels}
    return PAGE.substitute(
        title=f"{counts['anomalous']} of {len(rows)} images anomalous",
        facts="\n".join(FACT.substitute(name=n, text=_escape(t)) for n, t in facts.items()),
        notes="\n".join(f"<li>{_escape(note)}</li>" for note in _notes(weights)),
        style=style,
        style_hash=_hash(style),
        script=SCRIPT,
        script_hash=_hash(SCRIPT),
        choices="\n".join(CHOICE.substitute(verdict=v, n=n) for v, n in choices.items()),
        level_headers="".join(LEVEL_HEADER.substitute(level=n, rect=r) for n, r in rects.items()),
        rows="\n".join(_row(*row, len(common), weights, threshold, limit) for row in rows),
    )


def _facts(path: Path, detector: detectors.Detector, false_alarms: float) -> dict[str, str]:
    """Return detector, threshold, and what is promised of false positives."""
    n = len(detector.calibration)
    promise = f"{false_alarms:g} expected, not guaranteed: the calibration set is {n} training "
    promise += "images, scored in folds"
    if detector.metadata["n_valid"]:
        promise = f"at most {false_alarms:g} on average over calibration sets, if normal images "
        promise += f"are exchangeable with the calibration set of {n} images"
    return {
        "Detector": str(path),
        "Anomalous": f"score above {detector.threshold(false_alarms):.2f}",
        "False-positive rate": promise,
    }


def _notes(weights: dict[int, float]) -> list[str]:
    """Return what the columns show."""
    parts = " + ".join(f"{weight:.3g} x level {level}" for level, weight in weights.items())
    notes = [
        f"Score: {parts}; the bar shows these parts, in the colours of the levels, and the "
        f"threshold as a line. It ends at {BAR:g} thresholds.",
        "Level: normalised score of a feature level (224: the raw pixels), 1 is the mean of the "
        "calibration set.",
        "P-value: fraction of normal images expected to score as high.",
    ]
    if not settings.backbone_levels(weights):
        return [*notes, "No heatmaps: raw pixels alone have one crop."]
    return [
        *notes,
        "Heatmap: mean score of the crops that cover a position / that of the calibration set. "
        "Clear is 1 or less, red the image's highest value, at least 2. Crops are large: it tells "
        "where to look, not where a defect ends.",
    ]


def _row(
    prediction: detectors.Prediction,
    picture: Picture | None,
    n_common: int,
    weights: dict[int, float],
    threshold: float,
    limit: float,
) -> str:
    """Return a table row.

    `n_common` is how many parts of its path all rows have, `limit` where a bar ends.
    """
    path = Path(prediction.path)
    folder = path.parent.parts[n_common:]
    if prediction.error:
        values = f'<td class="error">{_escape(prediction.error)}</td>'
    else:
        bar = _bar(prediction, weights, threshold, limit)
        values = f"<td>{prediction.score:.2f}{bar}</td><td>{prediction.p_value:.3g}</td>"
        values += "".join(f"<td>{prediction.levels[level]:.2f}</td>" for level in weights)
    return ROW.substitute(
        verdict=_verdict(prediction),
        picture=_picture(picture, path.name) if picture else "",
        folder=_escape("".join(f"{part}/" for part in folder)),
        name=_escape(path.name),
        values=values,
    )


def _common_parts(folders: Sequence[Path]) -> list[str]:
    """Return what all folders begin with; none for absolute and relative ones together."""
    columns = zip(*(folder.parts for folder in folders), strict=False)
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return [column[0] for column in equal]


def _picture(picture: Picture, name: str) -> str:
    width, height = picture.size
    text = PICTURE.substitute(
        url=_url(picture.name),
        thumbnail_url=_url(picture.thumbnail),
        width=width,
        height=height,
        alt=_escape(name if picture.red is None else f"{name}, and with its heatmap"),
    )
    return text if picture.red is None else f"{text}<small>red: {picture.red:.2g}</small>"


def _bar(
    prediction: detectors.Prediction, weights: dict[int, float], threshold: float, limit: float
) -> str:
    """Return a bar of the score's parts, one colour per level, and a line at the threshold."""
    rects, x = "", 0.0
    for (level, weight), colour in zip(weights.items(), itertools.cycle(COLOURS), strict=False):
        width = weight * prediction.levels[level]
        rects += RECT.substitute(x=f"{x:.4g}", width=f"{width:.4g}", fill=colour)
        x += width
    rects += RECT.substitute(x=f"{threshold:.4g}", width=f"{limit / 65:.4g}", fill="#222")
    return BAR_CHART.substitute(limit=f"{limit:.4g}", rects=rects)


def _level_weights(values: settings.Settings) -> dict[int, float]:
    """Return level -> its weight in the score (see `sinbad_utils.ensemble_scores`)."""
    network = settings.backbone_levels(values.pyramid_level)
    weights = {level: 1.0 / len(network) for level in network}
    if settings.PIXEL_LEVEL in values.pyramid_level:
        weights[settings.PIXEL_LEVEL] = values.lambda_factor if network else 1.0
    return weights


def _verdict(prediction: detectors.Prediction) -> str:
    if prediction.error:
        return "error"
    return "anomalous" if prediction.is_anomalous else "normal"


def _escape(text: str) -> str:
    return html.escape(tables.legible(text))


def _url(name: str) -> str:
    return quote(os.fsencode(f"{PICTURES}/{name}"))


def _hash(text: str) -> str:
    """Return what allows an inline style or script in the page's Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
