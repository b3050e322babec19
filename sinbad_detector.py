"""Fit a detector on normal images, and ask it whether others are anomalous.

Reads   folders and files of images of one object, with the same viewpoint and aspect ratio
Writes  OUT: the detector (fit), or a CSV: path, score, p_value, is_anomalous, levels (score)

    python sinbad_detector.py fit --train_dir normal --out bottle.npz
    python sinbad_detector.py score --detector bottle.npz new --out scores.csv --heatmaps maps

An image is called anomalous if its p-value is at most --false_alarms, the false-positive rate that
is expected among normal images. Exit status 1 if an image could not be scored.
"""

import argparse
import json
import logging
from pathlib import Path

from sinbad import atomic, cli, detectors, ensembles, errors, layouts, settings
from sinbad.report import tables

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fit_parser = commands.add_parser("fit", help="fit a detector, write it to a file")
    add = fit_parser.group(settings.INPUT_OUTPUT).add_argument
    add("--train_dir", type=cli.path, required=True, metavar="DIR", help="normal images")
    add("--out", type=cli.path, required=True, metavar="FILE", help="detector to write, .npz")
    about = "normal images for calibration (default: cross-validation on the training images)"
    add("--valid_dir", type=cli.path, metavar="DIR", help=about)
    cli.add_settings(fit_parser, ["pyramid_level", "crop_size_ratio", "rep_num_224", "folds"])
    cli.add_settings(fit_parser, ["lambda_factor", "seed", *cli.DESCRIPTOR_FLAGS])
    cli.add_settings(fit_parser, [*cli.GRID_FLAGS, *cli.BACKBONE_FLAGS, *cli.MACHINE_FLAGS])
    score_parser = commands.add_parser("score", help="score images")
    add = score_parser.group(settings.INPUT_OUTPUT).add_argument
    add("images", nargs="+", type=cli.path, metavar="IMAGE", help="image files and folders")
    about = "detector written by fit"
    add("--detector", type=cli.path, required=True, metavar="FILE", help=about)
    add("--out", type=cli.path, metavar="FILE", help="CSV to write (default: stdout)")
    add("--json", type=cli.path, metavar="FILE", help="JSON to write, same content")
    add("--heatmaps", type=cli.path, metavar="DIR", help="folder of images with their crop scores")
    about = "the network's weights, if they were moved since fit"
    add("--weights", type=cli.path, metavar="FILE", help=about)
    score_parser.group(settings.COMPUTED).add_argument(
        "--false_alarms",
        type=cli.parse_as(settings.number(0, 1, "()")),
        default=0.05,
        metavar="RATE",
        help="false-positive rate: fraction of normal images that may be called anomalous",
    )
    cli.add_settings(score_parser, cli.MACHINE_FLAGS)
    return parser.parse_args(argv)


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder."""
    if not folder.is_dir():
        reason = "a file" if folder.exists() else "no such folder"
        raise errors.UserError(f"{folder} must be a folder of images, got {reason}")
    return [folder / name for name in layouts.list_images(folder)]


def check_output(path: Path, inputs: list[Path]) -> None:
    """Raise an error if a file cannot be written later, or is an input."""
    if path.resolve() in {image.resolve() for image in inputs}:
        raise errors.UserError(f"{path} is an input; choose another output")
    atomic.check_writable(path)


def fit(args: argparse.Namespace) -> None:
    """Fit and save."""
    train = images_in(args.train_dir)
    valid = images_in(args.valid_dir) if args.valid_dir else []
    check_output(args.out, [*train, *valid])
    detector = detectors.Detector.fit(train, valid, cli.settings_of(args))
    detector.save(args.out)
    n = len(detector.calibration)
    log.info(
        f"{args.out}: {len(train)} training images, a calibration set of {n}: false-positive rates "
        f"from {1 / (n + 1):.3g}"
    )
    print(args.out)


def write_table(args: argparse.Namespace, predictions: list[detectors.Prediction]) -> None:
    """Write the CSV and the JSON."""
    levels = sorted({level for prediction in predictions for level in prediction.levels})
    records = []
    for prediction in predictions:
        record = {"path": prediction.path, "score": None, "p_value": None, "is_anomalous": None}
        if not prediction.error:
            record["score"], record["p_value"] = prediction.score, prediction.p_value
            record["is_anomalous"] = int(prediction.is_anomalous)
        record |= {f"level_{level}": prediction.levels.get(level) for level in levels}
        records.append(record | {"error": prediction.error})
    text = tables.csv_text([list(records[0]), *(list(record.values()) for record in records)])
    if args.out is not None:
        atomic.atomic_write(args.out, text)
    else:
        print(text.rstrip("\n"))
    if args.json is not None:
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        atomic.atomic_write(args.json, text.encode("utf-8", "backslashreplace"))


def heatmap_path(args: argparse.Namespace, number: int, image: Path) -> Path:
    """Return the file of an image's heatmap; images are numbered from 1."""
    return args.heatmaps / f"{number:04d}_{image.name[:200]}.png"


