"""Submit, run or report the tasks of a folder written by create_batch_array_sinbad*.py.

Reads   FOLDER/{tasks.tsv,batch.json,array.sbatch}
Writes  FOLDER/submitted.tsv, FOLDER/ensemble.sbatch, FOLDER/logs/

A task is done when all of its output files exist, running when squeue shows it (waiting included),
else missing. batch_master.sh calls this:

    sh ../sinbad_runs/sbatches/batch_master.sh
"""

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from command_line import Progress, ScriptParser, UserError, integer_from, run_script, say
from loco_datasets import PIXEL_LEVEL
from slurm_arrays import (
    REPO_DIR,
    TASK_PROGRAM,
    Batch,
    make_batch,
    plan_tasks,
    read_batch,
    read_tasks,
    render_sbatch,
    shorten_numbers,
    tasks_text,
    write_atomically,
    write_folder,
)
from slurm_states import (
    ARRAY,
    ENSEMBLE,
    LOCAL_JOB,
    Overview,
    Submission,
    ask_slurm,
    failure_reason,
    list_jobs,
    look,
    print_status,
    read_submissions,
    record_submission,
)

DEFAULT_MAX_ARRAY_SIZE = 1001  # slurm.conf's own default
SECONDS_BETWEEN_LOOKS = 0.1
ENSEMBLE_PROGRAM = REPO_DIR / "calc_anom_ensm.py"


# --- submission ------------------------------------------------------------------------------


def max_array_size(batch: Batch) -> int:
    """Return the flag's value, else what this cluster allows: indices stay below it."""
    if batch.max_array_size is not None:
        return batch.max_array_size
    for line in ask_slurm(["scontrol", "show", "config"]).splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdigit():
            return int(value)
    return DEFAULT_MAX_ARRAY_SIZE


