"""The page of a detector's predictions, in a real browser where there is one."""

import csv
import html
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import draw_image
from PIL import Image

import sinbad_detector
from sinbad import detectors, errors
from sinbad.report import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = {  # file name -> colour of the image
    "<img src=x onerror=document.title='run'>.png": (200, 20, 20),
    "a&b\"c'.png": (20, 160, 20),
    "#?%41.png": (20, 20, 200),
    "漢字" * 30 + ".png": (200, 200, 20),
    "n\udcff.png": (200, 20, 200),
}
SMALL = "--net test_resnet --weights random --initial_res 64 --crop_size_ratio .99 --device cpu"


@pytest.fixture(scope="module")
def detector_path(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a detector of levels 14 and 224."""
    return fit(dataset_dir, tmp_path_factory.mktemp("d") / "d.npz", "14", "224")


def fit(dataset_dir: Path, path: Path, *levels: str) -> Path:
    folders = ["--train_dir", str(dataset_dir / "pushpins/train/good"), "--out", str(path)]
    flags = ["--rep_num_224", "2", "--n_projections", "5", "--pyramid_level", *levels]
    sinbad_detector.main(["fit", *folders, *SMALL.split(), *flags])
    return path


def score(detector: Path, report: Path, *words: str) -> int:
    flags = ["--out", f"{report}.csv", "--false_alarms", ".2", "--device", "cpu"]
    return sinbad_detector.main(
        ["score", "--detector", str(detector), "--report", str(report), *flags, *words]
    )


@pytest.fixture(scope="module")
def report(detector_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report on images of hostile names, one that is damaged and two normal ones."""
    folder = tmp_path_factory.mktemp("hostile")
    new = folder / "new"
    new.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (85, 50), colour).save(new / name)
    (new / "damaged.png").write_bytes(b"no image")
    for number in range(2):
        draw_image("test/good", number).save(new / f"good_{number}.png")
    paths = [str(path) for path in sorted(new.iterdir())]
    assert score(detector_path, folder / "report", *paths) == 1
    return folder / "report"


