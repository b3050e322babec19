"""Images to matrices: every pixel against loops, labels, order, links, what is skipped."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import test_images
from conftest import COUNTS, GOLDEN, IM_SIZE, SHARED, draw_class, draw_image, files_below

import data_to_matrices
from data_to_matrices import make_matrices
from sinbad import errors, image_pool, images, layouts, matrices

REAL_IMAGES = SHARED / "data" / "loco"
ANOMALIES = {"loco": "logical_anomalies", "struct": "structural_anomalies"}


def part_paths(part: str) -> list[str]:
    return [f"{part}/{number:03d}.png" for number in range(COUNTS[part])]


@pytest.mark.parametrize("kind", ["loco", "struct"])
def test_every_pixel_label_and_path(kind: str, dataset_dir: Path, data_dir: Path) -> None:
    folder = data_dir / f"pushpins_{kind}"
    anomalies = f"test/{ANOMALIES[kind]}"
    expected_paths = {
        "train": part_paths("train/good"),
        "valid": part_paths("validation/good"),
        "test": part_paths("test/good") + part_paths(anomalies),
    }
    for split, paths in expected_paths.items():
        stored = np.load(folder / f"{split}_data.npy")
        assert stored.dtype == np.uint8
        assert stored.shape == (len(paths), 3, IM_SIZE, IM_SIZE)
        for matrix, path in zip(stored, paths, strict=True):
            expected = test_images.slow_resize(
                dataset_dir / "pushpins" / path, (1700, 1000), IM_SIZE
            )
            np.testing.assert_array_equal(matrix, expected)
    record = json.loads((folder / "image_paths.json").read_text())
    assert {split: record[split] for split in expected_paths} == expected_paths
    labels = np.load(folder / "image_level_label.npy")
    assert labels.dtype == np.float64
    assert labels.tolist() == [0.0] * COUNTS["test/good"] + [1.0] * COUNTS[anomalies]


def test_a_category_that_is_not_of_loco_takes_the_size_of_its_first_image(tmp_path: Path) -> None:
    draw_class(tmp_path / "in" / "cups")
    make_matrices(tmp_path / "in", tmp_path / "out", ["cups_loco"], 48)
    stored = np.load(tmp_path / "out" / "cups_loco" / "train_data.npy")
    path = tmp_path / "in" / "cups" / "train/good/000.png"
    np.testing.assert_array_equal(stored[0], test_images.slow_resize(path, (85, 50), 48))


def test_crop_pixels_of_either_kind_of_matrix() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    source = images.nearest_source(10, 15)
    expected = np.zeros((3, 15, 15), np.uint8)
    for y in range(15):
        for x in range(15):
            expected[:, y, x] = image[:, 4 + y * 10 // 15, 7 + x * 10 // 15]
    for stored in (image, image.astype(np.float32) / 255.0):
        np.testing.assert_array_equal(image_pool.crop_pixels(stored, (4, 7), source), expected)


def test_train_and_valid_of_both_subsets_are_stored_once(
    dataset_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    for name in ("pushpins_struct", "pushpins_loco"):  # in runs of their own
        make_matrices(dataset_dir, tmp_path, [name], IM_SIZE)
    for folder in (data_dir, tmp_path):
        for name, shared in (("train", True), ("valid", True), ("test", False)):
            loco, struct = (folder / f"pushpins_{k}" / f"{name}_data.npy" for k in ANOMALIES)
            assert loco.samefile(struct) == shared
    assert files_below(tmp_path) == files_below(data_dir)


def test_loading_gives_back_what_was_written(data_dir: Path) -> None:
    arrays = matrices.load_matrices(data_dir, "pushpins_loco")
    assert arrays.im_size == IM_SIZE
    counts = {split: len(pixels) for split, pixels in arrays.images.items()}
    assert counts == {"train": 5, "valid": 3, "test": 5}
    assert arrays.labels.tolist() == [0.0] * 3 + [1.0] * 2


def test_the_digest_is_of_names_images_and_labels(data_dir: Path) -> None:
    arrays = matrices.load_matrices(data_dir, "pushpins_loco")
    train = ["train/good/other.png", *arrays.paths["train"][1:]]
    sha256 = [[0, 0, "other", 0], *arrays.files["train"][1:]]
    changes = [
        {"paths": arrays.paths | {"train": train}},
        {"files": arrays.files | {"train": sha256}},
        {"labels": 1 - arrays.labels},
    ]
    assert len({arrays.digest, *(replace(arrays, **change).digest for change in changes)}) == 4


@pytest.mark.parametrize(
    ("name", "black", "extent"),
    [
        ("ours_loco", "all", (64, 37)),  # as recorded
        ("pushpins_loco", "all", (64, 37)),  # LOCO's 1700 x 1000
        ("cups_loco", "one", (50, 21)),  # what is not zero
        ("cups_loco", "all", (64, 64)),  # nothing tells the padding
    ],
)
def test_extent_of_the_images_without_padding(
    name: str, black: str, extent: tuple[int, int], data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(data_dir / "pushpins_loco", folder)
    if name != "ours_loco":
        (folder / "image_paths.json").unlink()
    for split in matrices.SPLITS.values():
        pixels = np.zeros_like(np.load(folder / split), np.float32)
        if black == "one":
            pixels[1, 1, 20, 7] = pixels[-1, 2, 4, 49] = 1 / 255
        (folder / split).unlink()
        np.save(folder / split, pixels)
    assert matrices.load_matrices(tmp_path, name).image_extent == extent


def test_finished_matrices_are_skipped_and_overwritten_on_demand(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset_dir", str(dataset_dir), "--out_dir", str(tmp_path), "--im_size", "32"]
    data_to_matrices.main(flags)
    before = files_below(tmp_path)
    assert len(before) == 10
    test_file = tmp_path / "pushpins_loco" / "test_data.npy"
    inode = test_file.stat().st_ino
    capsys.readouterr()
    data_to_matrices.main(flags)
    captured = capsys.readouterr()
    assert captured.err.count("finished already") == 2
    assert captured.out == ""
    assert test_file.stat().st_ino == inode
    data_to_matrices.main([*flags, "--overwrite"])
    assert test_file.stat().st_ino != inode
    assert files_below(tmp_path) == before


def test_other_settings_and_other_images_are_errors_that_name_them(tmp_path: Path) -> None:
    draw_class(tmp_path / "in" / "pushpins")
    make = partial(make_matrices, tmp_path / "in", tmp_path / "out", ["pushpins_loco"])
    make(32)
    with pytest.raises(errors.UserError, match=r"im_size 32, now im_size is 40; .*--overwrite"):
        make(40)
    make(40, overwrite=True)
    assert matrices.load_matrices(tmp_path / "out", "pushpins_loco").im_size == 40
    (tmp_path / "in" / "pushpins" / "train/good/004.png").unlink()
    with pytest.raises(errors.UserError, match=r"train list of 5 images.*another list, of 4"):
        make(40)


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("valid", "validation")])
def test_matrices_of_images_that_have_changed_are_not_linked(
    split: str, part: str, dataset_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dataset_dir, tmp_path / "images"))
    make_matrices(folder, tmp_path, ["pushpins_loco"], IM_SIZE)
    draw_image("train/good", 4).save(folder / f"pushpins/{part}/good/000.png")
    make_matrices(folder, tmp_path, ["pushpins_struct"], IM_SIZE)
    before, after = (np.load(tmp_path / f"pushpins_{k}/{split}_data.npy") for k in ANOMALIES)
    changed = np.load(tmp_path / "pushpins_struct/train_data.npy")[4]
    np.testing.assert_array_equal(after[0], changed)
    assert not np.array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1:], before[1:])


def test_matrices_of_another_size_are_not_linked(dataset_dir: Path, tmp_path: Path) -> None:
    for kind, side in zip(ANOMALIES, (IM_SIZE, IM_SIZE + 8), strict=True):
        make_matrices(dataset_dir, tmp_path, [f"pushpins_{kind}"], side)
        for split in matrices.SPLITS.values():
            assert np.load(tmp_path / f"pushpins_{kind}" / split).shape[-1] == side


def test_size_times_and_sha256_of_each_image_are_recorded(
    data_dir: Path, dataset_dir: Path
) -> None:
    arrays = matrices.load_matrices(data_dir, "pushpins_loco")
    for split, paths in arrays.paths.items():
        for path, stamp in zip(paths, arrays.files[split], strict=True):
            file = dataset_dir / "pushpins" / path
            facts, sha256 = file.stat(), hashlib.sha256(file.read_bytes()).hexdigest()
            assert stamp == [facts.st_size, facts.st_mtime_ns, sha256, facts.st_ctime_ns]


@pytest.mark.parametrize("record", ["with ctime", "without ctime"])
def test_images_replaced_by_others_are_noticed(
    record: str, dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(dataset_dir, tmp_path / "images"))
    path, other = (folder / f"pushpins/train/good/{name}.png" for name in ("000", "004"))
    contents = [file.read_bytes().ljust(20_000, b"\0") for file in (path, other)]  # of one size
    path.write_bytes(contents[0])
    make = partial(make_matrices, folder, tmp_path, ["pushpins_loco"], IM_SIZE)
    make()
    before = (tmp_path / "pushpins_loco/train_data.npy").read_bytes()
    record_path = tmp_path / "pushpins_loco/image_paths.json"
    if record == "without ctime":
        values = json.loads(record_path.read_text())
        files = values["files"]
        values["files"] = {split: [stamp[:3] for stamp in files[split]] for split in files}
        record_path.write_text(json.dumps(values))
    facts = path.stat()
    path.write_bytes(contents[0])  # the same image, another time
    make()
    assert "finished already" in capsys.readouterr().err
    path.write_bytes(contents[1])  # another image, size and mtime are the same
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    make()
    assert "written again, 1 images have changed" in capsys.readouterr().err
    assert (tmp_path / "pushpins_loco/train_data.npy").read_bytes() != before


@pytest.mark.parametrize("name", ["valid_data.npy", "image_level_label.npy"])
def test_a_folder_with_a_part_missing_is_written_again(
    name: str, dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subsets = ["pushpins_loco", "pushpins_struct"]
    make_matrices(dataset_dir, tmp_path, subsets, 32)
    before = files_below(tmp_path)
    for subset in subsets:
        (tmp_path / subset / name).unlink()
    make_matrices(dataset_dir, tmp_path, subsets, 32)
    lines = capsys.readouterr().err.splitlines()
    for subset in subsets:
        assert f"{subset}: written again, {tmp_path / subset / name} is missing" in lines
    assert files_below(tmp_path) == before


def test_number_of_workers_does_not_change_a_byte(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in (1, 4):
        out = tmp_path / str(workers)
        make_matrices(dataset_dir, out, ["pushpins_loco"], 32, n_workers=workers)
    assert files_below(tmp_path / "1") == files_below(tmp_path / "4")
    assert "train 5 (LOCO: 372)" in capsys.readouterr().err


@pytest.mark.skipif(not REAL_IMAGES.is_dir(), reason="needs the real images of ../shared/data/loco")
@pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow before 13 resizes differently by 1")
def test_matrices_of_real_images_equal_the_authors() -> None:
    subset = layouts.find_subset(REAL_IMAGES, "juice_bottle_loco", 1024)
    with np.load(GOLDEN / "juice_bottle_official.npz") as golden:
        np.testing.assert_array_equal(subset.labels, golden["labels"])
        for split, paths in subset.paths.items():
            digest = hashlib.sha256()
            files = [subset.category_dir / path for path in paths]
            for matrix in images.preprocess_images(files, subset.settings):
                digest.update(matrix.tobytes())
            assert digest.hexdigest() == str(golden[f"sha256_{split}"])


def test_another_process_was_faster_with_other_settings(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = matrices.write_split

    def slow(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401  stands in for any call
        monkeypatch.setattr(matrices, "write_split", real)
        make_matrices(dataset_dir, tmp_path, ["pushpins_loco"], 32)  # meanwhile
        real(*args, **kwargs)

    monkeypatch.setattr(matrices, "write_split", slow)
    with pytest.raises(errors.UserError, match="was computed with im_size 32, now im_size is 64"):
        make_matrices(dataset_dir, tmp_path, ["pushpins_loco"], 64)
    assert matrices.load_matrices(tmp_path, "pushpins_loco").im_size == 32
    assert [path.name for path in tmp_path.iterdir()] == ["pushpins_loco"]
