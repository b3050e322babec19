"""The array generators: what they write, what they submit, and how the tasks run without Slurm."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from slurm_cluster import wait_until
from slurm_stub import batch_master, expected_results, process_of, stub_batch, stub_results

import create_batch_array_sinbad as network
import create_batch_array_sinbad_224 as pixels
import sinbad_single_layer
from sinbad import errors, loco, slurm

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("numbers", [[3], [0, 1, 2, 7], [0, 4, 8], list(range(100)), [9, 1, 2]])
def test_numbers_are_written_and_read_as_slurm_does(numbers: list[int]) -> None:
    assert slurm.expand_numbers(slurm.shorten_numbers(numbers)) == sorted(numbers)
    assert slurm.expand_pattern(f"a/{slurm.brace_pattern(numbers)}/b") == [
        f"a/{n}/b" for n in numbers
    ]


def test_array_indices_of_squeue() -> None:
    assert slurm.expand_numbers("0-8:4,11%3") == [0, 4, 8, 11]
    assert slurm.expand_numbers("N/A") == [0]


# ---------------------------------------------------------------- what is written


def test_the_papers_grid(tmp_path: Path) -> None:
    network.main(["--out_dir", str(tmp_path / "a")])
    pixels.main(["--out_dir", str(tmp_path / "b")])
    tasks = slurm.read_tasks(tmp_path / "a")
    assert len(tasks) == 10 * 2 * 4
    assert len({outputs for outputs, _ in tasks}) == len(tasks)
    tasks = slurm.read_tasks(tmp_path / "b")
    assert [len(slurm.expand_pattern(outputs)) for outputs, _ in tasks] == [100] * 10
    assert "--rep 0-99" in tasks[0][1]


@pytest.mark.parametrize(
    ("flags", "n_tasks", "n_files"),
    [((), 16, 1), (("--group", "class"), 1, 16), (("--rep", "0-4", "--reps_per_task", "2"), 48, 2)],
)
def test_granularity(tmp_path: Path, flags: tuple[str, ...], n_tasks: int, n_files: int) -> None:
    common = ["--mvtype", "pushpins", "--results_dir", str(tmp_path / "r")]
    network.main(["--out_dir", str(tmp_path / "a"), *common, *flags])
    tasks = slurm.read_tasks(tmp_path / "a")
    assert len(tasks) == n_tasks
    files = [path for outputs, _ in tasks for path in slurm.expand_pattern(outputs)]
    assert len(slurm.expand_pattern(tasks[0][0])) == n_files
    assert len(set(files)) == len(files)
    first = (
        loco.scores_folder(tmp_path / "r", "ver1", 7, 0, "pushpins_loco") / "16_crop_anom_maps.npz"
    )
    assert files[0] == str(first)


def test_every_command_is_one_of_sinbad_single_layer(tmp_path: Path) -> None:
    own = ["--weights", "some weights.pth", "--net", "resnet18", "--official", "--seed", "3"]
    network.main(["--out_dir", str(tmp_path / "a b"), "--group", "class", *own, "--rep", "0", "2"])
    for _, command in slurm.read_tasks(tmp_path / "a b"):
        python, script, *argv = shlex.split(command)
        assert (python, Path(script)) == (sys.executable, REPO / "sinbad_single_layer.py")
        args = sinbad_single_layer.parse_args(argv)
        assert args.pyramid_level == [7, 14]
        assert args.crop_size_ratio == [0.25, 0.5, 0.7, 0.99]
        assert (args.rep, args.seed, args.net, args.official) == ([[0], [2]], 3, "resnet18", True)
        assert Path(args.weights) == Path.cwd() / "some weights.pth"
        assert Path(args.data_dir) == REPO.parent / "dataset_loco/data_matrices"


@pytest.mark.parametrize("name", ["it's mine_loco", "$(touch x)_loco", "名前_struct", "a;b_loco"])
def test_names_with_characters_of_the_shell(tmp_path: Path, name: str) -> None:
    folder = stub_batch(tmp_path, 1, 0, "--mvtype", name)
    assert batch_master(folder, "--local", "1").returncode == 0
    assert stub_results(folder) == expected_results(1)
    assert Path(slurm.read_tasks(folder)[0][0]).parent.name == name


def test_classes_of_the_matrices_belong_to_all(tmp_path: Path) -> None:
    for name in ("toy_loco", "toy_struct"):
        (tmp_path / "m" / name).mkdir(parents=True)
        (tmp_path / "m" / name / "train_data.npy").touch()
    pixels.main(["--data_dir", str(tmp_path / "m"), "--out_dir", str(tmp_path / "a")])
    assert [Path(outputs).parent.name for outputs, _ in slurm.read_tasks(tmp_path / "a")] == [
        "toy_loco",
        "toy_struct",
    ]


def test_sbatch_lines_only_for_what_was_set(tmp_path: Path) -> None:
    site = tmp_path / "site.txt"
    site.write_text(
        "# our cluster\n--partition gpu\n--mem=16G\n--throttle 4\n--requeue\n"
        "--setup 'module load cuda ; true # quietly'\n--setup 'source /venv/bin/activate'\n"
    )
    flags = ["--mvtype", "pushpins_loco", "--out_dir"]
    network.main([*flags, str(tmp_path / "a")])
    text = (tmp_path / "a/array.sbatch").read_text()
    options = [line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == ["#SBATCH --open-mode", "#SBATCH --gres"]
    network.main([*flags, str(tmp_path / "b"), f"@{site}", "--mem", "32G", "--mail", "me@here"])
    text = (tmp_path / "b/array.sbatch").read_text()
    for line in ("partition=gpu", "mem=32G", "requeue", "mail-user=me@here", "mail-type=END,FAIL"):
        assert f"#SBATCH --{line}\n" in text
    assert "\nmodule load cuda ; true # quietly\nsource /venv/bin/activate\n" in text
    assert "--throttle=4" in (tmp_path / "b/batch_master.sh").read_text()
    for no_gpu in (["--gres", "none"], ["--device", "cpu"]):
        network.main([*flags, str(tmp_path / "c"), *no_gpu])
        assert "--gres" not in (tmp_path / "c/array.sbatch").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_size_ratio", ".5", ".33"], "crop_size_ratio must .* both write 9_crop"),
        (["--mvtype", "nothing"], "mvtype must be a data set"),
        (["--mvtype", "toy/"], "mvtype must be a data set"),
        (["--mvtype", "-x_loco"], "expected at least one argument"),
        (["--mvtype", "a{1,2}_loco"], "must be UTF-8 without braces, #, tabs"),
        (["--mvtype", "a\tb_loco"], "must be UTF-8 without braces, #, tabs"),
        (["--mvtype", "a\udcffb_loco"], "must be UTF-8 without braces, #, tabs"),
        (["--mvtype", "a,b", "a,b_struct", "--group", "class"], "mvtype must be a data set"),
        (["--mvtype", "a,b_loco", "a,b_struct", "--group", "class"], "without commas where a task"),
        (["--throttle", "0"], "throttle: must be a whole number from 1, got 0"),
        (["--results_dir", "a\tb"], "must be UTF-8 without braces, #, tabs"),
        (["--results_dir", "run#2"], "braces, #, tabs"),
        (["--version_name", "run#2"], "braces, #, tabs"),
        (["--out_dir", "100%"], "--out_dir without % and"),
        (["--out_dir", "a\\b"], "--out_dir without % and"),
        (["--precision", "fp8"], "precision: invalid choice: 'fp8'"),
        (["--mem", "1G\n2G"], "must be one line each"),
        (["@missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--pyramid_level", "7", "224"], "pyramid_level must be of the network, got 224"),
        (["--status"], "tasks.tsv must hold whole lines .* got none"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        network.main(["--out_dir", str(tmp_path / "new"), *flags])
    assert not (tmp_path / "new").exists()


SETTINGS = {"crop_size_ratio": 0.5, "seed": 3, "n_projections": 1000, "official": False}
NETWORK = {"net": "wide_resnet50_2", "weights_sha256": "random", "precision": "fp32"}


def save_output(path: Path, settings: dict[str, object]) -> None:
    """Write what a generator reads of a file of scores: the record of its settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, run=json.dumps({"settings": {**settings, "mvtype": "pushpins_loco"}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 4, now seed is 3"),
        ({"crop_size_ratio": 0.4}, "crop_size_ratio 0.4, now crop_size_ratio is 0.5"),
        ({"net": "resnet18"}, "net resnet18, now net is wide_resnet50_2"),
        ({"precision": "bf16"}, "precision bf16, now precision is fp32"),
        ({"compile": True}, "compile True, now compile is False"),
        ({"n_projections": 10}, "n_projections 10, now n_projections is 1000"),
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
    network.main(flags)
    paths = list(map(Path, slurm.expand_pattern(slurm.read_tasks(tmp_path / "a")[0][0])))
    for path in paths:
        save_output(path, {**SETTINGS, **NETWORK, "weights_sha256": "0" * 64})
    network.main(flags)
    save_output(paths[output], {**SETTINGS, **NETWORK, "weights_sha256": "0" * 64, **change})
    with pytest.raises(
        errors.UserError, match=f"{paths[output]} was made with {message}.*; choose"
    ):
        network.main(flags)
    network.main([*flags, "--version_name", "ver2"])
    paths[output].write_bytes(b"PK\3\4 cut")
    with pytest.raises(errors.UserError, match=f"{paths[output]} must be a whole .npz file"):
        network.main(flags)
    np.savez(paths[output], scores=np.ones(3))  # as the authors' files: no record
    network.main(flags)


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
    network.main(flags)
    path = Path(slurm.read_tasks(tmp_path / "a")[1][0])
    save_output(path, {**SETTINGS, **NETWORK, "weights_sha256": names[made_with]})
    if made_with == wanted:
        network.main(flags)
        return
    with pytest.raises(
        errors.UserError, match=f"{names[made_with]}, now .* is {names[wanted]}; choose"
    ):
        network.main(flags)


@pytest.mark.parametrize("generator", [network, pixels])
def test_compiled_is_a_setting_of_the_network_alone(tmp_path: Path, generator: ModuleType) -> None:
    flags = ["--out_dir", str(tmp_path / "a"), "--results_dir", str(tmp_path / "r")]
    flags += ["--mvtype", "pushpins_loco", "--rep", "0"]
    generator.main(flags)
    of_network = NETWORK if generator is network else {}
    for outputs, _ in slurm.read_tasks(tmp_path / "a"):
        (path,) = map(Path, slurm.expand_pattern(outputs))
        save_output(path, of_network)
    weights = ["--weights", "random"]
    generator.main([*flags, *weights])
    if generator is network:
        with pytest.raises(
            errors.UserError, match="was made with compile False, now compile is True"
        ):
            generator.main([*flags, *weights, "--compile"])
    else:
        generator.main([*flags, *weights, "--compile"])


def test_generators_start_at_once_and_without_torch() -> None:
    code = (
        "import sys, create_batch_array_sinbad, create_batch_array_sinbad_224; print(*sys.modules)"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
        seconds.append(time.monotonic() - started)
        assert "sinbad.slurm" in found.stdout.decode().split()
        assert not {"torch", "numpy", "tqdm"} & set(found.stdout.decode().split())
    assert min(seconds) < 0.6  # 0.1 s where nothing else runs


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean(tmp_path: Path) -> None:
    root = tmp_path / "with space's"
    common = ["--setup", "source /x/activate", "--exclude", "n[1-3]", "--then_ensemble"]
    network.main(["--out_dir", str(root / "sbatches"), *common])
    pixels.main(["--out_dir", str(root / "sbatches_224"), *common])
    scripts = [*root.glob("*/array.sbatch"), *root.glob("*/batch_master.sh")]
    assert len(scripts) == 4
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-3], lambda t: b"\xff\xfe\0", lambda t: b"", lambda t: b"1" + t[1:]]
)
@pytest.mark.parametrize("flags", [["--status"], ["--local", "1"], []])
def test_a_damaged_list_is_one_line_and_repaired(
    tmp_path: Path, damage: "type[bytes]", flags: list[str]
) -> None:
    folder = stub_batch(tmp_path, 3, 0)
    path = folder / "tasks.tsv"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    found = batch_master(folder, *flags)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: {path} must hold whole lines of index, outputs and command")
    stub_batch(tmp_path, 3, 0)
    assert path.read_bytes() == whole


