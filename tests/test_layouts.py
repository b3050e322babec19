"""Folder layouts other than LOCO's: recognised, split, and scored to a table of defects."""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import IM_SIZE, draw_class, draw_image, files_below
from PIL import Image
from sklearn.metrics import roc_auc_score

import calc_anom_ensm
import data_to_matrices
import reproduce_paper
import sinbad_single_layer
from sinbad import errors, layouts, loco, matrices, settings
from sinbad.report import tables

SIZE = (64, 64)  # pixels
N_TRAIN, N_GOOD = 12, 3
# Defect -> the part of LOCO whose images stand for it.
DEFECTS = {"dent": "logical_anomalies", "scratch": "structural_anomalies"}
N_OF_EACH = 2


def save(path: Path, part: str, number: int) -> None:
    """Draw an image, of a part of LOCO's tree, into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_image(part, number, SIZE).save(path)


def save_mask(path: Path, value: int = 255) -> None:
    """Write a mask with a defect of four pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE, np.uint8)
    pixels[2:4, 2:4] = value
    Image.fromarray(pixels).save(path)


def draw_tests(category_dir: Path) -> None:
    """Draw test/good and a folder a defect."""
    for number in range(N_GOOD):
        save(category_dir / f"test/good/{number:03d}.png", "test/good", number)
    for name, part in DEFECTS.items():
        for number in range(N_OF_EACH):
            save(category_dir / f"test/{name}/{number:03d}.png", f"test/{part}", number)


def draw_mvtec(root: Path) -> Path:
    """Draw class bottle in MVTec AD's layout."""
    draw_tests(root / "bottle")
    for number in range(N_TRAIN):
        save(root / f"bottle/train/good/{number:03d}.png", "train/good", number)
    for name in DEFECTS:
        for number in range(N_OF_EACH):
            save_mask(root / f"bottle/ground_truth/{name}/{number:03d}_mask.png")
    return root


def draw_plain(root: Path) -> Path:
    """Draw a class with images straight in train and a validation folder."""
    draw_tests(root / "杯子")
    for split, count in (("train", N_TRAIN), ("validation", 4)):
        for number in range(count):
            save(root / f"杯子/{split}/{number:03d}.png", "validation/good", 100 * count + number)
    return root


