"""Atomic writes: whose hidden files go, slower runs, links, devices and pipes."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import files_below

from sinbad import atomic

ROOT = Path(__file__).parents[1]


def leave_hidden(path: Path, hidden_in: Path | None = None) -> Path:
    """Leave what a killed run leaves of an output."""
    with suppress(KeyboardInterrupt), atomic.atomic_path(path, hidden_in) as hidden:
        raise KeyboardInterrupt
    hidden.write_bytes(b"half of it")
    return hidden


def write(path: Path, content: str, folder: bool) -> None:
    if folder:
        path.mkdir()
    (path / "part" if folder else path).write_text(content)


def test_only_hidden_files_of_the_same_output_are_removed(tmp_path: Path) -> None:
    score_files = [tmp_path / f"pushpins_{kind}/scores.npz" for kind in ("loco", "struct")]
    tables = [tmp_path / name for name in ("a.csv", "a.csv.csv", "a", "[a].csv", "n" * 250)]
    hidden = {path: leave_hidden(path, tmp_path) for path in score_files + tables}
    others = tmp_path / ".other.partial"
    for path in (others, *hidden.values()):
        path.touch()
        os.utime(path, (0, 0))  # ages do not count
    while hidden:
        path, removed = hidden.popitem()
        atomic.atomic_write(path, "complete", tmp_path)
        assert not removed.exists()
        assert all(kept.exists() for kept in (others, *hidden.values()))


@pytest.mark.parametrize("folder", [False, True])
def test_a_slower_run_goes_on_with_the_output_of_a_faster_one(folder: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic.atomic_path(out) as slower:
        write(slower, "slow", folder)
        with atomic.atomic_path(out) as faster:
            write(faster, "fast", folder)
        before = out.stat().st_ino
        assert not slower.exists()
        if folder:
            write(slower / "more", "late", folder)
    assert list(files_below(tmp_path).values()) == [b"fast"]
    assert out.stat().st_ino == before


def test_other_missing_files_stay_errors(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError, match="no image"), atomic.atomic_path(tmp_path / "out"):
        (tmp_path / "no image").read_bytes()
    with pytest.raises(FileNotFoundError, match="out'"), atomic.atomic_path(tmp_path / "out") as at:
        at.mkdir()
        (at / "no part").read_bytes()
    with pytest.raises(FileNotFoundError, match="new'"), atomic.atomic_path(tmp_path / "new"):
        pass  # nothing is written, or all was removed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_containers_of_one_host_name_leave_what_the_other_is_writing(tmp_path: Path) -> None:
    container = ["unshare", "--fork", "--pid"]  # has process numbers of its own
    code = "import sys, pathlib; from sinbad import atomic; "
    code += "atomic.atomic_write(pathlib.Path(sys.argv[1]), 'complete')"
    try:
        subprocess.run([*container, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make a process namespace (root)")
    with atomic.atomic_path(tmp_path / "out") as living:
        living.write_text("complete")
        for name in ("other", "out"):
            assert living.exists()
            command = [*container, sys.executable, "-c", code, tmp_path / name]
            subprocess.run(command, check=True, cwd=ROOT)
    assert files_below(tmp_path) == {"other": b"complete", "out": b"complete"}


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_is_replaced_unless_another_process_has_finished_it_meanwhile(
    existed: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for content in ("first", "second") if existed else ():
        with atomic.atomic_path(out) as hidden:
            write(hidden, content, folder=True)
        assert files_below(tmp_path) == {"out/part": content.encode()}
    with atomic.atomic_path(out) as hidden:
        write(hidden, "late", folder=True)
        if existed:
            out.rename(tmp_path / "old")
        write(out, "finished", folder=True)
    assert files_below(out) == {"part": b"finished"}
    assert not list(tmp_path.glob(".*"))


def test_hidden_files_lie_where_no_reader_looks(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    assert atomic.hidden_folder(tmp_path / "rep_num_0/pushpins_loco") == tmp_path / "rep_num_0"
    assert atomic.hidden_folder(other) == other  # itself where a file system begins
    linked = other / f"sinbad-test-{os.getpid()}" / "level"
    linked.mkdir(parents=True)
    try:
        (tmp_path / "level").symlink_to(linked)
        assert atomic.hidden_folder(tmp_path / "level") == linked.parent
        atomic.atomic_write(tmp_path / "level/file", "x", linked.parent)
        (tmp_path / "link").symlink_to(linked / "file")
        atomic.atomic_write(tmp_path / "link", "y", tmp_path)
        assert files_below(linked.parent) == {"level/file": b"y"}
    finally:
        shutil.rmtree(linked.parent)


def test_many_runs_may_write_below_one_folder_at_once(tmp_path: Path) -> None:
    def write_all(number: int) -> None:
        for i in range(30):
            for name in (f"{number}_{i}.txt", "shared.txt"):
                atomic.atomic_write(tmp_path / name, b"complete")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_all, range(8)))
    files = files_below(tmp_path)
    assert len(files) == 8 * 30 + 1
    assert set(files.values()) == {b"complete"}


# ---------------------------------------------------------------- links, devices, pipes


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_target_is_replaced(dangling: bool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data/target.csv", tmp_path / "link.csv"
    link.symlink_to("data/target.csv")
    if not dangling:
        target.write_text("before")
        (tmp_path / "kept").hardlink_to(target)
    atomic.check_writable(link)
    atomic.atomic_write(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert dangling or (tmp_path / "kept").read_text() == "before"  # replaced, not written over


def test_a_device_or_a_pipe_is_written_and_stays(tmp_path: Path) -> None:
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    atomic.check_writable(fifo)  # waits for no reader
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    atomic.atomic_write(fifo, "data")
    reader.join(timeout=10)
    assert read == [b"data"]
    assert fifo.is_fifo()
    terminal, device = os.openpty()
    atomic.check_writable(Path(os.ttyname(device)))
    atomic.atomic_write(Path(os.ttyname(device)), "data")
    assert os.read(terminal, 100) == b"data"
    with pytest.raises(OSError, match="/dev/full"):
        atomic.atomic_write(Path("/dev/full"), "data")


@pytest.mark.parametrize("redirection", ["> file", "| cat > file", ">> file"])
def test_standard_output_is_written_and_stays(redirection: str, tmp_path: Path) -> None:
    code = "print('before'); out = pathlib.Path('/dev/stdout'); atomic.check_writable(out); "
    code += "atomic.atomic_write(out, 'data\\n'); print('after')"
    command = f'"{sys.executable}" -c "import pathlib; from sinbad import atomic; {code}"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    subprocess.run(
        f"{command} {redirection}", shell=True, check=True, cwd=tmp_path, env=environment
    )
    assert files_below(tmp_path) == {"file": b"before\ndata\nafter\n"}


def test_an_output_that_cannot_be_written_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    present = sorted(tmp_path.rglob("*"))
    for name, error in (("taken", IsADirectoryError), ("file/x/y", NotADirectoryError)):
        for attempt in (atomic.check_writable, lambda path: atomic.atomic_write(path, b"data")):
            with pytest.raises(error) as caught:
                attempt(tmp_path / name)
            assert str(tmp_path / name).startswith(caught.value.filename)
    for name in ("file", "new", "missing/folders/new"):
        atomic.check_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == present