# ---------------------------------------------------------------- submission, with stand-ins


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put one of Slurm's commands on the PATH; it notes its arguments in `folder`/calls."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\n{script}\n')
    path.chmod(0o755)


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder of stand-ins on the PATH: no jobs, arrays of 1001, job 4711 in a banner."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "calls").touch()
    stand_in(folder, "squeue", "true")
    stand_in(folder, "scontrol", 'echo "MaxArraySize            = ${MAX_ARRAY_SIZE:-1001}"')
    # Talks as a submit plugin does, before and after the answer to --parsable.
    stand_in(folder, "sbatch", 'echo "*** Quota: 40 % used. ***"; echo "4711;cluster"; echo Bye.')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def calls(slurm_commands: Path, name: str) -> list[str]:
    """Return the arguments of a stand-in's calls."""
    return [
        line
        for line in (slurm_commands / "calls").read_text().splitlines()
        if line.startswith(name)
    ]


def test_a_talkative_sbatch(slurm_commands: Path, tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 3, 0, "--throttle", "2")
    found = batch_master(folder)
    assert found.stdout == "4711\n"
    assert "--array=0-2%2 array.sbatch 0" in calls(slurm_commands, "sbatch")[0]


def test_a_silent_sbatch_is_an_error_and_nothing_is_submitted_twice(
    slurm_commands: Path, tmp_path: Path
) -> None:
    stand_in(slurm_commands, "sbatch", "exit 0")
    folder = stub_batch(tmp_path, 3, 0, "--max_array_size", "2")
    found = batch_master(folder)
    assert (found.returncode, found.stdout) == (2, "")
    assert "must print a job's id, got ''; look at squeue --me" in found.stderr
    assert len(calls(slurm_commands, "sbatch")) == 1


