"""Progress where there is no terminal."""

import re
import time

import pytest

from sinbad import cli


def test_progress_in_a_log_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LOG_LINES", 0.2)
    started = time.monotonic()
    for _ in cli.progress(list(range(60)), "level 7", "crops"):
        time.sleep(0.01)
    most = (time.monotonic() - started) / 0.2 + 1  # and the last one
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= most
    for line in lines:
        assert re.fullmatch(r"level 7: \d+/60, +[\d.]+crops/s, [\d:]+ left", line), line
    assert list(cli.progress([1, 2], "short")) == [1, 2]
    assert capsys.readouterr().err == ""
