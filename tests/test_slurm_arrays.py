"""The array generators: what they write, and how the tasks run without Slurm."""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import wait_until
from slurm_stub import batch_master, expected_results, kill_task, stub_batch, stub_results

import create_batch_array_sinbad as resnet
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from command_line import UserError
from loco_datasets import scores_folder
from result_files import LevelScores, save_scores
from slurm_arrays import write_ensemble
from slurm_patterns import expand_pattern
from slurm_states import (
    Submission,
    look,
    read_batch,
    read_submissions,
    read_tasks,
    record_submission,
)

REPO = Path(__file__).resolve().parent.parent


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
        "setup =\n    module load cuda ; true # quietly\n    source /venv/bin/activate\n"
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
    assert "\nmodule load cuda ; true # quietly\nsource /venv/bin/activate\n" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_size_ratio", ".5", ".33"], "crop_size_ratio must .* both write 9_crop"),
        (["--mvtype", "nothing"], "mvtype must be a data set"),
        (["--throttle", "0"], "throttle: must be a whole number from 1, got 0"),
        (["--results_dir", "a\tb"], "must be without tabs"),
        (
            ["--results_dir", "run#2"],
            r"results_dir: must be without tabs and \{\}#, got '/.*run#2'",
        ),
        (["--version_name", "run#2"], r"version_name: must be without tabs and \{\}#, got 'run#2'"),
        (["--out_dir", "100%"], r"out_dir: must be without tabs and \{\}%\\, got '/.*100%'"),
        (["--out_dir", "a\\b"], r"out_dir: must be without tabs"),
        (["--precision", "fp8"], "precision: must be fp32 or tf32 or bf16, got fp8"),
        (["--device", "gpu"], "device: must be auto, cpu, cuda or cuda:<i>, got gpu"),
        (["--device", "cuda:"], "device: must be auto, cpu, cuda or cuda:<i>, got cuda:"),
        (["--mem", "1G\n2G"], "must be one line, got"),
        (["--profile", "missing.ini"], "profile must be a file, got missing.ini: No such file"),
        (["--status"], r"batch.json must be a file, got none; write it with create_batch"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resnet.main(["--out_dir", str(tmp_path / "new"), *flags])


SETTINGS = {"crop_size_ratio": 0.5, "seed": 3, "n_projections": 1000, "official": False}
NETWORK = {"net": "wide_resnet50_2", "weights_sha256": "random", "precision": "fp32"}


def save_output(path: Path, settings: dict[str, object]) -> None:
    """Write a file of scores (9 crops) that was made with these settings."""
    run = {"settings": {**settings, "mvtype": "pushpins_loco"}}
    scores = LevelScores(np.ones((9, 2)), np.ones((9, 2)), np.ones(2), [], run)
    save_scores(path, scores, path.parents[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 4, now seed is 3"),
        ({"crop_size_ratio": 0.4}, "crop_size_ratio 0.4, now crop_size_ratio is 0.5"),
        ({"net": "resnet18"}, "net resnet18, now net is wide_resnet50_2"),
        ({"precision": "bf16"}, "precision bf16, now precision is fp32"),
        ({"weights_sha256": "random"}, "weights_sha256 random, now weights_sha256 is that of imag"),
    ],
)
@pytest.mark.parametrize("output", [0, 2])
def test_results_of_other_settings_do_not_count_as_done(
    tmp_path: Path, change: dict[str, object], message: str, output: int
) -> None:
    flags = ["--out_dir", str(tmp_path / "a"), "--results_dir", str(tmp_path / "r")]
    flags += ["--mvtype", "pushpins_loco", "--seed", "3", "--crop_size_ratio", ".5"]
    flags += ["--rep", "0-2", "--pyramid_level", "7"]
    resnet.main(flags)
    paths = list(map(Path, expand_pattern(read_tasks(tmp_path / "a")[0].outputs)))
    for path in paths:
        save_output(path, {**SETTINGS, **NETWORK, "weights_sha256": "0" * 64})
    resnet.main(flags)
    save_output(paths[output], {**SETTINGS, **NETWORK, "weights_sha256": "0" * 64, **change})
    with pytest.raises(UserError, match=f"{paths[output]} was made with {message}.*; choose"):
        resnet.main(flags)
    resnet.main([*flags, "--version_name", "ver2"])


@pytest.mark.parametrize("made_with", ["random", "a.pth", "b.pth"])
@pytest.mark.parametrize("wanted", ["random", "a.pth", "b.pth"])
def test_results_of_other_weights_do_not_count_as_done(
    tmp_path: Path, made_with: str, wanted: str
) -> None:
    names = {"random": "random"}
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_text(name)
        names[name] = hashlib.sha256(name.encode()).hexdigest()
    weights = wanted if wanted == "random" else str(tmp_path / wanted)
    flags = ["--out_dir", str(tmp_path / "a"), "--results_dir", str(tmp_path / "r"), "--seed", "3"]
    flags += ["--mvtype", "pushpins_loco", "--crop_size_ratio", ".5", "--weights", weights]
    resnet.main(flags)
    path = Path(read_tasks(tmp_path / "a")[1].outputs)
    save_output(path, {**SETTINGS, **NETWORK, "weights_sha256": names[made_with]})
    if made_with == wanted:
        resnet.main(flags)
        return
    with pytest.raises(UserError, match=f"{names[made_with]}, now .* is {names[wanted]}; choose"):
        resnet.main(flags)


def test_results_of_the_raw_pixels_have_no_network(tmp_path: Path) -> None:
    flags = ["--out_dir", str(tmp_path / "a"), "--results_dir", str(tmp_path / "r"), "--seed", "3"]
    flags += ["--mvtype", "pushpins_loco", "--crop_size_ratio", ".5", "--n_projections", "1000"]
    flags += ["--rep", "0-1", "--net", "resnet18", "--weights", "missing.pth"]
    pixels.main(flags)
    for path in expand_pattern(read_tasks(tmp_path / "a")[0].outputs):
        save_output(Path(path), SETTINGS)
    pixels.main(flags)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("colour = red", r"keys of .*site\.ini must be flags of Slurm, got colour"),
        ("requeue = perhaps", r"requeue in .*site\.ini must be yes or no, got perhaps"),
        ("throttle = many", r"site\.ini: argument --throttle: must be a whole .* got many"),
        ("mem = 1G\n 2G", r"site\.ini: argument --mem: must be one line, got"),
        ("cpus = 4 ; four", r"cpus in .*site\.ini must be a value alone, got 4 ; four"),
        ("cpus = 4 # four", r"cpus in .*site\.ini must be a value alone, got 4 # four"),
    ],
)
def test_bad_profile_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "site.ini").write_text(f"[slurm]\n{line}\n")
    with pytest.raises(UserError, match=message):
        resnet.main(["--profile", str(tmp_path / "site.ini"), "--out_dir", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


def test_braces_in_the_working_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a{1,2}").mkdir()
    monkeypatch.chdir(tmp_path / "a{1,2}")
    with pytest.raises(UserError, match=r"must be without tabs and \{\}.*a\{1,2\}/results"):
        resnet.main(["--out_dir", str(tmp_path / "new"), "--results_dir", "results"])


def test_help_shows_no_empty_default(capsys: pytest.CaptureFixture[str]) -> None:
    for script in (resnet, pixels):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        assert "(default: )" not in capsys.readouterr().out


def test_generators_start_at_once_and_without_torch() -> None:
    code = (
        "import sys, create_batch_array_sinbad, create_batch_array_sinbad_224; print(*sys.modules)"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
        seconds.append(time.monotonic() - started)
        assert not {"torch", "numpy", "tqdm"} & set(found.stdout.decode().split())
    assert min(seconds) < 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean(tmp_path: Path) -> None:
    root = tmp_path / "with space's"
    a, b = root / "sbatches", root / "sbatches_224"
    common = ["--setup", "source /x/activate", "--exclude", "n[1-3]", "--then_ensemble"]
    resnet.main(["--out_dir", str(a), *common])
    pixels.main(["--out_dir", str(b), *common])
    write_ensemble(a, read_batch(a))
    scripts = [a / "ensemble.sbatch", *root.glob("*/array.sbatch"), *root.glob("*/batch_master.sh")]
    assert len(scripts) == 5
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


# --- damaged and moved folders ---------------------------------------------------------------


def cut(text: bytes) -> bytes:
    """Leave out the last bytes of the last line."""
    return text[:-3]


def cut_a_line(text: bytes) -> bytes:
    """Leave out the last line."""
    return text[: text[:-1].rindex(b"\n") + 1]


DAMAGES = {
    "cut": cut,
    "a line less": cut_a_line,
    "edited": lambda text: text.replace(b"0", b"1", 1),
    "no text": lambda text: b"\xff\xfe\x00",
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("flags", [["--status"], ["--local", "1"], []])
def test_a_damaged_list_is_one_line_and_repaired(
    tmp_path: Path, damage: str, flags: list[str]
) -> None:
    folder = stub_batch(tmp_path, 3, 0, "--setup", "exit 3")
    batch_master(folder, "--local", "2")
    path = folder / "tasks.tsv"
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    found = batch_master(folder, *flags)
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        f"error: {path} must be as it was written, got another text; write it with "
        "create_batch_array_sinbad.py or create_batch_array_sinbad_224.py"
    ]
    stub_batch(tmp_path, 3, 0, "--setup", "exit 3")
    assert path.read_bytes() == whole
    assert len(read_submissions(folder)) == 1


@pytest.mark.parametrize(
    ("name", "text", "cure"),
    [
        *[("batch.json", text, "write it") for text in (b"", b"[]", b"null", b'{"name": 1}')],
        ("batch.json", b"\xff\xfe", "write it"),
        *[("submitted.tsv", text, "remove it") for text in (b"7\tarray\n", b"7", b"\xff\n")],
        ("submitted.tsv", b"7\tarray\t0\t0-\tnow\n", "remove it"),
    ],
)
def test_other_damaged_files_are_one_line(
    tmp_path: Path, name: str, text: bytes, cure: str
) -> None:
    folder = stub_batch(tmp_path, 1, 0)
    (folder / name).write_bytes(text)
    found = batch_master(folder)
    assert found.returncode == 2
    assert f"{name} must be as it was written, got another text; {cure}" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    if name == "batch.json":
        stub_batch(tmp_path, 1, 0)
        assert read_batch(folder).mvtypes == ["pushpins_loco"]


def test_a_moved_folder_runs_its_own_tasks(tmp_path: Path) -> None:
    elsewhere = ["--setup", "cd /"]
    stub_batch(tmp_path, 3, 0, *elsewhere).rename(tmp_path / "moved")
    stub_batch(tmp_path, 3, 0, *elsewhere, "--version_name", "other")  # at the old path
    assert batch_master(tmp_path / "moved", "--local", "2").returncode == 0
    assert stub_results(tmp_path / "moved") == expected_results(3)
    assert not list(tmp_path.glob("results/other*"))


def test_folders_of_other_alphabets(tmp_path: Path) -> None:
    folder = stub_batch(tmp_path / "Größe 大", 1, 0)
    plain = {**os.environ, "LC_ALL": "C"}
    command = ["sh", "batch_master.sh", "--local", "1"]
    found = subprocess.run(command, cwd=folder, capture_output=True, env=plain, check=False)
    assert found.returncode == 0, found.stderr
    assert stub_results(folder) == expected_results(1)


# --- without Slurm ---------------------------------------------------------------------------


def states(folder: Path) -> dict[str, str]:
    """Return the numbers of tasks by state that --status prints."""
    lines = batch_master(folder, "--status").stdout.splitlines()
    return dict(line.split()[:2] for line in lines[1:4])


def test_local_runs_resume_and_say_why_a_task_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub_batch(tmp_path / "it's mine", 5, 0.1)
    unstarted = batch_master(folder, "--status")
    assert unstarted.returncode == 1
    assert "nothing was submitted yet" in unstarted.stderr
    monkeypatch.setenv("STUB_FAILS", "3")
    first = batch_master(folder, "--local", "2")
    assert first.returncode == 1
    status = batch_master(folder, "--status")
    assert status.returncode == 1
    for text in (first.stderr, status.stdout):
        assert "task 3 failed: error: rep must be another" in text
    assert states(folder) == {"done": "4", "running": "0", "missing": "1"}
    shutil.rmtree(folder / "logs")
    monkeypatch.delenv("STUB_FAILS")
    again = batch_master(folder, "--local", "2")
    assert "5 tasks: 4 done, 0 running, 1 missing" in again.stderr
    assert batch_master(folder, "--status").returncode == 0
    assert stub_results(folder) == expected_results(5)


def test_local_tasks_end_with_an_interrupt_and_are_seen_after_a_kill(tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 3, 30)
    command = ["sh", "batch_master.sh", "--local", "2"]
    runs = []
    for end in (signal.SIGINT, signal.SIGKILL):
        runs.append(subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True))
        wait_until(lambda: states(folder)["running"] == "2", 20, "two local tasks")
        second = batch_master(folder, "--local", "2")
        assert second.returncode == 2
        assert "must be driven by one batch_master.sh" in second.stderr
        runs[-1].send_signal(end)
        runs[-1].wait()
        n_left = {signal.SIGINT: "0", signal.SIGKILL: "2"}[end]
        assert states(folder) == {"done": "0", "running": n_left, "missing": str(3 - int(n_left))}
        said = "tasks 0-1 failed: ended without a word" in batch_master(folder, "--status").stdout
        assert said == (end == signal.SIGINT)
    assert "interrupted; run the same command again" in str(runs[0].communicate()[1])
    for task in (0, 1):  # what the killed run left
        kill_task(task, folder)


def test_a_local_task_without_output_has_failed(tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 2, 0, "--setup", "exit 0")
    found = batch_master(folder, "--local", "2")
    assert found.returncode == 1
    for task in (0, 1):
        log = folder / f"logs/local_{task}.log"
        assert f"task {task} failed: wrote no output ({log})" in found.stderr
    assert "tasks 0-1 failed; the same command runs what is missing again" in found.stderr


def test_finished_tasks_do_not_need_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stub_batch(tmp_path / "it", 2, 0)
    assert batch_master(folder, "--local", "2").returncode == 0
    record_submission(folder, Submission("7", "array", 0, (0, 1)))
    for name in ("squeue", "scontrol", "sbatch"):  # they do not answer
        (tmp_path / name).write_text("#!/bin/sh\necho no answer >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for flags in ([], ["--status"], ["--local", "1"]):
        assert batch_master(folder, *flags).returncode == 0
    Path(read_tasks(folder)[1].outputs).unlink()
    unfinished = batch_master(folder)
    assert unfinished.returncode == 2
    assert "must succeed, got exit status 1: no answer" in unfinished.stderr


def test_another_list_of_tasks_forgets_old_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAILS", "0")
    folder = stub_batch(tmp_path, 1, 0)
    batch_master(folder, "--local", "2")
    assert len(read_submissions(folder)) == 1
    stub_batch(tmp_path, 2, 0)
    assert read_submissions(folder) == []
    assert look(folder, read_tasks(folder)).missing == [0, 1]
