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
from dataclasses import fields
from pathlib import Path

from sinbad.detectors import Detector, DetectorOptions
from sinbad.errors import UserError, run_script, say
from sinbad.files import write_whole
from sinbad.flags import (
    ScriptParser,
    add_level_flag,
    device_flags,
    integer_from,
    network_flags,
    number_between,
    ratio_type,
    scoring_flags,
)
from sinbad.folders import list_images
from sinbad.report.figures import heatmap
from sinbad.report.tables import csv_text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    groups = [network_flags(), scoring_flags(), device_flags()]
    fit = commands.add_parser("fit", parents=groups, help="fit a detector, write it to a file")
    add = fit.add_argument
    add("--train_dir", type=Path, required=True, help="folder of good pictures")
    add("--valid_dir", type=Path, help="folder of other good pictures; without it the training "
        "pictures are scored in folds, each by the others")  # fmt: skip
    add("--out", type=Path, required=True, help="file to write, .npz")
    own = DetectorOptions  # the defaults are its
    add_level_flag(fit, own.pyramid_level)
    add("--crop_size_ratio", type=ratio_type, nargs="+", default=own.crop_size_ratio,
        help="side of a crop, of the image's; of the network's levels")  # fmt: skip
    add("--rep_num_224", type=integer_from(1), default=own.rep_num_224,
        help="raw-pixel repetitions")  # fmt: skip
    add("--lambda_factor", type=number_between(0, 1e6), default=own.lambda_factor,
        help="weight of level 224")  # fmt: skip
    add("--seed", type=integer_from(0), default=own.seed, help="of the random directions and folds")
    add("--folds", type=integer_from(2), default=own.folds, help="without --valid_dir")
    score = commands.add_parser("score", parents=[device_flags()], help="score pictures")
    add = score.add_argument
    add("pictures", nargs="+", type=Path, metavar="PICTURE", help="files and folders")
    add("--detector", type=Path, required=True, help="file of fit")
    add("--weights", help="where the network's weights are, if not where they were")
    add("--false_alarms", type=number_between(0, 1, "()"), default=0.05,
        help="share of good pictures that may be called anomalous")  # fmt: skip
    add("--out", type=Path, help="CSV to write (default: stdout)")
    add("--json", type=Path, help="the same as JSON")
    add("--heatmaps", type=Path, help="folder for pictures that show where to look")
    return parser.parse_args(argv)


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder."""
    if not folder.is_dir():
        raise UserError(f"a folder of pictures must be there, got {folder}; check the path")
    return [folder / Path(name).name for name in list_images(folder, ".")]


def fit(args: argparse.Namespace) -> None:
    """Fit and save."""
    if args.official:
        raise UserError(
            "--official must be off for a detector, got it: its ranges are those of a whole test "
            "split; leave it out"
        )
    names = {one.name for one in fields(DetectorOptions)} & set(vars(args))
    values = {name: getattr(args, name) for name in names}
    values |= {name: tuple(dict.fromkeys(values[name]))
               for name in ("pyramid_level", "crop_size_ratio")}  # fmt: skip
    train, valid = (pictures_in(own) if own else [] for own in (args.train_dir, args.valid_dir))
    detector = Detector.fit(train, valid, DetectorOptions(**values), args.device)
    detector.save(args.out)
    smallest = 1 / (len(detector.calibration) + 1)
    say(f"{args.out}: {detector.about['n_train']} training pictures, verdicts by "
        f"{len(detector.calibration)} good pictures: false alarms from {smallest:.3g}")  # fmt: skip
    print(args.out)


def score(args: argparse.Namespace) -> int:
    """Load, score, write; return 1 if a picture could not be scored."""
    pictures = [picture for path in args.pictures
                for picture in (pictures_in(path) if path.is_dir() else [path])]  # fmt: skip
    detector = Detector.load(args.detector, args.weights, args.device)
    verdicts = []
    for verdict, scores, place in detector.examine(pictures, args.false_alarms):
        verdicts.append(verdict)
        if verdict.error:
            say(f"error: {verdict.error}")
        elif args.heatmaps is not None:
            name = f"{len(verdicts):04d}_{Path(verdict.path).name}.png"
            about = f"score {verdict.score:.2f}, anomalous above "
            about += f"{detector.threshold(args.false_alarms):.2f}; p = {verdict.p_value:.3f}"
            png = heatmap(Path(verdict.path), scores, place, about, verdict.is_anomalous)
            write_whole(args.heatmaps / name, png)
    levels = sorted({level for verdict in verdicts for level in verdict.levels})
    rows = [["path", "score", "p_value", "is_anomalous", *(f"level_{n}" for n in levels), "error"]]
    for one in verdicts:
        numbers = [one.score, one.p_value, int(one.is_anomalous)] if not one.error else [""] * 3
        of_levels = [one.levels.get(level, "") for level in levels]
        rows.append([one.path, *numbers, *of_levels, one.error])
    if args.out is not None:
        write_whole(args.out, csv_text(rows))
    else:
        print(csv_text(rows).rstrip("\n"))
    if args.json is not None:
        records = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        write_whole(args.json, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    n_bad = sum(bool(one.error) for one in verdicts)
    n_anomalous = sum(one.is_anomalous for one in verdicts)
    say(f"{len(verdicts) - n_bad} pictures scored, {n_anomalous} anomalous, {n_bad} broken")
    return int(n_bad > 0)


def main(argv: list[str] | None = None) -> int:
    """Fit, or score."""
    args = parse_args(argv)
    if args.command == "score":
        return score(args)
    fit(args)
    return 0


if __name__ == "__main__":
    run_script(main)
