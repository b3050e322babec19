"""A Slurm array that remembers nothing: the text for sbatch, submit, status, local run.

A task is done when its outputs are there, waiting or running when squeue shows its folder's job
name and its index, else missing. Two submissions at once, or a kill between sbatch and the next
line, cost at most work done twice. Standard library only: it runs on login nodes.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sinbad import atomic, cli, errors, loco

log = logging.getLogger(__name__)

Task = tuple[str, str]  # a line of tasks.tsv: outputs as a bash brace pattern, command
Ratios = dict[str, float]  # crop ratios by the files that they write
Alive = dict[int, tuple[str, str]]  # task -> id of its array's job, reason of one that waits or ""

TASK_PROGRAM = Path(__file__).resolve().parents[1] / "sinbad_single_layer.py"
OF_THE_TASKS = (cli.network_flags, cli.scoring_flags, cli.results_flags, cli.device_flags)
OF_SUBMISSION = ("throttle", "max_array_size", "then_ensemble", "ensemble_out", "dataset_dir")
OF_SBATCH = (
    "partition",
    "account",
    "qos",
    "gres",
    "mem",
    "cpus-per-task",
    "time",
    "exclude",
    "constraint",
    "mail-user",
)
SCORES = re.compile(r"(.+_pyramid_lvl_)(\d+)/rep_num_(\d+)/([^/]+)/[^/]+")

ARRAY = """\
#!/bin/bash
# Run line $1 + $SLURM_ARRAY_TASK_ID of tasks.tsv, or the command $2. batch_master.sh submits it.
#SBATCH --open-mode=append
{options}
# shellcheck disable=SC1090,SC1091  # the set-up lines may source files of the cluster
sinbad_command=${{2:-$(sed -n "$(($1 + ${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" tasks.tsv | cut -f 3)}}
[ -n "$sinbad_command" ] || {{ echo "error: there is no such line in $PWD/tasks.tsv" >&2; exit 2; }}
echo "# $HOSTNAME, $(date): $sinbad_command"
set --
{setup}
eval "$sinbad_command"
"""

BATCH_MASTER = """\
#!/bin/sh
# Submit the unfinished tasks of tasks.tsv and print the job ids.
#
#     sh batch_master.sh             submit what is missing
#     sh batch_master.sh --status    say what is done, running, missing and why
#     sh batch_master.sh --local 2   run what is missing here without Slurm, 2 at a time
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec {program} --submit --out_dir "$here" {flags} "$@"
"""


# ---------------------------------------------------------------- tasks


def shorten_numbers(numbers: Iterable[int]) -> str:
    """Write numbers as runs, as sbatch --array has them: 0 1 2 7 -> "0-2,7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if not runs or number > runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(number)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def expand_numbers(text: str) -> list[int]:
    """Expand the array indices of squeue: "0-2,7%4" -> 0 1 2 7, "0-8:4" -> 0 4 8, "N/A" -> 0."""
    runs = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", text.replace("N/A", "0").partition("%")[0])
    ranges = [range(int(low), int(high or low) + 1, int(step or 1)) for low, high, step in runs]
    return list(itertools.chain(*ranges))


def brace_pattern(values: Sequence[Any]) -> str:
    """Write values as bash does: 7 -> "7", 7 14 -> "{7,14}", 0 ... 99 -> "{0..99}"."""
    first, last = values[0], values[-1]
    if len(values) == 1:
        return str(first)
    if isinstance(first, int) and list(values) == list(range(first, last + 1)):
        return f"{{{first}..{last}}}"
    return "{" + ",".join(map(str, values)) + "}"


def expand_pattern(pattern: str) -> list[str]:
    """Expand a brace pattern into its paths, in bash's order."""
    choices: list[list[str]] = []
    for i, part in enumerate(re.split("[{}]", pattern)):
        run = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        numbers = range(int(run[1]), int(run[2]) + 1) if run else ()
        choices.append(list(map(str, numbers)) or (part.split(",") if i % 2 else [part]))
    return ["".join(parts) for parts in itertools.product(*choices)]


