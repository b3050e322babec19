"""Every command of the README runs, in the order of the page; its numbers are those measured."""

import csv
import importlib.util
import math
import os
import re
import shlex
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from conftest import draw_class, draw_image
from uea_toy import write_toy

import sinbad_time_series
from sinbad import loco

ROOT = Path(__file__).parents[1]
NET = ["--net", "test_resnet", "--weights", "random", "--initial_res", "64", "--n_projections", "5"]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]
SMALL = {  # what is added to the commands, so that they run on small synthetic images
    "data_to_matrices.py": ["--im_size", "64"],
    "sinbad_single_layer.py": [*NET, "--device", "cpu"],
    "calc_anom_ensm.py": ["--no-figures"],
    "reproduce_paper.py": [*NET, "--device", "cpu", "--rep_num_224", "2", "--no-figures"],
    "create_batch_array_sinbad.py": [*NET, "--device", "cpu"],
    "create_batch_array_sinbad_224.py": [*NET, "--device", "cpu"],
    "sinbad_time_series.py": ["--n_projections", "5", "--device", "cpu"],
    "sinbad_detector.py": ["--device", "cpu"],
    "demo/make_dataset.py": ["--n_train", "1", "--n_valid", "1", "--n_test", "1", "--scale", ".05"],
    "batch_master.sh": ["--local", "2"],
}
NOT_RUN = ("make", "pip", ".", "sha256sum", "mkdir", "tar", "sbatch")  # install, download, submit


