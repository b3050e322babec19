"""Break a module in one place at a time and count how often its tests notice.

Every mutant (a comparison, a sign, a number or a condition changed, a call removed) is tested in a
copy of the repository in a temporary folder: the checkout is never touched. Tests that fail have
killed it; those that run for four times as long as without a change count apart. Prints `killed`,
`timed out` or `survived` with line and change, and the rate.

    python tests/mutate.py --module sinbad_utils.py --n 25 --seed 0
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # the quickest to fail first
    "sinbad_utils.py": ("sinbad_utils", "ensembles", "cuda_dispatch"),
    "sinbad/atomic.py": ("atomic", "nothing_is_lost"),
    "sinbad/backbones.py": ("backbones",),
    "sinbad/cli.py": ("cli", "settings", "bad_inputs"),
    "sinbad/crops.py": ("scoring", "maps", "ensembles"),
    "sinbad/detectors.py": ("detectors",),
    "sinbad/devices.py": ("devices", "scoring"),
    "sinbad/ensembles.py": ("ensembles", "extra_scores"),
    "sinbad/errors.py": ("nothing_is_lost", "bad_inputs"),
    "sinbad/extra_scores.py": ("extra_scores",),
    "sinbad/image_pool.py": ("cuda_dispatch", "scoring", "matrices"),
    "sinbad/images.py": ("images", "matrices"),
    "sinbad/layouts.py": ("layouts", "bad_inputs"),
    "sinbad/loco.py": ("layouts", "tables", "single_layer"),
    "sinbad/matrices.py": ("matrices", "layouts", "bad_inputs", "scoring"),
    "sinbad/report/comparison.py": ("compare",),
    "sinbad/report/maps.py": ("maps",),
    "sinbad/report/metrics.py": ("metrics", "tables"),
    "sinbad/report/page.py": ("page",),
    "sinbad/report/tables.py": ("tables", "light", "metrics"),
    "sinbad/score_files.py": ("ensembles", "bad_inputs", "single_layer"),
    "sinbad/score_tasks.py": ("slurm", "single_layer"),
    "sinbad/scoring.py": ("scoring", "cuda_dispatch", "single_layer"),
    "sinbad/settings.py": ("settings", "cli", "detectors"),
    "sinbad/slurm.py": ("slurm",),
    "sinbad/stored_models.py": ("detectors",),
    "sinbad/uea.py": ("uea", "time_series"),
    "sinbad_time_series.py": ("time_series",),
}
SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
}
LEAST_LIMIT = 60.0  # seconds


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, what it is, the module's text with it."""

    line: int
    change: str
    source: str


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place."""
    if isinstance(node, ast.Compare):
        for operator in SWAPS[type(node.ops[0])]:
            yield ast.Compare(node.left, [operator(), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)][0](), node.values)
    elif isinstance(node, ast.BinOp):
        for operator in SWAPS.get(type(node.op), ()):
            yield ast.BinOp(node.left, operator(), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def sample_mutants(source: str, n: int, seed: int) -> list[Mutant]:
    """Return n of all mutants of a module's text, by line; equal seeds give equal mutants."""
    tree = ast.parse(source)
    places = []
    skipped: set[ast.AST] = set()  # decorators: nobody notices what is frozen
    for parent in ast.walk(tree):
        for decorator in getattr(parent, "decorator_list", ()):
            skipped.update(ast.walk(decorator))
        if parent in skipped:
            continue
        for name, value in ast.iter_fields(parent):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(node, ast.AST):
                    places += [(parent, name, i, node, other) for other in replacements(node)]
    mutants = []
    for parent, name, i, node, other in random.Random(seed).sample(places, min(n, len(places))):
        value = getattr(parent, name)
        changed = [*value[:i], other, *value[i + 1 :]] if isinstance(value, list) else other
        before, after = (textwrap.shorten(ast.unparse(shown), 70) for shown in (node, other))
        setattr(parent, name, changed)
        mutants.append(Mutant(node.lineno, f"{before} -> {after}", ast.unparse(tree)))
        setattr(parent, name, value)
    return sorted(mutants, key=lambda mutant: (mutant.line, mutant.change))


def copy_repository(target: Path) -> None:
    """Copy all files of the checkout that git does not ignore."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_tests(repository: Path, module: str, source: str, limit: float | None = None) -> str:
    """Test a module with another text; return survived, killed or timed out."""
    files = [f"tests/test_{name}.py" for name in TESTS[module]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(shutil.copytree(repository, Path(folder) / "repository"))
        (copy / module).write_text(source, encoding="utf-8")
        try:
            run = subprocess.run(command, cwd=copy, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return "timed out"
    return "killed" if run.returncode else "survived"


def try_mutants(repository: Path, module: str, n: int, seed: int) -> None:
    """Test a module as it is, then each of n mutants of it; print what became of them."""
    source = (repository / module).read_text(encoding="utf-8")
    start = time.monotonic()
    if run_tests(repository, module, source) != "survived":
        raise SystemExit(f"tests of {module} must pass before it is changed, got failures")
    limit = max(LEAST_LIMIT, 4.0 * (time.monotonic() - start))
    results = Counter[str]()
    for mutant in sample_mutants(source, n, seed):
        result = run_tests(repository, module, mutant.source, limit)
        results[result] += 1
        print(f"{result:<9} {module}:{mutant.line} {mutant.change}", flush=True)
    rate = results["killed"] / max(1, results["killed"] + results["survived"])
    print(f"{module}: {dict(results)}, killed {rate:.0%}", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--module", choices=TESTS, nargs="+", default=list(TESTS))
    parser.add_argument("--n", type=int, default=25, help="mutants, sampled from all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Test the unchanged module, then each mutant."""
    args = parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="unchanged_") as folder:
        repository = Path(folder) / "repository"
        copy_repository(repository)
        for module in args.module:
            try_mutants(repository, module, args.n, args.seed)


if __name__ == "__main__":
    main()