def draw_visa(root: Path) -> Path:
    """Draw class widget in VisA's layout."""
    rows = ["object,split,label,image,mask"]
    for number in range(N_TRAIN + N_GOOD):
        name = f"widget/Data/Images/Normal/{number:04d}.JPG"
        save(root / name, "train/good", number)
        rows.append(f"widget,{'train' if number < N_TRAIN else 'test'},normal,{name},")
    for number in range(2 * N_OF_EACH):
        name = f"widget/Data/Images/Anomaly/{number:03d}.JPG"
        mask = f"widget/Data/Masks/Anomaly/{number:03d}.png"
        save(root / name, "test/logical_anomalies", number)
        save_mask(root / mask, 1 + number)
        rows.append(f"widget,test,anomaly,{name},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root


LAYOUTS = {
    "MVTec AD": (draw_mvtec, "bottle", {"dent": 2, "scratch": 2}),
    "VisA": (draw_visa, "widget", {"bad": 4}),
    "plain": (draw_plain, "杯子", {"dent": 2, "scratch": 2}),
}


# ---------------------------------------------------------------- names


def test_names_of_subsets() -> None:
    assert loco.split_mvtype("metal_nut_all") == ("metal_nut", "all")
    types = {"pushpins": ("loco", "struct"), "bottle": ("all",)}
    expand = partial(loco.expand_mvtypes, types=types)
    assert expand(["all"]) == ["pushpins_loco", "pushpins_struct", "bottle_all"]
    assert expand(["loco"]) == ["pushpins_loco"]
    assert expand(["bottle", "cup_all"]) == ["bottle_all", "cup_all"]
    with pytest.raises(errors.UserError, match="<class>_all"):
        expand(["cup"])


@pytest.mark.parametrize(
    ("name", "present", "chosen"),
    [
        ("bottle", "bottle_all cup_loco notes", "bottle_all"),
        ("cup", "bottle_all cup_loco notes", "cup_loco"),
        (
            "all",
            "cup_loco pins_loco pins_struct a_all notes",
            "a_all cup_loco pins_loco pins_struct",
        ),
        ("all", "screw_bag_loco cup_loco", "screw_bag_loco cup_loco"),  # LOCO's first
        ("pushpins", "pushpins_loco cup_loco", "pushpins_loco"),
        ("all", "bottle_all", "bottle_all"),
    ],
)
def test_names_stand_for_the_subsets_present(
    name: str, present: str, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert loco.choose_mvtypes([name], present.split()) == chosen.split()
    missing = "note: not found: pushpins_struct" in caplog.text
    assert missing == (chosen == "pushpins_loco")


# ---------------------------------------------------------------- recognising


def test_layouts_are_recognised_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_class(tmp_path / "pins")
    for draw, *_ in LAYOUTS.values():
        draw(tmp_path)
    expected = {"bottle": "MVTec AD", "pins": "LOCO", "widget": "VisA", "杯子": "plain"}
    assert layouts.find_layouts(tmp_path) == expected
    assert layouts.choose_subsets(tmp_path, ["all"]) == [
        *("bottle_all", "pins_loco", "pins_struct", "widget_all", "杯子_all")
    ]
    lines = capsys.readouterr().err.splitlines()
    said = "LOCO (pins); MVTec AD (bottle); VisA (widget); plain (杯子)"
    assert lines == [f"layouts in {tmp_path}: {said}"]
    assert layouts.choose_subsets(tmp_path, ["bottle"]) == ["bottle_all"]


def test_no_layout_shows_what_was_found_and_all_four(tmp_path: Path) -> None:
    (tmp_path / "bottle/images").mkdir(parents=True)
    with pytest.raises(errors.UserError) as caught:
        layouts.find_layouts(tmp_path)
    for part in ("LOCO (<", "MVTec AD (<", "VisA (split_csv/1cls.csv", "plain (<", "bottle/images"):
        assert part in str(caught.value)


def test_classes_without_anomalies_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_mvtec(tmp_path)
    for name in DEFECTS:
        shutil.rmtree(tmp_path / "bottle/test" / name)
    with pytest.raises(errors.UserError, match=r"must hold anomalous images .*, got none"):
        layouts.choose_subsets(tmp_path, None)
    assert "bottle_all skipped, no folder" in capsys.readouterr().err
    with pytest.raises(errors.UserError, match=r"bottle must hold test/<any>, got .*test/good"):
        layouts.find_subset(tmp_path, "bottle_all", IM_SIZE)


def test_what_lies_beside_the_folders_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_mvtec(tmp_path)
    save(tmp_path / "bottle/test/loose.png", "test/good", 0)
    save(tmp_path / "bottle/train/bad/000.png", "test/good", 0)
    subset = layouts.find_subset(tmp_path, "bottle_all", IM_SIZE)
    assert len(subset.paths["train"]) == N_TRAIN - 5
    save(tmp_path / "bottle/Validation/000.png", "test/good", 0)
    layouts.find_subset(tmp_path, "bottle_all", IM_SIZE)
    first, second = (line for line in capsys.readouterr().err.splitlines() if "ignored" in line)
    assert "2 folders or files ignored" in first
    assert "bottle: Validation, test/loose.png, train/bad (expected <class>/train/good" in second


def draw_folders(category_dir: Path, *folders: str) -> None:
    """Draw two images in each folder, but none where the name ends in /."""
    for folder in folders:
        (category_dir / folder).mkdir(parents=True)
        for number in range(0 if folder.endswith("/") else 2):
            save(category_dir / folder / f"{number}.png", "train/good", number)


@pytest.mark.parametrize("valid", ["validation", "valid", "val"])
@pytest.mark.parametrize("normal", ["", "/good", "/ok", "/normal"])
def test_spellings_of_folders(
    normal: str, valid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal_test = f"test{normal or '/good'}"
    read = f"train{normal}", f"{valid}{normal}", normal_test, "test/dent"
    draw_folders(tmp_path / "cup", *read)
    subset = layouts.find_subset(tmp_path, "cup_all", IM_SIZE)
    train, normal_valid, good, bad = ([f"{folder}/{n}.png" for n in (0, 1)] for folder in read)
    assert subset.paths == {"train": train, "valid": normal_valid, "test": good + bad}
    assert subset.labels.tolist() == [0, 0, 1, 1]
    assert layouts.defect_images(subset.category_dir, subset.paths["test"]) == {"dent": [2, 3]}
    assert "ignored" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("train", "val", "valid"), "cup must hold one of validation, valid, val, got valid and v"),
        (("train/ok", "train/good"), "train must hold one of good, ok, normal, got good and ok"),
        (("train", "test/good", "test/ok"), "test must hold one of good, ok, normal, got good and"),
        (("train", "test/logical_anomalies"), "cup must hold train/good, got test/logical_anomal"),
        (("train/good", "test/logical_anomalies"), "cup must hold validation/good, got test/logi"),
        (("train/good/rgb",), "train/good must hold images that Pillow reads, got rgb"),
        (("train/good", "val/"), "val must hold images that Pillow reads, got an empty folder"),
    ],
)
def test_folders_that_cannot_be_read(folders: tuple[str, ...], words: str, tmp_path: Path) -> None:
    draw_folders(tmp_path / "cup", *folders)
    with pytest.raises(errors.UserError, match=words):
        layouts.find_subset(tmp_path, "cup_all", IM_SIZE)