def absolute(path: Path | str) -> Path:
    """Make a path absolute; symbolic links stay, other machines may have them elsewhere."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def array_parser(
    description: str | None, paper: loco.LevelSettings, name: str, sibling: str
) -> cli.ScriptParser:
    """Make the parser of a generator; defaults are `paper`, of its levels, and the folder `name`.

    `sibling` is the other generator's folder, whose scores the ensemble takes too.
    """
    parser = cli.ScriptParser(description, [group() for group in OF_THE_TASKS])
    parser.set_defaults(num_workers=None)  # of the tasks' machine, not of this one
    add, above = parser.add_argument, cli.integer_from
    add("--data_dir", type=Path, default=loco.DEFAULT_DATA_DIR, help="folder of the matrices")
    add("--seed", type=above(0), default=0, help="of the random directions")
    add("--mvtype", nargs="+", default=["all"], help="data sets, classes, loco, struct or all")
    add(
        "--crop_size_ratio",
        nargs="+",
        type=cli.ratio_type,
        default=list(paper.crop_ratios),
        help="side of a crop, of the image's",
    )
    add(
        "--rep",
        nargs="+",
        type=cli.integer_ranges,
        default=[list(range(paper.n_reps))],
        help=f"repetitions, as 3 or 0-99 (default: 0 to {paper.n_reps - 1})",
    )
    add("--group", choices=("none", "class"), default="none", help="class: a task is a whole class")
    add("--reps_per_task", type=above(1), metavar="N", help="repetitions in a task (default: all)")
    runs, images = loco.DEFAULT_RUNS_DIR, str(loco.DEFAULT_DATASET_DIR)
    add("--out_dir", type=Path, default=runs / name, help="the folder to write")
    add("--status", action="store_true", help="say what is done, running, missing and why")
    add("--submit", action="store_true", help="submit what is missing, as batch_master.sh does")
    add("--local", type=above(1), metavar="N", help="run what is missing here, N at a time")
    add(
        "--then_ensemble",
        nargs="?",
        const=Path(sibling),
        metavar="SIBLING",
        type=lambda text: absolute(text) if "/" in text else Path(text),
        help="calc_anom_ensm.py "
        f"follows this and another folder: a path, or a name beside, else {sibling}",
    )
    add("--ensemble_out", type=absolute, metavar="DIR", help="its tables (default: by the scores)")
    add("--dataset_dir", type=absolute, default=images, help="its images and masks")
    add("--throttle", type=above(1), metavar="N", help="at most N tasks at a time")
    add("--max_array_size", type=above(1), metavar="N", help="tasks in an array (default: Slurm's)")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line before a task")
    for option in OF_SBATCH:
        add(
            f"--{option.split('-')[0]}",
            dest=option,
            metavar="TEXT",
            help=f"#SBATCH --{option}",
            default="gpu:1" if option == "gres" else None,
        )
    add("--requeue", action=BooleanOptionalAction, help="start a preempted task again")
    return parser


def plan_tasks(args: Namespace, levels: list[int], ratios: Ratios) -> list[Task]:
    """Split the work into tasks; their commands run anywhere and hold only what is no default."""
    present = [path.parent.name for path in args.data_dir.glob("*/train_data.npy")]
    mvtypes, reps = loco.choose_mvtypes(args.mvtype, present), cli.flatten(args.rep)
    by_file = [{file: ratio} for file, ratio in ratios.items()]
    parts: list[list[Any]] = [[[own] for own in mvtypes], [[own] for own in levels], by_file]
    if args.group == "class":
        classes: dict[str, list[str]] = {}
        for mvtype in mvtypes:
            classes.setdefault(loco.split_mvtype(mvtype)[0], []).append(mvtype)
        parts = [list(classes.values()), [levels], [ratios]]
    step = args.reps_per_task or len(reps)
    parts.append([reps[i : i + step] for i in range(0, len(reps), step)])
    common = [f"--seed={args.seed}", f"--data_dir={absolute(args.data_dir)}"]
    parser = ArgumentParser(parents=[group() for group in OF_THE_TASKS], add_help=False)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name == "results_dir" or (name == "weights" and value not in ("imagenet", "random")):
            value = absolute(value)
        if value is not None and value != default:
            common.append(f"--{name}" if value is True else f"--{name}={value}")
    tasks, where = [], (absolute(args.results_dir), args.version_name)
    for own, own_levels, own_ratios, own_reps in itertools.product(*parts):
        words = [sys.executable, TASK_PROGRAM, "--mvtype", *own, "--pyramid_level", *own_levels]
        words += ["--crop_size_ratio", *own_ratios.values(), "--rep"]
        command = shlex.join(map(str, [*words, *shorten_numbers(own_reps).split(","), *common]))
        folder = loco.scores_folder(*where, *map(brace_pattern, (own_levels, own_reps, own)))
        unfit = re.search("[\t\r\n\ud800-\udfff]", command) or (own[1:] and "," in "".join(own))
        if unfit or re.search("[{}#]", "".join(map(str, (*where, *own)))):
            raise errors.UserError(
                "names and paths must be UTF-8 without braces, #, tabs and line ends, without "
                f"commas where a task has several, got {command if unfit else str(folder)!r}; "
                "rename or choose others"
            )
        tasks.append((f"{folder}/{brace_pattern(list(own_ratios))}", command))
    return tasks


def check_finished(args: Namespace, tasks: list[Task], level: int, ratios: Ratios) -> None:
    """Stop if an output is there that was made with other settings: it would count as done."""
    files = [Path(path) for outputs, _ in tasks for path in expand_pattern(outputs)]
    files = [path for path in files if path.exists()]
    wanted = {name: value for name, value in vars(args).items() if not isinstance(value, list)}
    paper = loco.level_settings(level)
    wanted["n_projections"] = args.n_projections or paper.n_projections
    wanted["shrinkage_factor"] = args.shrinkage_factor or paper.shrinkage
    wanted["weights_sha256"] = args.weights if args.weights == "random" else "that of imagenet"
    if files and args.weights not in ("imagenet", "random"):
        content = absolute(args.weights).read_bytes()
        wanted["weights_sha256"] = hashlib.sha256(content).hexdigest()
    for path in files:
        wanted["crop_size_ratio"] = ratios[path.name]
        try:
            with zipfile.ZipFile(path) as archive:  # of numpy, which is not here
                record = archive.read("run.npy").partition(b"\n")[2].decode("utf-32-le")
            found = json.loads(record).get("settings", {})
        except KeyError:  # the authors' files hold no record
            continue
        except (zipfile.BadZipFile, ValueError) as error:
            raise errors.UserError(
                f"{path} must be a whole .npz file, got {error}; remove it"
            ) from None
        if "net" in found:
            found.setdefault("compile", False)  # recorded where it is on
        if args.weights == "imagenet" and found.get("weights_sha256") != "random":
            found.pop("weights_sha256", None)  # not known before they are loaded: may be any file's
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise errors.UserError(
                    f"{path} was made with {name} {found[name]}, now {name} is {value}; choose "
                    "another --version_name or --results_dir, or remove it"
                )


def generate(args: Namespace, levels: list[int], folder: Path, script: str) -> None:
    """Write the folder of a generator; the list of tasks last."""
    grid = args.initial_res, args.crop_size_ratio, args.crop_num_edge
    ratios = loco.ratios_by_file(levels[0], *grid)
    tasks = plan_tasks(args, levels, ratios)
    check_finished(args, tasks, levels[0], ratios)
    options = {name: getattr(args, name) for name in OF_SBATCH if getattr(args, name) is not None}
    if args.gres == "none" or args.device == "cpu":
        del options["gres"]
    if "mail-user" in options:
        options["mail-type"] = "END,FAIL"
    texts = [*options.values(), *args.setup]
    if any(len(text.splitlines()) != 1 for text in texts) or set(str(folder)) & {"%", "\\"}:
        raise errors.UserError(
            f"values for sbatch must be one line each, --out_dir without % and \\, got {texts} and "
            f"{folder}; give --setup once a line"
        )
    lines = [f"#SBATCH --{name}={shlex.quote(text)}" for name, text in options.items()]
    if args.requeue is not None:
        lines.append(f"#SBATCH --{'' if args.requeue else 'no-'}requeue")
    kept = {name: getattr(args, name) for name in OF_SUBMISSION}
    submission = [f"--{name}={value}" for name, value in kept.items() if value is not None]
    program = shlex.join([sys.executable, str(Path(script).resolve())])
    array, master = folder / "array.sbatch", folder / "batch_master.sh"
    atomic.atomic_write(array, ARRAY.format(options="\n".join(lines), setup="\n".join(args.setup)))
    atomic.atomic_write(master, BATCH_MASTER.format(program=program, flags=shlex.join(submission)))
    atomic.atomic_write(folder / "tasks.tsv", format_tasks(tasks))
    log.info(f"{len(tasks)} tasks; submit them: sh {shlex.quote(str(master))}")


def format_tasks(tasks: list[Task]) -> str:
    """Return the text of tasks.tsv."""
    return "".join(f"{i}\t{outputs}\t{command}\n" for i, (outputs, command) in enumerate(tasks))


def read_tasks(folder: Path) -> list[Task]:
    """Read tasks.tsv; it must be there, and a generator's."""
    path = folder / "tasks.tsv"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    tasks = re.findall(r"^\d+\t(.*)\t(.*)$", text, re.M)
    if not tasks or format_tasks(tasks) != text:
        raise errors.UserError(
            f"{path} must hold whole lines of index, outputs and command, got none or others; write"
            " it with create_batch_array_sinbad.py or create_batch_array_sinbad_224.py"
        )
    return tasks


