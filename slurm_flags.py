"""Flags of the two array generators: what the tasks compute, and how Slurm runs them.

Nothing here is specific to a cluster: what a site needs is a flag, and can be kept in a profile.
Standard library only: the generators run on login nodes.
"""

import argparse
import configparser
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import ScriptParser, UserError, integer_from, integer_ranges, number_between
from loco_datasets import (
    CROP_NUM_EDGE,
    DEFAULT_DATA_DIR,
    DEFAULT_DATASET_DIR,
    DEFAULT_RESULTS_DIR,
    DEFAULT_VERSION,
    IM_SIZE,
    NETWORK_DEFAULTS,
    PRECISIONS,
    LevelSettings,
)
from slurm_patterns import shorten_numbers

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


def one_line(text: str) -> str:
    """Refuse what would break a line of a script (an argparse type)."""
    if len(text.splitlines()) != 1 or not text.strip():
        raise argparse.ArgumentTypeError(f"must be one line, got {text!r}")
    return text.strip()


def text_without(characters: str) -> Callable[[str], str]:
    """Make an argparse type: one line without tabs (they part tasks.tsv) and these characters."""

    def parse(text: str) -> str:
        if set(text) & {"\t", *characters}:
            raise argparse.ArgumentTypeError(f"must be without tabs and {characters}, got {text!r}")
        return one_line(text)

    return parse


def path_without(characters: str) -> Callable[[str], Path]:
    """Make an argparse type: a path that is without these characters once it is absolute."""
    check = text_without(characters)
    return lambda text: Path(check(os.path.abspath(os.path.expanduser(one_line(text)))))


