"""Time scoring beside the forward pass alone, on synthetic images.

Writes  tables on stdout; OUT: the same as CSV, and how they were measured

    python benchmarks/bench.py --what pipeline --net resnet18 --n_images 200

pipeline: from preprocessed images of a category, or of LOCO, to files of scores; scaling: the same
for several numbers of images, crops and directions, and time series; detector: fit, load, score;
memory: anonymous memory of scoring over its run.
The forward pass alone: the same network over as many crops of noise in full batches, interleaved
with scoring (on a CPU batch by batch).
"""

import argparse
import multiprocessing
import re
import resource
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data_to_matrices
import reproduce_paper
import sinbad_single_layer
import sinbad_time_series
from sinbad import (
    atomic,
    backbones,
    cli,
    detectors,
    devices,
    errors,
    loco,
    score_files,
    scoring,
    settings,
)
from sinbad.image_pool import ImagePool
from sinbad.report import metrics, tables
from sinbad.settings import Settings
from sinbad.uea import TimeSeriesDataset

PARTS = {"train/good": "train", "validation/good": "validation", "test/good": "good"}
PARTS |= {f"test/{loco.KINDS[kind]}": name for kind, name in loco.KIND_NAMES.items()}
TIMED_BATCHES = 32
N_DIRECTIONS = (250, 1000, 4000)
SERIES_SIZES = (500, 1000, 2000, 4000)  # training series, and as many test series
SERIES_SHAPE = (13, 50)  # channels and steps, as SpokenArabicDigits
COLUMNS = {  # of the tables; detector and scaling as in their files in results/
    "pipeline": "network;precision;images;crop forwards;seconds;seconds, forward pass alone;"
    "peak memory, GB;GPU memory, GB;relative speed, %",
    "scaling": "what;number;crop forwards;seconds;seconds, forward pass alone;peak memory, GB",
    "memory": "network;images;crops;seconds;after a fifth, MB;last tenth, MB;peak, MB",
    "detector": "network and settings;step, images;seconds;of the forward pass alone;peak GB;"
    "anonymous MB;ROC-AUC, %",
}

Counts = dict[str, loco.LocoClass]  # category -> sizes and numbers of its images