def run_array(args: Namespace, levels: list[int], script: str) -> int:
    """Do what the flags of `array_parser` ask for; return the exit status.

    `levels` are all of the network or only the raw pixels', `script` is the generator's file.
    """
    folder = absolute(args.out_dir)
    if not (args.status or args.local or args.submit):
        generate(args, levels, folder, script)
        return 0
    tasks = read_tasks(folder)
    needed = not (args.status or args.local)
    alive, missing = look(folder, tasks, needed)
    if args.status:
        print_status(folder, tasks, alive, missing)
        if args.then_ensemble:
            print(f"ensemble  {plan_ensemble(folder, args, needed)[0] or 'missing'}")
        return int(bool(missing))
    (folder / "logs").mkdir(exist_ok=True)
    n_waiting = sum(bool(reason) for _, reason in alive.values())
    waiting = f" ({n_waiting} of them waiting)" if n_waiting else ""
    n_done = len(tasks) - len(alive) - len(missing)
    log.info(
        f"{len(tasks)} tasks: {n_done} done, {len(alive)} running{waiting}, {len(missing)} missing;"
        f" folder {folder}"
    )
    if args.local:
        return run_locally(folder, args, tasks, missing)
    submit(folder, args, alive, missing)
    return 0


def is_done(task: Task) -> bool:
    """Tell whether all outputs of a task are there."""
    return all(os.path.exists(path.encode("utf-8")) for path in expand_pattern(task[0]))


