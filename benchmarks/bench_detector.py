"""Time a detector: load it, score one picture, ten, a folder, beside the bare network.

Reads   nothing: pictures are drawn
Writes  OUT (CSV): net, what, pictures, seconds, share of the bare network's time, peak memory

    python benchmarks/bench_detector.py --net resnet18 --n_pictures 1000

The paper's settings (levels 7, 14, the raw pixels' 100 repetitions), pictures of juice_bottle's
size. One picture and ten in five turns with the bare network, medians: as many crops as the
detector forwards, in full batches. The peak is that of the process so far, fitting included.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_pipeline import bare_network, draw_dataset, seconds_of

from sinbad import atomic, cli, detectors, errors, loco, score_plans
from sinbad.report import tables


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    add = parser.add_argument
    add("--net", default="resnet18")
    add("--n_train", type=cli.integer_from(4), default=40, help="pictures that are fitted on")
    add("--n_pictures", type=cli.integer_from(10), default=100, help="in the folder")
    add("--out", type=Path, default=Path("bench_detector.csv"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Fit, save, load, score, write the rows."""
    args, device = parse_args(argv), torch.device("cpu")
    rows: list[list[object]] = [
        ["net", "what", "pictures", "seconds", "of the bare network's time", "peak GB"]
    ]

    def note(what: str, n: int, seconds: float, bare: float = 0.0) -> None:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        share = f"{seconds / bare:.2f}" if bare else ""
        rows.append([args.net, what, n, f"{seconds:.2f}", share, f"{peak:.2f}"])

    with tempfile.TemporaryDirectory() as name:
        folder, own = Path(name), loco.LOCO_CLASSES["juice_bottle"]
        counts = loco.LocoClass(own.width, own.height, args.n_train, 0, args.n_pictures, 0, 0)
        draw_dataset(folder, {"bottle": counts})
        train, test = (
            sorted((folder / "bottle" / part).iterdir()) for part in ("train/good", "test/good")
        )
        options = detectors.DetectorOptions(args.net, "random")
        started = time.perf_counter()
        detector = detectors.Detector.fit(train, options=options, device="cpu")
        note("fit", len(train), time.perf_counter() - started)
        n_crops = sum(level == 14 for level, _, _ in detector.positions)
        detector.save(folder / "bottle.npz")
        size = (folder / "bottle.npz").stat().st_size / 1e6
        started = time.perf_counter()
        detector = detectors.Detector.load(folder / "bottle.npz", device="cpu")
        note(f"load {size:.1f} MB", 0, time.perf_counter() - started)
        note("first score", 1, seconds_of(lambda: detector.score(test[:1]), device))
        for n in (1, 10):
            turns = [
                (
                    seconds_of(lambda n=n: detector.score(test[:n]), device),
                    bare_network(args.net, (7, 14), "fp32", device, n_crops * n),
                )
                for _ in range(5)
            ]
            note("score", n, *map(float, np.median(turns, axis=0)))
        if args.n_pictures > 10:  # minutes: the bare network would not meet the same machine
            note("score", args.n_pictures, seconds_of(lambda: detector.score(test), device))
    head = f"# python benchmarks/bench_detector.py {' '.join(sys.argv[1:])}; "
    atomic.atomic_write(
        args.out, f"{head}{score_plans.made_with(32, device)}\n{tables.csv_text(rows)}"
    )
    print(tables.markdown([list(map(str, row)) for row in rows]))


if __name__ == "__main__":
    errors.run_script(main)