@pytest.mark.parametrize("name", ["teapots", "teapots_all", "screw_bag", "bottle_loco", "bottle_"])
def test_an_unknown_category_lists_those_that_were_found(name: str, tmp_path: Path) -> None:
    draw_mvtec(tmp_path)
    with pytest.raises(errors.UserError, match=rf"got {name}; the categories are bottle \(MV"):
        layouts.choose_subsets(tmp_path, [name])


def test_all_anomalies_of_a_loco_class(tmp_path: Path) -> None:
    draw_class(tmp_path / "pushpins")
    subset = layouts.find_subset(tmp_path, "pushpins_all", IM_SIZE)
    folders = [Path(path).parent.name for path in subset.paths["test"]]
    assert folders == ["good"] * 3 + ["logical_anomalies"] * 2 + ["structural_anomalies"] * 2
    assert subset.labels.tolist() == [0.0] * 3 + [1.0] * 4
    assert subset.settings == layouts.find_subset(tmp_path, "pushpins_loco", IM_SIZE).settings


# ---------------------------------------------------------------- VisA's list


def test_visa_list_gives_splits_labels_and_masks(tmp_path: Path) -> None:
    subset = layouts.find_subset(draw_visa(tmp_path), "widget_all", IM_SIZE)
    normal = [f"Data/Images/Normal/{number:04d}.JPG" for number in range(N_TRAIN + N_GOOD)]
    anomalous = [f"Data/Images/Anomaly/{number:03d}.JPG" for number in range(4)]
    assert sorted(subset.paths["train"] + subset.paths["valid"]) == normal[:N_TRAIN]
    assert subset.paths["test"] == normal[N_TRAIN:] + anomalous
    assert subset.labels.tolist() == [0.0] * N_GOOD + [1.0] * 4


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("object,", "class,", "1cls.csv must list object, split"),
        ("widget,train,normal,widget/", "widget,train,normal,other/", "image other/Data"),
        ("widget,train,normal", "widget,train,anomaly", "'train', 'anomaly'"),
        ("0001.JPG", "0000.JPG", "image widget/Data/Images/Normal/0000.JPG"),
        ("widget,test,anomaly", "widget,test,normal", "must list bad images of .*widget, got none"),
        ("0000.JPG", "9999.JPG", "9999.JPG"),
    ],
)
def test_a_wrong_visa_list(old: str, new: str, line: str, tmp_path: Path) -> None:
    path = draw_visa(tmp_path) / "split_csv/1cls.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((errors.UserError, FileNotFoundError), match=line):
        data_to_matrices.make_matrices(tmp_path, tmp_path / "out", ["widget_all"], IM_SIZE)


def test_missing_objects_of_visa_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_visa(tmp_path)
    with open(tmp_path / "split_csv/1cls.csv", "a") as file:
        file.write("candle,train,normal,candle/Data/Images/Normal/0000.JPG,\n")
    assert layouts.choose_subsets(tmp_path, None) == ["widget_all"]
    assert f"not found in {tmp_path}: candle" in capsys.readouterr().err


