"""Submit, run or report the tasks of a folder written by create_batch_array_sinbad*.py.

Reads   FOLDER/{tasks.tsv,batch.json,array.sbatch}
Writes  FOLDER/submitted.tsv, FOLDER/ensemble.sbatch, FOLDER/logs/

batch_master.sh calls this for its own folder:

    sh ../sinbad_runs/sbatches/batch_master.sh

A task is done when its output files exist, running when squeue shows it, else missing.
"""

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from command_line import Progress, ScriptParser, integer_from, run_script, say
from slurm_arrays import forget_ensemble, has_sibling, write_ensemble
from slurm_patterns import name_tasks, shorten_numbers
from slurm_states import (
    ARRAY,
    ENSEMBLE,
    LOCAL_JOB,
    LOGS,
    Batch,
    Overview,
    Submission,
    Task,
    alive_ensembles,
    ask_slurm,
    find_ensemble_done,
    is_done,
    last_words,
    look,
    max_array_size,
    only_one,
    print_status,
    read_batch,
    read_submissions,
    read_tasks,
    record_submission,
)

ENSEMBLE_LOCK = ".ensemble.lock"
SECONDS_BETWEEN_LOOKS = 0.1


# --- submission ------------------------------------------------------------------------------


def sbatch(
    folder: Path, words: list[str], kind: str, first: int = 0, tasks: tuple[int, ...] = ()
) -> str:
    """Submit from the folder, whose logs/ Slurm writes to; record, print, return the job id."""
    cure = "change the generator's flags or --profile, what was submitted before is kept"
    job_id = ask_slurm(["sbatch", "--parsable", *words], folder, cure).split(";")[0].strip()
    record_submission(folder, Submission(job_id, kind, first, tasks))
    print(job_id, flush=True)
    return job_id


def submit_arrays(folder: Path, batch: Batch, overview: Overview) -> list[str]:
    """Submit what is missing, as several arrays where one is not allowed to be so long.

    With a throttle an array follows those before it, also those of earlier submissions, so that
    the limit holds for all of them. Returns job ids.
    """
    tasks, job_ids = overview.missing, []
    if not tasks:
        return []
    size, before = max_array_size(batch), list(overview.alive_jobs)
    for first in range(0, max(tasks) + 1, size):
        part = tuple(task for task in tasks if first <= task < first + size)
        if not part:
            continue
        array = ",".join(shorten_numbers(task - first for task in part))
        after = []
        if batch.throttle is not None:
            array += f"%{batch.throttle}"
            after = [f"--dependency=afterany:{':'.join(before)}"] if before else []
        words = [*after, f"--array={array}", "array.sbatch", str(first)]
        before = [sbatch(folder, words, ARRAY, first, part)]
        job_ids += before
        offset = f" (tasks from {first})" if first else ""
        say(f"submitted --array={array}{offset} as job {job_ids[-1]}")
    return job_ids


def submit(folder: Path, batch: Batch, overview: Overview) -> int:
    """Submit what is missing, then the ensemble if it was asked for."""
    new_jobs = submit_arrays(folder, batch, overview)
    if has_sibling(batch):
        with one_ensemble(folder, batch):
            submit_ensemble(folder, batch, replace=bool(new_jobs))
    return 0


# --- ensemble --------------------------------------------------------------------------------


def look_at_both(folder: Path, batch: Batch) -> dict[Path, Overview]:
    """Return the states of both folders' tasks."""
    both = (folder, Path(str(batch.sibling)))
    return {path: look(path, read_tasks(path)) for path in both}


def one_ensemble(folder: Path, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """Wait for the lock that both folders share, so that they do not start two ensembles."""
    first = min(folder.resolve(), Path(str(batch.sibling)).resolve())
    return only_one(first, ENSEMBLE_LOCK, wait=True)


def waiting_for(folder: Path, overview: Overview) -> list[str]:
    """Return sbatch's names of the jobs that a folder's unfinished tasks are in."""
    names: list[str] = []
    for submission in read_submissions(folder):
        indices = overview.alive_jobs.get(submission.job_id, [])
        if indices and len(indices) == len(submission.tasks):
            names.append(submission.job_id)
        else:  # an array of which a task has failed never becomes "ok": wait for the others singly
            names += [f"{submission.job_id}_{index}" for index in indices]
    return names


def submit_ensemble(folder: Path, batch: Batch, replace: bool) -> None:
    """Submit the ensemble after both folders' arrays, or say what it still waits for.

    Parameters
    ----------
    folder, batch
        Folder that was generated with --then_ensemble, and its batch.json.
    replace : bool
        Whether tasks were submitted just now: an ensemble that waits does not wait for those.
    """
    overviews = look_at_both(folder, batch)
    for path, overview in overviews.items():
        if overview.missing:
            say(
                f"ensemble not submitted: {len(overview.missing)} tasks of {path} are neither "
                f"done nor submitted; next: sh {shlex.quote(str(path / 'batch_master.sh'))}"
            )
            return
    after = [name for path, overview in overviews.items() for name in waiting_for(path, overview)]
    done = find_ensemble_done(list(overviews))
    if done and not after:
        say(f"ensemble already done; to have it again, remove {done}")
        return
    alive = alive_ensembles(list(overviews))
    if alive and not replace:
        say(f"ensemble submitted before, as job {', '.join(alive)}")
        return
    for job_id in alive:
        ask_slurm(["scancel", job_id])
    script = write_ensemble(folder, batch)
    forget_ensemble(list(overviews))
    flags = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    job_id = sbatch(folder, [*(flags if after else []), script.name], ENSEMBLE)
    say(f"submitted the ensemble as job {job_id}, after {', '.join(after) or 'nothing'}")


# --- without Slurm ---------------------------------------------------------------------------


def start(folder: Path, script: str, log: Path, task: int = 0) -> subprocess.Popen[bytes]:
    """Start a script for sbatch here, in a process group of its own.

    The lock on its log lasts as long as its processes, even if this one is killed.
    """
    with log.open("wb") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        return subprocess.Popen(
            ["bash", script], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)},
            start_new_session=True,
        )  # fmt: skip


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End those of the processes that still run, and their children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()