def submit_arrays(folder: Path, batch: Batch, tasks: list[int]) -> list[str]:
    """Submit tasks, as several arrays where one is not allowed to be so long; return job ids.

    With a throttle the arrays follow one another, so that the limit holds for all of them.
    """
    size, job_ids = max_array_size(batch), []
    for first in range(0, max(tasks, default=-1) + 1, size):
        part = tuple(task for task in tasks if first <= task < first + size)
        if not part:
            continue
        array = ",".join(shorten_numbers(task - first for task in part))
        command = ["sbatch", "--parsable"]
        if batch.throttle is not None:
            array += f"%{batch.throttle}"
            command += [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else []
        command += [f"--array={array}", "array.sbatch", str(first)]
        job_ids.append(ask_slurm(command, folder).split(";")[0].strip())
        record_submission(folder, Submission(job_ids[-1], ARRAY, first, part))
        say(f"submitted --array={array} (tasks from {first}) as job {job_ids[-1]}")
        print(job_ids[-1], flush=True)
    return job_ids


def submit(folder: Path) -> int:
    """Submit what is missing, then the ensemble if it was asked for."""
    if shutil.which("sbatch") is None:
        ask_slurm(["sbatch", "--version"])  # says what to do instead
    batch = read_batch(folder)
    overview = look(folder, read_tasks(folder))
    say(f"{overview.line()}; folder {folder}")
    new_jobs = submit_arrays(folder, batch, overview.missing)
    if batch.sibling is not None:
        submit_ensemble(folder, batch, replace=bool(new_jobs))
    return 0


# --- ensemble --------------------------------------------------------------------------------


def ensemble_command(folder: Path, batch: Batch) -> str:
    """Return the command that ensembles this folder's scores with those of its sibling."""
    sibling = read_batch(Path(str(batch.sibling)))
    pixels, resnet = sorted([batch, sibling], key=lambda b: b.levels != [PIXEL_LEVEL])
    if pixels.levels != [PIXEL_LEVEL] or resnet.levels == [PIXEL_LEVEL]:
        raise UserError(
            f"--then_ensemble must name the folder of the other generator, got {batch.sibling}; "
            f"generate {folder} again"
        )
    if set(pixels.mvtypes) != set(resnet.mvtypes):
        raise UserError(
            f"both folders must hold the same data sets, got {', '.join(batch.mvtypes)} in "
            f"{folder} and {', '.join(sibling.mvtypes)} in {batch.sibling}; generate one again"
        )
    if pixels.reps != list(range(len(pixels.reps))):
        raise UserError(
            f"an ensemble must have the raw-pixel repetitions 0, 1, 2 ..., got "
            f"{' '.join(shorten_numbers(pixels.reps))}; generate that folder with --rep 0-<last>"
        )
    words = [sys.executable, ENSEMBLE_PROGRAM, "--mvtype", *resnet.mvtypes]
    words += ["--pyramid_level", *resnet.levels, "--rep", *shorten_numbers(resnet.reps)]
    words += ["--version", f"{resnet.results_dir}/{resnet.version}_pyramid_lvl_#"]
    words += ["--version_224", f"{pixels.results_dir}/{pixels.version}_pyramid_lvl_{PIXEL_LEVEL}"]
    words += ["--rep_num_224", len(pixels.reps)]
    words += ["--out", batch.ensemble_out] if batch.ensemble_out else []
    return shlex.join(map(str, words))


def write_ensemble(folder: Path, batch: Batch) -> Path:
    """Write ensemble.sbatch; it leaves ensemble.done when it succeeds."""
    done = shlex.quote(str(folder / "ensemble.done"))
    about = "Ensemble the scores of both folders. Written and submitted by batch_master.sh."
    body = f"rm -f {done}\n{ensemble_command(folder, batch)} && touch {done}\n"
    path = folder / "ensemble.sbatch"
    name = f"{batch.name}_ensemble"
    write_atomically(path, render_sbatch(batch, name, "ensemble_%j.log", about, body))
    return path


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
    sibling = Path(str(batch.sibling))
    try:
        overviews = {f: look(f, read_tasks(f)) for f in (folder, sibling)}
    except UserError:
        say(f"ensemble not submitted: {sibling} has not been generated yet")
        return
    for path, overview in overviews.items():
        if overview.missing:
            say(
                f"ensemble not submitted: {len(overview.missing)} tasks of {path} are neither "
                f"done nor submitted; run `sh {shlex.quote(str(path / 'batch_master.sh'))}`, "
                f"then this again if that folder was generated without --then_ensemble"
            )
            return
    running = [name for path, overview in overviews.items() for name in waiting_for(path, overview)]
    if not running and any((f / "ensemble.done").exists() for f in overviews):
        say("ensemble already done; to have it again, remove ensemble.done")
        return
    alive = alive_ensembles(list(overviews))
    if alive and not replace:
        say(f"ensemble submitted before, as job {', '.join(alive)}")
        return
    for job_id in alive:
        ask_slurm(["scancel", job_id])
    script = write_ensemble(folder, batch)
    for path in overviews:
        (path / "ensemble.done").unlink(missing_ok=True)
    after = [f"--dependency=afterok:{':'.join(running)}", "--kill-on-invalid-dep=yes"]
    command = ["sbatch", "--parsable", *(after if running else []), script.name]
    job_id = ask_slurm(command, folder).split(";")[0].strip()
    record_submission(folder, Submission(job_id, ENSEMBLE, 0, ()))
    say(f"submitted the ensemble as job {job_id}, after {', '.join(running) or 'nothing'}")
    print(job_id, flush=True)


def alive_ensembles(folders: list[Path]) -> list[str]:
    """Return the ids of ensembles of these folders that wait or run."""
    jobs = {job_id for job_id, _ in list_jobs()}
    submissions = [one for folder in folders for one in read_submissions(folder)]
    return [one.job_id for one in submissions if one.kind == ENSEMBLE and one.job_id in jobs]


# --- without Slurm ---------------------------------------------------------------------------


def start_task(folder: Path, task: int) -> subprocess.Popen[bytes]:
    """Start array.sbatch for one task, in a process group of its own."""
    log = folder / "logs" / f"{LOCAL_JOB}_{task}.log"
    with log.open("wb") as stream:
        return subprocess.Popen(
            ["bash", "array.sbatch"], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)},
            start_new_session=True,
        )  # fmt: skip