def check_heatmaps(args: argparse.Namespace, images: list[Path]) -> None:
    """Raise an error if heatmaps cannot be written, or would lie among other images."""
    folder = args.heatmaps.resolve()
    if folder in {path.resolve().parent for path in images} | {p.resolve() for p in args.images}:
        raise errors.UserError(f"heatmaps must lie outside the scored folders, got {args.heatmaps}")
    expected = {heatmap_path(args, number, path).name for number, path in enumerate(images, 1)}
    args.heatmaps.mkdir(parents=True, exist_ok=True)
    for name in sorted(path.name for path in args.heatmaps.iterdir()):
        if name not in expected and not name.startswith("."):
            raise errors.UserError(
                f"heatmaps must be a folder without other files, got {args.heatmaps} "
                f"with {name}; remove them or choose another folder"
            )
    if expected:
        atomic.check_writable(args.heatmaps / min(expected))


def write_heatmap(
    path: Path,
    prediction: detectors.Prediction,
    ensemble: ensembles.Ensemble,
    index: int,
    threshold: float,
) -> bool:
    """Write an image beside its crop scores; log an error and return False if that fails."""
    from sinbad.report import figures  # matplotlib: slow to import, not needed for scores

    caption = f"score {prediction.score:.2f}, anomalous above {threshold:.2f}; "
    caption += f"p = {prediction.p_value:.3f}"
    image, grids = Path(prediction.path), ensemble.grids
    try:
        png = figures.heatmap(image, grids, index, caption, prediction.is_anomalous)
        atomic.atomic_write(path, png)
    except (OSError, errors.UserError) as error:  # the scores and other heatmaps are not lost
        log.error(f"could not write the heatmap {path}: {error}")
        return False
    return True


def score(args: argparse.Namespace) -> int:
    """Load, score, write; return 1 if an image could not be scored, or a heatmap not written."""
    if args.out and args.json and args.out.resolve() == args.json.resolve():
        raise errors.UserError(f"out and json must be two files, got {args.out} for both")
    paths = []
    for path in args.images:
        paths += images_in(path) if path.is_dir() else [path]
    for path in filter(None, (args.out, args.json)):
        check_output(path, [args.detector, *paths])
    if args.heatmaps:
        check_heatmaps(args, paths)
    detector = detectors.Detector.load(args.detector, args.weights, args.device, args.num_workers)
    threshold = detector.threshold(args.false_alarms)
    with_heatmaps = args.heatmaps is not None
    if with_heatmaps and not settings.backbone_levels(detector.values.pyramid_level):
        log.warning("no heatmaps are written: raw pixels alone (level 224) have one crop")
        with_heatmaps = False
    predictions: list[detectors.Prediction] = []
    n_lost = 0  # heatmaps
    try:
        for prediction, ensemble, index in detector.iter_predictions(paths, args.false_alarms):
            predictions.append(prediction)
            if prediction.error:
                log.error(prediction.error)
            elif with_heatmaps:
                path = heatmap_path(args, len(predictions), Path(prediction.path))
                n_lost += not write_heatmap(path, prediction, ensemble, index, threshold)
    finally:  # what was scored is not lost because something later fails
        if predictions:
            write_table(args, predictions)
            n_failed = sum(bool(prediction.error) for prediction in predictions)
            n_anomalous = sum(prediction.is_anomalous for prediction in predictions)
            n_scored = len(predictions) - n_failed
            log.info(f"{n_scored} images scored, {n_anomalous} anomalous, {n_failed} unreadable")
    return int(n_failed + n_lost > 0)


def main(argv: list[str] | None = None) -> int:
    """Fit, or score."""
    args = parse_args(argv)
    if args.command == "score":
        return score(args)
    fit(args)
    return 0


if __name__ == "__main__":
    errors.run_script(main, resumes=False)
