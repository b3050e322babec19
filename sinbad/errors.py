"""Errors of the user's input, shown as one line, and the other lines on stderr.

Standard library only (tqdm where a bar is on screen): the array generators run on login nodes.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

log = logging.getLogger("sinbad")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

KEPT = "finished outputs are kept"
CURES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of the quota and run the same command again",
    errno.EACCES: "give this user the right to read, write and search it, or choose another",
    errno.EPERM: "give this user the right to read, write and search it, or choose another",
    errno.EROFS: "choose a folder that is not read-only",
    errno.EEXIST: "a file is where a folder must be, choose another path",
    errno.ENOTDIR: "a file is where a folder must be, choose another path",
}
# torch is not imported here; without memory on a CPU it raises a plain RuntimeError.
TORCH_MEMORY_ERROR, CPU_MEMORY_ERROR = "OutOfMemoryError", "DefaultCPUAllocator"


class UserError(Exception):
    """An error of the user's input: shown as one line, `error: <what> must be <rule>, got ...`."""


class StderrHandler(logging.Handler):
    """Shows log records on stderr, one line each, and keeps a progress bar on screen whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; information plainly, the rest under its level's name."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        message = level + record.getMessage()
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show what the package logs on stderr; stdout carries results only."""
    if not any(isinstance(handler, StderrHandler) for handler in log.handlers):
        log.addHandler(StderrHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def run_script(
    main: Callable[..., Any], argv: list[str] | None = None, resumes: bool = True
) -> NoReturn:
    """Run a script's `main`; turn an error of the user's input into one line and exit status 2.

    Anything else is a bug of ours and shows its traceback; `--debug` shows every traceback.
    `resumes`: whether the same command goes on after the outputs that are finished.
    """
    kept = f"; {KEPT}" if resumes else ""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    log_to_stderr()
    try:
        status = main(argv)
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
        where = error.filename if error.filename is not None else "the output"
        cure = CURES.get(error.errno, "check the path")
        cure += kept if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        sys.exit(_fail(f"{where}: {error.strerror or error}; {cure}"))
    except (MemoryError, RuntimeError) as error:
        is_torch = type(error).__name__ == TORCH_MEMORY_ERROR or CPU_MEMORY_ERROR in str(error)
        if debug or not (isinstance(error, MemoryError) or is_torch):
            raise
        cure = "ask for fewer --rep, levels or crop ratios at once, or a smaller --batch_size"
        sys.exit(_fail(f"not enough memory ({str(error) or 'none left'}); {cure}{kept}"))
    except KeyboardInterrupt:
        log.info(f"interrupted; run the same command again{kept}")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(status or 0)


def _prepare_streams() -> None:
    """Let stdout and stderr print any file name whatever the locale; if closed, discard output."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  stays open
        elif hasattr(getattr(sys, name), "reconfigure"):  # not what a notebook puts there
            getattr(sys, name).reconfigure(encoding="utf-8", errors="surrogateescape")


def _give_up_stdout() -> None:
    """If nobody takes what is left to print, let the interpreter end without a second error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    """Log the error's line and return the exit status."""
    log.error(" ".join(message.split()))
    return EXIT_USER_ERROR
