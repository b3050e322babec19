"""Folders of tasks that take a known time and write a line each, and the README's way to run them.

The generators write them as they write the real ones, only the program of the tasks is a stub.
"""

import contextlib
import os
import shlex
import signal
import subprocess
from pathlib import Path
from unittest import mock

import create_batch_array_sinbad_224 as pixels
from sinbad import slurm

# Writes like the real program: a temporary name, then renamed. Fails at the repetition STUB_FAILS.
STUB = """\
import os, pathlib, sys, time
def value(flag):
    words = [word for arg in sys.argv for word in arg.split("=", 1)]
    return words[words.index(flag) + 1] if flag in words else "ver1"
root = pathlib.Path(value("--results_dir"))
name = f"{value('--version_name')}_pyramid_lvl_{value('--pyramid_level')}"
rep = value("--rep")
out = root / name / f"rep_num_{rep}" / value("--mvtype") / "1022.00_lvl_anom_maps.npz"
out.parent.mkdir(parents=True, exist_ok=True)
if rep == os.environ.get("STUB_FAILS"):
    sys.exit("error: rep must be another, got it; this line is the reason")
part = root / f".partial_{name}_{rep}"
with part.open("w") as stream:
    stream.write("half")
    stream.flush()
    time.sleep(float(os.environ["STUB_SECONDS"]))
    stream.write(f" and half of {rep}")
part.replace(out)
"""


def stub_batch(root: Path, n_tasks: int, seconds: float, *flags: str) -> Path:
    """Generate a folder of stub tasks, one a repetition, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "stub.py").write_text(STUB)
    where = ["--out_dir", str(root / "sbatches"), "--results_dir", str(root / "results")]
    what = ["--mvtype", "pushpins_loco", "--rep", f"0-{n_tasks - 1}", "--reps_per_task", "1"]
    how = ["--device", "cpu", "--setup", f"export STUB_SECONDS={seconds}"]
    with mock.patch.object(slurm, "TASK_PROGRAM", root / "stub.py"):
        pixels.main([*where, *what, *how, *flags])
    return root / "sbatches"


def stub_results(folder: Path) -> list[str]:
    """Return what the tasks of a folder have written."""
    return [Path(outputs).read_text() for outputs, _ in slurm.read_tasks(folder)]


def expected_results(n_tasks: int) -> list[str]:
    """Return what undisturbed tasks write."""
    return [f"half and half of {rep}" for rep in range(n_tasks)]


def batch_master(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `sh batch_master.sh` in its folder, as the README does."""
    command = ["sh", "batch_master.sh", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def process_of(task: int, folder: Path) -> int | None:
    """Return the process that runs the command of a task, None if it does not run."""
    words = shlex.split(slurm.read_tasks(folder)[task][1])
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if path.read_text(errors="replace").split("\0")[:-1] == words:
                return int(path.parent.name)
    return None


def kill_task(task: int, folder: Path) -> None:
    """Kill the process of a task as the kernel does when memory runs out."""
    process = process_of(task, folder)
    assert process is not None
    os.kill(process, signal.SIGKILL)