def test_a_controller_that_does_not_answer(slurm_commands: Path, tmp_path: Path) -> None:
    stand_in(
        slurm_commands, "squeue", "echo Unable to contact >&2; echo slurm controller >&2; exit 1"
    )
    folder = stub_batch(tmp_path, 2, 0)
    found = batch_master(folder)
    assert found.returncode == 2
    assert found.stderr.startswith("error: `squeue --noheader")
    assert "got exit status 1: Unable to contact slurm controller; what" in found.stderr
    assert calls(slurm_commands, "sbatch") == []
    assert batch_master(folder, "--status").returncode == 1
    assert "note: `squeue" in batch_master(folder, "--status").stderr
    assert batch_master(folder, "--local", "2").returncode == 0
    assert batch_master(folder).returncode == 0  # what is finished does not need Slurm
    assert stub_results(folder) == expected_results(2)


@pytest.mark.parametrize(
    ("size", "arrays"),
    [
        ("0", ["4711_0", "4711_1", "4711_2"]),
        ("2", ["--array=0-1", "--array=0"]),
        ("none", ["--array=0-2"]),
    ],
)
def test_limits_of_arrays(
    slurm_commands: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    arrays: list[str],
) -> None:
    monkeypatch.setenv("MAX_ARRAY_SIZE", size)
    folder = stub_batch(tmp_path, 3, 0)
    assert len(batch_master(folder).stdout.split()) == len(arrays)
    submitted = calls(slurm_commands, "sbatch")
    for line, array in zip(submitted, arrays, strict=True):
        if size == "0":  # a cluster without arrays: every task is a job
            assert "--array" not in line
            assert line.endswith(f" {array[-1]}")
        else:
            assert array in line.split()
    words = [word for line in submitted for word in line.split()]
    names = [word.partition("=")[2] for word in words if word.startswith("--job-name=")]
    listing = "\n".join(f'echo "47{i}|N/A|RUNNING|{name}|None"' for i, name in enumerate(names))
    stand_in(slurm_commands, "squeue", listing)
    if size == "0":
        assert "3 tasks: 0 done, 3 running, 0 missing" in batch_master(folder).stderr
        assert len(calls(slurm_commands, "sbatch")) == 3


