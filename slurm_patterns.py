"""Numbers written as runs, and files as brace patterns, as bash, sbatch and squeue have them.

Standard library only: it runs on login nodes.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence


def shorten_numbers(numbers: Iterable[int]) -> list[str]:
    """Shorten numbers to runs: 0 1 2 3 7 8 -> "0-3", "7-8"; what --rep and sbatch --array take."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(low) if low == high else f"{low}-{high}" for low, high in runs]


def expand_numbers(text: str) -> list[int]:
    """Expand what `shorten_numbers` and squeue write: "0-3,7" -> 0 1 2 3 7, "0-8:4" -> 0 4 8."""
    numbers: list[int] = []
    for run in filter(None, text.split(",")):
        bounds, _, step = run.partition(":")
        low, dash, high = bounds.partition("-")
        numbers += range(int(low), int(high if dash else low) + 1, int(step or 1))
    return numbers


def brace_pattern(values: Sequence[object]) -> str:
    """Write values as bash does: 7 -> "7", 7 14 -> "{7,14}", 0 ... 99 -> "{0..99}"."""
    if len(values) == 1:
        return str(values[0])
    if all(isinstance(v, int) for v in values):
        (run, *more) = shorten_numbers(values)  # type: ignore[arg-type]
        if not more:
            return "{" + run.replace("-", "..") + "}"
    return "{" + ",".join(map(str, values)) + "}"


def expand_pattern(pattern: str) -> list[str]:
    """Expand a brace pattern as bash does; the inverse of `brace_pattern`."""
    choices: list[list[str]] = []
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        first, dots, last = part.partition("..")
        if i % 2 and dots:
            choices.append([str(n) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    return ["".join(parts) for parts in itertools.product(*choices)]


def group_by_value(values: dict[int, str]) -> dict[str, list[int]]:
    """Return the numbers that have a value, by value."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, value in values.items():
        groups[value].append(number)
    return groups


def name_tasks(numbers: list[int]) -> str:
    """Write numbers of tasks as "task 3" or "tasks 0-2,5"."""
    return f"task{'s' if len(numbers) > 1 else ''} {','.join(shorten_numbers(numbers))}"
