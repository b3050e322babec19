"""Time the pipeline by stages and as a whole, against the bare network and a textbook program.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from score_runs import RunOptions, score_tasks

from benchmarks.agreement import agreement
from benchmarks.measuring import STAGES, draw_dataset, seconds_of, small_class, watched_stages
from benchmarks.textbook import textbook_scores
from data_to_matrices import make_matrices
from loco_datasets import NETWORK_DEFAULTS
from reproduce_paper import paper_descriptor, paper_tasks
from result_files import write_atomic
from sinbad.backbones import INPUT_SIDE, Backbone, choose_device, load_weights
from sinbad.datasets import KINDS, LOCO_CLASSES, PIXEL_LEVEL, LocoClass
from sinbad.errors import run_script, say
from sinbad.files import to_json
from sinbad.flags import IM_SIZE, LEVELS, PRECISIONS, ScriptParser, integer_from
from sinbad.matrices import load_matrices
from sinbad.report.tables import markdown
from sinbad.results import read_scores
from sinbad.scoring import BATCH_SIZES, Descriptor, ScoreTask

SMALL_IMAGES = 24  # few: the textbook program is slow, and the CPU that a GPU is compared with
SMALL_MVTYPES = [f"pushpins_{kind}" for kind in KINDS]
# With the paper's 1000 directions the textbook program's p x p inverse alone takes minutes.
TEXTBOOK_DIRECTIONS, TEXTBOOK_RATIO = 200, 0.7
TEXTBOOK_DESCRIPTOR = {14: Descriptor(TEXTBOOK_DIRECTIONS, 5, 0.1)}
AGREEMENT_REPS = 2

Figures = dict[str, Any]


def run_options(
    args: argparse.Namespace, root: Path, descriptors: dict[int, Descriptor], results: str
) -> RunOptions:
    """Return the paper's settings with this benchmark's net; scores go to ROOT/<results>."""
    return RunOptions(
        net=args.net,
        weights="random",
        initial_res=IM_SIZE,
        crop_num_edge=4,
        descriptors=descriptors,
        batch_size=None,
        precision=args.precision,
        official=False,
        num_workers=os.cpu_count() or 1,
        data_dir=root / "matrices",
        results_dir=root / results,
        overwrite=True,
    )


def bare_network(args: argparse.Namespace, device: torch.device, n_crops: int) -> float:
    """Return the seconds that the network alone takes for some crops."""
    levels = tuple(level for level in args.pyramid_level if level != PIXEL_LEVEL)
    backbone = Backbone(args.net, load_weights(args.net, "random"), levels).to(device)
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
    descriptors = {level: paper_descriptor(level) for level in args.pyramid_level}
    options = run_options(args, root, descriptors, "results")
    tasks = paper_tasks(mvtypes, args.pyramid_level, [0], args.rep_num_224, "bench")
    resnet = {task: version for task, version in tasks.items() if task.level != PIXEL_LEVEL}
    with watched_stages(device) as (stages, batches):
        watched_seconds = seconds_of(lambda: score_tasks(tasks, options, device), device)
    turns = [
        {
            "everything": seconds_of(lambda: score_tasks(tasks, options, device), device),
            "ResNet levels": seconds_of(lambda: score_tasks(resnet, options, device), device),
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


def bench_textbook(args: argparse.Namespace, device: torch.device, root: Path) -> Figures:
    """Time the textbook program and ours: the same images, level 14, one grid, fewer directions."""
    options = run_options(args, root, TEXTBOOK_DESCRIPTOR, "results")
    tasks = {ScoreTask(mvtype, 14, TEXTBOOK_RATIO, 0, 0): "bench" for mvtype in SMALL_MVTYPES}
    matrices = [load_matrices(root / "matrices", mvtype).images for mvtype in SMALL_MVTYPES]
    images = [{name: torch.tensor(part) for name, part in own.items()} for own in matrices]
    weights = load_weights(args.net, "random")

    textbook: list[dict[str, torch.Tensor]] = []

    def run_textbook() -> None:
        for own in images:
            scores = textbook_scores(
                own, args.net, weights, TEXTBOOK_RATIO, TEXTBOOK_DIRECTIONS, device
            )
            textbook.append(scores)

    paths = score_tasks(tasks, options, device).values()  # warm
    ours = seconds_of(lambda: score_tasks(tasks, options, device), device)
    plain = seconds_of(run_textbook, device)
    differences = [
        np.abs(read_scores(path).test / own["test"].numpy() - 1).max()
        for path, own in zip(paths, textbook, strict=True)
    ]
    return {
        "n_images": SMALL_IMAGES,
        "descriptor_length": 5 * TEXTBOOK_DIRECTIONS,
        "ours_seconds": ours,
        "textbook_seconds": plain,
        "speed_up": plain / ours,
        "largest_relative_difference": float(max(differences)),
    }


def bench_agreement(args: argparse.Namespace, device: torch.device, root: Path) -> list[Figures]:
    """Compare the scores of the device's precisions with the CPU's."""
    descriptors = {level: paper_descriptor(level) for level in args.pyramid_level}
    options = run_options(args, root, descriptors, "results")
    tasks = paper_tasks(SMALL_MVTYPES, args.pyramid_level, [0], AGREEMENT_REPS, "bench")
    return list(agreement(tasks, options, device))


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
            *("--turns", "0", "--no-textbook", "--no-agreement"),
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
    if "textbook" in figures:
        own = figures["textbook"]
        rows = [["level 14, one grid of 4 crops", "seconds"]]
        rows += [[name, f"{own[f'{name}_seconds']:.2f}"] for name in ("textbook", "ours")]
        yield markdown([*rows, ["speed-up", f"{own['speed_up']:.1f}"]])
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
    parser.add_argument("--net", default=NETWORK_DEFAULTS["net"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--pyramid_level", type=int, nargs="+", choices=LEVELS, default=[7, 14, 224]
    )
    parser.add_argument("--rep_num_224", type=integer_from(1), default=100)
    parser.add_argument("--n_images", type=integer_from(8), default=16, help="of the drawn class")
    parser.add_argument("--loco", action="store_true", help="draw all five classes, LOCO's counts")
    parser.add_argument("--turns", type=integer_from(0), default=3, help="of the whole runs")
    for part in ("textbook", "agreement"):
        parser.add_argument(f"--{part}", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scale", type=integer_from(8), nargs="+", help="only these image counts")
    parser.add_argument("--out", type=Path, default=Path("demo/benchmark.json"))
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
            if args.textbook or args.agreement:
                draw_dataset(small / "dataset", small_class(SMALL_IMAGES))
                make_matrices(small / "dataset", small / "matrices", SMALL_MVTYPES, IM_SIZE)
            if args.textbook:
                figures["textbook"] = bench_textbook(args, device, small)
            if args.agreement:
                figures["agreement"] = bench_agreement(args, device, small)
    write_atomic(args.out, (to_json(figures) + "\n").encode())
    print("\n\n".join(tables(figures)))
    say(f"written: {args.out}")


if __name__ == "__main__":
    run_script(main)
