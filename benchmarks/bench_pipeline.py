"""Time scoring against the bare network; compare the scores of every precision with the CPU's.

Reads   nothing: images are drawn
Writes  OUT (JSON), and tables on stdout

    python benchmarks/bench_pipeline.py
    python benchmarks/bench_pipeline.py --net resnet18 --n_images 200 --turns 1
    python benchmarks/bench_pipeline.py --loco --device cuda --precision tf32 --turns 1

The bare network is the same network on as many crops of noise, in full batches (of many, the first
hundred, and the time of all from theirs). It takes turns with scoring, so that both meet the same
machine; still, compare ratios rather than seconds.
"""

import argparse
import logging
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_to_matrices import make_matrices
from reproduce_paper import paper_tasks
from reproduce_paper import parse_args as paper_flags
from sinbad import atomic, backbones, cli, errors, loco, score_files, score_plans
from sinbad.report import tables
from sinbad_single_layer import score_and_save

log = logging.getLogger("sinbad")

PARTS = {
    "train/good": "train",
    "validation/good": "validation",
    "test/good": "good",
    "test/structural_anomalies": "structural",
    "test/logical_anomalies": "logical",
}
BARE_BATCHES = 100  # that the bare network runs at most
Figures = dict[str, Any]


def small_class(n_images: int) -> dict[str, loco.LocoClass]:
    """Return pushpins with `n_images` in all, half of them for training."""
    full, eighth = loco.LOCO_CLASSES["pushpins"], max(1, n_images // 8)
    n_train = max(2, n_images - 4 * eighth)
    return {"pushpins": loco.LocoClass(full.width, full.height, n_train, *[eighth] * 4)}


def draw_dataset(folder: Path, classes: dict[str, loco.LocoClass]) -> int:
    """Draw smooth random images in LOCO's layout; return how many."""

    def draw(job: tuple[Path, loco.LocoClass]) -> None:
        path, facts = job
        rng = np.random.default_rng(list(str(path.relative_to(folder)).encode()))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        size = (facts.width, facts.height)
        coarse.resize(size, Image.Resampling.BILINEAR).save(path, compress_level=1)

    jobs = []
    for name, facts in classes.items():
        for part, count in PARTS.items():
            (folder / name / part).mkdir(parents=True)
            numbers = range(getattr(facts, count))
            jobs += [(folder / name / part / f"{i:03d}.png", facts) for i in numbers]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, jobs))
    return len(jobs)