def look(folder: Path, tasks: list[Task], needed: bool = True) -> tuple[Alive, list[int]]:
    """Return the tasks that wait or run, and those that are missing; Slurm is asked if need be."""
    unfinished = [i for i, task in enumerate(tasks) if not is_done(task)]
    alive = find_alive(job_name(folder), needed) if unfinished else {}
    unfinished = [i for i in unfinished if not is_done(tasks[i])]  # some ended meanwhile
    running = {i: alive[i] for i in unfinished if i in alive}
    return running, [i for i in unfinished if i not in alive]


def print_status(folder: Path, tasks: list[Task], alive: Alive, missing: list[int]) -> None:
    """Print what is done, running, missing and why."""
    done = set(range(len(tasks))) - {*alive, *missing}
    print(f"{'state':<10}{'tasks':>6}  which")
    for state, numbers in (("done", done), ("running", alive), ("missing", missing)):
        print(f"{state:<10}{len(numbers):>6}  {shorten_numbers(numbers)}".rstrip())
    for reason in dict.fromkeys(reason for _, reason in alive.values() if reason):
        own = [task for task in alive if alive[task][1] == reason]
        print(f"{shorten_numbers(own)} of the running wait: {reason}")
    for line in why_failed(folder, tasks, missing):
        print(line)


def why_failed(folder: Path, tasks: list[Task], missing: list[int]) -> list[str]:
    """Return lines that say which tasks failed, with the last line of their newest logs."""
    newest: dict[str, tuple[str, Path]] = {}  # by command
    for log in sorted((folder / "logs").glob("*.log"), key=os.path.getmtime):
        lines = log.read_text("utf-8", "replace").splitlines()
        first, *others = list(filter(str.strip, lines)) or [""]  # "# <host>, <date>: <command>"
        newest[first.partition(": ")[2]] = others[-1] if others else "ended without a word", log
    found = {task: newest[tasks[task][1]] for task in missing if tasks[task][1] in newest}
    said = []
    for words in dict.fromkeys(words for words, _ in found.values()):
        own = [task for task in found if found[task][0] == words]
        said.append(f"{shorten_numbers(own)} failed: {words} ({found[own[0]][1]})")
    return said