# ---------------------------------------------------------------- validation images


@pytest.mark.parametrize(("share", "n_valid"), [(0.1, 5), (0.3, 6)])
def test_validation_images_are_taken_from_train(share: float, n_valid: int, tmp_path: Path) -> None:
    root = draw_mvtec(tmp_path)
    for number in range(N_TRAIN, 20):
        save(root / f"bottle/train/good/{number:03d}.png", "train/good", number)
    subsets = [layouts.find_subset(root, "bottle_all", IM_SIZE, share, seed) for seed in (0, 0, 1)]
    for subset in subsets:
        train, valid = subset.paths["train"], subset.paths["valid"]
        assert len(valid) == n_valid
        assert sorted(train + valid) == [f"train/good/{number:03d}.png" for number in range(20)]
        assert train == sorted(train)
        assert valid == sorted(valid)
        assert subset.settings["valid_share"] == share
    assert subsets[0].paths == subsets[1].paths
    assert subsets[0].paths["valid"] != subsets[2].paths["valid"]
    assert [subset.settings["valid_seed"] for subset in subsets] == [0, 0, 1]


def test_too_few_training_images(tmp_path: Path) -> None:
    draw_mvtec(tmp_path)
    for number in range(3):
        (tmp_path / f"bottle/train/good/{number:03d}.png").unlink()
    with pytest.raises(errors.UserError, match=r"10 training images or more, 5 of them .* got 9"):
        layouts.find_subset(tmp_path, "bottle_all", IM_SIZE)


def test_a_validation_folder_takes_the_place_of_sampled_images(tmp_path: Path) -> None:
    root = draw_mvtec(tmp_path / "images")
    data_to_matrices.make_matrices(root, tmp_path / "out", ["bottle_all"], 32)
    for number in range(2):
        save(root / f"bottle/validation/good/{number:03d}.png", "validation/good", number)
    assert layouts.find_layouts(root) == {"bottle": "plain"}
    with pytest.raises(errors.UserError, match=r"with valid_seed 0, now valid_seed is N"):
        data_to_matrices.make_matrices(root, tmp_path / "out", ["bottle_all"], 32)
    data_to_matrices.make_matrices(root, tmp_path / "out", ["bottle_all"], 32, overwrite=True)
    written = matrices.load_matrices(tmp_path / "out", "bottle_all")
    assert written.paths["valid"] == ["validation/good/000.png", "validation/good/001.png"]
    assert len(written.paths["train"]) == N_TRAIN
    assert "valid_share" not in written.settings


def test_validation_sampled_in_another_way_needs_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset_dir", str(draw_mvtec(tmp_path)), "--out_dir", str(tmp_path / "out")]
    flags += ["--im_size", "32"]
    files = []
    for sampling in ([], [], ["--seed", "1"], ["--valid_share", ".5"], []):
        if sampling or len(files) == 4:
            with pytest.raises(
                errors.UserError, match=r"computed with valid_(seed|share) .*overwrite"
            ):
                data_to_matrices.main([*flags, *sampling])
            sampling = [*sampling, "--overwrite"]
        data_to_matrices.main([*flags, *sampling])
        files.append(files_below(tmp_path / "out"))
    assert capsys.readouterr().err.count("finished already") == 1
    assert files[0] == files[1] == files[4]
    assert files[0] != files[2] != files[3]
    record = json.loads(files[3]["bottle_all/image_paths.json"])
    assert (record["settings"]["valid_share"], len(record["valid"])) == (0.5, 6)
    with pytest.raises(errors.UserError, match="im_size 32, now im_size is 40"):
        data_to_matrices.main([*flags[:-1], "40", "--seed", "1"])


# ---------------------------------------------------------------- listing


def test_every_extension_that_pillow_opens_is_an_image_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    names = ["a.PNG", "b.jpg", "c.jfif", "d.gif", "e.webp", "f.ppm", "g.bmp", "h.tif", "i.jp2"]
    for name in (*names, "._a.PNG", "notes.txt", "Thumbs.db"):
        (tmp_path / name).touch()
    assert layouts.list_images(tmp_path) == names
    line = f"4 of {len(names) + 4} files skipped (not images) in {tmp_path}"
    assert line in capsys.readouterr().err


