"""What the scripts' command lines share: the parser, groups of flags (argparse parents), progress.

Standard library only (tqdm when a bar is shown), so the array generators start at once.
"""

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sinbad import errors, loco

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")
PRECISIONS = ("fp32", "tf32", "bf16")  # of the network alone
SECONDS_BETWEEN_LOG_LINES = 60.0

# ---------------------------------------------------------------- parser and types


class _DefaultsShown(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every flag that has one, unless the text names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        hidden = any(default is value for value in (None, False, argparse.SUPPRESS))
        if hidden or "default" in text:
            return text
        values = default if isinstance(default, list) else [default]
        return f"{text} (default: {' '.join(map(str, values))})".strip()


class ScriptParser(argparse.ArgumentParser):
    """Parser whose help is the script's docstring; errors are one line; @FILE holds more flags."""

    def __init__(
        self,
        description: str | None = None,
        parents: Iterable[argparse.ArgumentParser] = (),
        **options: Any,  # noqa: ANN401  what argparse gives to the parsers of sub-commands
    ) -> None:
        super().__init__(
            description=description,
            formatter_class=_DefaultsShown,
            allow_abbrev=False,
            fromfile_prefix_chars="@",
            parents=list(parents),
            epilog="@FILE anywhere reads flags from a file, one a line; # begins a comment.",
            **options,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an @FILE as a shell does."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            rule = f"a line of an @FILE must be a flag as in a shell, got {arg_line} ({error})"
            raise errors.UserError(f"{rule}; close the quotes") from None

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise errors.UserError(f"{message}; see --help")


def integer_from(low: int) -> Callable[[str], int]:
    """Make an argparse type: a whole number not below `low`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+]?[0-9]{1,18}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low}, got {text}")
        return int(text)

    return parse


def number_between(low: float, high: float, ends: str = "[]") -> Callable[[str], float]:
    """Make an argparse type: a number of an interval; `ends` as in "(]" tells which ends count."""
    rule = f"{'above' if ends[0] == '(' else 'from'} {low:g} "
    rule += f"{'and below' if ends[1] == ')' else 'to'} {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        inside = low <= value <= high
        if not inside or (value == low and ends[0] == "(") or (value == high and ends[1] == ")"):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return parse


ratio_type = number_between(0, 1, "()")


def integer_ranges(text: str) -> list[int]:
    """Parse "3" or "0-99" (an argparse type; several of them are joined by `flatten`)."""
    form = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    numbers = range(int(form[1]), int(form[2] or form[1]) + 1) if form else range(0)
    if not numbers:
        raise argparse.ArgumentTypeError(f"must be a number or a range like 0-99, got {text}")
    return list(numbers)


def flatten(lists: Iterable[Iterable[int]]) -> list[int]:
    """Join lists of numbers into one, ordered, each number once."""
    return sorted({number for numbers in lists for number in numbers})


# ---------------------------------------------------------------- groups of flags


def workers_flag() -> argparse.ArgumentParser:
    """Return --num_workers."""
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument(
        "--num_workers",
        type=integer_from(1),
        default=os.cpu_count() or 1,
        help="threads that read images (default: one a processor)",
    )
    return group


def device_flags() -> argparse.ArgumentParser:
    """Return --device and --num_workers."""
    group = argparse.ArgumentParser(add_help=False, parents=[workers_flag()])
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i>")
    return group


def network_flags() -> argparse.ArgumentParser:
    """Return the flags of the network and its input."""
    group = argparse.ArgumentParser(add_help=False)
    add = group.add_argument
    about = "a ResNet or ResNeXt of torchvision, or a model of timm with feature maps"
    add("--net", default="wide_resnet50_2", help=about)
    add("--weights", default="imagenet", help="imagenet (downloaded once), random, or a FILE")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the network alone; tf32 acts on CUDA only",
    )
    add(
        "--batch_size",
        type=integer_from(1),
        help="crops of one forward pass; default 32, on a GPU 256",
    )
    add(
        "--compile",
        action="store_true",
        help="let torch.compile make the network faster; may change last bits",
    )
    return group


def scoring_flags() -> argparse.ArgumentParser:
    """Return the flags that say how crops are described and scored."""
    group = argparse.ArgumentParser(add_help=False)
    add = group.add_argument
    add("--n_projections", type=integer_from(1), help="directions; default 1000, level 224: 10")
    add(
        "--n_quantiles",
        type=integer_from(1),
        default=loco.N_QUANTILES,
        help="thresholds of a direction",
    )
    add(
        "--shrinkage_factor",
        type=number_between(0, 1, "(]"),
        help="of the covariance, above 0 to 1; default .1, level 224: 1",
    )
    add(
        "--crop_num_edge",
        type=integer_from(1),
        default=loco.CROP_NUM_EDGE,
        help="stride = side / this",
    )
    add(
        "--initial_res",
        type=integer_from(8),
        default=loco.IM_SIZE,
        help="side of the matrices in pixels",
    )
    about = "the authors' numerics: ranges of each split's own images, C^-1 for C^(-1/2)"
    add("--official", action="store_true", help=about)
    return group


def results_flags() -> argparse.ArgumentParser:
    """Return the flags of where scores lie."""
    group = argparse.ArgumentParser(add_help=False)
    add = group.add_argument
    add("--results_dir", type=Path, default=loco.DEFAULT_RESULTS_DIR, help="folder of the scores")
    add("--version_name", default=loco.DEFAULT_VERSION, help="start of the folder names")
    return group


def report_flags() -> argparse.ArgumentParser:
    """Return the flags of a report, but --out, whose default differs."""
    group = argparse.ArgumentParser(add_help=False)
    add = group.add_argument
    add(
        "--lambda_factor",
        type=number_between(0, 1e6),
        default=loco.LAMBDA_FACTOR,
        help="weight of level 224",
    )
    add(
        "--dataset_dir",
        type=Path,
        default=loco.DEFAULT_DATASET_DIR,
        help="folder of the classes: their images, and masks for the AUROC per defect",
    )
    add("--extra_scores", type=Path, help="CSV of another method: image_path,score")
    add("--extra_weight", type=number_between(0, 1e6), default=1.0, help="weight of --extra_scores")
    add("--maps_dir", type=Path, help="write anomaly maps (.tiff) there")
    add("--figures", action=argparse.BooleanOptionalAction, default=True, help="draw pictures")
    return group


def add_level_flag(parser: argparse.ArgumentParser, default: Iterable[int]) -> None:
    """Add --pyramid_level."""
    parser.add_argument(
        "--pyramid_level",
        type=integer_from(1),
        nargs="+",
        default=list(default),
        metavar="LEVEL",
        help=f"{', '.join(map(str, loco.LEVELS[:-1]))}: stages of the network, by the side of their "
        f"feature map; {loco.LEVELS[-1]}: raw pixels",
    )


# ---------------------------------------------------------------- progress


class _LogLines:
    """What a bar writes to where no terminal is: a line each time."""

    def write(self, text: str) -> None:
        """Say what is not blank."""
        if text.strip():
            log.info(text.strip())

    def flush(self) -> None:
        """Do nothing, a line is flushed at once."""


def progress_bar(total: int, desc: str, unit: str = "it") -> "tqdm":
    """Return a tqdm bar, on a terminal; elsewhere it is a line a minute at most."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)
    every = SECONDS_BETWEEN_LOG_LINES
    form = "{desc}: {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left"
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        file=_LogLines(),
        bar_format=form,
        mininterval=every,
        maxinterval=every,
        delay=every,
    )


def progress(items: "list[Item]", desc: str, unit: str = "it") -> Iterator[Item]:
    """Yield the items of a list and show how far it is (see `progress_bar`)."""
    with progress_bar(len(items), desc, unit) as bar:
        for item in items:
            yield item
            bar.update()
