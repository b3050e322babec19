"""Compare SINBAD with methods of anomalib: the same network, weights, images and threads.

Reads   LOCO_DIR/juice_bottle, WEIGHTS (a state_dict of ResNet-18; its first three stages are used)
Writes  OUT/peers.csv

    python3 -m venv peers-venv
    peers-venv/bin/pip install anomalib==2.7.0 timm==1.0.31 torch==2.14.1 torchvision==0.29.1
    peers-venv/bin/python benchmarks/peers.py --weights resnet18.pth

Each run is a process of its own. anomalib's methods have its defaults, images squeezed to 256 x 256
among them, and use no validation images; SINBAD has its defaults, and is normalised by the
validation images. One category ranks nothing.
"""

import argparse
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sinbad import atomic, cli, detectors, errors, images, score_files
from sinbad.report import metrics, tables
from sinbad.settings import PIXEL_LEVEL, Settings

CATEGORY, NET = "juice_bottle", "resnet18"
PARTS = ("train/good", "validation/good", "test/good", "test/logical_anomalies")
CORESET_RATIO, BATCH = 0.1, 32  # anomalib's defaults
COLUMNS = "method;seed;ROC-AUC, %;fit, CPU seconds;score, CPU seconds;peak memory, GB"

Paths = list[Path]


class Run(NamedTuple):
    """What was measured of a method: scores of its images, CPU seconds of all threads."""

    scores: list[float]
    fit_seconds: float
    score_seconds: float


def run_sinbad(levels: tuple[int, ...], parts: list[Paths], weights: str, seed: int) -> Run:
    """Fit a detector, and score the test images."""
    train, valid, good, anomalous = parts
    values = Settings(levels, net=NET, weights=weights, seed=seed, device="cpu", num_workers=1)
    started = time.process_time()
    detector = detectors.Detector.fit(train, valid, values)
    fitted = time.process_time()
    predictions = detector.score([*good, *anomalous])
    scores = [prediction.score for prediction in predictions]
    return Run(scores, fitted - started, time.process_time() - fitted)


def load_batches(paths: Paths) -> list[Tensor]:
    """Load images as anomalib's default pre-processing does, in batches."""
    from anomalib.models import Patchcore
    from torchvision.transforms.v2 import functional

    transform = Patchcore.configure_pre_processor().transform
    loaded = (functional.to_image(images.open_image(path)).float() / 255 for path in paths)
    return list(torch.stack([transform(image) for image in loaded]).split(BATCH))


def run_anomalib(name: str, parts: list[Paths], weights: str, seed: int) -> Run:
    """Fit a model of anomalib, and score the test images."""
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    random.seed(seed)
    np.random.seed(seed)  # of the core-set's projection
    torch.manual_seed(seed)
    train, _, good, anomalous = parts
    started = time.process_time()
    if name == "PatchCore":
        model = PatchcoreModel(("layer2", "layer3"), NET, pre_trained=False)
    else:
        model = PadimModel(NET, ["layer1", "layer2", "layer3"], pre_trained=False)
    network = model.feature_extractor.feature_extractor
    state = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    model.train()
    for batch in load_batches(train):
        model(batch)
    if name == "PatchCore":
        model.subsample_embedding(CORESET_RATIO)
    else:
        model.fit()
    fitted = time.process_time()
    model.eval()
    with torch.inference_mode():
        batches = load_batches([*good, *anomalous])
        scores = torch.cat([model(batch).pred_score.flatten() for batch in batches])
    return Run(scores.tolist(), fitted - started, time.process_time() - fitted)


# Method -> function, what it is called with.
METHODS: dict[str, tuple[Callable[..., Run], Any]] = {
    "SINBAD, levels 14 and 224": (run_sinbad, (14, PIXEL_LEVEL)),
    "SINBAD, level 14": (run_sinbad, (14,)),
    "PatchCore": (run_anomalib, "PatchCore"),
    "PaDiM": (run_anomalib, "PaDiM"),
}


def measure(method: str, loco_dir: Path, weights: str, seed: int) -> list[Any]:
    """Return a row of the table; in a process of its own, for the peak memory."""
    parts = [sorted((loco_dir / CATEGORY / part).iterdir()) for part in PARTS]
    function, what = METHODS[method]
    run = function(what, parts, weights, seed)
    scores, n_good = np.array(run.scores), len(parts[2])
    auroc = 100 * metrics.auroc_against(scores[:n_good], scores[n_good:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds = f"{run.fit_seconds:.1f}", f"{run.score_seconds:.1f}"
    return [method, seed, f"{auroc:.3f}", *seconds, f"{peak:.2f}"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--loco_dir", type=cli.path, default=cli.DATASET_DIR, help="MVTec LOCO AD")
    add("--weights", type=cli.path, required=True, help="state_dict of ResNet-18")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of each method")
    add("--threads", type=cli.int_at_least(1), default=1, help="of each process")
    add("--out", type=cli.path, default=Path("results"), help="folder of the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure every method with every seed, one after the other."""
    args = parse_args(argv)
    os.environ.update(OMP_NUM_THREADS=str(args.threads), TQDM_DISABLE="1")  # of the processes below
    rows: list[list[Any]] = [COLUMNS.split(";")]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        for seed in args.seeds:
            for method in METHODS:
                task = measure, method, args.loco_dir, str(args.weights), seed
                rows.append(processes.submit(*task).result())
                print(*rows[-1], sep=", ", flush=True)
        info = score_files.environment_info
        about = processes.submit(info, BATCH, torch.device("cpu")).result()
    flags = f"--seeds {' '.join(map(str, args.seeds))} --threads {args.threads}"
    head = f"# python benchmarks/peers.py {flags}; {about}\n"
    atomic.atomic_write(args.out / "peers.csv", head + tables.csv_text(rows))


if __name__ == "__main__":
    errors.run_script(main)