# ---------------------------------------------------------------- Slurm


def ask_slurm(words: list[str], folder: Path | None = None) -> str:
    """Run one of Slurm's commands and return what it prints."""
    # Without the person's own format and filters; else squeue cuts indices at 64 characters.
    own = {name: text for name, text in os.environ.items() if not name.startswith("SQUEUE_")}
    own["SLURM_BITSTR_LEN"] = "0"
    run = subprocess.run(
        ["env", *words],
        cwd=folder,
        env=own,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if run.returncode:
        raise errors.UserError(
            f"`{shlex.join(words)}` must succeed, got exit status {run.returncode}: "
            f"{' '.join(run.stderr.split())}; what was submitted before is kept, try again on a "
            "login node, or run the tasks here without Slurm: sh batch_master.sh --local 2"
        )
    return run.stdout


def job_name(*folders: Path) -> str:
    """Return the name of the jobs of folders and of the tasks that are in them now."""
    digest = hashlib.sha256()
    for folder in sorted(path.resolve() for path in folders):
        digest.update(os.fsencode(folder) + b"\0" + (folder / "tasks.tsv").read_bytes())
    return f"sinbad_{digest.hexdigest()[:8]}"


def find_alive(name: str, needed: bool) -> Alive:
    """Ask squeue for the tasks of the jobs `name`+<offset>; if not `needed`, it may fail."""
    # Not with --array: it leaves out the last index of a waiting array like 0-20:4.
    words = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F|%K|%T|%j|%r"]
    alive: Alive = {}
    try:
        listing = ask_slurm(words)
    except errors.UserError as error:
        if needed:
            raise
        log.info(f"note: {error}")
        return alive
    form = rf"^(\d+)\|(.*)\|(\w+)\|{name}(?:\+(\d+))?\|(.*)$"
    for job, indices, state, offset, reason in re.findall(form, listing, re.M):
        for index in expand_numbers(indices):
            alive[int(offset or 0) + index] = job, reason if state == "PENDING" else ""
    return alive


def sbatch(folder: Path, words: list[str]) -> str:
    """Submit; print and return the job's id, whatever else sbatch prints."""
    answer = ask_slurm(["sbatch", "--parsable", *words], folder)
    ids = re.findall(r"^(\d+)(?:;.*)?$", answer, re.M)
    if not ids:
        raise errors.UserError(
            f"sbatch --parsable must print a job's id, got {answer!r}; look at squeue --me, what "
            "is there will not be submitted again"
        )
    print(ids[-1], flush=True)
    return ids[-1]


def submit(folder: Path, args: Namespace, alive: Alive, missing: list[int]) -> None:
    """Submit what is missing, then the ensemble if it was asked for."""
    size = args.max_array_size or 1001  # slurm.conf's own
    if missing and not args.max_array_size:
        config = ask_slurm(["scontrol", "show", "config"])
        form = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.M)
        size = int(form[1]) if form else size  # 0: no arrays there, each task is a job
    # With a throttle an array follows those before it, so that the limit holds for all of them.
    limit = f"%{args.throttle}" if args.throttle else ""
    before = list(dict.fromkeys(job for job, _ in alive.values()))
    for first, part in itertools.groupby(missing, lambda task: task - task % max(size, 1)):
        array = f"--array={shorten_numbers(task - first for task in part)}{limit}"
        words = [f"--job-name={job_name(folder)}+{first}"]
        words += [f"--dependency=afterany:{':'.join(before)}"] if limit and before else []
        words.append(f"--output=logs/%A_{first}{'+%a' if size else ''}.log")
        words += [array] if size else []
        job = sbatch(folder, [*words, "array.sbatch", str(first)])
        before = [job]
        log.info(f"submitted {array} as job {job}, of the tasks from {first}")
    if args.then_ensemble:
        state, earlier, words = plan_ensemble(folder, args, needed=True)
        if missing and earlier:  # it waits for less
            ask_slurm(["scancel", *earlier])
            state = ""
        log.info(f"ensemble {state or 'submitted as job ' + sbatch(folder, words)}")