def matching(pattern: str, rule: str) -> Callable[[str], str]:
    """Make an argparse type: a text that a regular expression describes."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return text

    return parse


IN_PATTERNS = "{}"  # mean something in the output patterns of tasks.tsv
IN_LOG_NAMES = "%\\"  # mean something to Slurm in the path of a log
IN_VERSIONS = "#"  # stands for the level in --version of calc_anom_ensm.py
absolute_path = path_without(IN_PATTERNS)


def weights_source(text: str) -> str:
    """Make a file of weights absolute, leave the two words alone (an argparse type)."""
    return text if text in ("imagenet", "random") else str(absolute_path(text))


DEVICES = "auto, cpu, cuda or cuda:<i>"
ANY_PRECISION = " or ".join(PRECISIONS)

# Handed on to the tasks as they are; where there is no default, the task has its own.
HANDED_ON = {
    "initial_res": (integer_from(8), "side of the matrices in pixels"),
    "crop_num_edge": (integer_from(1), "stride of the crops = side / this"),
    "n_projections": (integer_from(1), "number of random directions"),
    "n_quantiles": (integer_from(1), "number of thresholds a direction"),
    "shrinkage_factor": (number_between(0, 1, low_open=True), "of the covariance, above 0 to 1"),
    "seed": (integer_from(0), "of the random directions"),
    "net": (matching(r"\w+", "a name"), "a ResNet or ResNeXt of torchvision"),
    "weights": (weights_source, "imagenet, random or a FILE with a state_dict"),
    "batch_size": (integer_from(1), "crops of one forward pass"),
    "device": (matching("auto|cpu|cuda(:[0-9]+)?", DEVICES), f"{DEVICES}; cpu: no --gres"),
    "precision": (matching("|".join(PRECISIONS), ANY_PRECISION), ANY_PRECISION),
    "num_workers": (integer_from(1), "threads that read pixels"),
}


def add_task_flags(parser: ScriptParser, settings: LevelSettings) -> None:
    """Add the flags that say what is computed, and how it is split into tasks.

    Parameters
    ----------
    parser : ScriptParser
    settings : LevelSettings
        The paper's, of the levels that the generator is for: the defaults.
    """
    add = parser.add_argument_group("what is computed, see sinbad_single_layer.py").add_argument
    ratios, reps = settings.crop_ratios, list(range(settings.n_reps))
    add("--mvtype", nargs="+", type=text_without(IN_PATTERNS), default=["all"], metavar="NAME",
        help="data sets, classes or loco, struct, all (default: all)")  # fmt: skip
    add("--version_name", type=text_without(IN_PATTERNS + IN_VERSIONS), default=DEFAULT_VERSION,
        help=f"start of the folder names (default: {DEFAULT_VERSION})")  # fmt: skip
    ratio = number_between(0, 1, low_open=True, high_open=True)
    add("--crop_size_ratio", nargs="+", type=ratio, default=list(ratios), metavar="SHARE",
        help=f"side of a crop, of the image's (default: {' '.join(map(str, ratios))})")  # fmt: skip
    add("--rep", nargs="+", type=integer_ranges, default=[reps],
        help=f"repetitions, as 3 or 0-99 (default: {shorten_numbers(reps)[0]})")  # fmt: skip
    for name, kind, path in (
        ("data_dir", absolute_path, DEFAULT_DATA_DIR),
        ("results_dir", path_without(IN_PATTERNS + IN_VERSIONS), DEFAULT_RESULTS_DIR),
    ):
        add(f"--{name}", type=kind, default=str(path), help=f"(default: {path})")
    defaults = {
        "initial_res": IM_SIZE,
        "crop_num_edge": CROP_NUM_EDGE,
        "n_projections": settings.n_projections,
        "n_quantiles": settings.n_quantiles,
        "shrinkage_factor": settings.shrinkage,
        "seed": 0,
        **NETWORK_DEFAULTS,
    }
    for name, (kind, meaning) in HANDED_ON.items():
        default = f" (default: {defaults[name]})" if name in defaults else ""
        add(f"--{name}", type=kind, default=defaults.get(name), help=meaning + default)
    add("--official", action="store_true", help="the authors' numerics")
    add = parser.add_argument_group("how it is split into tasks").add_argument
    add("--group", choices=("none", "class"), default="none",
        help="none: a task is one data set, level and crop ratio, the most tasks at once; class: a "
        "task is a whole class in one pass, the least GPU time (default: none)")  # fmt: skip
    add("--reps_per_task", type=integer_from(1), metavar="N",
        help="repetitions in one task (default: all)")  # fmt: skip


def add_slurm_flags(parser: ScriptParser, out_dir: Path, sibling: str) -> None:
    """Add the flags that say how and where the tasks run; none of them changes a result.

    Parameters
    ----------
    parser : ScriptParser
    out_dir : Path
        Default of the folder to write.
    sibling : str
        Name of the other generator's folder, beside this one.
    """
    add = parser.add_argument_group("the folder").add_argument
    add("--out_dir", type=path_without(IN_PATTERNS + IN_LOG_NAMES), default=str(out_dir),
        help=f"(default: {out_dir})")  # fmt: skip
    add("--status", action="store_true",
        help="only print what is done, running, missing; exit 1 if any is missing")  # fmt: skip
    add("--then_ensemble", type=absolute_path, nargs="?", const=Path(sibling), metavar="SIBLING",
        help="let calc_anom_ensm.py follow when the tasks of this and of the other generator's "
        f"folder are done (default of SIBLING: {sibling} beside --out_dir)")  # fmt: skip
    add("--dataset_dir", type=absolute_path, default=str(DEFAULT_DATASET_DIR), metavar="DIR",
        help="images and masks, for the ensemble's pictures and tables "
        f"(default: {DEFAULT_DATASET_DIR})")  # fmt: skip
    add("--ensemble_out", type=absolute_path, metavar="DIR",
        help="folder of the ensemble's tables (default of calc_anom_ensm.py)")  # fmt: skip
    group = parser.add_argument_group(
        "how Slurm runs the tasks", "A line #SBATCH is written only for what is set."
    )
    group.add_argument("--profile", type=Path, metavar="FILE",
        help=f"INI file whose section [{PROFILE_SECTION}] holds any of {', '.join(PROFILE_KEYS)}; "
        "flags win, --setup lines are added")  # fmt: skip
    add_site_flags(group.add_argument)


def add_site_flags(add: Callable[..., argparse.Action]) -> None:
    """Add the flags that a profile can set, by a parser's or a group's `add_argument`."""
    for name, option in SBATCH_OPTIONS.items():
        default = f" (default: {DEFAULT_GRES}; none: no such line)" if name == "gres" else ""
        add(f"--{name}", type=one_line, metavar="TEXT", help=f"#SBATCH --{option}{default}")
    add("--requeue", action=argparse.BooleanOptionalAction,
        help="start a preempted task again (default: the cluster's)")  # fmt: skip
    add("--throttle", type=integer_from(1), metavar="N", help="at most N tasks at a time")
    add("--setup", action="append", metavar="LINE",
        help="shell line before the command, as 'module load cuda'; may be repeated")  # fmt: skip
    add("--max_array_size", type=integer_from(2), metavar="N",
        help="tasks in one array (default: MaxArraySize of scontrol when submitting)")  # fmt: skip


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
        parser.read_string(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"--profile must be a file, got {path}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise UserError(f"--profile must be an INI file, got another: {error}") from None
    if PROFILE_SECTION not in parser:
        raise UserError(
            f"{path} must have a section [{PROFILE_SECTION}], got {parser.sections() or 'none'}; "
            f"write that line above the keys"
        )
    section = parser[PROFILE_SECTION]
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
    check_texts(path, {name: text for name, text in values.items() if isinstance(text, str)})
    return values


def check_texts(path: Path, texts: dict[str, str]) -> None:
    """Refuse values of a profile that are none of their flags, and name the profile."""
    for name, text in texts.items():
        if re.search(r"\s[#;]", text):
            raise UserError(
                f"{name} in {path} must be a value alone, got {text}; give the comment a line of "
                f"its own"
            )
    parser = ScriptParser(None)
    add_site_flags(parser.add_argument)
    try:
        parser.parse_args([f"--{name}={text}" for name, text in texts.items()])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


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
    if args.requeue is not None:
        lines.append("#SBATCH --requeue" if args.requeue else "#SBATCH --no-requeue")
    return lines