def commands(page: str = "README.md") -> list[str]:
    """Return the commands of all shell blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in line.split(" # ")[0].split(";"))
    return [part for part in parts if part and not part.startswith("python -m venv")]


def scripts() -> list[Path]:
    """Return what a person runs: the docstring is the help."""
    return [path for path in sorted(ROOT.glob("*.py")) if "run_script(main" in path.read_text()]


def load(path: Path) -> ModuleType:
    """Import a script by its path; that runs nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_runs_in_the_order_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_class(tmp_path / "dataset_loco/breakfast_box", (80, 64))
    for name in sinbad_time_series.PUBLISHED:
        write_toy(tmp_path / "dataset_uea", (20, 25), name)
    for folder, n_images in (("normal", 20), ("new", 2)):
        (tmp_path / "repo" / folder).mkdir(parents=True)
        for number in range(n_images):
            image = draw_image("train/good", number + 100 * (folder == "new"))
            image.save(tmp_path / "repo" / folder / f"{number}.png")
    monkeypatch.chdir(tmp_path / "repo")
    run = []
    for command in commands():
        program, *words = shlex.split(command)
        if program in NOT_RUN:
            continue
        small = SMALL[words[0] if words[0] in SMALL else Path(words[0]).name]
        if words[:2] == ["sinbad_detector.py", "fit"]:
            small = [*small, *NET, "--rep_num_224", "2", "--crop_size_ratio", ".99"]
        if program == "sh":
            process = subprocess.run([program, *words, *small], capture_output=True, check=False)
            assert process.returncode == 0, process.stderr
        else:
            assert program == "python"
            assert not load(ROOT / words[0]).main([*words[1:], *small]), command
        run.append(Path(words[0]).name)
    assert {path.name for path in scripts()} <= set(run)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_understood(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, flags in re.findall(
        r"^```text\n# (\S+\.txt)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    ):
        (tmp_path / name).write_text(flags)
    for command in commands(page):
        program, *words = shlex.split(command)
        if program == "sbatch":
            program, *words = shlex.split(words[words.index("--wrap") + 1])
        if program == "python":
            load(ROOT / words[0]).parse_args(words[1:])
        elif program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert program == "sh" or program in NOT_RUN


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_command_of_a_docstring(path: Path) -> None:
    module = load(path)
    lines = (module.__doc__ or "").replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(";")]
    shown = [shlex.split(part) for part in parts if part.startswith(f"python {path.name}")]
    assert shown
    for words in shown:
        module.parse_args(words[2:])


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_named_file_exists(page: str) -> None:
    folder, text = (ROOT / page).parent, (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text)
    for target, anchor in links:
        if not target.startswith("https://"):
            assert (folder / target).exists(), target
            assert not anchor or anchor in anchors(folder / target if target else ROOT / page), (
                anchor
            )
    names = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|txt)|results/\w+\.csv)`", text))
    names -= {"batch_master.sh"}  # written by the generators
    assert not [name for name in names if not ((folder / name).exists() or (ROOT / name).exists())]


def test_the_archive_is_that_of_the_code() -> None:
    for page in ("README.md", "docs/troubleshooting.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert re.findall(r"\b[0-9a-f]{64}\b", text) == [loco.ARCHIVE_SHA256]
        assert loco.DOWNLOAD_PAGE in text


@pytest.mark.parametrize(
    ("levels", "pixels", "dependency"),
    [
        ("echo 11", "echo 12", ["--dependency=afterok:11:12"]),
        ("true", "echo 12", ["--dependency=afterok:12"]),
        ("echo 11", "true", ["--dependency=afterok:11"]),
        ("true", "true", []),
        ("exit 2", "echo 12", None),
        ("echo 11", "exit 2", None),
    ],
)
def test_the_ensemble_is_submitted_after_both_arrays(
    levels: str, pixels: str, dependency: list[str] | None, tmp_path: Path
) -> None:
    page = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for folder, command in (("sbatches", levels), ("sbatches_224", pixels)):
        (tmp_path / "sinbad_runs" / folder).mkdir(parents=True)
        (tmp_path / "sinbad_runs" / folder / "batch_master.sh").write_text(f"{command}\n")
    (tmp_path / "repo").mkdir()
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    process = subprocess.run(
        ["sh", "-c", lines],
        cwd=tmp_path / "repo",
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if dependency is None:
        assert process.returncode == 2
        assert not process.stdout
    else:
        *options, wrap, command = process.stdout.splitlines()
        assert [*options, wrap] == [*dependency, "--wrap"]
        program, script, *words = shlex.split(command)
        assert program == "python"
        load(ROOT / script).parse_args(words)


def measured(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of results."""
    head, *lines = (ROOT / "results" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    assert head.startswith(("# python benchmarks/", "# make demo"))
    return list(csv.DictReader(lines))


def words_of(path: str) -> str:
    """Return a page's text without its line breaks."""
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def cells_of(path: str) -> list[list[str]]:
    """Return the cells of every line of a page that is of a table."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


def test_the_table_of_time_series_is_that_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    values = defaultdict(list)
    for row in measured("time_series"):
        name, published, authors, _, value = row.values()
        values[name, published, authors].append(float(value))
    assert {name for name, *_ in values} == set(sinbad_time_series.PUBLISHED)
    for (name, published, authors), aurocs in values.items():
        assert len(aurocs) == 10
        ours = rf"{statistics.mean(aurocs):.1f} \+- {statistics.stdev(aurocs):.1f}"
        row = rf"^\| {name} +\| +{published} \| +{authors} \| +{ours} \|$"
        assert re.search(row, text, re.MULTILINE)


def test_numbers_of_images_are_those_measured() -> None:
    values = defaultdict(list)
    for row in measured("images"):
        values[row["network"], row["way"], row["what"]].append(float(row["ROC-AUC, %"]))
    ours = {
        key: f"{statistics.mean(v):.1f} +- {statistics.stdev(v):.1f}" for key, v in values.items()
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    columns = [("ours", "network levels"), ("ours", "level 224"), ("ours", "ensemble")]
    columns.append(("official", "ensemble"))
    for net in ("resnet18", "tf_efficientnet_lite0", "tf_efficientnet_lite2"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {net}, level"))
        one_level = {"network levels": "level 14"} if net == "resnet18" else {}
        expected = [ours[net, way, one_level.get(what, what)] for way, what in columns]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected
    text = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    rows = {"level 14, 16 crops": "level 14, 16 crops", "level 14, all grids": "level 14"}
    rows |= {"level 14, 1 crop": "level 14, 1 crops", "ensemble": "ensemble"}
    ways = ("ours", "official", "crop_norm crop", "crop_pool max", "both")
    of = {name: ("resnet18", what) for name, what in rows.items()}
    of |= {
        f"EfficientNet-Lite{n}, ensemble": (f"tf_efficientnet_lite{n}", "ensemble") for n in (0, 2)
    }
    for name, (net, what) in of.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        expected = [ours[net, way, what] for way in ways]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected


def test_the_table_of_false_positive_rates_is_that_measured() -> None:
    table, counts = cells_of("docs/detector.md"), defaultdict(list)
    for row in measured("verdicts"):
        n_train, n_valid, _, *values = map(int, row.values())
        counts[n_train, n_valid].append(values)
    assert len(counts) == 9
    errors = []
    for (n_train, n_valid), rows in counts.items():
        n_splits, cells = len(rows), [str(n_train), str(n_valid) if n_valid else "folds"]
        assert n_splits == 300
        for rate, column in ((0.05, 1), (0.1, 3)):
            exact = 100 * math.floor(rate * (n_valid + 1) + 1e-9) / (n_valid + 1)
            cells.append(f"{exact:.1f}" if n_valid else "-")
            alarms = [100 * row[column] / row[0] for row in rows]
            for values in (alarms, [100 * row[column + 1] / 40 for row in rows]):
                error = statistics.stdev(values) / math.sqrt(n_splits)
                cells.append(f"{statistics.mean(values):.1f} +- {error:.1f}")
            mean, error = statistics.mean(alarms), statistics.stdev(alarms) / math.sqrt(n_splits)
            if n_valid:
                errors.append(abs(mean - exact) / error)
            else:
                assert 0.48 < mean / (100 * rate) < 0.67
        assert cells in table
    assert max(errors) < 1.4
    assert f"all {len(errors)} rates" in words_of("docs/detector.md").replace("twelve", "12")


def test_the_table_of_random_training_images_is_that_measured() -> None:
    table, values = cells_of("docs/ablation.md"), defaultdict(list)
    for row in measured("subsets"):
        values[row["n_train"]].append(float(row["ROC-AUC, %"]))
    assert list(values) == ["4", "8", "10", "20", "40"]
    for n_train, aurocs in values.items():
        assert len(aurocs) == 50
        low, *_, high = statistics.quantiles(aurocs, n=10, method="inclusive")
        spread = f"{low:.1f} to {high:.1f}"
        assert [n_train, f"{statistics.median(aurocs):.1f}", spread, f"{min(aurocs):.1f}"] in table


def test_the_table_of_the_ablation_is_that_measured() -> None:
    names = {
        "n_projections": "random projections",
        "n_quantiles": "histogram bins",
        "shrinkage_factor": "shrinkage",
        "crop_size_ratio": "crop ratios",
    }
    values = defaultdict(list)
    for row in measured("ablation"):
        changed, value, _, auroc, seconds = row.values()
        values[names.get(changed, changed), value, seconds].append(float(auroc))
    table = cells_of("docs/ablation.md")
    assert sum(len(cells) == 5 for cells in table) == len(values) + 2
    for (changed, value, seconds), aurocs in values.items():
        assert len(aurocs) == 5
        spread = f"{min(aurocs):.1f} to {max(aurocs):.1f}"
        assert [changed, value, f"{statistics.median(aurocs):.1f}", spread, seconds] in table


def test_numbers_of_a_gpu_are_those_measured() -> None:
    values = {
        (row["network"], row["precision"], row["what"]): row["value"] for row in measured("gpu")
    }
    tables, wide = cells_of("benchmarks/README.md"), "wide_resnet50_2"
    text, page = words_of("README.md"), words_of("benchmarks/README.md")
    ranges = "ranges of 10 x 1605632 values"
    topk, kthvalue = (
        f"{float(values['-', 'fp32', f'{ranges}, torch.{name}, ms']):.1f}"
        for name in ("topk", "kthvalue")
    )
    assert f"`torch.topk`: for the raw pixels {topk} ms per repetition" in page
    assert f"took {kthvalue}." in page
    assert "fp32 scores are the CPU's within 1e-4, AUROC in tf32 and bf16 within 0.2" in text
    for precision in ("bf16", "tf32"):
        names = {"scoring, seconds": "s", "bare network, seconds": "s", "GPU memory, GB": "GB"}
        cells = [
            f"{float(values[wide, precision, f'LOCO, {name}']):.1f} {unit}"
            for name, unit in names.items()
        ]
        assert [precision, *cells] in tables
        assert f"{float(cells[0][:-2]):.0f} s in {precision}" in text
    for precision in ("fp32", "tf32", "bf16"):
        names = ("torchvision's", "ours", "compiled")
        cells = [
            f"{float(values[wide, precision, f'256 crops, {name}, ms']):.1f} ms" for name in names
        ]
        assert [precision, *cells] in tables
        for net in ("resnet18", "tf_efficientnet_lite0"):
            auroc, *cells = (
                values[net, precision, f"juice_bottle, ensemble, {what}"]
                for what in (
                    "ROC-AUC, %",
                    "largest relative difference from the CPU",
                    "rank correlation with the CPU",
                )
            )
            assert [f"{net}, {precision}", f"{float(auroc):.1f}", *cells] in tables
            on_cpu = float(values[net, "fp32 on the CPU", "juice_bottle, ensemble, ROC-AUC, %"])
            assert abs(float(auroc) - on_cpu) < 0.2
            assert precision != "fp32" or float(cells[0]) < 1e-4


def test_numbers_of_a_cpu_are_those_measured() -> None:
    value = {row["what"]: float(row["value"]) for row in measured("cpu")}
    text, page = words_of("README.md"), words_of("benchmarks/README.md")
    forward, fractions = value["384 images, bare network, seconds"], []
    for what in ("bare network", "everything"):
        seconds = value[f"384 images, {what}, seconds"]
        fractions.append(f"{100 * forward / seconds:.0f} %")
        name = what.replace("bare network", "forward pass alone")
        (row,) = (cells for cells in cells_of("benchmarks/README.md") if cells[0].startswith(name))
        assert row[1:] == [f"{seconds:.1f}", f"{384 / seconds:.2f}", fractions[-1]]
    peak = f"{value['384 images, peak memory, GB']} GB"
    assert f"scoring, writing) at {fractions[1]} of the speed of the forward pass alone" in text
    assert f"in {peak}" in text
    assert f"peak memory is {peak}" in page
    rehearsal = {
        what: value[f"rehearsal, {what}"]
        for what in (
            "until killed, seconds",
            "started again, seconds",
            "files of scores when killed",
            "files of scores",
            "peak memory, GB",
            "images, MB",
            "matrices, MB",
            "scores, MB",
        )
    }
    killed, again, n_killed, n_files, memory, *disk, n_scores = rehearsal.values()
    assert f"{killed + again:,.0f} s from images to the table, killed once" in page
    assert f"after {killed:.0f} s, with {n_killed:.0f} of {n_files:,.0f} files of scores" in page
    assert f"Peak memory {memory:.1f} GB" in page
    images, matrices = (f"{megabytes / 1000:.1f} GB" for megabytes in disk)
    assert f"images {images}, preprocessed images {matrices}, scores {n_scores:.0f} MB" in page
    torchvision, ours, compiled = (
        value[f"32 crops, {name}, s"] for name in ("torchvision's", "ours", "compiled")
    )
    assert f"torchvision's own network {torchvision} s" in page
    assert f"folded {ours} s, compiled {compiled} s" in page


def test_times_of_a_detector_are_those_measured() -> None:
    table, rows = cells_of("docs/detector.md"), measured("detector")
    assert len(rows) > 8
    for row in rows:
        *cells, ratio, peak, memory, auroc = row.values()
        cells += [ratio or "-", f"{peak} GB", f"{memory} MB", f"{auroc} %" if auroc else "-"]
        assert cells in table
    page, seconds, ratios, megabytes = words_of("docs/detector.md"), {}, {}, {}
    for name, step, cell, ratio, _, memory, auroc in (row.values() for row in rows):
        seconds[name, step] = cell, auroc
        ratios[name, step], megabytes[name, step] = ratio, float(memory)
    quick, full = (seconds[rows[i]["network and settings"], "test, 67"] for i in (0, -1))
    assert f"67 images in {quick[0]} s in place of {full[0]} s" in page
    assert f"{quick[1]} % in place of {full[1]} %" in page
    ten, thousand = (seconds[rows[0]["network and settings"], f"score, {n}"] for n in (10, 1000))
    assert f"{thousand[0]} s for 1000, {ten[0]} s for 10" in page
    default, many, full = (
        next(name for name, _ in seconds if name.startswith(start))
        for start in (
            "wide_resnet50_2",
            "resnet18 --pyramid_level 7",
            "resnet18 --pyramid_level 14 2",
        )
    )
    one_image = [ratios[name, "score, 1"] for name in (default, full, many)]
    latency = float(seconds[default, "score, 1"][0])
    assert f"default network took {latency:.1f} s per image" in words_of("README.md")
    assert f"all levels takes {one_image[0]} times the forward pass of its crops" in page
    assert f"takes {one_image[1]} times (level 14 and raw pixels) and {one_image[2]} times" in page
    imports, first, later = (
        megabytes[many, step] for step in ("imports", "first score, 1", "score, 1")
    )
    assert f"takes {first - imports:.0f} MB after its first image and" in page
    assert f"and {later - imports:.0f} MB while it scores one at a time" in page


def test_times_against_size_are_those_measured() -> None:
    page, table, series = words_of("benchmarks/README.md"), cells_of("benchmarks/README.md"), []
    rows = measured("scaling")
    for what, number, *values, peak in (row.values() for row in rows):
        if what == "time series":
            series.append(f"{number} {values[1]} s")
        else:
            assert [what, number, *values, f"{peak} GB"] in table
    assert len(rows) - len(series) == 10
    assert ", ".join(series).replace(" ", " take ", 1) in page


def test_memory_over_a_run_is_that_measured() -> None:
    table, rows = cells_of("benchmarks/README.md"), measured("memory")
    assert [row["crops"] for row in rows] == ["2560", "10240", "20000", "2560"]
    for row in rows:
        net, n_images, n_crops, _, *megabytes = row.values()
        assert [net, n_images, n_crops, *(f"{value} MB" for value in megabytes)] in table
        early, late, peak = map(float, megabytes)
        assert late < 1.15 * early
        assert peak < (1000 if net == "resnet18" else 2000)


def test_other_methods_are_those_measured() -> None:
    values = defaultdict(list)
    for row in measured("peers"):
        values[row["method"]].append([float(value) for value in list(row.values())[2:]])
    for method, runs in values.items():
        assert len(runs) == 3
        aurocs, *columns = zip(*runs, strict=True)
        cells = [method, f"{statistics.mean(aurocs):.1f} +- {statistics.stdev(aurocs):.1f}"]
        *seconds, peak = (statistics.median(column) for column in columns)
        cells += [*(f"{value:.0f} s" for value in seconds), f"{peak:.1f} GB"]
        assert cells in cells_of("docs/reproduction.md")
    sinbad, *_, patchcore, _ = (
        f"{statistics.mean(run[0] for run in runs):.1f}" for runs in values.values()
    )
    assert f"PatchCore {patchcore}, this repository {sinbad}." in words_of("README.md")


def test_the_table_of_the_demo_is_what_it_printed() -> None:
    rows = [list(row.values()) for row in measured("demo")]
    assert len(rows) == 7
    tables = cells_of("README.md")
    for row in rows:
        n_columns = len(next(cells for cells in tables if cells[0] == row[0]))
        assert [cell or "-" for cell in row[:n_columns]] in tables