def run_tasks(folder: Path, tasks: dict[int, Task], n_at_once: int) -> list[int]:
    """Run tasks here, some at a time; return those that failed. An interrupt ends the running.

    A task whose outputs are not there has failed, whatever it says itself.
    """
    job = Submission(LOCAL_JOB, ARRAY, 0, tuple(tasks))
    logs = {task: folder / LOGS / job.log(task) for task in tasks}
    for log in logs.values():
        log.unlink(missing_ok=True)  # what is there ran, or runs
    record_submission(folder, job)
    waiting, failed = list(tasks), []
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        with Progress(len(tasks), "tasks", "task") as bar:
            while waiting or running:
                while waiting and len(running) < n_at_once:
                    task = waiting.pop(0)
                    running[task] = start(folder, "array.sbatch", logs[task], task)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for task in [t for t, process in running.items() if process.poll() is not None]:
                    status = running.pop(task).returncode
                    if status == 0 and is_done(tasks[task]):
                        say(f"task {task} done")
                    else:
                        failed.append(task)
                        reason = last_words(logs[task]) if status else "wrote no output"
                        say(f"task {task} failed: {reason} ({logs[task]})")
                    bar.update()
    finally:
        end(list(running.values()))
    return failed


def run_locally(folder: Path, batch: Batch, missing: dict[int, Task], n_at_once: int) -> int:
    """Run what is missing without Slurm, then the ensemble if it was asked for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = run_tasks(folder, missing, n_at_once) if missing else []
    if failed:
        say(f"{name_tasks(failed)} failed; the same command runs what is missing again")
        return 1
    if has_sibling(batch):
        with one_ensemble(folder, batch):
            return run_ensemble(folder, batch)
    return 0


def run_ensemble(folder: Path, batch: Batch) -> int:
    """Run the ensemble here, unless tasks are unfinished."""
    overviews = look_at_both(folder, batch)
    for path, overview in overviews.items():
        if len(overview.done) < overview.n_tasks:
            say(f"ensemble not run: {path} has {overview.line()}")
            return 0
    done = find_ensemble_done(list(overviews))
    if done:
        say(f"ensemble already done; to have it again, remove {done}")
        return 0
    job = Submission(LOCAL_JOB, ENSEMBLE)
    record_submission(folder, job)
    log = folder / LOGS / job.log()
    process = start(folder, write_ensemble(folder, batch).name, log)
    try:
        status = process.wait()
    finally:
        end([process])
    say(f"ensemble failed: {last_words(log)} ({log})" if status else f"ensemble done, see {log}")
    return int(bool(status))


# --- command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of batch_master.sh."""
    parser = ScriptParser(__doc__)
    parser.add_argument("folder", type=Path, help="what a generator wrote")
    parser.add_argument("--local", type=integer_from(1), metavar="N", help="run here, N at a time")
    parser.add_argument("--status", action="store_true", help="exit 1 if any task is missing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Do what batch_master.sh was asked for."""
    args = parse_args(argv)
    folder = args.folder.absolute()
    if args.status:
        return print_status(folder)
    with only_one(folder):
        batch, tasks = read_batch(folder), read_tasks(folder)
        overview = look(folder, tasks)
        say(f"{overview.line()}; folder {folder}")
        (folder / LOGS).mkdir(exist_ok=True)
        if overview.missing and batch.sibling is not None:
            forget_ensemble([folder, Path(batch.sibling)])
        if args.local is None:
            return submit(folder, batch, overview)
        return run_locally(folder, batch, {i: tasks[i] for i in overview.missing}, args.local)


if __name__ == "__main__":
    run_script(main)
