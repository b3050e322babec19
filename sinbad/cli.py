"""Command lines: the parser, flags made from settings, flags that scripts share, progress bars.

Standard library only (tqdm when a bar is shown), so the array generators start at once.
"""

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sinbad import __version__, errors, settings

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SECONDS_BETWEEN_LOG_LINES = 60.0
# Of an @FILE: from a # that begins a word, and is not in quotes (kept as group 1); unlike shlex,
# which would cut ver1_pyramid_lvl_# too.
COMMENT = re.compile(r"""("[^"]*"|'[^']*')|(?<!\S)#.*""")
HELP_WIDTH, FLAG_WIDTH = 100, 30  # characters

# ---------------------------------------------------------------- parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Flags in one column, help in another; defaults as one would type them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=FLAG_WIDTH, width=HELP_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str:
        description, default = action.help or "", action.default
        hidden = any(default is value for value in (None, False, argparse.SUPPRESS))
        if hidden or "default" in description:
            return description
        values = default if isinstance(default, (list, tuple)) else [default]
        return f"{description} (default: {' '.join(map(str, values))})".strip()


class ScriptParser(argparse.ArgumentParser):
    """Parser whose help is the script's docstring; errors are one line; @FILE holds more flags."""

    def __init__(self, description: str | None = None, **options: Any) -> None:  # noqa: ANN401  argparse's
        super().__init__(
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
            epilog="@FILE reads more flags from a file, one per line; # begins a comment.\n\n"
            f"sinbad {__version__}",
            **options,
        )

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of flags with a title, made at its first use."""
        groups = {group.title: group for group in self._action_groups}
        return groups[title] if title in groups else self.add_argument_group(title)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; --help and --debug come last among the groups."""
        if "--help" not in self._option_string_actions:
            add = self.group("help").add_argument
            add("-h", "--help", action="help", help="show this help")
            add(
                "--debug",
                action="store_true",
                help="show an error's traceback; not in an @FILE",
            )
        arguments = _with_files(sys.argv[1:] if args is None else args)
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise errors.UserError(f"{message}; see --help")


def _with_files(arguments: Iterable[str], inside: tuple[Path, ...] = ()) -> list[str]:
    """Replace every @FILE by the flags in it; `inside` are the files that are being read."""
    result: list[str] = []
    for argument in arguments:
        if not argument.startswith("@") or argument == "@":
            result.append(argument)
            continue
        path = Path(argument[1:]).expanduser()
        if path.resolve() in inside:
            raise errors.UserError(f"@{path} names itself; remove that line")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            words = [word for line in lines for word in shlex.split(COMMENT.sub(r"\1", line))]
        except UnicodeDecodeError:
            raise errors.UserError(f"{path} must be UTF-8 text; save it again as UTF-8") from None
        except ValueError as error:
            raise errors.UserError(f"{path} must hold flags as in a shell ({error})") from None
        result += _with_files(words, (*inside, path.resolve()))
    return result


