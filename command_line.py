"""What every script's command line shares: errors in one line, --debug, progress, warnings.

Imports nothing but the standard library (tqdm when a bar is shown), so the array generators start
at once on a login node.
"""

import argparse
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from sinbad.errors import UserError, say

Item = TypeVar("Item")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
SECONDS_BETWEEN_LOG_LINES = 60.0


class _DefaultsShown(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every flag that has one, unless the text names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        shown = default is not None and default is not False and default is not argparse.SUPPRESS
        if not shown or "default" in text:
            return text
        values = default if isinstance(default, list) else [default]
        return f"{text} (default: {' '.join(map(str, values))})".strip()


class ScriptParser(argparse.ArgumentParser):
    """Parser whose help is the script's docstring and whose errors are one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=_DefaultsShown,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise UserError(f"{message}; see --help")


def integer_from(low: int) -> Callable[[str], int]:
    """Make an argparse type: a whole number not below `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low}, got {text}")
        return value

    return parse


def number_between(
    low: float, high: float, low_open: bool = False, high_open: bool = False
) -> Callable[[str], float]:
    """Make an argparse type: a number of the interval from `low` to `high`."""
    rule = (
        f"{'above' if low_open else 'from'} {low:g} {'and below' if high_open else 'to'} {high:g}"
    )

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if not (above and below):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return parse


def integer_ranges(text: str) -> list[int]:
    """Parse "3" or "0-99" (an argparse type; several of them are joined by `flatten`)."""
    form = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    numbers = range(int(form[1]), int(form[2] or form[1]) + 1) if form else range(0)
    if not numbers:
        raise argparse.ArgumentTypeError(f"must be a number or a range like 0-99, got {text}")
    return list(numbers)


def add_rep_flag(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add --rep: numbers or ranges; `flatten` makes one list of them."""
    parser.add_argument(
        "--rep", type=integer_ranges, nargs="+", default=[[0]], help=f"{meaning} (default: 0)"
    )


def flatten(lists: Iterable[Iterable[int]]) -> list[int]:
    """Join lists of numbers into one, ordered, each number once."""
    return sorted({number for numbers in lists for number in numbers})


class Progress:
    """A tqdm bar on a terminal; a line a minute at most in a log file."""

    def __init__(self, total: int | None, desc: str, unit: str = "it") -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done, self.started = 0, time.monotonic()
        self.last_line = self.started
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)

    def update(self, n: int = 1) -> None:
        """Count `n` more units."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LOG_LINES:
            self.last_line = time.monotonic()
            self._log()

    def _log(self) -> None:
        """Write one line: done, rate, remaining time."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
        of_total = f"{self.done}/{self.total or '?'} {self.unit}"
        say(f"{self.desc}: {of_total}, {rate:.1f} {self.unit}/s{left}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.bar is not None:
            self.bar.close()


def progress(
    iterable: Iterable[Item], total: int | None = None, desc: str = "", unit: str = "it"
) -> Iterator[Item]:
    """Yield the items of `iterable` and show how far it is (see `Progress`)."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    with Progress(total, desc, unit) as bar:
        for item in iterable:
            yield item
            bar.update()


def describe_os_error(error: OSError) -> str:
    """Say in one line what the system refused, and the cure where there is an obvious one."""
    where = error.filename if error.filename is not None else "the output"
    cures = {
        errno.ENOSPC: "free some space and run the same command again, finished outputs are kept",
        errno.EDQUOT: "free some of the quota and run the same command again",
        errno.EACCES: "choose a folder that this user may write",
        errno.EROFS: "choose a folder that is not read-only",
        errno.EPERM: "choose a folder that this user may write",
    }
    cure = cures.get(error.errno or 0, "check the path")
    return f"{where}: {error.strerror or error}; {cure}"


def run_script(main: Callable[..., Any], argv: list[str] | None = None) -> NoReturn:
    """Run a script's `main`; turn an error of the user's input into one line and exit status 2.

    Anything else is a bug of ours and shows its traceback; `--debug` shows every traceback.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open as long as the process lives
    try:
        status = main(argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # here its errors are still caught
    except UserError as error:
        if debug:
            raise
        sys.exit(_fail(str(error)))
    except OSError as error:
        _give_up_stdout()
        if debug or error.errno is None:
            raise
        if isinstance(error, BrokenPipeError):  # the reader has gone, as `| head` does
            sys.exit(EXIT_USER_ERROR)
        sys.exit(_fail(describe_os_error(error)))
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on, finished outputs are kept")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(status or 0)


def _give_up_stdout() -> None:
    """If nobody takes what is left to print, let the interpreter end without a second error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    """Print the error line and return the exit status."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_USER_ERROR