def test_true_sizes_of_locos_categories(tmp_path: Path) -> None:
    true_sizes = {"breakfast_box": [1600, 1280], "juice_bottle": [800, 1600]}
    true_sizes |= {"pushpins": [1700, 1000], "screw_bag": [1600, 1100]}
    true_sizes |= {"splicing_connectors": [1700, 850]}
    assert true_sizes.keys() == loco.LOCO_CLASSES.keys()
    for name, true_size in true_sizes.items():
        draw_class(tmp_path / name)
        resized = layouts.find_subset(tmp_path, f"{name}_loco", 1024).settings
        assert resized["aspect"] == true_size
        assert max(resized["width"], resized["height"]) == 1024


# ---------------------------------------------------------------- masks


LOCO_IMAGES = ["test/good/000.png", *(f"test/logical_anomalies/{n:03d}.png" for n in range(4))]


@pytest.fixture
def loco_dir(tmp_path: Path) -> Path:
    """Return a category folder with a list of three defects, two of them of one pixel value."""
    defects = {"missing": 255, "swapped": 240, "turned": 240}
    config = [{"defect_name": name, "pixel_value": value} for name, value in defects.items()]
    (tmp_path / "defects_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("form", ["{:03d}/000.png", "{:03d}.png", "{:03d}/000.PNG"])
def test_masks_tell_which_images_show_which_defect(
    form: str, loco_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = loco_dir / "ground_truth/logical_anomalies"
    for number, value in ((0, 255), (1, 240), (2, 255)):
        save_mask(folder / form.format(number), value)
    (folder / "._000.png").write_bytes(b"what macOS leaves")
    defects = layouts.defect_images(loco_dir, LOCO_IMAGES)
    assert defects == {"missing": [1, 3], "swapped or turned": [2]}
    assert "1 of 4 anomalous images of" in capsys.readouterr().err  # 003 has no mask


def test_several_masks_of_an_image_count_each(loco_dir: Path) -> None:
    for name, value in (("000.png", 255), ("001.png", 240)):
        save_mask(loco_dir / "ground_truth/logical_anomalies/000" / name, value)
    defects = layouts.defect_images(loco_dir, LOCO_IMAGES[:2])
    assert defects == {"missing": [1], "swapped or turned": [1]}


@pytest.mark.parametrize("layout", [*LAYOUTS, "MVTec AD without _mask"])
def test_defects_by_folder(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, category, counts = LAYOUTS[layout.removesuffix(" without _mask")]
    subset = layouts.find_subset(draw(tmp_path), f"{category}_all", IM_SIZE)
    if "without" in layout:
        for path in (tmp_path / "bottle/ground_truth").rglob("*_mask.png"):
            path.rename(path.with_name(path.name.replace("_mask", "")))
    defects = layouts.defect_images(subset.category_dir, subset.paths["test"])
    starts = {name: N_GOOD + sum(list(counts.values())[:i]) for i, name in enumerate(counts)}
    assert defects == {n: list(range(starts[n], starts[n] + counts[n])) for n in counts}
    assert "no mask" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "mask", "image"),
    [
        ("MVTec AD", "ground_truth/scratch/001_mask.png", "test/scratch/001.png"),
        ("VisA", "Data/Masks/Anomaly/002.png", "Data/Images/Anomaly/002.JPG"),
    ],
)
@pytest.mark.parametrize("left", ["nothing", "a black one"])
def test_images_without_a_mask_are_named(
    left: str, layout: str, mask: str, image: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw, category, counts = LAYOUTS[layout]
    subset = layouts.find_subset(draw(tmp_path), f"{category}_all", IM_SIZE)
    (subset.category_dir / mask).unlink()
    if left == "a black one":
        save_mask(subset.category_dir / mask, 0)
    defects = layouts.defect_images(subset.category_dir, subset.paths["test"])
    line = f"1 of 4 anomalous images of {subset.category_dir} have no mask, such as {image}"
    assert line in caplog.text
    assert {name: len(images) for name, images in defects.items()} == counts


# ---------------------------------------------------------------- to the table


@pytest.fixture(scope="module", autouse=True)
def small_settings() -> Iterator[None]:
    """Take one crop and few directions, to be quick."""
    few = replace(settings.BACKBONE_DEFAULTS, crop_ratios=(0.99,), n_projections=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "BACKBONE_DEFAULTS", few)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_to_the_table(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, category, counts = LAYOUTS[layout]
    images = draw(tmp_path / "images")
    arrays, results, out = (tmp_path / name for name in ("matrices", "results", "out"))
    places = ["--data_dir", str(arrays), "--results_dir", str(results), "--device", "cpu"]
    net = ["--net", "test_resnet", "--weights", "random", "--initial_res", str(IM_SIZE)]
    dataset = ["--dataset_dir", str(images)]
    data_to_matrices.main([*dataset, "--out_dir", str(arrays), "--im_size", str(IM_SIZE)])
    run = [*places, *net, "--mvtype", category]
    resnet = ["--pyramid_level", "7", "--crop_size_ratio", ".99", "--n_projections", "10"]
    sinbad_single_layer.main([*run, *resnet])
    sinbad_single_layer.main([*run, "--pyramid_level", "224", "--rep", "0-1"])
    before = files_below(results)
    capsys.readouterr()
    version = str(results / "ver1_pyramid_lvl_#")
    levels = ["--pyramid_level", "7", "--rep_num_224", "2", "--no-figures"]
    calc_anom_ensm.main(
        ["--version", version, "--version_224", version, *levels, "--out", str(out), *dataset]
    )
    check_report(out, category, counts, capsys.readouterr().out)
    with_figures = layout == "VisA"
    outputs = ["--maps_dir", str(tmp_path / "maps"), *(["--figures"] if with_figures else [])]
    levels.insert(2, "224")
    reproduce_paper.main(
        [*dataset, *places, *net, *levels, *outputs, "--out", str(tmp_path / "paper")]
    )
    assert capsys.readouterr().err.count("finished already") == 1 + 1 + 2  # matrices and scores
    assert files_below(results) == before
    assert (tmp_path / "paper/scores.csv").read_bytes() == (out / "scores.csv").read_bytes()
    assert (tmp_path / f"paper/images_{category}_all.png").is_file() == with_figures
    n_test = len(matrices.load_matrices(arrays, f"{category}_all").labels)
    assert len(list((tmp_path / "maps" / category).rglob("*.tiff"))) == n_test


def check_report(out: Path, category: str, counts: dict[str, int], printed: str) -> None:
    """Hold AUROC of the data set and of each defect to the per-image scores; no kinds of LOCO."""
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([float(row["label"]) for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    assert labels.sum() == sum(counts.values())
    entry = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    values = entry["data_sets"][f"{category}_all"]
    expected = roc_auc_score(labels, scores)
    assert values["auroc"]["ensemble"] == pytest.approx(expected)
    classification = entry["classes"][category]["classification"]
    assert classification["auc_roc"]["mean"] == values["auroc"]["ensemble"]
    start = N_GOOD
    for name, n_images in counts.items():
        chosen = np.r_[0:N_GOOD, start : start + n_images]
        assert values["auroc_by_defect"][name] == {
            "auroc": pytest.approx(roc_auc_score(labels[chosen], scores[chosen])),
            "n_images": n_images,
        }
        start += n_images
    with open(out / "table.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["data set"] for row in table] == [f"{category}_all", "mean"]
    assert [row["ensemble"] for row in table] == [f"{100 * expected:.1f}"] * 2
    assert [row["SINBAD (2302.12245)"] for row in table] == ["-", "-"]
    assert f"{category}_all" in printed
    assert (out / "classes.csv").read_text(encoding="utf-8").startswith("class,mean,pooled\n")


def test_published_figures_never_stand_beside_all_anomalies() -> None:
    counts = layouts.loco_counts("pushpins_struct")[0].values()
    names = "n_train", "n_validation", "n_good", "n_anomalous"
    entry = dict(zip(names, counts, strict=True))
    assert tables.is_whole("pushpins_struct", entry)
    assert not tables.is_whole("pushpins_all", entry)