def parse_as(rule: settings.Rule) -> Callable[[str], Any]:
    """Return an argparse type from a setting's rule."""

    def parse(text: str) -> Any:  # noqa: ANN401  of the rule
        try:
            return rule(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def int_at_least(low: int) -> Callable[[str], int]:
    """Return the argparse type of a whole number not below `low`."""
    return parse_as(settings.whole_number(low))


def integer_ranges(text: str) -> list[int]:
    """Parse "3" or "0-99" (an argparse type; several of them are merged by `sorted_unique`)."""
    form = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    numbers = range(int(form[1]), int(form[2] or form[1]) + 1) if form else range(0)
    if not numbers:
        raise argparse.ArgumentTypeError(f"must be a number or a range like 0-99, got {text}")
    return list(numbers)


def shorten_numbers(numbers: Iterable[int]) -> str:
    """Write sorted numbers as runs: 0 1 2 7 -> "0-2,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if not runs or number > runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(number)
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def sorted_unique(lists: Iterable[Iterable[int]]) -> list[int]:
    """Merge lists of numbers into one, sorted, each number once."""
    return sorted({number for numbers in lists for number in numbers})


def path(text: str) -> Path:
    """Parse a path; ~ is the home folder, in an @FILE too."""
    return Path(text).expanduser()


# ---------------------------------------------------------------- flags of settings


def add_settings(
    parser: ScriptParser,
    names: Iterable[str],
    **defaults: Any,  # noqa: ANN401  of the settings
) -> None:
    """Add the flags of settings, each in the group of its title; `defaults` replace theirs."""
    for name in names:
        declared = settings.DECLARED[name]
        default = defaults.get(name, declared.default)
        options: dict[str, Any] = {"default": default, "help": declared.metadata["help"]}
        if declared.metadata["rule"] is settings.switch:
            options["action"] = "store_true"
        else:
            options["type"] = parse_as(declared.metadata["rule"])
            options["metavar"] = _placeholder(declared.default, default, name)
            if isinstance(declared.default, tuple):
                options |= {"nargs": "+", "default": list(default)}
        parser.group(declared.metadata["group"]).add_argument(f"--{name}", **options)


def _placeholder(declared: object, default: object, name: str) -> str:
    """Return what stands for a setting's value in the help."""
    value = declared[0] if isinstance(declared, tuple) else default
    if isinstance(value, str):
        return "NAME"
    return "X" if isinstance(value, float) or name == "shrinkage_factor" else "N"


def settings_of(args: argparse.Namespace, **changes: Any) -> settings.Settings:  # noqa: ANN401
    """Return the settings that parsed flags ask for; `changes` replace them."""
    values = {name: value for name, value in vars(args).items() if name in settings.DECLARED}
    return settings.Settings(**values | changes)


def flags_of(values: settings.Settings, names: Iterable[str]) -> list[str]:
    """Return the flags of settings that are not the default, as on a command line."""
    flags = []
    for name in names:
        value = getattr(values, name)
        if isinstance(value, tuple):
            flags += [f"--{name}", *map(str, value)]
        elif value is True:
            flags.append(f"--{name}")
        elif value != settings.DECLARED[name].default:
            flags.append(f"--{name}={value}")
    return flags


BACKBONE_FLAGS = ("net", "weights", "precision", "batch_size", "compile")
MACHINE_FLAGS = ("device", "num_workers")
DESCRIPTOR_FLAGS = ("n_projections", "n_quantiles", "shrinkage_factor")
GRID_FLAGS = ("crop_num_edge", "initial_res")
TASK_FLAGS = ("seed", "official", *DESCRIPTOR_FLAGS, *GRID_FLAGS, *BACKBONE_FLAGS, *MACHINE_FLAGS)
ENSEMBLE_FLAGS = ("lambda_factor", "crop_norm", "crop_pool")

# ---------------------------------------------------------------- flags that scripts share

DATASET_DIR = Path("../dataset_loco")
RUNS_DIR = Path("../sinbad_runs")
SUBSETS = "test subsets (pushpins_loco), categories (pushpins), loco, struct or all"
SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "mvtype": {"nargs": "+", "metavar": "NAME", "help": SUBSETS},
    "dataset_dir": {"type": path, "default": DATASET_DIR, "help": "folder of the categories"},
    "data_dir": {
        "type": path,
        "default": DATASET_DIR / "data_matrices",
        "help": "folder of the preprocessed images, from data_to_matrices.py",
    },
    "results_dir": {"type": path, "default": RUNS_DIR / "results", "help": "folder of the scores"},
    "version_name": {"default": "ver1", "metavar": "NAME", "help": "prefix of the score folders"},
    "out": {"type": path, "metavar": "DIR", "help": "folder of tables and figures"},
    "overwrite": {"action": "store_true", "help": "compute finished outputs again"},
    "extra_scores": {"type": path, "metavar": "CSV", "help": "another method's image_path,score"},
    "extra_weight": {
        "type": parse_as(settings.number(0, 1e6)),
        "default": 1.0,
        "metavar": "X",
        "help": "weight of --extra_scores",
    },
    "extra_norm": {
        "choices": ("mean", "std"),
        "default": "mean",
        "help": "divide --extra_scores by their validation mean, or standardise them",
    },
    "compare": {
        "type": path,
        "metavar": "CSV",
        "help": "another run's scores.csv, or image_path,score, of the same images (higher = more "
        "anomalous): is the difference of AUROC real? 95 %% interval, paired bootstrap",
    },
    "maps_dir": {"type": path, "metavar": "DIR", "help": "folder of anomaly maps (.tiff)"},
    "figures": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "plot score distributions, ROC curves and example images (default: --figures)",
    },
    "rep": {
        "type": integer_ranges,
        "nargs": "+",
        "default": [[0]],
        "metavar": "N",
        "help": "repetitions with other random projections, as 3 or 0-99 (default: 0)",
    },
    "valid_share": {
        "type": parse_as(settings.number(0, 1, "()")),
        "default": settings.VALID_SHARE,
        "metavar": "X",
        "help": "fraction of the training images used for validation where there are none",
    },
}
COMPUTED_FLAGS = dict.fromkeys(("rep", "valid_share"), settings.COMPUTED)
REPORT_FLAGS = ("extra_scores", "extra_weight", "extra_norm", "compare", "maps_dir", "figures")


def add_shared(parser: ScriptParser, *names: str, **changes: dict[str, Any]) -> None:
    """Add flags of SHARED_FLAGS; `changes` name -> options that differ in this script."""
    for name in names:
        add = parser.group(COMPUTED_FLAGS.get(name, settings.INPUT_OUTPUT)).add_argument
        options = SHARED_FLAGS[name] | changes.get(name, {})
        if "type" in options and options["type"] is path:
            options = {"metavar": "DIR", **options}
        add(f"--{name}", **options)


# ---------------------------------------------------------------- progress


class _LogLines:
    """Stream that turns a progress bar's updates into log lines."""

    def write(self, text: str) -> None:
        """Log what is not blank."""
        if text.strip():
            log.info(text.strip())

    def flush(self) -> None:
        """Do nothing, a line is flushed at once."""


def progress_bar(total: int, desc: str, unit: str = "it") -> "tqdm":
    """Return a tqdm bar on a terminal; elsewhere it is one line per minute at most."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)
    interval = SECONDS_BETWEEN_LOG_LINES
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        file=_LogLines(),
        bar_format="{desc}: {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left",
        mininterval=interval,
        maxinterval=interval,
        delay=interval,
        position=0,  # else a second bar moves a terminal's cursor
    )


def progress(items: "list[Item]", desc: str, unit: str = "it") -> Iterator[Item]:
    """Yield the items of a list with a progress bar (see `progress_bar`)."""
    with progress_bar(len(items), desc, unit) as bar:
        for item in items:
            yield item
            bar.update()
