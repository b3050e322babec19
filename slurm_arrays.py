"""Plan the tasks of a Slurm array and write the folder that runs them; used by both generators.

The folder holds `tasks.tsv` (index, outputs, command; one line a task), `array.sbatch` (runs one
line of it), `batch_master.sh` (submits what is unfinished, see slurm_jobs.py) and `batch.json`
(what batch_master.sh must know). Standard library only: it runs on login nodes.
"""

import argparse
import functools
import itertools
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line import UserError, flatten, say
from loco_datasets import (
    PIXEL_LEVEL,
    expand_mvtypes,
    scores_file_name,
    scores_folder,
    split_mvtype,
)
from slurm_flags import HANDED_ON, sbatch_lines
from slurm_patterns import brace_pattern, expand_pattern, shorten_numbers
from slurm_states import (
    ENSEMBLE,
    ENSEMBLE_DONE,
    LOGS,
    Batch,
    Task,
    find_alive,
    only_one,
    read_batch,
    sha256_of,
    write_atomically,
)

REPO_DIR = Path(__file__).absolute().parent
TASK_PROGRAM = REPO_DIR / "sinbad_single_layer.py"
ENSEMBLE_PROGRAM = REPO_DIR / "calc_anom_ensm.py"


# --- tasks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The part of the work that one task does; `ratios` by the file that each one writes."""

    mvtypes: list[str]
    levels: list[int]
    ratios: dict[str, float]
    reps: list[int]


def plan_tasks(args: argparse.Namespace, levels: list[int]) -> list[Task]:
    """Split the work of the flags into tasks.

    Parameters
    ----------
    args : Namespace
        Flags of `add_task_flags`.
    levels : list of int
        Pyramid levels, all ResNet levels or only the raw-pixel one.

    Raises
    ------
    UserError
        If two crop ratios would write the same file, or a name is not a data set's.
    """
    mvtypes, reps = expand_mvtypes(args.mvtype), flatten(args.rep)
    ratios = ratios_by_file(args, levels[0])
    step = args.reps_per_task or len(reps)
    rep_parts = [reps[i : i + step] for i in range(0, len(reps), step)]
    if args.group == "class":
        classes = dict.fromkeys(split_mvtype(mvtype)[0] for mvtype in mvtypes)
        sets = [[m for m in mvtypes if split_mvtype(m)[0] == name] for name in classes]
        parts = itertools.product(sets, [levels], [ratios], rep_parts)
    else:
        one_ratio = [{file: ratio} for file, ratio in ratios.items()]
        parts = itertools.product(
            [[m] for m in mvtypes], [[v] for v in levels], one_ratio, rep_parts
        )
    shares = itertools.starmap(Share, parts)
    return [Task(output_pattern(args, share), task_command(args, share)) for share in shares]


def ratios_by_file(args: argparse.Namespace, level: int) -> dict[str, float]:
    """Return the crop ratios by the names of the files that they write; no two may be the same."""
    ratios: dict[str, float] = {}
    for ratio in dict.fromkeys(args.crop_size_ratio):
        name = scores_file_name(level, args.initial_res, ratio, args.crop_num_edge)
        if name in ratios:
            raise UserError(
                f"crop_size_ratio must give one file a ratio, got {ratios[name]} and {ratio} that "
                f"both write {name}; give the second another --version_name"
            )
        ratios[name] = ratio
    return ratios


def output_pattern(args: argparse.Namespace, share: Share) -> str:
    """Return the brace pattern of a task's output files."""
    level, rep = brace_pattern(share.levels), brace_pattern(share.reps)
    # A pattern stands where one number stands otherwise.
    folder = scores_folder(
        args.results_dir, args.version_name, level, rep, brace_pattern(share.mvtypes)
    )
    return str(folder / brace_pattern(list(share.ratios)))


def task_command(args: argparse.Namespace, share: Share) -> str:
    """Return a task's command, ready to paste into a shell; it runs from any folder."""
    words = [sys.executable, TASK_PROGRAM, "--version_name", args.version_name]
    words += ["--mvtype", *share.mvtypes, "--pyramid_level", *share.levels]
    words += ["--crop_size_ratio", *share.ratios.values(), "--rep", *shorten_numbers(share.reps)]
    words += ["--data_dir", args.data_dir, "--results_dir", args.results_dir]
    for name in HANDED_ON:
        value = getattr(args, name)
        words += [] if value is None else [f"--{name}", value]
    words += ["--official"] if args.official else []
    return shlex.join(map(str, words))