def plan_ensemble(folder: Path, args: Namespace, needed: bool) -> tuple[str, list[str], list[str]]:
    """Return what holds the ensemble up or "", its jobs that are there, sbatch's words for it.

    It is done if its tables are newer than all scores of this folder and its sibling.
    """
    both, parts, after, scores = (folder, folder.parent / args.then_ensemble), [], [], []
    for one in both:
        if not (one / "tasks.tsv").exists():
            return f"waits for {one}, which has not been generated yet", [], []
        tasks = read_tasks(one)
        alive, missing = look(one, tasks, needed)
        if missing:
            command = f"sh {shlex.quote(f'{one}/batch_master.sh')}"
            return f"waits for {len(missing)} missing tasks of {one}; next: {command}", [], []
        after += dict.fromkeys(job for job, _ in alive.values())
        paths = [path for outputs, _ in tasks for path in expand_pattern(outputs)]
        columns = zip(*(SCORES.fullmatch(path).groups() for path in paths), strict=True)
        parts.append([list(dict.fromkeys(column)) for column in columns])
        scores += paths
    parts.sort(key=lambda part: part[1] == [str(loco.PIXEL_LEVEL)])
    (version, levels, reps, mvtypes), (version_224, _, reps_224, _) = parts
    out = args.ensemble_out or Path(version[0]).parent / "ensemble"
    tables = [path.stat().st_mtime for path in out.glob("scores*.csv")]
    if not after and tables and max(tables) >= max(map(os.path.getmtime, scores)):
        return "done: its tables are newer than all scores", [], []
    command = [sys.executable, TASK_PROGRAM.with_name("calc_anom_ensm.py"), "--mvtype", *mvtypes]
    command += ["--pyramid_level", *levels, "--rep", *reps, f"--out={out}"]
    command += [f"--version={version[0]}#", f"--version_224={version_224[0]}#"]
    command += [f"--rep_num_224={len(reps_224)}", f"--dataset_dir={absolute(args.dataset_dir)}"]
    name = f"{job_name(*both)}_ensemble"
    earlier = [job for job, _ in find_alive(name, needed).values()]
    words = [f"--job-name={name}", "--output=logs/ensemble_%j.log"]
    words += [f"--dependency=afterany:{':'.join(after)}"] if after else []
    words += ["array.sbatch", "0", shlex.join(map(str, command))]
    return f"submitted as job {', '.join(earlier)}" if earlier else "", earlier, words


def run_locally(folder: Path, args: Namespace, tasks: list[Task], missing: list[int]) -> int:
    """Run what is missing here, some at a time, then the ensemble; an interrupt ends all of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    script = "echo task {} begins >&2; bash array.sbatch {} >logs/local_{}.log 2>&1 || true"
    pool = ["xargs", f"-P{args.local}", "-I{}", "sh", "-c", script]
    run_here(folder, pool, "\n".join(map(str, missing)))
    failed = [task for task in missing if not is_done(tasks[task])]
    for line in why_failed(folder, tasks, failed):
        log.info(f"task {line}")
    if failed:
        log.info(f"tasks {shorten_numbers(failed)} failed; the same command runs them again")
    elif args.then_ensemble:
        state, _, words = plan_ensemble(folder, args, needed=False)
        if not state:
            script = 'exec bash array.sbatch 0 "$0" >logs/ensemble_local.log 2>&1'
            failed = [0] if run_here(folder, ["sh", "-c", script, words[-1]]) else []
            state = f"{'failed' if failed else 'done'}, see {folder}/logs/ensemble_local.log"
        log.info(f"ensemble {state}")
    return int(bool(failed))


def run_here(folder: Path, words: list[str], text: str = "") -> int:
    """Run a command in a process group of its own, which ends with us; return its exit status."""
    os.environ["SLURM_ARRAY_TASK_ID"] = "0"
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=folder, stdin=pipe, text=True, start_new_session=True)
    try:
        process.communicate(text)
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            while True:  # until none of the group is left, xargs' children included
                os.killpg(process.pid, signal.SIGTERM)
                process.poll()
                time.sleep(0.05)
        raise
    return process.returncode