def test_jobs_of_other_folders_and_lists_do_not_count(slurm_commands: Path, tmp_path: Path) -> None:
    folders = [stub_batch(tmp_path / name, 2, 0) for name in "ab"]
    batch_master(folders[0])
    (name,) = [
        word[11:] for word in calls(slurm_commands, "sbatch")[0].split() if "--job-name" in word
    ]
    answer = f'echo "*** hello ***"; echo "4711|0-1%2|PENDING|{name}|Resources"'
    stand_in(slurm_commands, "squeue", answer)
    status = batch_master(folders[0], "--status")
    assert "running        2  0-1" in status.stdout
    assert "0-1 of the running wait: Resources" in status.stdout
    assert batch_master(folders[0]).stdout == ""
    assert "missing        2  0-1" in batch_master(folders[1], "--status").stdout
    stub_batch(tmp_path / "a", 3, 0)
    assert "missing        3  0-2" in batch_master(folders[0], "--status").stdout


# ---------------------------------------------------------------- without Slurm


def states(folder: Path) -> dict[str, str]:
    """Return the numbers of tasks by state that --status prints."""
    lines = batch_master(folder, "--status").stdout.splitlines()
    return dict(line.split()[:2] for line in lines[1:4])


def test_local_runs_resume_and_say_why_a_task_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub_batch(tmp_path / "it's mine Größe 大", 5, 0.1)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("STUB_FAILS", "3")
    first = batch_master(folder, "--local", "2")
    assert first.returncode == 1
    status = batch_master(folder, "--status")
    assert status.returncode == 1
    assert "task 3 failed: error: rep must be another" in first.stderr
    assert "3 failed: error: rep must be another" in status.stdout
    assert states(folder) == {"done": "4", "running": "0", "missing": "1"}
    shutil.rmtree(folder / "logs")
    monkeypatch.delenv("STUB_FAILS")
    again = batch_master(folder, "--local", "2")
    assert "5 tasks: 4 done, 0 running, 1 missing" in again.stderr
    assert batch_master(folder, "--status").returncode == 0
    assert stub_results(folder) == expected_results(5)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_local_tasks_end_with_an_interrupt(tmp_path: Path, end: signal.Signals) -> None:
    folder = stub_batch(tmp_path, 3, 30)
    command = ["sh", "batch_master.sh", "--local", "2"]
    run = subprocess.Popen(
        command,
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(end, signal.SIG_DFL),  # a background job ignores SIGINT
    )
    wait_until(lambda: all(process_of(i, folder) for i in (0, 1)), 20, "two local tasks")
    run.send_signal(end)
    assert "interrupted; run the same command again" in run.communicate()[1]
    assert not any(process_of(i, folder) for i in (0, 1))
    assert states(folder) == {"done": "0", "running": "0", "missing": "3"}
    assert "0-1 failed: ended without a word" in batch_master(folder, "--status").stdout


def test_a_local_task_without_output_has_failed(tmp_path: Path) -> None:
    folder = stub_batch(tmp_path, 2, 0, "--setup", "exit 0")
    found = batch_master(folder, "--local", "2")
    assert found.returncode == 1
    assert "tasks 0-1 failed; the same command runs them again" in found.stderr


def test_a_moved_folder_runs_its_own_tasks(tmp_path: Path) -> None:
    elsewhere = ["--setup", "cd /"]
    stub_batch(tmp_path, 3, 0, *elsewhere).rename(tmp_path / "moved")
    stub_batch(tmp_path, 3, 0, *elsewhere, "--version_name", "other")  # at the old path
    assert batch_master(tmp_path / "moved", "--local", "2").returncode == 0
    assert stub_results(tmp_path / "moved") == expected_results(3)
    assert not list(tmp_path.glob("results/other*"))