def make_plan(
    args: argparse.Namespace, root: Path, classes: dict[str, loco.LocoClass]
) -> score_plans.ScorePlan:
    """Make the matrices of drawn images; return the paper's runs with random weights."""
    mvtypes = [f"{name}_{kind}" for name in classes for kind in loco.KINDS]
    workers = os.cpu_count() or 1
    make_matrices(root / "dataset", root / "matrices", mvtypes, loco.IM_SIZE, workers)
    flags = ["--net", args.net, "--weights", "random"]
    flags += ["--results_dir", str(root / "results"), "--overwrite", *["--compile"] * args.compile]
    tasks = paper_tasks(mvtypes, args.pyramid_level, [0], args.rep_num_224, "bench")
    return score_plans.ScorePlan.of(paper_flags(flags), tasks, root / "matrices")


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a call in seconds, the GPU's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def bare_network(
    net: str, levels: tuple[int, ...], precision: str, device: torch.device, n_crops: int
) -> float:
    """Return the seconds that the network alone takes for some crops."""
    backbone = backbones.build_backbone(net, backbones.load_weights(net, "random"), levels).to(
        device
    )
    batch_size = score_plans.BATCH_SIZES[device.type]
    crops = torch.randn(batch_size, 3, backbones.INPUT_SIDE, backbones.INPUT_SIDE, device=device)
    crops = crops.contiguous(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, False
    torch.backends.cudnn.allow_tf32 = precision == "tf32"

    @torch.inference_mode()
    def loop(n_batches: int) -> None:
        for _ in range(n_batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                backbone(crops)

    loop(1)  # warm
    n_batches = -(-n_crops // batch_size)
    n_run = min(n_batches, BARE_BATCHES)
    return n_batches / n_run * seconds_of(lambda: loop(n_run), device)


def bench_scoring(args: argparse.Namespace, device: torch.device, root: Path) -> Figures:
    """Time scoring and the bare network in turns, in each precision."""
    classes = loco.LOCO_CLASSES if args.loco else small_class(args.n_images)
    n_images = draw_dataset(root / "dataset", classes)
    started = time.perf_counter()
    plan = make_plan(args, root, classes)
    figures: Figures = {"n_images": n_images, "seconds_of_matrices": time.perf_counter() - started}
    crops: list[int] = []
    extract = backbones.FeatureExtractor.extract

    def counted(self: backbones.FeatureExtractor, batch: torch.Tensor) -> dict[int, torch.Tensor]:
        crops.append(len(batch))
        return extract(self, batch)

    seconds = figures["seconds"] = {
        precision: {"scoring": [], "bare network": []} for precision in args.precision
    }
    levels = loco.network_levels(args.pyramid_level)
    for precision in args.precision * args.turns:
        own, crops[:] = replace(plan, precision=precision), []
        with mock.patch.object(backbones.FeatureExtractor, "extract", counted):
            scoring = seconds_of(lambda p=own: score_and_save(p, device), device)
        bare = bare_network(args.net, levels, precision, device, sum(crops))
        seconds[precision]["scoring"].append(scoring)
        seconds[precision]["bare network"].append(bare)
        log.info(f"{precision}: scoring {scoring:.1f} s, bare network {bare:.1f} s")
    peak = {"cpu": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return figures | {"crop_forwards": sum(crops), "peak_memory_bytes": peak}


def bench_agreement(args: argparse.Namespace, device: torch.device, root: Path) -> list[list[str]]:
    """Return a row for every precision on the device: how far its scores are from the CPU's."""
    classes = small_class(24)
    draw_dataset(root / "dataset", classes)
    score_plan = replace(
        make_plan(args, root, classes), batch_size=score_plans.BATCH_SIZES[device.type]
    )
    reference = crop_scores(replace(score_plan, precision="fp32"), torch.device("cpu"))
    rows = [["against the CPU in fp32", "largest relative difference", "rank correlation"]]
    for name in cli.PRECISIONS:
        pairs = zip(
            reference, crop_scores(replace(score_plan, precision=name), device), strict=True
        )
        pairs = [pair for pair in pairs if pair[0].any()]  # padding only scores 0
        difference = max(float(abs(b / a - 1).max()) for a, b in pairs)
        correlation = min(float(spearmanr(*pair).statistic) for pair in pairs)
        rows.append([f"{name} on {device.type}", f"{difference:.1e}", f"{correlation:.6f}"])
    return rows


def crop_scores(plan: score_plans.ScorePlan, device: torch.device) -> list[NDArray[np.float64]]:
    """Return the scores (n_test + n_valid,) of every crop of every task."""
    files = [score_files.read_scores(path) for path in score_and_save(plan, device)]
    return [crop for file in files for crop in np.concatenate([file.test, file.valid], axis=1)]


def table(own: Figures) -> list[list[str]]:
    """Return the rows of the table of times; medians over the turns."""
    rows = [["precision", "what", "seconds", "images/s", "crops/s", "share of the bare network"]]
    for precision, turns in own["seconds"].items():
        medians = {name: float(np.median(seconds)) for name, seconds in turns.items()}
        for name, seconds in medians.items():
            rates = [f"{own[key] / seconds:.2f}" for key in ("n_images", "crop_forwards")]
            share = f"{100 * medians['bare network'] / seconds:.0f} %"
            rows.append([precision, name, f"{seconds:.1f}", *rates, share])
    peaks = [f"{name} {n / 1e9:.2f} GB" for name, n in own["peak_memory_bytes"].items()]
    return [
        *rows,
        ["", "peak memory", ", ".join(peaks), "", "", ""],
        ["", "matrices", f"{own['seconds_of_matrices']:.1f}", "", "", ""],
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--net", default="wide_resnet50_2")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    add("--precision", choices=cli.PRECISIONS, nargs="+", default=["fp32"])
    cli.add_level_flag(parser, default=[7, 14, loco.PIXEL_LEVEL])
    add("--rep_num_224", type=cli.integer_from(1), default=100)
    add("--n_images", type=cli.integer_from(8), default=16, help="of the drawn class")
    add("--loco", action="store_true", help="draw all five classes, LOCO's counts")
    add("--compile", action="store_true", help="all but the bare network")
    add("--turns", type=cli.integer_from(1), default=3)
    add("--agreement", action="store_true", help="compare the precisions' scores too")
    add("--out", type=Path, default=Path("benchmark.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    args = parse_args(argv)
    device = backbones.choose_device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    figures: Figures = {
        "flags": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "gpu": gpu},
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures["scoring"] = bench_scoring(args, device, Path(folder) / "scoring")
        print(tables.markdown(table(figures["scoring"])))
        if args.agreement:
            figures["agreement"] = bench_agreement(args, device, Path(folder) / "agreement")
            print("\n" + tables.markdown(figures["agreement"]))
    atomic.atomic_write(args.out, atomic.to_json(figures) + "\n")
    log.info(f"written: {args.out}")


if __name__ == "__main__":
    errors.run_script(main)
