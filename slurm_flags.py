"""Flags of the two array generators: what the tasks compute, and how Slurm runs them.

Nothing here is specific to a cluster: what a site needs is a flag, and can be kept in a profile.
Standard library only: the generators run on login nodes.
"""

import argparse
import configparser
import os
import shlex
from pathlib import Path
from typing import Any

from command_line import ScriptParser, UserError, integer_from, integer_ranges, number_between
from loco_datasets import (
    CROP_NUM_EDGE,
    DEFAULT_DATA_DIR,
    DEFAULT_RESULTS_DIR,
    DEFAULT_VERSION,
    IM_SIZE,
    LevelSettings,
)

# Flags that become a line `#SBATCH --<option>=<value>`, only when set.
SBATCH_OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "gres": "gres",
    "mem": "mem",
    "cpus": "cpus-per-task",
    "time": "time",
    "exclude": "exclude",
    "constraint": "constraint",
    "mail": "mail-user",
}
DEFAULT_GRES = "gpu:1"
PROFILE_SECTION = "slurm"
PROFILE_KEYS = (*SBATCH_OPTIONS, "requeue", "throttle", "max_array_size", "setup")


def absolute_path(text: str) -> Path:
    """Make a path absolute (an argparse type)."""
    return Path(os.path.abspath(os.path.expanduser(one_line(text))))


def one_line(text: str) -> str:
    """Refuse what would break a line or a pattern of a generated file (an argparse type)."""
    if not text.strip() or set(text) & set("\t\n\r{}"):
        raise argparse.ArgumentTypeError(f"must be one line without tabs and {{}}, got {text!r}")
    return text.strip()


def weights_source(text: str) -> str:
    """Make a file of weights absolute, leave the two words alone (an argparse type)."""
    return text if text in ("imagenet", "random") else str(absolute_path(text))


# Handed on to the tasks, only when given: the defaults are those of sinbad_single_layer.py.
HANDED_ON = {
    "net": (one_line, "network of torchvision"),
    "n_projections": (integer_from(1), "number of random directions"),
    "n_quantiles": (integer_from(1), "number of thresholds a direction"),
    "shrinkage_factor": (number_between(0, 1, low_open=True), "of the covariance, share above 0"),
    "batch_size": (integer_from(1), "crops in one pass of the network"),
    "weights": (weights_source, "imagenet, random or a FILE with a state_dict"),
    "seed": (integer_from(0), "seed of the random directions"),
    "device": (one_line, "auto, cpu, cuda or cuda:<i>; with cpu no --gres by default"),
    "precision": (one_line, "fp32, tf32 or bf16"),
}


def add_task_flags(parser: ScriptParser, settings: LevelSettings) -> None:
    """Add the flags that say what is computed; names and meanings are sinbad_single_layer.py's."""
    add = parser.add_argument
    add(
        "--mvtype",
        nargs="+",
        type=one_line,
        default=["all"],
        help="data sets, classes or loco, struct, all",
    )
    add("--version_name", type=one_line, default=DEFAULT_VERSION, help=f"({DEFAULT_VERSION})")
    ratio = number_between(0, 1, low_open=True, high_open=True)
    add("--crop_size_ratio", nargs="+", type=ratio, default=list(settings.crop_ratios),
        help=f"crop side as share of the image's ({settings.crop_ratios})")  # fmt: skip
    add("--rep", nargs="+", type=integer_ranges, default=[list(range(settings.n_reps))],
        help=f"repetitions, like 0-99 (0-{settings.n_reps - 1})")  # fmt: skip
    add("--reps_per_task", type=integer_from(1), help="repetitions in one task (all)")
    add("--group", choices=("none", "class"), default="none",
        help="class: a task does all of a class in one pass, the least GPU time (none: the most "
        "tasks, one a data set, level and ratio)")  # fmt: skip
    add("--initial_res", type=integer_from(1), default=IM_SIZE, help=f"pixels ({IM_SIZE})")
    add("--crop_num_edge", type=integer_from(1), default=CROP_NUM_EDGE, help=f"({CROP_NUM_EDGE})")
    for name, path in (("data_dir", DEFAULT_DATA_DIR), ("results_dir", DEFAULT_RESULTS_DIR)):
        add(f"--{name}", type=absolute_path, default=str(path), help=f"({path})")
    for name, (kind, meaning) in HANDED_ON.items():
        add(f"--{name}", type=kind, help=f"{meaning} (default of sinbad_single_layer.py)")
    add("--official", action="store_true", help="the published scripts' two numeric differences")


