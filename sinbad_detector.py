"""Fit a detector on good pictures, and ask it whether others are anomalous.

Reads   folders and files of pictures, all of one object seen alike and of one aspect
Writes  OUT: the detector (fit), or a CSV: path, score, p_value, is_anomalous, levels (score)

    python sinbad_detector.py fit --train_dir normal --out bottle.npz
    python sinbad_detector.py score --detector bottle.npz new --out scores.csv --heatmaps maps

A picture is called anomalous if its p-value is at most --false_alarms: of good pictures no more
than that share is expected to be. Exit status 1 if a picture could not be scored.
"""

import argparse
import json
import logging
from dataclasses import fields
from pathlib import Path

from sinbad import atomic, cli, detectors, errors, layouts
from sinbad.report import figures, tables

log = logging.getLogger("sinbad")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    groups = [cli.network_flags(), cli.scoring_flags(), cli.device_flags()]
    fit = commands.add_parser("fit", parents=groups, help="fit a detector, write it to a file")
    add = fit.add_argument
    add("--train_dir", type=Path, required=True, help="folder of good pictures")
    add(
        "--valid_dir",
        type=Path,
        help="folder of other good pictures; without it the training "
        "pictures are scored in folds, each by the others",
    )
    add("--out", type=Path, required=True, help="file to write, .npz")
    own = detectors.DetectorOptions  # the defaults are its
    cli.add_level_flag(fit, own.pyramid_level)
    add(
        "--crop_size_ratio",
        type=cli.ratio_type,
        nargs="+",
        default=own.crop_size_ratio,
        help="side of a crop, of the image's; of the network's levels",
    )
    add(
        "--rep_num_224",
        type=cli.integer_from(1),
        default=own.rep_num_224,
        help="raw-pixel repetitions",
    )
    add(
        "--lambda_factor",
        type=cli.number_between(0, 1e6),
        default=own.lambda_factor,
        help="weight of level 224",
    )
    add(
        "--seed",
        type=cli.integer_from(0),
        default=own.seed,
        help="of the random directions and folds",
    )
    add("--folds", type=cli.integer_from(2), default=own.folds, help="without --valid_dir")
    score = commands.add_parser("score", parents=[cli.device_flags()], help="score pictures")
    add = score.add_argument
    add("pictures", nargs="+", type=Path, metavar="PICTURE", help="files and folders")
    add("--detector", type=Path, required=True, help="file of fit")
    add("--weights", help="where the network's weights are, if not where they were")
    add(
        "--false_alarms",
        type=cli.number_between(0, 1, "()"),
        default=0.05,
        help="share of good pictures that may be called anomalous",
    )
    add("--out", type=Path, help="CSV to write (default: stdout)")
    add("--json", type=Path, help="the same as JSON")
    add("--heatmaps", type=Path, help="folder for pictures that show where to look")
    return parser.parse_args(argv)


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder."""
    if not folder.is_dir():
        raise errors.UserError(f"a folder of pictures must be there, got {folder}; check the path")
    return [folder / name for name in layouts.list_images(folder)]


def fit(args: argparse.Namespace) -> None:
    """Fit and save."""
    if args.official:
        raise errors.UserError(
            "--official must be off for a detector, got it: its ranges are those of a whole test "
            "split; leave it out"
        )
    names = {one.name for one in fields(detectors.DetectorOptions)} & set(vars(args))
    values = {name: getattr(args, name) for name in names}
    values |= {
        name: tuple(dict.fromkeys(values[name])) for name in ("pyramid_level", "crop_size_ratio")
    }
    train, valid = (pictures_in(own) if own else [] for own in (args.train_dir, args.valid_dir))
    detector = detectors.Detector.fit(
        train, valid, detectors.DetectorOptions(**values), args.device
    )
    detector.save(args.out)
    smallest = 1 / (len(detector.calibration) + 1)
    log.info(
        f"{args.out}: {detector.about['n_train']} training pictures, verdicts by "
        f"{len(detector.calibration)} good pictures: false alarms from {smallest:.3g}"
    )
    print(args.out)


def score(args: argparse.Namespace) -> int:
    """Load, score, write; return 1 if a picture could not be scored."""
    pictures = [
        picture
        for path in args.pictures
        for picture in (pictures_in(path) if path.is_dir() else [path])
    ]
    detector = detectors.Detector.load(args.detector, args.weights, args.device)
    verdicts = []
    for verdict, scores, place in detector.examine(pictures, args.false_alarms):
        verdicts.append(verdict)
        if verdict.error:
            log.error(f"{verdict.error}")
        elif args.heatmaps is not None:
            name = f"{len(verdicts):04d}_{Path(verdict.path).name}.png"
            about = f"score {verdict.score:.2f}, anomalous above "
            about += f"{detector.threshold(args.false_alarms):.2f}; p = {verdict.p_value:.3f}"
            png = figures.heatmap(
                Path(verdict.path), scores.grids, place, about, verdict.is_anomalous
            )
            atomic.atomic_write(args.heatmaps / name, png)
    levels = sorted({level for verdict in verdicts for level in verdict.levels})
    rows = [["path", "score", "p_value", "is_anomalous", *(f"level_{n}" for n in levels), "error"]]
    for one in verdicts:
        numbers = [one.score, one.p_value, int(one.is_anomalous)] if not one.error else [None] * 3
        of_levels = [one.levels.get(level) for level in levels]
        rows.append([one.path, *numbers, *of_levels, one.error])
    if args.out is not None:
        atomic.atomic_write(args.out, tables.csv_text(rows))
    else:
        print(tables.csv_text(rows).rstrip("\n"))
    if args.json is not None:
        records = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        atomic.atomic_write(args.json, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    n_bad = sum(bool(one.error) for one in verdicts)
    n_anomalous = sum(one.is_anomalous for one in verdicts)
    log.info(f"{len(verdicts) - n_bad} pictures scored, {n_anomalous} anomalous, {n_bad} broken")
    return int(n_bad > 0)


def main(argv: list[str] | None = None) -> int:
    """Fit, or score."""
    args = parse_args(argv)
    if args.command == "score":
        return score(args)
    fit(args)
    return 0


if __name__ == "__main__":
    errors.run_script(main)
