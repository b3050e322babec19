"""Runs of numbers and brace patterns: as bash, sbatch and squeue have them."""

import subprocess

import pytest

from slurm_patterns import brace_pattern, expand_numbers, expand_pattern, shorten_numbers


@pytest.mark.parametrize("values", [[7], [7, 14], list(range(100)), [0, 2, 3], ["a_loco", "b"]])
def test_patterns_name_every_file_as_bash_does(values: list[object]) -> None:
    pattern = f"/r/x_{brace_pattern(values)}/y"
    assert expand_pattern(pattern) == [f"/r/x_{value}/y" for value in values]
    bash = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
    assert bash.stdout.split() == expand_pattern(pattern)


def test_runs_of_numbers_are_shortened() -> None:
    assert shorten_numbers([15, 4, 8, 5, 6]) == ["4-6", "8", "15"]
    assert shorten_numbers([]) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("7", [7]),
        ("0-20:4", [0, 4, 8, 12, 16, 20]),
        ("0-2,5,7-8", [0, 1, 2, 5, 7, 8]),
        ("", []),
    ],
)
def test_runs_of_numbers_are_expanded(text: str, numbers: list[int]) -> None:
    assert expand_numbers(text) == numbers


@pytest.mark.parametrize("text", ["x", "3-", "0-4,...", "1-2-3"])
def test_cut_runs_of_numbers_are_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        expand_numbers(text)
