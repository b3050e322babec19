"""The array generators: what they write, and what a real one-node Slurm makes of it."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_cluster import SlurmMissingError, end_jobs, job_listing, running_cluster, wait_until

import calc_anom_ensm
import create_batch_array_sinbad as resnet
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
import slurm_jobs
from command_line import UserError
from loco_datasets import scores_folder
from slurm_arrays import brace_pattern, expand_pattern, read_tasks, shorten_numbers
from slurm_states import ask_slurm, look, read_submissions

REPO = Path(__file__).resolve().parent.parent
SECONDS_TO_FINISH = 120.0

# A task of a known length that writes like the real one: a temporary name, then renamed.
STUB = """\
import pathlib, sys, time
def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]
root = pathlib.Path(value("--results_dir"))
name = f"{value('--version_name')}_pyramid_lvl_{value('--pyramid_level')}"
rep, seconds = value("--rep"), pathlib.Path(__file__).with_name("seconds").read_text()
out = root / name / f"rep_num_{rep}" / value("--mvtype") / "1022.00_lvl_anom_maps.npz"
out.parent.mkdir(parents=True, exist_ok=True)
if out.exists():
    sys.exit(0)
if rep == value("--seed"):
    sys.exit("error: rep must not be the seed, got it; this line is the reason")
part = root / f".partial_{name}_{rep}"
with part.open("w") as stream:
    stream.write("half")
    stream.flush()
    time.sleep(float(seconds))
    stream.write(f" and half of {rep}")
part.replace(out)
"""


@pytest.fixture
def slurm(cluster: None) -> Iterator[None]:
    """Give the running Slurm to one test and cancel what it leaves."""
    yield
    end_jobs()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Give a running one-node Slurm, or skip and say why."""
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder:
        daemons = running_cluster(Path(folder))
        try:
            daemons.__enter__()
        except SlurmMissingError as error:
            pytest.skip(str(error))
        try:
            yield
        finally:
            daemons.__exit__(None, None, None)