def run_tasks(folder: Path, tasks: list[int], n_at_once: int) -> list[int]:
    """Run tasks here, some at a time; return those that failed. An interrupt ends the running."""
    waiting, failed = list(tasks), []
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        with Progress(len(tasks), "tasks", "task") as bar:
            while waiting or running:
                while waiting and len(running) < n_at_once:
                    running[waiting[0]] = start_task(folder, waiting[0])
                    waiting.pop(0)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for task in [t for t, process in running.items() if process.poll() is not None]:
                    status = running.pop(task).returncode
                    failed += [task] if status else []
                    say(f"task {task} {f'failed, exit status {status}' if status else 'done'}")
                    bar.update()
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            process.wait()
    return failed


def run_locally(folder: Path, n_at_once: int) -> int:
    """Run what is missing without Slurm, then the ensemble if it was asked for."""
    batch, tasks = read_batch(folder), read_tasks(folder)
    overview = look(folder, tasks)
    say(f"{overview.line()}; folder {folder}, {n_at_once} at a time")
    if overview.missing:
        record_submission(folder, Submission(LOCAL_JOB, ARRAY, 0, tuple(overview.missing)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = run_tasks(folder, overview.missing, n_at_once)
    for task in failed:
        say(f"task {task} failed: {failure_reason(folder, task, read_submissions(folder))}")
    if failed or batch.sibling is None:
        return int(bool(failed))
    sibling = Path(batch.sibling)
    if not (sibling / "tasks.tsv").exists() or look(sibling, read_tasks(sibling)).missing:
        say(f"ensemble not run: tasks of {sibling} are missing; run its batch_master.sh --local")
        return 0
    script, log = write_ensemble(folder, batch), folder / "logs" / "ensemble_local.log"
    with log.open("wb") as stream:
        status = subprocess.run(
            ["bash", script.name], cwd=folder, stdout=stream, stderr=stream, check=False
        ).returncode
    say(f"ensemble {'failed' if status else 'done'}, see {log}")
    return int(bool(status))


# --- command line ----------------------------------------------------------------------------


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two batch_master.sh do not submit the same tasks."""
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} must be driven by one batch_master.sh, got a second; wait for the first"
            ) from None
        except OSError:
            pass  # a file system without locks: the person must not start two
        yield


def generate(
    args: argparse.Namespace,
    name: str,
    levels: list[int],
    script: str,
    program: Path = TASK_PROGRAM,
) -> None:
    """Write the folder of a generator; refuse while jobs of another list of tasks are alive.

    Parameters
    ----------
    args : Namespace
        All flags of the generator.
    name : str
        Slurm's name of the jobs.
    levels : list of int
        Pyramid levels, all ResNet levels or only the raw-pixel one.
    script : str
        File name of the generator.
    program : Path
        Script that every task runs.
    """
    tasks, folder = plan_tasks(args, levels, program), args.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        path = folder / "tasks.tsv"
        if path.exists() and path.read_text() != tasks_text(tasks):
            alive = look(folder, read_tasks(folder)).alive_jobs
            if alive:
                raise UserError(
                    f"out_dir must not have jobs of other tasks alive, got {', '.join(alive)} of "
                    f"{folder}; wait, scancel them, or write to another --out_dir"
                )
            (folder / "submitted.tsv").unlink(missing_ok=True)
        (folder / "ensemble.done").unlink(missing_ok=True)
        write_folder(args, tasks, make_batch(args, name, levels), script)
    say(f"{len(tasks)} tasks; submit them: sh {shlex.quote(str(folder / 'batch_master.sh'))}")


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
    read_tasks(folder)  # before a lock file is made in a folder that is not ours
    with only_one(folder):
        return submit(folder) if args.local is None else run_locally(folder, args.local)


if __name__ == "__main__":
    run_script(main)
