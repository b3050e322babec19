"""Time the pipeline by stages and as a whole, against the bare network; compare precisions.

Reads   nothing: images are drawn
Writes  OUT (JSON), and tables on stdout

    python benchmarks/bench_pipeline.py
    python benchmarks/bench_pipeline.py --net resnet18 --n_images 48
    python benchmarks/bench_pipeline.py --net resnet18 --scale 100 200 400
    python benchmarks/bench_pipeline.py --loco --device cuda --precision tf32

The bare network is the same network on as many crops of noise, full batches. It takes turns with
the pipeline, so that both meet the same machine; still, compare ratios rather than seconds.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import STAGES, draw_dataset, seconds_of, small_class, watched_stages
from data_to_matrices import make_matrices
from reproduce_paper import paper_tasks
from reproduce_paper import parse_args as paper_flags
from sinbad.backbones import INPUT_SIDE, build_backbone, choose_device, load_weights
from sinbad.datasets import IM_SIZE, KINDS, LOCO_CLASSES, PIXEL_LEVEL, LocoClass, network_levels
from sinbad.errors import run_script, say
from sinbad.files import to_json, write_whole
from sinbad.flags import PRECISIONS, ScriptParser, add_level_flag, integer_from
from sinbad.report.tables import markdown
from sinbad.results import read_scores
from sinbad.scoring import BATCH_SIZES, ScorePlan
from sinbad_single_layer import score_and_save

SMALL_IMAGES = 24  # few: the CPU that a GPU is compared with is slow
SMALL_MVTYPES = [f"pushpins_{kind}" for kind in KINDS]
AGREEMENT_REPS = 2

Figures = dict[str, Any]


def bench_plan(
    args: argparse.Namespace, root: Path, mvtypes: list[str], n_pixel_reps: int
) -> ScorePlan:
    """Return the paper's runs with this benchmark's net; scores go to ROOT/results."""
    flags = ["--net", args.net, "--weights", "random", "--precision", args.precision]
    flags += ["--results_dir", str(root / "results"), "--overwrite"]
    tasks = paper_tasks(mvtypes, args.pyramid_level, [0], n_pixel_reps, "bench")
    return ScorePlan.of(paper_flags(flags), tasks, root / "matrices")


def bare_network(args: argparse.Namespace, device: torch.device, n_crops: int) -> float:
    """Return the seconds that the network alone takes for some crops."""
    levels = network_levels(args.pyramid_level)
    backbone = build_backbone(args.net, load_weights(args.net, "random"), levels).to(device)
    batch_size = BATCH_SIZES[device.type]
    crops = torch.randn(batch_size, 3, INPUT_SIDE, INPUT_SIDE, device=device)
    crops = crops.contiguous(memory_format=torch.channels_last)
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"

    @torch.inference_mode()
    def loop(n_batches: int) -> None:
        for _ in range(n_batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                backbone(crops)

    loop(1)  # warm
    return seconds_of(lambda: loop(-(-n_crops // batch_size)), device)


def bench_pipeline(
    args: argparse.Namespace, device: torch.device, root: Path, classes: dict[str, LocoClass]
) -> Figures:
    """Time the stages apart, then the whole, the ResNet levels and the bare network in turns."""
    draw_dataset(root / "dataset", classes)
    mvtypes = [f"{name}_{kind}" for name in classes for kind in KINDS]
    workers = os.cpu_count() or 1
    read_seconds = seconds_of(
        lambda: make_matrices(root / "dataset", root / "matrices", mvtypes, IM_SIZE, workers),
        torch.device("cpu"),
    )
    plan = bench_plan(args, root, mvtypes, args.rep_num_224)
    network = replace(plan, tasks=tuple(t for t in plan.tasks if t.level != PIXEL_LEVEL))
    with watched_stages(device) as (stages, batches):
        watched_seconds = seconds_of(lambda: score_and_save(plan, device), device)
    turns = [
        {
            "everything": seconds_of(lambda: score_and_save(plan, device), device),
            "network levels": seconds_of(lambda: score_and_save(network, device), device),
            "bare network": bare_network(args, device, sum(batches)),
        }
        for _ in range(args.turns)
    ]
    medians = (
        {name: float(np.median([t[name] for t in turns])) for name in turns[0]} if turns else {}
    )
    peak = {"cpu": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return {
        "n_images": sum(
            f.train + f.validation + f.good + f.structural + f.logical for f in classes.values()
        ),
        "crop_forwards": sum(batches),
        "read_seconds": read_seconds,
        "stage_seconds": {stage: stages[stage] for stage in STAGES},
        "watched_seconds": watched_seconds,
        "median_seconds": medians,
        "turns": turns,
        "peak_memory_bytes": peak,
    }


def bench_agreement(args: argparse.Namespace, device: torch.device, root: Path) -> list[Figures]:
    """Compare the scores of every precision on the device, and of half the batch, with the CPU's.

    Returns
    -------
    Of each run the largest relative difference, and the smallest rank correlation of a crop
    """
    cpu, batch_size = torch.device("cpu"), BATCH_SIZES[device.type]
    plan = replace(bench_plan(args, root, SMALL_MVTYPES, AGREEMENT_REPS), batch_size=batch_size)
    runs = {"half the batch size": replace(plan, precision="fp32", batch_size=batch_size // 2)}
    # tf32 is the same as fp32 on a CPU.
    there = [name for name in PRECISIONS if (device.type, name) != ("cpu", "tf32")]
    runs |= {name: replace(plan, precision=name) for name in there}
    reference = _crop_scores(replace(plan, precision="fp32"), cpu)
    figures = []
    for name, own in runs.items():
        pairs = [pair for pair in zip(reference, _crop_scores(own, device), strict=True)
                 if pair[0].any()]  # padding only scores 0  # fmt: skip
        figures.append({
            "run": name,
            "largest_relative_difference": max(float(abs(b / a - 1).max()) for a, b in pairs),
            "smallest_rank_correlation": min(float(spearmanr(*p).statistic) for p in pairs),
        })  # fmt: skip
    return figures


def _crop_scores(plan: ScorePlan, device: torch.device) -> list[NDArray[np.float64]]:
    """Return the scores (n_test + n_valid,) of every crop of every task."""
    files = [read_scores(path) for path in score_and_save(plan, device)]
    return [crop for file in files for crop in np.concatenate([file.test, file.valid], axis=1)]


def bench_scale(args: argparse.Namespace, root: Path) -> list[Figures]:
    """Time several numbers of images, each in a process of its own: its peak memory is its own."""
    found = []
    for n_images in args.scale:
        out = root / f"{n_images}.json"
        levels = map(str, args.pyramid_level)
        command = [
            *(sys.executable, __file__, "--n_images", str(n_images), "--out", str(out)),
            *("--net", args.net, "--device", args.device, "--precision", args.precision),
            *("--rep_num_224", str(args.rep_num_224), "--pyramid_level", *levels),
            *("--turns", "0", "--no-agreement"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(json.loads(out.read_text())["pipeline"])
    return found


def tables(figures: Figures) -> Iterator[str]:
    """Yield the figures as Markdown tables."""
    if "pipeline" in figures:
        own = figures["pipeline"]
        rows = [["stage", "seconds"], ["read: images to matrices", f"{own['read_seconds']:.1f}"]]
        rows += [[stage, f"{seconds:.1f}"] for stage, seconds in own["stage_seconds"].items()]
        yield markdown(rows)
        peaks = own["peak_memory_bytes"].items()
        yield markdown([["peak memory", "GB"], *([name, f"{n / 1e9:.2f}"] for name, n in peaks)])
    if figures.get("pipeline", {}).get("turns"):
        bare = own["median_seconds"]["bare network"]
        rows = [["scoring", "seconds", "images/s", "crops/s", "share of the bare network"]]
        for name, seconds in own["median_seconds"].items():
            rates = [f"{own[key] / seconds:.2f}" for key in ("n_images", "crop_forwards")]
            rows.append([name, f"{seconds:.1f}", *rates, f"{100 * bare / seconds:.0f} %"])
        yield markdown(rows)
    if "agreement" in figures:
        rows = [["against the CPU in fp32", "largest relative difference", "rank correlation"]]
        for own in figures["agreement"]:
            difference = f"{own['largest_relative_difference']:.1e}"
            rows.append([own["run"], difference, f"{own['smallest_rank_correlation']:.6f}"])
        yield markdown(rows)
    if "scale" in figures:
        rows = [["images", "crops", "seconds", "ms/crop", "peak memory, MB"]]
        for own in figures["scale"]:
            seconds, crops = own["watched_seconds"], own["crop_forwards"]
            peak = f"{own['peak_memory_bytes']['cpu'] / 1e6:.0f}"
            each = f"{1000 * seconds / crops:.1f}"
            rows.append([str(own["n_images"]), str(crops), f"{seconds:.1f}", each, peak])
        yield markdown(rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--net", default="wide_resnet50_2")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    add_level_flag(parser, default=[7, 14, PIXEL_LEVEL])
    parser.add_argument("--rep_num_224", type=integer_from(1), default=100)
    parser.add_argument("--n_images", type=integer_from(8), default=16, help="of the drawn class")
    parser.add_argument("--loco", action="store_true", help="draw all five classes, LOCO's counts")
    parser.add_argument("--turns", type=integer_from(0), default=3, help="of the whole runs")
    parser.add_argument("--agreement", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scale", type=integer_from(8), nargs="+", help="only these image counts")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    args = parse_args(argv)
    device = choose_device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    flags = {name: str(value) for name, value in vars(args).items() if name != "out"}
    figures: Figures = {
        "flags": flags,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "gpu": gpu},
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.scale:
            figures["scale"] = bench_scale(args, root)
        else:
            classes = LOCO_CLASSES if args.loco else small_class(args.n_images)
            figures["pipeline"] = bench_pipeline(args, device, root / "pipeline", classes)
            small = root / "small"
            if args.agreement:
                draw_dataset(small / "dataset", small_class(SMALL_IMAGES))
                make_matrices(small / "dataset", small / "matrices", SMALL_MVTYPES, IM_SIZE)
                figures["agreement"] = bench_agreement(args, device, small)
    write_whole(args.out, to_json(figures) + "\n")
    print("\n\n".join(tables(figures)))
    say(f"written: {args.out}")


if __name__ == "__main__":
    run_script(main)