def stub_batch(root: Path, n_reps: int, seconds: float, *more: str) -> Path:
    """Generate a folder of stub tasks, one a repetition; repetition 7777 would fail."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "stub.py").write_text(STUB)
    (root / "seconds").write_text(str(seconds))
    flags = ["--out_dir", str(root / "sbatches"), "--results_dir", str(root / "results")]
    flags += ["--mvtype", "pushpins_loco", "--rep", f"0-{n_reps - 1}", "--reps_per_task", "1"]
    args = pixels.parse_args([*flags, "--seed", "7777", "--device", "cpu", *more])
    slurm_jobs.generate(args, "stub", [224], "test", root / "stub.py")
    return root / "sbatches"


def batch_master(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `sh batch_master.sh` in its folder, as the README does."""
    command = ["sh", "batch_master.sh", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def is_quiet() -> bool:
    """Say whether Slurm has no jobs left."""
    return not job_listing()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all finished files below a folder, by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def job_ids(folder: Path) -> set[str]:
    """Return the jobs that a folder's tasks were submitted as."""
    return {submission.job_id for submission in read_submissions(folder)}


# --- without Slurm ---------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[7], [7, 14], list(range(100)), [0, 2, 3], ["a_loco", "b"]])
def test_patterns_name_every_file_as_bash_does(values: list[object]) -> None:
    pattern = f"/r/x_{brace_pattern(values)}/y"
    assert expand_pattern(pattern) == [f"/r/x_{value}/y" for value in values]
    bash = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
    assert bash.stdout.split() == expand_pattern(pattern)


def test_runs_of_numbers_are_shortened() -> None:
    assert shorten_numbers([15, 4, 8, 5, 6]) == ["4-6", "8", "15"]
    assert shorten_numbers([]) == []


def test_the_papers_grid(tmp_path: Path) -> None:
    resnet.main(["--out_dir", str(tmp_path / "a")])
    pixels.main(["--out_dir", str(tmp_path / "b")])
    tasks = read_tasks(tmp_path / "a")
    assert len(tasks) == 10 * 2 * 4
    assert len({task.outputs for task in tasks}) == len(tasks)
    assert [line.split("\t")[0] for line in (tmp_path / "a/tasks.tsv").open()] == [
        str(i) for i in range(80)
    ]
    tasks = read_tasks(tmp_path / "b")
    assert [len(expand_pattern(task.outputs)) for task in tasks] == [100] * 10
    assert "--rep 0-99" in tasks[0].command


@pytest.mark.parametrize(
    ("flags", "n_tasks", "n_files"),
    [((), 16, 1), (("--group", "class"), 1, 16), (("--rep", "0-4", "--reps_per_task", "2"), 48, 2)],
)
def test_granularity(tmp_path: Path, flags: tuple[str, ...], n_tasks: int, n_files: int) -> None:
    common = ["--mvtype", "pushpins", "--results_dir", str(tmp_path / "r")]
    resnet.main(["--out_dir", str(tmp_path / "a"), *common, *flags])
    tasks = read_tasks(tmp_path / "a")
    assert len(tasks) == n_tasks
    files = [path for task in tasks for path in expand_pattern(task.outputs)]
    assert len(expand_pattern(tasks[0].outputs)) == n_files
    assert len(set(files)) == len(files)
    first = scores_folder(tmp_path / "r", "ver1", 7, 0, "pushpins_loco") / "16_crop_anom_maps.npz"
    assert files[0] == str(first)


def test_every_command_is_one_of_sinbad_single_layer(tmp_path: Path) -> None:
    weights = ["--weights", "some weights.pth", "--net", "resnet18", "--official", "--seed", "3"]
    resnet.main(["--out_dir", str(tmp_path / "a b"), "--group", "class", *weights])
    for task in read_tasks(tmp_path / "a b"):
        python, script, *argv = shlex.split(task.command)
        assert (python, Path(script)) == (sys.executable, REPO / "sinbad_single_layer.py")
        args = sinbad_single_layer.parse_args(argv)
        assert args.pyramid_level == [7, 14]
        assert args.crop_size_ratio == [0.25, 0.5, 0.7, 0.99]
        assert args.official
        assert Path(args.weights) == Path.cwd() / "some weights.pth"


def test_sbatch_lines_only_for_what_was_set(tmp_path: Path) -> None:
    profile = tmp_path / "site.ini"
    profile.write_text(
        "[slurm]\npartition = gpu\nmem = 16G\nthrottle = 4\nrequeue = yes\n"
        "setup =\n    module load cuda\n    source /venv/bin/activate\n"
    )
    flags = ["--mvtype", "pushpins_loco", "--out_dir"]
    resnet.main([*flags, str(tmp_path / "a")])
    text = (tmp_path / "a/array.sbatch").read_text()
    options = [line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [f"#SBATCH --{o}" for o in ("job-name", "output", "open-mode", "gres")]
    resnet.main([*flags, str(tmp_path / "b"), "--profile", str(profile), "--mem", "32G"])
    text = (tmp_path / "b/array.sbatch").read_text()
    for line in ("--partition=gpu", "--mem=32G", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "\nmodule load cuda\nsource /venv/bin/activate\n" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_size_ratio", ".5", ".33"], "crop_size_ratio must .* both write 9_crop"),
        (["--mvtype", "nothing"], "mvtype must be a data set"),
        (["--throttle", "0"], "throttle: must be a whole number from 1, got 0"),
        (["--results_dir", "a\tb"], "must be one line without tabs"),
        (["--profile", "missing.ini"], "profile must be an INI file, got missing.ini"),
        (["--status"], "must be a folder with tasks.tsv"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resnet.main(["--out_dir", str(tmp_path / "new"), *flags])


def test_unknown_profile_key(tmp_path: Path) -> None:
    (tmp_path / "site.ini").write_text("[slurm]\ncolour = red\n")
    with pytest.raises(UserError, match=r"keys of .* must be flags of Slurm, got colour"):
        resnet.main(["--profile", str(tmp_path / "site.ini")])


def test_generators_start_at_once_and_without_torch() -> None:
    code = (
        "import sys, create_batch_array_sinbad, create_batch_array_sinbad_224; print(*sys.modules)"
    )
    started = time.monotonic()
    modules = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert time.monotonic() - started < 1
    assert not {"torch", "numpy", "tqdm"} & set(modules.stdout.split())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean(tmp_path: Path) -> None:
    root = tmp_path / "with space's"
    a, b = root / "sbatches", root / "sbatches_224"
    common = ["--setup", "source /x/activate", "--exclude", "n[1-3]", "--then_ensemble"]
    resnet.main(["--out_dir", str(a), *common])
    pixels.main(["--out_dir", str(b), *common])
    slurm_jobs.write_ensemble(a, slurm_jobs.read_batch(a))
    scripts = [a / "ensemble.sbatch", *root.glob("*/array.sbatch"), *root.glob("*/batch_master.sh")]
    assert len(scripts) == 5
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


def test_local_runs_resume_and_say_why_a_task_failed(tmp_path: Path) -> None:
    folder = stub_batch(tmp_path / "my runs", 5, 0.1, "--seed", "3")
    assert batch_master(folder, "--status").returncode == 1
    first = batch_master(folder, "--local", "2")
    assert first.returncode == 1
    status = batch_master(folder, "--status")
    assert status.returncode == 1
    assert "task 3 failed: error: rep must not be the seed" in status.stdout
    assert [line.split()[:2] for line in status.stdout.splitlines()[1:4]] == [
        ["done", "4"], ["running", "0"], ["missing", "1"],
    ]  # fmt: skip
    again = batch_master(folder, "--local", "2")
    assert "5 tasks: 4 done, 0 running, 1 missing" in again.stderr


def test_another_list_of_tasks_forgets_old_failures(tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 4, 0, "--seed", "3")
    batch_master(folder, "--local", "2")
    stub_batch(tmp_path, 5, 0)
    assert read_submissions(folder) == []
    assert look(folder, read_tasks(folder)).missing == [3, 4]


# --- on a real Slurm -------------------------------------------------------------------------


def test_2500_tasks_are_split_and_submitted_once(slurm: None, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 2500, 0)
    node = ask_slurm(["sinfo", "--noheader", "--format=%n"]).strip()
    ask_slurm(["scontrol", "update", f"nodename={node}", "state=drain", "reason=test"])
    try:
        done = batch_master(folder)
        assert done.returncode == 0, done.stderr
        jobs = done.stdout.split()
        rows = [line.split() for line in job_listing().splitlines()]
        arrays = [[int(index) for job, index, _ in rows if job == one] for one in jobs]
        assert [sorted(array) for array in arrays] == [
            list(range(1001)), list(range(1001)), list(range(498)),
        ]  # fmt: skip
        again = batch_master(folder)
        assert again.stdout == ""
        assert "2500 tasks: 0 done, 2500 running (2500 of them waiting), 0 missing" in again.stderr
    finally:
        ask_slurm(["scancel", f"--user={os.getuid()}"])
        ask_slurm(["scontrol", "update", f"nodename={node}", "state=resume"])
    wait_until(is_quiet, SECONDS_TO_FINISH, "the cancelled jobs")


def test_lines_of_later_arrays_are_counted_on(slurm: None, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 5, 0, "--max_array_size", "3", "--throttle", "1")
    assert len(batch_master(folder).stdout.split()) == 2
    wait_until(is_quiet, SECONDS_TO_FINISH, "five tasks")
    assert batch_master(folder, "--status").returncode == 0
    reps = [Path(task.outputs).read_text() for task in read_tasks(folder)]
    assert reps == [f"half and half of {rep}" for rep in range(5)]


def test_a_node_that_goes_down_loses_nothing(slurm: None, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 4, 0.8, "--requeue")
    node = ask_slurm(["sinfo", "--noheader", "--format=%n"]).strip()
    batch_master(folder)
    wait_until(lambda: all(process_of(task, folder) for task in (0, 1)), 10, "two tasks at work")
    ask_slurm(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])
    wait_until(lambda: not any(process_of(task, folder) for task in (0, 1)), 10, "their end")
    assert len(look(folder, read_tasks(folder)).running) == 4
    ask_slurm(["scontrol", "update", f"nodename={node}", "state=resume"])
    # Slurm holds requeued jobs back for two minutes; a person would wait.
    for job in {line.split()[0] for line in job_listing().splitlines()}:
        ask_slurm(["scontrol", "update", f"jobid={job}", "starttime=now"])
    wait_until(is_quiet, SECONDS_TO_FINISH, "four tasks")
    assert batch_master(folder, "--status").returncode == 0
    reps = [Path(task.outputs).read_text() for task in read_tasks(folder)]
    assert reps == [f"half and half of {rep}" for rep in range(4)]
    assert len(job_ids(folder)) == 1


def generate_both(root: Path, data_dir: Path) -> tuple[list[str], list[str]]:
    """Generate both folders, the ensemble after them; return the flags that fix the results."""
    single = ["--initial_res", "64", "--n_projections", "8", "--device", "cpu"]
    single += ["--data_dir", str(data_dir), "--mvtype", "pushpins_loco"]
    single += ["--results_dir", str(root / "results")]
    levels = [*single, "--net", "resnet18", "--weights", "random", "--batch_size", "4"]
    levels += ["--crop_size_ratio", ".7", ".99"]
    site = ["--setup", "export OMP_NUM_THREADS=1", "--requeue"]
    site += ["--then_ensemble", "--ensemble_out", str(root / "ensemble")]
    resnet.main(["--out_dir", str(root / "sbatches"), *levels, *site])
    pixels.main(["--out_dir", str(root / "sbatches_224"), *single, "--rep", "0-2", *site])
    levels += ["--pyramid_level", "7", "14"]
    return levels, [*single, "--pyramid_level", "224", "--rep", "0-2"]


def process_of(task: int, folder: Path) -> list[int]:
    """Return the process that runs the command of a task, if it runs."""
    words = shlex.split(read_tasks(folder)[task].command)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if path.read_text(errors="replace").split("\0")[:-1] == words:
                found.append(int(path.parent.name))
    return found


def run_in_one_process(root: Path, levels: list[str], pixel_level: list[str]) -> dict[str, bytes]:
    """Compute what the arrays compute, all of it in this process; the threads are the tasks'."""
    script = (root / "sbatches" / "ensemble.sbatch").read_text()
    ensemble = shlex.split(script.splitlines()[-1])
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sinbad_single_layer.main(levels)
        sinbad_single_layer.main(pixel_level)
        calc_anom_ensm.main(ensemble[2 : ensemble.index("&&")])
    finally:
        torch.set_num_threads(n_threads)
    return contents(root / "results") | contents(root / "ensemble")


def test_killed_tasks_are_redone_and_all_bytes_equal_one_process(
    slurm: None, tmp_path: Path, data_dir: Path
) -> None:
    root = tmp_path / "my runs"
    first, second = root / "sbatches", root / "sbatches_224"
    flags = generate_both(root, data_dir)

    submitted = batch_master(first)
    assert "ensemble not submitted: 1 tasks of" in submitted.stderr
    (job,) = submitted.stdout.split()
    job_224, ensemble = batch_master(second).stdout.split()
    dependency = ask_slurm(["scontrol", "show", "job", ensemble])
    assert f"afterok:{job}_*" in dependency
    assert f"afterok:{job_224}_*" in dependency
    again = batch_master(first)
    assert (again.stdout, again.stderr.splitlines()[-1]) == (
        "", f"ensemble submitted before, as job {ensemble}",
    )  # fmt: skip

    wait_until(lambda: all(process_of(task, first) for task in (0, 1)), 20, "tasks 0 and 1")
    time.sleep(0.5)
    ask_slurm(["scancel", f"{job}_0"])
    os.kill(process_of(1, first)[0], signal.SIGKILL)
    wait_until(is_quiet, SECONDS_TO_FINISH, "both arrays")
    status = batch_master(first, "--status").stdout
    assert "missing        2  0-1" in status
    assert re.search(r"task 0 failed: .*CANCELLED", status)
    assert re.search("task 1 failed: .*Killed", status)
    assert not (root / "ensemble").exists()

    again = batch_master(first)
    assert "4 tasks: 2 done, 0 running, 2 missing" in again.stderr
    assert "submitted --array=0-1 " in again.stderr
    assert len(again.stdout.split()) == 2  # the array and the ensemble
    wait_until(is_quiet, SECONDS_TO_FINISH, "the two tasks and the ensemble")
    assert batch_master(first, "--status").returncode == 0
    for folder in (first, second):
        assert "ensemble already done" in batch_master(folder).stderr

    on_slurm = contents(root / "results") | contents(root / "ensemble")
    assert sum(name.endswith(".npz") for name in on_slurm) == 4 + 3
    assert "scores.csv" in on_slurm
    for name in ("results", "ensemble"):
        shutil.rmtree(root / name)
    assert run_in_one_process(root, *flags) == on_slurm

    # What is left to --local: a task, and the ensemble.
    Path(read_tasks(first)[-1].outputs).unlink()
    shutil.rmtree(root / "ensemble")
    for folder in (first, second):
        (folder / "ensemble.done").unlink(missing_ok=True)
    local = batch_master(first, "--local", "2")
    assert local.returncode == 0, local.stderr
    assert "4 tasks: 3 done, 0 running, 1 missing" in local.stderr
    assert contents(root / "results") | contents(root / "ensemble") == on_slurm