def check_finished(args: argparse.Namespace, tasks: list[Task], level: int) -> None:
    """Stop if an output is there that was made with other settings: it would count as done."""
    outputs = (Path(path) for task in tasks for path in expand_pattern(task.outputs))
    paths = [path for path in outputs if path.exists()]
    if not paths:
        return
    from result_files import read_scores  # imports numpy

    wanted = {name: getattr(args, name) for name in (*HANDED_ON, "official")}
    ratios = ratios_by_file(args, level)
    for path in paths:
        # The raw pixels' files have no settings of the network.
        found = read_scores(path).run.get("settings", {})
        now = {**wanted, "crop_size_ratio": ratios[path.name]}
        if "weights_sha256" in found:
            now["weights_sha256"] = weights_sha256(args.weights, found["weights_sha256"])
        for name, value in now.items():
            if found.get(name, value) != value:
                raise UserError(
                    f"{path} was made with {name} {found[name]}, now {name} is {value}; choose "
                    f"another --version_name or --results_dir, or remove it"
                )


def weights_sha256(weights: str, found: str) -> str:
    """Return what a task will record of --weights, to compare with what was `found`."""
    if weights == "imagenet":  # unknown before torchvision has them: any file's may be theirs
        return found if found != "random" else "that of imagenet"
    return weights if weights == "random" else sha256_of_file(Path(weights))


@functools.cache
def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file of weights; it is read once."""
    return sha256_of(path.read_bytes())


# --- scripts ---------------------------------------------------------------------------------

WHERE_TO_RUN = """\
# The folder, however it was moved; the set-up lines may go elsewhere.
sinbad_folder=$PWD
"""

ARRAY_BODY = """\
tasks=$sinbad_folder/tasks.tsv
task=$((SLURM_ARRAY_TASK_ID + ${1:-0}))
command=$(awk -F '\\t' -v task="$task" '$1 == task { print $3 }' "$tasks")
if [ -z "$command" ]; then
    echo "error: task must be one of $tasks, got $task; generate the folder again" >&2
    exit 2
