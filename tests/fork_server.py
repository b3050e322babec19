"""Imports the scripts once, then runs each as a process of its own that can be killed at any time.

Reads lines of JSON: {"runs": [[script, argv], ...], "kill_after": seconds or null}. Starts all runs
at once, kills them with SIGKILL after that time, answers with their exit statuses (-9: killed) and
the seconds that they took.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

import torch

import calc_anom_ensm
import create_batch_array_sinbad
import data_to_matrices
import reproduce_paper
import sinbad_detector
import sinbad_single_layer
import sinbad_time_series
from sinbad import errors

MAINS: dict[str, Callable[[list[str]], int | None]] = {
    "calc_anom_ensm": calc_anom_ensm.main,
    "create_batch_array_sinbad": create_batch_array_sinbad.main,
    "data_to_matrices": data_to_matrices.main,
    "reproduce_paper": reproduce_paper.main,
    "sinbad_detector": sinbad_detector.main,
    "sinbad_single_layer": sinbad_single_layer.main,
    "sinbad_time_series": sinbad_time_series.main,
}


def start(script: str, argv: list[str]) -> int:
    """Start a script as a child process of its own; return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        errors.run_script(MAINS[script], argv)
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
        children = [start(script, argv) for script, argv in request["runs"]]
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
