"""Command lines: flags in files, help, ranges, progress where there is no terminal."""

import importlib
import re
import time
from pathlib import Path

import pytest
from conftest import SHARED

import calc_anom_ensm
import data_to_matrices
import sinbad_detector
import sinbad_single_layer
from sinbad import __version__, cli, errors, settings

ROOT = Path(__file__).parents[1]
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if "run_script(" in path.read_text()]
COMMANDS = [(name,) for name in SCRIPTS] + [("sinbad_detector", c) for c in ("fit", "score")]


# ---------------------------------------------------------------- @FILE


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_flags_of_a_file(encoding: str, tmp_path: Path) -> None:
    text = "# of this study\n--net resnet18 # small\n\n--version_name 'größer #1'\n@more.txt\n"
    (tmp_path / "flags.txt").write_text(text.replace("@", f"@{tmp_path}/"), encoding)
    (tmp_path / "more.txt").write_text("--seed=3\n--mvtype\npushpins\n", encoding)
    args = sinbad_single_layer.parse_args([f"@{tmp_path}/flags.txt", "--seed", "4"])
    assert (args.net, args.version_name, args.mvtype) == ("resnet18", "größer #1", ["pushpins"])
    assert args.seed == 4  # what comes last counts


def test_a_number_sign_in_a_word_begins_no_comment(tmp_path: Path) -> None:
    (tmp_path / "flags.txt").write_text("--version runs/v_pyramid_lvl_# # it's of all levels\n")
    args = calc_anom_ensm.parse_args([f"@{tmp_path}/flags.txt"])
    assert args.version == "runs/v_pyramid_lvl_#"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("--mvtype größer".encode("utf-16"), "{} must be UTF-8 text; save it again as UTF-8"),
        ("--mvtype größer".encode("latin-1"), "{} must be UTF-8 text; save it again as UTF-8"),
        (b"--mvtype 'pushpins", r"{} must hold flags as in a shell \(No closing quotation\)"),
        (b"@flags.txt", "@{} names itself; remove that line"),
        (b"@second.txt", "@{} names itself; remove that line"),
    ],
)
def test_a_file_of_flags_that_cannot_be_read(
    content: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flags.txt").write_bytes(content)
    Path("second.txt").write_text("--overwrite\n@flags.txt")
    with pytest.raises(errors.UserError, match=f"^{line.format('flags.txt')}$"):
        data_to_matrices.parse_args(["@flags.txt"])
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        data_to_matrices.parse_args(["@none.txt"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the files of ../shared/cases")
def test_files_of_flags_from_practice() -> None:
    score = ["score", "--detector", "x.npz", "new.png"]
    bom, utf16 = (f"@{SHARED}/cases/flags_{name}.txt" for name in ("bom", "utf16"))
    assert sinbad_detector.parse_args([*score, bom]).false_alarms == 0.1
    with pytest.raises(errors.UserError, match=r"flags_utf16\.txt must be UTF-8"):
        sinbad_detector.parse_args([*score, utf16])


def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "paths.txt").write_text("--data_dir ~/data\n--results_dir=~/runs\n--weights ~/w\n")
    args = sinbad_single_layer.parse_args(["--mvtype", "all", "@~/paths.txt"])
    expected = [tmp_path / name for name in ("data", "runs", "w")]
    assert [args.data_dir, args.results_dir, Path(args.weights)] == expected
    assert calc_anom_ensm.parse_args(["--version", "~/v_#"]).version == f"{tmp_path}/v_#"


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = command
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).parse_args([*words, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= cli.HELP_WIDTH
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    groups = [settings.INPUT_OUTPUT, settings.COMPUTED]
    if name.startswith("create_batch_array"):
        groups = ["array", "cluster", *groups]
    if command == ("sinbad_detector",):
        groups = ["positional arguments"]
    assert titles[: len(groups)] == groups
    assert titles[-1] == "help"
    assert "--debug" in text
    assert text.splitlines()[-1] == f"sinbad {__version__}"
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags))
    assert "True" not in text
    assert "[[" not in text


def test_an_unknown_flag_is_an_error_and_an_abbreviation_is_unknown() -> None:
    for flag in ("--im_sise", "--im"):
        with pytest.raises(errors.UserError, match=f"unrecognized arguments: {flag}.*; see --help"):
            data_to_matrices.parse_args([f"{flag}=64"])


# ---------------------------------------------------------------- numbers, progress


def test_ranges_of_numbers() -> None:
    parse = sinbad_single_layer.parse_args
    reps = parse(["--mvtype", "all", "--rep", "5", "0-2", "2", "4-5"]).rep
    assert cli.sorted_unique(reps) == [0, 1, 2, 4, 5]
    assert cli.sorted_unique(parse(["--mvtype", "all"]).rep) == [0]
    assert cli.shorten_numbers([]) == ""
    assert cli.shorten_numbers([0, 1, 2, 4, 7, 8]) == "0-2,4,7-8"
    for text in ("5-2", "-1", "1_0", "x", "0-", "٣", "1-2-3"):
        with pytest.raises(errors.UserError, match=f"a range like 0-99, got {text};"):
            parse(["--mvtype", "all", f"--rep={text}"])


def test_repetitions_are_sorted_and_count_once(tmp_path: Path) -> None:
    flags = ["--mvtype", "pushpins_loco", "--rep", "2", "0-1", "1"]
    runs = calc_anom_ensm.select_runs(calc_anom_ensm.parse_args(flags))
    assert list(runs) == ["rep 0", "rep 1", "rep 2"]
    args = sinbad_single_layer.parse_args([*flags, "--data_dir", str(tmp_path)])
    tasks = sinbad_single_layer.requested_tasks(args, cli.settings_of(args))
    assert [task.rep for task in tasks] == [0, 1, 2]


def test_ends_of_shared_flags() -> None:
    parse = calc_anom_ensm.parse_args
    assert parse(["--mvtype", "all", "--extra_weight", "0"]).extra_weight == 0.0
    assert parse(["--mvtype", "all", "--extra_weight", "1000000"]).extra_weight == 1e6
    for weight in ("-0.1", "1000001"):
        with pytest.raises(errors.UserError, match=r"must be from 0 to 1e\+06, got"):
            parse(["--mvtype", "all", f"--extra_weight={weight}"])


def test_progress_in_a_log_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LOG_LINES", 0.2)
    started = time.monotonic()
    with cli.progress_bar(1, "another bar"):
        for _ in cli.progress(list(range(60)), "level 7", "crops"):
            time.sleep(0.01)
    most = (time.monotonic() - started) / 0.2 + 1  # and the last one
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= most
    for line in lines:
        assert re.fullmatch(r"level 7: \d+/60, +[\d.]+crops/s, [\d:]+ left", line), line
    assert list(cli.progress([1, 2], "short")) == [1, 2]
    assert capsys.readouterr().err == ""