fi
echo "task $task on $(hostname), $(date): $command"
eval "$command"
"""

BATCH_MASTER = """\
#!/bin/sh
# Submit the unfinished tasks of tasks.tsv, print the job ids. Written by {script}.
#
#     sh batch_master.sh             submit what is missing or failed, nothing twice
#     sh batch_master.sh --local 2   run the same tasks here without Slurm, 2 at a time
#     sh batch_master.sh --status    say what is done, running, missing and why
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec {python} {jobs} "$here" "$@"
"""


def render_sbatch(batch: Batch, job_name: str, log: str, about: str, body: str) -> str:
    """Return a script for sbatch, started in the folder: header, the set-up lines, then `body`."""
    header = [
        "#!/bin/bash",
        f"# {about}",
        f"#SBATCH --job-name={job_name}",
        f"#SBATCH --output={LOGS}/{log}",
        "#SBATCH --open-mode=append",  # a requeued task keeps the log of its first run
        *batch.sbatch_lines,
        "# The set-up lines may source files that only the cluster has.",
        "# shellcheck disable=SC1090,SC1091",
    ]
    setup = [*batch.setup, ""] if batch.setup else []
    return "\n".join([*header, "", WHERE_TO_RUN, *setup, body])


def write_folder(folder: Path, tasks: list[Task], batch: Batch, script: str) -> None:
    """Write everything `sh batch_master.sh` needs; the tasks' list last.

    Parameters
    ----------
    folder : Path
        Made if missing.
    tasks : list of Task
        Lines 0..N-1 of tasks.tsv.
    batch : Batch
        Content of batch.json.
    script : str
        Name of the generator, for the headers.
    """
    array = render_sbatch(
        batch,
        batch.name,
        "%A_%a.log",
        f"Run line $1 + $SLURM_ARRAY_TASK_ID of tasks.tsv. Written by {script}.",
        ARRAY_BODY,
    )
    master = BATCH_MASTER.format(
        script=script,
        python=shlex.quote(sys.executable),
        jobs=shlex.quote(str(REPO_DIR / "slurm_jobs.py")),
    )
    write_atomically(folder / "array.sbatch", array)
    write_atomically(folder / "batch_master.sh", master)
    write_atomically(folder / "batch.json", json.dumps(asdict(batch), indent=1) + "\n")
    write_atomically(folder / "tasks.tsv", tasks_text(tasks))


def tasks_text(tasks: list[Task]) -> str:
    """Return the content of tasks.tsv."""
    return "".join(f"{i}\t{task.outputs}\t{task.command}\n" for i, task in enumerate(tasks))


# --- ensemble ---------------------------------------------------------------------------------


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
    words += ["--rep_num_224", len(pixels.reps), "--dataset_dir", batch.dataset_dir]
    words += ["--out", batch.ensemble_out] if batch.ensemble_out else []
    return shlex.join(map(str, words))


def write_ensemble(folder: Path, batch: Batch) -> Path:
    """Write ensemble.sbatch; it leaves ensemble.done when it succeeds."""
    done = f'"$sinbad_folder"/{ENSEMBLE_DONE}'
    about = "Ensemble the scores of both folders. Written and submitted by batch_master.sh."
    body = f"rm -f {done}\n{ensemble_command(folder, batch)} && touch {done}\n"
    path = folder / f"{ENSEMBLE}.sbatch"
    name = f"{batch.name}_{ENSEMBLE}"
    write_atomically(path, render_sbatch(batch, name, f"{ENSEMBLE}_%j.log", about, body))
    return path


def forget_ensemble(folders: list[Path]) -> None:
    """Remove what says that the ensemble of two folders is done."""
    for folder in folders:
        (folder / ENSEMBLE_DONE).unlink(missing_ok=True)


def has_sibling(batch: Batch) -> bool:
    """Say whether an ensemble is wanted and can be: print it if the other folder is not there."""
    if batch.sibling is None:
        return False
    there = Path(batch.sibling, "tasks.tsv").exists()
    if not there:
        say(f"ensemble not started: {batch.sibling} has not been generated yet")
    return there


# --- generators ------------------------------------------------------------------------------


def make_batch(args: argparse.Namespace, name: str, levels: list[int], tasks_sha256: str) -> Batch:
    """Gather what batch_master.sh must know from the flags."""
    return Batch(
        name=name,
        sbatch_lines=sbatch_lines(args),
        setup=args.setup or [],
        throttle=args.throttle,
        max_array_size=args.max_array_size,
        mvtypes=expand_mvtypes(args.mvtype),
        version=args.version_name,
        results_dir=str(args.results_dir),
        levels=levels,
        reps=flatten(args.rep),
        sibling=str(args.out_dir.parent / args.then_ensemble) if args.then_ensemble else None,
        ensemble_out=str(args.ensemble_out) if args.ensemble_out else None,
        dataset_dir=str(args.dataset_dir),
        tasks_sha256=tasks_sha256,
    )


def forget_other_tasks(folder: Path, batch: Batch) -> None:
    """Forget what was submitted of another list of tasks; refuse while any of it is alive."""
    try:
        same = read_batch(folder).tasks_sha256 == batch.tasks_sha256
    except UserError:  # none yet, or damaged
        same = False
    if same or not (folder / "submitted.tsv").exists():
        return
    alive, alive_jobs = find_alive(folder)
    if alive:
        raise UserError(
            f"out_dir must not have other tasks running, got {folder} with jobs "
            f"{', '.join(alive_jobs) or 'of --local'}; wait, scancel them, or write "
            f"to another --out_dir"
        )
    (folder / "submitted.tsv").unlink()
    say("replaced another list of tasks, their results are kept")


def generate(args: argparse.Namespace, name: str, levels: list[int], script: str) -> None:
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
    """
    tasks, folder = plan_tasks(args, levels), args.out_dir
    check_finished(args, tasks, levels[0])
    folder.mkdir(parents=True, exist_ok=True)
    batch = make_batch(args, name, levels, sha256_of(tasks_text(tasks).encode()))
    with only_one(folder):
        forget_other_tasks(folder, batch)
        write_folder(folder, tasks, batch, script)
    say(f"{len(tasks)} tasks; submit them: sh {shlex.quote(str(folder / 'batch_master.sh'))}")