def category_counts(n_images: int) -> Counts:
    """Return a category of pushpins' size with `n_images`, about half of them for training."""
    n_part = max(1, n_images // 8)
    numbers = dict.fromkeys(PARTS.values(), n_part) | {"train": max(2, n_images - 4 * n_part)}
    return {"synthetic": replace(loco.LOCO_CLASSES["pushpins"], **numbers)}


def write_images(folder: Path, counts: Counts) -> None:
    """Write smooth random images in LOCO's layout."""
    for category, facts in counts.items():
        for part, name in PARTS.items():
            (folder / category / part).mkdir(parents=True)
            for number in range(getattr(facts, name)):
                rng = np.random.default_rng([number, *f"{category}/{part}".encode()])
                coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                image = coarse.resize((facts.width, facts.height), Image.Resampling.BILINEAR)
                image.save(folder / category / part / f"{number:03d}.jpg")


@contextmanager
def scorer(counts: Counts, values: Settings) -> Iterator[Callable[[Settings], list[Path]]]:
    """Write and preprocess synthetic images; yield a function that scores them by some settings."""
    mvtypes = [f"{category}_{kind}" for category in counts for kind in loco.KINDS]
    grids = replace(settings.BACKBONE_DEFAULTS, crop_ratios=values.crop_size_ratio)
    with mock.patch.object(settings, "BACKBONE_DEFAULTS", grids):
        tasks = reproduce_paper.paper_tasks(mvtypes, values, [0], "bench")
    with tempfile.TemporaryDirectory() as name:
        dataset, *where = (Path(name, folder) for folder in ("dataset", "matrices", "results"))
        write_images(dataset, counts)
        size = values.initial_res, values.n_workers
        data_to_matrices.make_matrices(dataset, where[0], mvtypes, *size)
        yield lambda values: sinbad_single_layer.score_and_save(tasks, values, *where, True)


def timed(function: Callable[..., Any], *args: object) -> tuple[float, Any]:
    """Call a function; return the wall time in seconds, and the result."""
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, result


def time_forward(values: Settings, n_crops: int) -> float:
    """Return the seconds of the forward pass alone, over `n_crops` crops of noise.

    At most TIMED_BATCHES are timed; they all take the same.
    """
    levels = settings.backbone_levels(values.pyramid_level)
    device = devices.choose_device(values.device)
    weights = backbones.load_weights(values.net, values.weights)
    backbone = backbones.build_backbone(values.net, weights, levels)
    extractor = backbones.FeatureExtractor(backbone, device, values.precision)
    crops = noise_batch(values)
    torch.backends.cudnn.allow_tf32 = values.precision == "tf32"
    forward(extractor, crops, 1)  # warm up
    n_batches = -(-n_crops // len(crops))
    n_timed = min(n_batches, TIMED_BATCHES)
    return timed(forward, extractor, crops, n_timed)[0] * n_batches / n_timed


def noise_batch(values: Settings) -> torch.Tensor:
    """Return a full batch of noise as the network takes it."""
    device = devices.choose_device(values.device)
    shape = scoring.batch_size_on(device, values), 3, backbones.INPUT_SIDE, backbones.INPUT_SIDE
    return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)


def forward(extractor: backbones.FeatureExtractor, crops: torch.Tensor, n_batches: int) -> None:
    """Run the forward pass alone over a batch, some times."""
    is_half = extractor.precision == "bf16"
    for _ in range(n_batches):
        with torch.inference_mode(), torch.autocast(crops.device.type, torch.bfloat16, is_half):
            extractor.backbone(crops)
    if crops.is_cuda:
        torch.cuda.synchronize()


def peak_memory() -> str:
    """Return the peak memory of this process so far, in GB."""
    return f"{1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.2f}"


def time_scoring(values: Settings, counts: Counts, n_turns: int) -> list[str]:
    """Return a row: medians of seconds; crop forwards with the padding of the last batch."""
    device = devices.choose_device(values.device)
    extract = backbones.FeatureExtractor.extract
    n_crops: list[int] = []
    alone: list[float] = []
    noise = noise_batch(values)

    def count(extractor: backbones.FeatureExtractor, crops: torch.Tensor) -> scoring.Elements:
        n_crops.append(len(crops))
        if device.type == "cpu":  # a GPU would have to be waited for
            alone.append(timed(forward, extractor, noise, 1)[0])
        return extract(extractor, crops)

    turns = []
    with scorer(counts, values) as score:
        for _ in range(n_turns):
            n_crops.clear()
            alone.clear()
            with mock.patch.object(backbones.FeatureExtractor, "extract", count):
                seconds, _ = timed(score, values)
            forward_seconds = sum(alone) or time_forward(values, sum(n_crops))
            turns.append((seconds - sum(alone), forward_seconds))
    seconds, forward_seconds = np.median(turns, axis=0)
    gpu = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    n_images = sum(getattr(facts, part) for facts in counts.values() for part in PARTS.values())
    row = [values.net, values.precision, str(n_images), str(sum(n_crops)), f"{seconds:.1f}"]
    share = f"{100 * forward_seconds / seconds:.0f}"
    return [*row, f"{forward_seconds:.1f}", peak_memory(), f"{gpu:.2f}", share]


def in_a_process(function: Callable[..., list[Any]], *args: object) -> list[Any]:
    """Call a function in a process of its own, whose peak memory is that of the call."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, errors.log_to_stderr) as process:
        return process.submit(function, *args).result()


def pipeline_rows(args: argparse.Namespace, values: Settings) -> list[list[str]]:
    """Return one row per number of images."""
    cases = [loco.LOCO_CLASSES] if args.loco else map(category_counts, args.n_images)
    return [in_a_process(time_scoring, values, counts, args.turns) for counts in cases]


def scaling_rows(args: argparse.Namespace, values: Settings) -> list[list[str]]:
    """Return rows in which one size changes: images, crops, directions, time series.

    The others are those of the middle one of the numbers of images, and of the flags.
    """
    usual, ratios = args.n_images[len(args.n_images) // 2], values.crop_size_ratio
    cases = [("images", n, n, values) for n in args.n_images]
    for first in range(len(ratios)):
        changed = replace(values, crop_size_ratio=ratios[first:])
        n_crops = sum(len(changed.grid(ratio)) for ratio in changed.crop_size_ratio)
        cases.append(("crops of an image", n_crops, usual, changed))
    cases += [("directions", n, usual, replace(values, n_projections=n)) for n in N_DIRECTIONS]
    rows = []
    for what, number, n_images, changed in cases:
        row = in_a_process(time_scoring, changed, category_counts(n_images), args.turns)
        rows.append([what, str(number), *row[3:7]])
    rng, padding = np.random.default_rng(0), np.zeros(SERIES_SHAPE[0], np.float32)
    for n_series in SERIES_SIZES:
        train, test = rng.standard_normal((2, n_series, *SERIES_SHAPE), dtype=np.float32)
        labels = (np.arange(n_series) % 10).astype(str)
        data = TimeSeriesDataset(train, test, labels, labels, padding)
        seconds, _ = timed(sinbad_time_series.score_seed, data, 0, 100, 20, torch.device("cpu"))
        rows.append(["time series", str(n_series), "", f"{seconds:.1f}", "", ""])
    return rows


def detector_rows(args: argparse.Namespace, values: Settings) -> list[list[str]]:
    """Return one row per step of a detector and number of images; fit and score in two processes.

    With a folder of real images also the ROC-AUC of its test images.
    """
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = args.class_dir or Path(name)
        if not args.class_dir:
            numbers = dict.fromkeys(PARTS.values(), 0)
            numbers |= {"train": args.n_train, "good": max(args.n_images)}
            write_images(folder, {"": replace(loco.LOCO_CLASSES["juice_bottle"], **numbers)})
        for function in (fit_rows, score_rows):
            rows += in_a_process(function, args, values, folder, Path(name, "detector.npz"))
    return rows


def detector_row(
    values: Settings,
    what: str,
    seconds: float,
    ratio: float = 0.0,
    auroc: float = 0.0,
    memory: list[str] | None = None,
) -> list[str]:
    """Return a row of the table of detectors; `memory` is by default that of now."""
    flags = cli.flags_of(values, ["pyramid_level", "crop_size_ratio", "batch_size"])
    columns = [" ".join([values.net, *flags]), what, f"{seconds:.2f}"]
    columns += [f"{ratio:.2f}" if ratio else "", *(memory or memory_now())]
    return [*columns, f"{100 * auroc:.1f}" if auroc else ""]


def memory_now() -> list[str]:
    """Return the peak memory so far in GB, and the anonymous memory in MB."""
    return [peak_memory(), f"{anonymous_memory():.0f}"]


def fit_rows(
    args: argparse.Namespace, values: Settings, folder: Path, path: Path
) -> list[list[str]]:
    """Fit and save a detector."""
    train, valid = (sorted((folder / part / "good").glob("*")) for part in ("train", "validation"))
    seconds, detector = timed(detectors.Detector.fit, train[: args.n_train], valid, values)
    detector.save(path)
    return [detector_row(values, f"fit, {len(train[: args.n_train])}", seconds)]


def score_rows(
    args: argparse.Namespace, values: Settings, folder: Path, path: Path
) -> list[list[str]]:
    """Load a detector, and score; medians of turns beside the forward pass alone."""
    good, anomalous = (
        sorted((folder / "test" / kind).glob("*")) for kind in ("good", "logical_anomalies")
    )
    rows = [detector_row(values, "imports", 0.0)]
    seconds, detector = timed(detectors.Detector.load, path, values.weights, values.device)
    rows.append(detector_row(values, f"load {path.stat().st_size / 1e6:.1f} MB", seconds))
    rows.append(detector_row(values, "first score, 1", timed(detector.score, good[:1])[0]))
    n_crops = len({key[1:] for key in detector.stored if key[0] != settings.PIXEL_LEVEL})
    memory = {}  # of scoring; the forward pass alone has a network of its own
    for n in args.n_images:
        detector.score(good[:n])
        memory[n] = memory_now()
    for n in args.n_images:
        turns = np.empty((args.turns, 2))
        for turn in turns:
            turn[:] = timed(detector.score, good[:n])[0], time_forward(values, n_crops * n)
        seconds, ratio = np.median(turns[:, 0]), np.median(turns[:, 0] / turns[:, 1])
        rows.append(detector_row(values, f"score, {n}", seconds, ratio, memory=memory[n]))
    if anomalous:
        seconds, predictions = timed(detector.score, good + anomalous)
        scores = np.split(np.array([p.score for p in predictions]), [len(good)])
        auroc = metrics.auroc_against(*scores)
        rows.append(detector_row(values, f"test, {len(predictions)}", seconds, auroc=auroc))
    return rows


def anonymous_memory() -> float:
    """Return the memory of this process that no file backs, in MB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024 / 1e6


def memory_of_scoring(values: Settings, n_images: int) -> list[str]:
    """Return a row: memory while the crops of noise images are scored, the first half training."""
    side, ids = values.initial_res, range(n_images)
    with tempfile.TemporaryFile() as file:
        for number in ids:
            file.write(np.random.default_rng(number).bytes(3 * side**2))
        array = np.memmap(file, np.uint8, "r", shape=(n_images, 3, side, side))
        rows, names = [(array, i) for i in ids], list(map(str, ids))
        device = devices.choose_device(values.device)
        pool = ImagePool(rows, names, (side, side), device, values.n_workers)
        weights = backbones.load_weights(values.net, values.weights)
        backbone = backbones.build_backbone(values.net, weights, values.pyramid_level)
        extractor = backbones.FeatureExtractor(backbone, device, values.precision)
        tasks = [
            scoring.GridTask(ratio, scoring.Repetition(level, 0, 0))
            for ratio in values.crop_size_ratio
            for level in values.pyramid_level
        ]
        samples, finished = [], threading.Event()

        def sample() -> None:
            while not finished.wait(0.1):
                samples.append(anonymous_memory())

        with ThreadPoolExecutor(1) as thread:
            thread.submit(sample)
            splits = ids[: n_images // 2], [ids[n_images // 2 :]]
            scores = scoring.CropScorer(pool, values, extractor).score_grids(tasks, *splits)
            seconds, _ = timed(list, scores)
            finished.set()
    n = len(samples)
    figures = samples[n // 5], np.mean(samples[-n // 10 :]), max(samples)
    n_crops = n_images * sum(len(values.grid(ratio)) for ratio in values.crop_size_ratio)
    row = [values.net, str(n_images), str(n_crops), f"{seconds:.0f}"]
    return [*row, *(f"{figure:.0f}" for figure in figures)]


def memory_rows(args: argparse.Namespace, values: Settings) -> list[list[str]]:
    """Return one row per number of images."""
    return [in_a_process(memory_of_scoring, values, n_images) for n_images in args.n_images]


def largest_difference(values: Settings) -> float:
    """Return the largest relative difference of the scores of 24 images from the CPU's in fp32."""
    batch_size = scoring.batch_size_on(devices.choose_device(values.device), values)
    on_cpu = replace(values, device="cpu", precision="fp32", batch_size=batch_size)
    with scorer(category_counts(24), values) as score:
        expected, actual = (
            np.concatenate([np.load(path)["anom_map_test"].ravel() for path in score(changed)])
            for changed in (on_cpu, values)
        )
    scored = expected != 0  # in the padding all scores are 0
    return float(abs(actual[scored] / expected[scored] - 1).max())


MEASUREMENTS = {
    "pipeline": pipeline_rows,
    "detector": detector_rows,
    "scaling": scaling_rows,
    "memory": memory_rows,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add, at_least_1 = parser.add_argument, cli.int_at_least(1)
    add("--what", choices=MEASUREMENTS, default="pipeline", help="what is timed")
    add("--n_images", type=at_least_1, nargs="+", default=[16], metavar="N", help="images")
    add("--n_train", type=cli.int_at_least(19), default=40, metavar="N", help="detector: images")
    about = "detector: a category's folder of real images in LOCO's layout"
    add("--class_dir", type=cli.path, metavar="DIR", help=about)
    add("--loco", action="store_true", help="pipeline: images in the numbers and sizes of LOCO")
    add("--turns", type=at_least_1, default=3, metavar="N", help="repetitions, medians are shown")
    add("--agreement", action="store_true", help="compare scores with the CPU's in fp32 too")
    add("--out", type=cli.path, metavar="FILE", help="CSV to write")
    cli.add_settings(parser, ["pyramid_level", "crop_size_ratio", "rep_num_224", "initial_res"])
    cli.add_settings(parser, [*cli.BACKBONE_FLAGS, *cli.MACHINE_FLAGS], weights="random")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, write the rows."""
    args = parse_args(argv)
    if args.out:
        atomic.check_writable(args.out)
    values = cli.settings_of(args)
    rows = [COLUMNS[args.what].split(";"), *MEASUREMENTS[args.what](args, values)]
    print(tables.markdown(rows))
    if args.out:
        flags, device = sys.argv[1:] if argv is None else argv, devices.choose_device(args.device)
        about = score_files.environment_info(scoring.batch_size_on(device, values), device)
        head = f"# python benchmarks/bench.py {shlex.join(flags)}; {about}\n"
        atomic.atomic_write(args.out, head + tables.csv_text(rows))
    if args.agreement:
        print(f"\nlargest relative difference from the CPU: {largest_difference(values):.1e}")


if __name__ == "__main__":
    errors.run_script(main)