def add_slurm_flags(parser: ScriptParser, out_dir: Path, sibling: str) -> None:
    """Add the flags that say how and where the tasks run; none of them changes a result."""
    add = parser.add_argument
    add("--out_dir", type=absolute_path, default=str(out_dir), help=f"folder to write ({out_dir})")
    add("--status", action="store_true",
        help="only print done, running, missing and why; exit 1 if any is missing")  # fmt: skip
    add("--profile", type=Path, help=f"INI file whose [{PROFILE_SECTION}] section holds any of: "
        f"{', '.join(PROFILE_KEYS)}; flags win")  # fmt: skip
    for name, option in SBATCH_OPTIONS.items():
        default = f" ({DEFAULT_GRES}; none: no such line)" if name == "gres" else ""
        add(f"--{name}", type=one_line, help=f"#SBATCH --{option}{default}")
    add("--requeue", action="store_true", help="#SBATCH --requeue: run again after preemption")
    add("--throttle", type=integer_from(1), help="at most this many tasks at a time")
    add("--setup", action="append", default=[], metavar="LINE",
        help="shell line before the command, as module load; may be repeated")  # fmt: skip
    add("--max_array_size", type=integer_from(2), help="(asked from scontrol when submitting)")
    add("--then_ensemble", type=absolute_path, nargs="?", const=Path(sibling), metavar="SIBLING",
        help="submit calc_anom_ensm.py after this folder's and SIBLING's arrays; SIBLING is the "
        f"other generator's folder ({sibling}, beside --out_dir)")  # fmt: skip
    add("--ensemble_out", type=absolute_path,
        help="folder of the ensemble's tables (default of calc_anom_ensm.py)")  # fmt: skip


def parse_with_profile(parser: ScriptParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; what the --profile file sets replaces the defaults, so flags win."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--profile", type=Path, nargs="?")
    profile = first.parse_known_args(argv)[0].profile
    if profile is not None:
        parser.set_defaults(**read_profile(profile))
    return parser.parse_args(argv)


def read_profile(path: Path) -> dict[str, Any]:
    """Read the [slurm] section of an INI file: flags by name; setup may take many lines."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        section = parser[PROFILE_SECTION]
    except FileNotFoundError:
        raise UserError(f"--profile must be an INI file, got {path}; no such file") from None
    except (configparser.Error, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"--profile must be an INI file with a section [{PROFILE_SECTION}], got {path}; {error}"
        ) from None
    unknown = set(section) - set(PROFILE_KEYS)
    if unknown:
        raise UserError(
            f"keys of {path} must be flags of Slurm, got {', '.join(sorted(unknown))}; known are "
            f"{', '.join(PROFILE_KEYS)}"
        )
    values: dict[str, Any] = dict(section)
    if "setup" in section:
        values["setup"] = [line for line in section["setup"].splitlines() if line.strip()]
    if "requeue" in section:
        try:
            values["requeue"] = section.getboolean("requeue")
        except ValueError:
            raise UserError(
                f"requeue in {path} must be yes or no, got {section['requeue']}; change it"
            ) from None
    return values


def sbatch_lines(args: argparse.Namespace) -> list[str]:
    """Return the `#SBATCH` lines of the flags that were set."""
    values = {name: getattr(args, name) for name in SBATCH_OPTIONS}
    if values["gres"] is None and args.device != "cpu":
        values["gres"] = DEFAULT_GRES
    if values["gres"] == "none":
        values["gres"] = None
    lines = [
        f"#SBATCH --{option}={shlex.quote(values[name])}"
        for name, option in SBATCH_OPTIONS.items()
        if values[name] is not None
    ]
    lines += ["#SBATCH --mail-type=END,FAIL"] if args.mail else []
    return lines + (["#SBATCH --requeue"] if args.requeue else [])