def browse(tmp_path: Path, url: str, *flags: str) -> str:
    """Open a page in a browser; return its elements after the script, or skip the test."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", *flags]
    return subprocess.run(
        [*command, url], capture_output=True, check=True, timeout=120, encoding="utf-8"
    ).stdout


def shown_names(dom: str) -> list[str]:
    """Return the names in the rows that a page shows."""
    rows = re.findall(r'<tr data-verdict="\w+"([^>]*)>.*?class="name">.*?</small>(.*?)</td>', dom)
    return [html.unescape(name) for attributes, name in rows if "hidden" not in attributes]


def test_names_are_text_and_their_pictures_load(report: Path, tmp_path: Path) -> None:
    flags = [f"--screenshot={tmp_path / 's.png'}", "--window-size=1000,2000"]
    url = (report / page.INDEX).as_uri()
    dom = browse(tmp_path, url, "--dump-dom")
    assert "<title>run" not in dom
    assert "&lt;img src=x" in dom
    assert {name.replace("\udcff", "\\udcff") for name in COLOURS} <= set(shown_names(dom))
    browse(tmp_path, url, *flags)
    screenshot = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    for name, colour in COLOURS.items():
        assert (abs(screenshot - colour).max(2) < 9).sum() > 160 * 90, name


@pytest.mark.parametrize(
    "view, expected",
    [
        ("", 8),
        ("#verdict=error", ["damaged.png"]),
        ("#verdict=normal&q=damaged", []),
        ("#q=GOOD_", ["good_0.png", "good_1.png"]),
        ("#q=" + quote("#?%41"), ["#?%41.png"]),
        ("#q=%253F", []),
    ],
)
def test_the_address_filters_and_searches(
    view: str, expected: int | list[str], report: Path, tmp_path: Path
) -> None:
    dom = browse(tmp_path, (report / page.INDEX).as_uri() + view, "--dump-dom")
    names = sorted(shown_names(dom))
    assert (len(names) if isinstance(expected, int) else names) == expected
    assert f"<output>{len(names)} of 8 shown</output>" in dom


def changed_page(report: Path, addition: str, *, with_policy: bool) -> str:
    """Write a copy of the page with more HTML, with or without its policy; return its address."""
    text = (report / page.INDEX).read_text("utf-8").replace("</body>", addition + "</body>")
    if not with_policy:
        text = re.sub(r"<meta http-equiv[^>]*>", "", text)
    path = report.parent / "changed.html"
    path.write_text(text, "utf-8")
    return path.as_uri()


def test_what_is_asked_for_is_in_the_address(report: Path, tmp_path: Path) -> None:
    typed = "form.q.value = 'good_1'; form.verdict.value = 'all';"
    typed += "form.dispatchEvent(new Event('input')); document.title = location.hash"
    url = changed_page(report, f"<script>{typed}</script>", with_policy=False)
    dom = browse(tmp_path, url, "--dump-dom")
    assert "<title>#verdict=all&amp;q=good_1</title>" in dom
    assert shown_names(dom) == ["good_1.png"]


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """Return the address of a server, and the list of what is requested from it."""
    requested = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


def test_no_request_leaves_the_page(
    report: Path, tmp_path: Path, requests: tuple[str, list[str]]
) -> None:
    server, requested = requests
    text = (report / page.INDEX).read_text("utf-8")
    links = re.findall(r"""(?:src|href)="([^"]*)""", text)
    assert len(links) == 2 * 7
    assert all((report / page.PICTURES).samefile((report / link).parent) for link in links)
    assert not re.search("https?:|url\\(|@import|style=", text)
    addition = f'<img src="{server}/image"><script src="{server}/script"></script>'
    addition += f"<script>fetch('{server}/fetch')</script>"
    browse(tmp_path, changed_page(report, addition, with_policy=True), "--dump-dom")
    assert not requested
    browse(tmp_path, changed_page(report, addition, with_policy=False), "--dump-dom")
    assert sorted(requested) == ["/fetch", "/image", "/script"]


# ---------------------------------------------------------------- without a browser


def test_rows_are_those_of_the_csv_most_anomalous_first(report: Path) -> None:
    text = (report / page.INDEX).read_text("utf-8")
    with open(f"{report}.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["score"] or "-inf"))
    cells = [re.findall("<td.*?</td>", row) for row in re.findall("<tr data-.*", text)]
    assert len(cells) == len(rows) == 8
    for row, (_, _, verdict, score, *others) in zip(rows[:-1], cells[:-1], strict=True):
        name = "anomalous" if row["is_anomalous"] == "1" else "normal"
        assert f">{name}<" in verdict
        assert f">{float(row['score']):.2f}<" in score
        levels = (row["level_14"], row["level_224"])
        numbers = f"{float(row['p_value']):.3g}", *(f"{float(level):.2f}" for level in levels)
        assert others == [f"<td>{number}</td>" for number in numbers]
        bars = re.findall(r'x="([\d.]+)" width="([\d.]+)" height="100%"', score)
        (_, width), (x, last_width), _ = (tuple(map(float, bar)) for bar in bars)  # and threshold
        assert x == width
        assert x + last_width == pytest.approx(float(row["score"]), rel=1e-3)
    assert "damaged.png must be a complete image file" in cells[-1][-1]
    assert "<img" not in cells[-1][0]
    thumbnails = [Image.open(path).size for path in (report / page.PICTURES).glob("*.small.jpg")]
    assert thumbnails == [(514, 141)] * 7  # an image and its heatmap, 1.5 * 160 pixels each


def test_raw_pixels_alone_have_no_heatmaps(dataset_dir: Path, tmp_path: Path) -> None:
    detector = fit(dataset_dir, tmp_path / "d.npz", "224")
    assert score(detector, tmp_path / "r", str(dataset_dir / "pushpins/test/good")) == 0
    text = (tmp_path / "r" / page.INDEX).read_text("utf-8")
    assert "No heatmaps: " in text
    assert text.count('width="160" height="94"') == 3
    assert Image.open(next((tmp_path / "r/pictures").glob("0001_000.jpg"))).size == (85, 50)


def test_an_interrupted_run_has_a_page_of_what_it_scored(
    detector_path: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = detectors.Detector.iter_predictions

    def interrupted(*arguments: object) -> Iterator[object]:
        predictions = whole(*arguments)  # type: ignore[arg-type]
        yield from (next(predictions) for _ in range(2))
        raise KeyboardInterrupt

    def no_page(*_: object) -> str:
        raise OSError("no space")

    monkeypatch.setattr(detectors.Detector, "iter_predictions", interrupted)
    images = str(dataset_dir / "pushpins/test/good")
    with pytest.raises(KeyboardInterrupt):
        score(detector_path, tmp_path / "r", images)
    text = (tmp_path / "r" / page.INDEX).read_text("utf-8")
    assert "after 2 of 3 images" in text
    assert text.count("<tr data-") == 2
    monkeypatch.setattr(page, "page_text", no_page)
    (tmp_path / "r.csv").unlink()
    with pytest.raises(OSError, match="no space"):
        score(detector_path, tmp_path / "r", images)
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3  # the scores come first


def test_a_report_replaces_its_own_files_alone(
    detector_path: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    test, report = dataset_dir / "pushpins/test", tmp_path / "r"
    flags = ["--json", str(report / "s.json")]
    for _ in range(2):
        assert score(detector_path, report, *flags, str(test / "good")) == 0
    with pytest.raises(errors.UserError, match=r"without other files, got .* with s.json"):
        score(detector_path, report, str(test / "good"))
    with pytest.raises(errors.UserError, match=r"with pictures/0003_002.jpg"):
        score(detector_path, report, *flags, str(test / "logical_anomalies"))
    with pytest.raises(errors.UserError, match="outside the scored folders"):
        score(detector_path, report, str(report / "pictures"))
    with pytest.raises(errors.UserError, match="must be different files"):
        score(detector_path, report, "--json", str(report / page.INDEX), str(test / "good"))
