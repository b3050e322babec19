"""Imports scripts (its arguments) once, then runs each as a process that can be killed at any time.

Reads lines of JSON: {"runs": [[script, argv], ...]} with "kill_after": seconds or "kill_at_rename":
number of an output. Starts all runs at once, kills them with SIGKILL after that time or before that
output is renamed, answers with their exit statuses (-9: killed) and the seconds that they took.
"""

import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from sinbad import errors

SCRIPTS = {name: importlib.import_module(name) for name in sys.argv[1:]}


def start(script: str, argv: list[str], kill_at_rename: int | None) -> int:
    """Start a script as a child process; return its id."""
    child = os.fork()
    if child:
        return child
    status, rename, numbers = 1, os.replace, itertools.count(1)

    def replace(source: Path, target: Path) -> None:
        if next(numbers) == kill_at_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    try:
        os.replace = replace
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        errors.run_script(SCRIPTS[script].main, argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def main() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)  # no thread pool is started here, so a fork is whole
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        children = [start(*run, request.get("kill_at_rename")) for run in request["runs"]]
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps([codes, time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    main()
