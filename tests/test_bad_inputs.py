"""Wrong input: one line that begins with `error:`, exit status 2, nothing written."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import IM_SIZE, draw_class, draw_image, files_below
from PIL import Image

import calc_anom_ensm
import data_to_matrices
import make_demo_dataset
import sinbad_single_layer
from command_line import run_script
from result_files import LevelScores, save_scores

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Place:
    """Where a case may write: copies of the drawn images and matrices, and the output folder."""

    root: Path
    drawn: Path
    matrices: Path

    @property
    def out(self) -> Path:
        """The output folder, which must stay empty."""
        return self.root / "out"

    def images(self) -> Path:
        """Return a copy of the drawn data set."""
        return Path(shutil.copytree(self.drawn, self.root / "images"))

    def data(self) -> Path:
        """Return a copy of the matrices of pushpins_loco."""
        name = "pushpins_loco"
        shutil.copytree(self.matrices / name, self.root / "data" / name)
        return self.root / "data"


Case = tuple[Callable[..., None], list[str]]


@pytest.fixture
def place(tmp_path: Path, dataset_dir: Path, data_dir: Path) -> Place:
    return Place(tmp_path, dataset_dir, data_dir)


def matrices_case(place: Place, images: Path, *flags: str) -> Case:
    paths = ["--dataset_dir", str(images), "--out_dir", str(place.out)]
    return data_to_matrices.main, [*paths, "--im_size", "32", *flags]


def scores_case(place: Place, *flags: str, data: Path | None = None) -> Case:
    """Level 14 with random weights, unless later flags say otherwise."""
    return sinbad_single_layer.main, [
        *("--data_dir", str(data or place.matrices), "--results_dir", str(place.out)),
        *("--mvtype", "pushpins_loco", "--initial_res", str(IM_SIZE), "--device", "cpu"),
        *("--net", "resnet18", "--weights", "random", "--n_projections", "4"),
        *("--pyramid_level", "14", *flags),
    ]


def fails(case: Case, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a case as its script would; return its one error line."""
    main, argv = case
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(main, argv)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])  # the last line; notes may come before it
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


# ---------------------------------------------------------------- images and folders


def no_such_folder(place: Place) -> Case:
    return matrices_case(place, place.root / "nowhere")


def empty_folder(place: Place) -> Case:
    (place.root / "empty").mkdir()
    return matrices_case(place, place.root / "empty")


def class_without_test_good(place: Place) -> Case:
    images = place.images()
    shutil.rmtree(images / "pushpins/test/good")
    return matrices_case(place, images)


def class_without_images(place: Place) -> Case:
    images = place.images()
    for path in (images / "pushpins/validation/good").iterdir():
        path.unlink()
    return matrices_case(place, images)


def png_cut_in_half(place: Place) -> Case:
    images = place.images()
    path = images / "pushpins/test/good/001.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return matrices_case(place, images)


def text_named_png(place: Place) -> Case:
    images = place.images()
    (images / "pushpins/train/good/002.png").write_text("no image")
    return matrices_case(place, images)


def images_of_two_aspects(place: Place) -> Case:
    images = place.images()
    path = images / "pushpins/train/good/002.png"
    draw_image("train/good", 2, (50, 85)).save(path)
    return matrices_case(place, images)


def images_of_two_aspects_in_an_own_class(place: Place) -> Case:
    draw_class(place.root / "images" / "own")
    path = place.root / "images/own/validation/good/001.png"
    draw_image("validation/good", 1, (60, 60)).save(path)
    return matrices_case(place, place.root / "images")


def images_of_16_bits(place: Place) -> Case:
    images = place.images()
    pixels = np.full((50, 85), 30000, np.uint16)
    Image.fromarray(pixels).save(images / "pushpins/train/good/002.png")
    return matrices_case(place, images)


def a_class_named_like_a_data_set(place: Place) -> Case:
    draw_class(place.root / "images" / "own_loco")
    return matrices_case(place, place.root / "images")


def unknown_class_of_images(place: Place) -> Case:
    return matrices_case(place, place.drawn, "--mvtype", "teapots_loco")


def unknown_group(place: Place) -> Case:
    return matrices_case(place, place.drawn, "--mvtype", "teapots")


def tiny_im_size(place: Place) -> Case:
    return matrices_case(place, place.drawn, "--im_size", "0")


def unknown_flag(place: Place) -> Case:
    return matrices_case(place, place.drawn, "--im_sise", "64")


# ---------------------------------------------------------------- matrices


def no_matrices(place: Place) -> Case:
    return scores_case(place, data=place.root / "nowhere")


def matrices_of_another_size(place: Place) -> Case:
    return scores_case(place, "--initial_res", "128")


def npy_cut_short(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/test_data.npy"
    path.write_bytes(path.read_bytes()[:-1000])
    return scores_case(place, data=data)


def empty_npy(place: Place) -> Case:
    data = place.data()
    (data / "pushpins_loco/train_data.npy").write_bytes(b"")
    return scores_case(place, data=data)


def labels_of_another_length(place: Place) -> Case:
    data = place.data()
    np.save(data / "pushpins_loco/image_level_label.npy", np.zeros(3))
    return scores_case(place, data=data)


def json_cut_short(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/image_paths.json"
    path.write_text(path.read_text()[:40])
    return scores_case(place, data=data)


def json_of_another_kind(place: Place) -> Case:
    data = place.data()
    (data / "pushpins_loco/image_paths.json").write_text('{"train": 5}')
    return scores_case(place, data=data)


def npy_with_a_damaged_header(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/valid_data.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))
    return scores_case(place, data=data)


def matrices_of_whole_numbers(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/valid_data.npy"
    images = np.load(path).astype(np.int64)
    path.unlink()  # it may be linked
    np.save(path, images)
    return scores_case(place, data=data)


def matrices_of_no_validation_image(place: Place) -> Case:
    data = place.data()
    path = data / "pushpins_loco/valid_data.npy"
    path.unlink()
    np.save(path, np.zeros((0, 3, IM_SIZE, IM_SIZE), np.uint8))
    return scores_case(place, data=data)


def authors_matrices_with_nan(place: Place) -> Case:
    data = place.data()
    folder = data / "pushpins_loco"
    (folder / "image_paths.json").unlink()
    images = np.load(folder / "train_data.npy").astype(np.float32) / 255
    images[1, 0, 3, 3] = np.nan
    (folder / "train_data.npy").unlink()
    np.save(folder / "train_data.npy", images)
    return scores_case(place, "--pyramid_level", "224", data=data)


# ---------------------------------------------------------------- flags of the scores


def unknown_level(place: Place) -> Case:
    return scores_case(place, "--pyramid_level", "8")


def unknown_data_set(place: Place) -> Case:
    return scores_case(place, "--mvtype", "teapots")


def unknown_net(place: Place) -> Case:
    return scores_case(place, "--net", "resnet19")


def negative_shrinkage(place: Place) -> Case:
    return scores_case(place, "--shrinkage_factor", "-0.5")


def crop_ratio_zero(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", "0")


def crop_ratio_above_one(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", "1.5")


def crop_of_no_pixel(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", "0.001")


def batch_size_zero(place: Place) -> Case:
    return scores_case(place, "--batch_size", "0")


def repetitions_backwards(place: Place) -> Case:
    return scores_case(place, "--rep", "5-2")


def device_that_is_not_there(place: Place) -> Case:
    return scores_case(place, "--device", "cuda:99")


def unknown_device(place: Place) -> Case:
    return scores_case(place, "--device", "abacus")


def two_ratios_of_one_file_name(place: Place) -> Case:
    return scores_case(place, "--crop_size_ratio", ".5", ".33")


# ---------------------------------------------------------------- weights


def no_weights_file(place: Place) -> Case:
    return scores_case(place, "--weights", str(place.root / "none.pth"))


def weights_no_torch_file(place: Place) -> Case:
    path = place.root / "text.pth"
    path.write_text("no weights")
    return scores_case(place, "--weights", str(path))


def weights_no_state_dict(place: Place) -> Case:
    torch.save([1, 2], place.root / "list.pth")
    return scores_case(place, "--weights", str(place.root / "list.pth"))


def weights_of_another_net(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, place.root / "resnet18.pth")
    return scores_case(place, "--net", "resnet50", "--weights", str(place.root / "resnet18.pth"))


def weights_of_a_deeper_net(place: Place) -> Case:
    state = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(state, place.root / "resnet34.pth")
    return scores_case(place, "--weights", str(place.root / "resnet34.pth"))


def weights_without_a_stage(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("layer3")}
    torch.save(kept, place.root / "to_layer2.pth")
    return scores_case(place, "--weights", str(place.root / "to_layer2.pth"))


def weights_with_nan(place: Place) -> Case:
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer3.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, place.root / "nan.pth")
    return scores_case(place, "--weights", str(place.root / "nan.pth"))


# ---------------------------------------------------------------- output


def results_folder_is_a_file(place: Place) -> Case:
    (place.root / "file").touch()
    return scores_case(place, "--results_dir", str(place.root / "file"), "--pyramid_level", "224")


def matrices_folder_is_a_file(place: Place) -> Case:
    (place.root / "file").touch()
    return matrices_case(place, place.drawn, "--out_dir", str(place.root / "file"))


def results_folder_in_proc(place: Place) -> Case:
    return scores_case(place, "--results_dir", "/proc/sinbad", "--pyramid_level", "224")


# ---------------------------------------------------------------- ensemble


def write_scores(place: Place, level: int, n_crops: int, n_test: int = 4) -> None:
    """Write scores of one grid into place.root / "runs"."""
    root = place.root / "runs"
    rng = np.random.default_rng(n_crops)
    labels = np.array([0.0, 1.0] * (n_test // 2))
    paths = [f"test/{i}.png" for i in range(n_test)]
    scores = LevelScores(rng.random((n_crops, n_test)), rng.random((n_crops, 3)), labels, paths, {})
    folder = root / f"v_pyramid_lvl_{level}" / "rep_num_0" / "pushpins_loco"
    save_scores(folder / f"{n_crops}_crop_anom_maps.npz", scores, root)


def ensemble_case(place: Place, *flags: str) -> Case:
    version = str(place.root / "runs" / "v_pyramid_lvl_#")
    named = ["--version", version, "--version_224", version, "--mvtype", "pushpins_loco"]
    return calc_anom_ensm.main, [*named, "--out", str(place.out), "--rep_num_224", "0", *flags]


def no_scores_at_all(place: Place) -> Case:
    return ensemble_case(place, "--mvtype", "all")


def scores_of_one_level_missing(place: Place) -> Case:
    write_scores(place, 7, 1)
    return ensemble_case(place)


def scores_of_one_grid_missing(place: Place) -> Case:
    for level, n_crops in ((7, 1), (7, 4), (14, 1)):
        write_scores(place, level, n_crops)
    return ensemble_case(place)


def raw_pixel_scores_missing(place: Place) -> Case:
    for level in (7, 14):
        write_scores(place, level, 1)
    return ensemble_case(place, "--rep_num_224", "2")


def ensemble_labels_of_another_length(place: Place) -> Case:
    for level in (7, 14):
        write_scores(place, level, 1)
    folder = place.root / "runs/v_pyramid_lvl_14/rep_num_0/pushpins_loco"
    np.save(folder / "lbl.npy", np.zeros(3))
    return ensemble_case(place)


def levels_of_other_images(place: Place) -> Case:
    write_scores(place, 7, 1)
    write_scores(place, 14, 1, n_test=6)
    return ensemble_case(place)


def scores_cut_short(place: Place) -> Case:
    for level in (7, 14):
        write_scores(place, level, 1)
    path = place.root / "runs/v_pyramid_lvl_14/rep_num_0/pushpins_loco/1_crop_anom_maps.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return ensemble_case(place)


def damage_scores(place: Place, **arrays: np.ndarray) -> Case:
    """Replace arrays of a file of scores of 4 crops."""
    for level in (7, 14):
        write_scores(place, level, 4)
    path = place.root / "runs/v_pyramid_lvl_14/rep_num_0/pushpins_loco/4_crop_anom_maps.npz"
    with np.load(path) as archive:
        found = dict(archive)
    np.savez(path, **{**found, **arrays})
    return ensemble_case(place)


def scores_with_nan(place: Place) -> Case:
    return damage_scores(place, anom_map_test=np.full((4, 4), np.nan))


def scores_of_fewer_crops_than_named(place: Place) -> Case:
    return damage_scores(place, anom_map_test=np.ones((1, 4)), anom_map_valid=np.ones((1, 3)))


def scores_of_one_axis(place: Place) -> Case:
    return damage_scores(place, anom_map_valid=np.ones(4))


def scores_with_a_record_of_another_kind(place: Place) -> Case:
    return damage_scores(place, run=np.array("[]"))


def negative_lambda(place: Place) -> Case:
    return ensemble_case(place, "--lambda_factor", "-1")


CASES: dict[Callable[[Place], Case], list[str]] = {
    no_such_folder: ["dataset_dir must", "no such folder", "mvtec.com", "9e7c84dba550"],
    empty_folder: ["dataset_dir must", "nothing in it"],
    class_without_test_good: ["pushpins must hold test/good", "got test/logical_anomalies"],
    class_without_images: ["validation/good must hold images", "got none"],
    png_cut_in_half: ["test/good/001.png must be a whole image"],
    text_named_png: ["train/good/002.png must be a whole image"],
    images_of_two_aspects: ["002.png must have the aspect 1700 x 1000", "got 50 x 85"],
    images_of_two_aspects_in_an_own_class: ["001.png must have the aspect 85 x 50", "60 x 60"],
    images_of_16_bits: ["002.png must have 8 bits a channel", "I;16|I"],
    a_class_named_like_a_data_set: ["must not end in _loco or _struct", "got own_loco", "rename"],
    unknown_class_of_images: ["mvtype must", "got teapots_loco", "pushpins"],
    unknown_group: ["mvtype must", "got teapots", "breakfast_box"],
    tiny_im_size: ["--im_size", "from 8, got 0"],
    unknown_flag: ["--im_sise", "--help"],
    no_matrices: ["nowhere", "python data_to_matrices.py --mvtype pushpins"],
    matrices_of_another_size: ["initial_res must", "64, got 128", "--initial_res 64"],
    npy_cut_short: ["test_data.npy must be a whole .npy file", "--overwrite"],
    empty_npy: ["train_data.npy must be a whole .npy file", "--overwrite"],
    labels_of_another_length: ["image_level_label.npy must hold 5 labels, 0 or 1, got 3"],
    json_cut_short: ["image_paths.json must be JSON", "--overwrite"],
    json_of_another_kind: ["image_paths.json must be JSON with train", "--overwrite"],
    npy_with_a_damaged_header: ["valid_data.npy must be a whole .npy file", "--overwrite"],
    matrices_of_whole_numbers: ["valid_data.npy must be uint8", "got int64"],
    matrices_of_no_validation_image: [
        "valid_data.npy must be (n, 3, 64, 64)",
        "got (0, 3, 64, 64)",
    ],
    authors_matrices_with_nan: ["must hold k/255"],
    unknown_level: ["--pyramid_level", "8", "224"],
    unknown_data_set: ["mvtype must", "got teapots"],
    unknown_net: ["net must be one of", "resnet18", "got resnet19"],
    negative_shrinkage: ["--shrinkage_factor", "above 0 to 1, got -0.5"],
    crop_ratio_zero: ["--crop_size_ratio", "above 0 and below 1, got 0"],
    crop_ratio_above_one: ["--crop_size_ratio", "above 0 and below 1, got 1.5"],
    crop_of_no_pixel: ["crops must be at least 1 pixel", "0.001"],
    batch_size_zero: ["--batch_size", "from 1, got 0"],
    repetitions_backwards: ["--rep", "got 5-2"],
    device_that_is_not_there: ["device must be on this machine", "cuda:99"],
    unknown_device: ["device must be auto, cpu, cuda", "got abacus"],
    two_ratios_of_one_file_name: ["0.5 and 0.33", "9_crop_anom_maps.npz", "--version_name"],
    no_weights_file: ["weights must be imagenet, random or a file", "none.pth"],
    weights_no_torch_file: ["weights must be a file written by torch.save", "text.pth"],
    weights_no_state_dict: ["weights must hold a state_dict", "list.pth"],
    weights_of_another_net: ["weights must be of the net", "resnet18.pth", "--net"],
    weights_of_a_deeper_net: ["weights must be of the net", "also holds layer1.2.conv1.weight"],
    weights_without_a_stage: ["weights must be of the net and levels", "lacks layer3"],
    weights_with_nan: ["features must be finite", "train/good/000.png", "level 14"],
    results_folder_is_a_file: ["file", "choose|check"],
    matrices_folder_is_a_file: ["file", "choose|check"],
    results_folder_in_proc: ["/proc/sinbad"],
    no_scores_at_all: ["version must hold scores", "sinbad_single_layer.py"],
    scores_of_one_level_missing: ["lvl_14", "--pyramid_level 14"],
    scores_of_one_grid_missing: ["same crop grids", "[1, 4]|[4, 1]", "level 14"],
    raw_pixel_scores_missing: ["lvl_224", "--pyramid_level 224 --rep 0", "--rep_num_224"],
    ensemble_labels_of_another_length: ["lbl.npy must hold 4 labels", "got 3"],
    levels_of_other_images: ["same images", "4 and 6"],
    scores_cut_short: ["1_crop_anom_maps.npz must be a whole file of scores"],
    scores_with_nan: ["4_crop_anom_maps.npz must be a whole file of scores", "NaN"],
    scores_of_fewer_crops_than_named: ["4_crop_anom_maps.npz must be", "1 and 1 crops"],
    scores_of_one_axis: ["4_crop_anom_maps.npz must be", "anom_map_valid is float64 of shape (4,)"],
    scores_with_a_record_of_another_kind: ["4_crop_anom_maps.npz must be", "no record"],
    negative_lambda: ["--lambda_factor", "got -1"],
}


@pytest.mark.parametrize("prepare", CASES, ids=lambda prepare: prepare.__name__)
def test_bad_input(
    prepare: Callable[[Place], Case], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(prepare(place), capsys)
    for words in CASES[prepare]:
        assert any(choice in line for choice in words.split("|"))
    assert files_below(place.out) == {}
    assert not Path("/proc/sinbad").exists()


def test_weights_that_cannot_be_downloaded(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(place.root / "empty_cache"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    line = fails(scores_case(place, "--weights", "imagenet"), capsys)
    for words in ("no route to host", "download.pytorch.org", "--weights FILE", "empty_cache"):
        assert words in line
    assert files_below(place.out) == {}


def test_what_was_finished_before_stays_as_it_was(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    good = matrices_case(place, place.drawn, "--mvtype", "pushpins_loco")
    good[0](good[1])
    before = files_below(place.out)
    fails(matrices_case(place, place.drawn, "--im_size", "48"), capsys)
    images = place.images()
    (images / "pushpins/train/good/002.png").write_text("no image")
    fails(matrices_case(place, images, "--overwrite"), capsys)
    assert files_below(place.out) == before


def test_results_and_matrices_of_the_authors_are_not_replaced(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place.out / "ver1_pyramid_lvl_14/rep_num_0/pushpins_loco"
    folder.mkdir(parents=True)
    arrays = {"anom_map_test": np.ones((1, 5)), "anom_map_valid": np.ones((1, 3))}
    np.savez(folder / "1_crop_anom_maps.npz", **arrays)
    np.save(folder / "lbl.py.npy", np.zeros(5))
    before = files_below(place.out)
    assert "file of this collection" in fails(scores_case(place), capsys)
    assert files_below(place.out) == before
    main, argv = scores_case(place, "--overwrite")
    main(argv)
    assert sorted(path.name for path in folder.iterdir()) == ["1_crop_anom_maps.npz", "lbl.npy"]

    matrices = place.root / "theirs" / "pushpins_loco"
    matrices.mkdir(parents=True)
    np.save(matrices / "train_data.npy", np.zeros((2, 3, 64, 64), np.float32))
    case = matrices_case(place, place.drawn, "--out_dir", str(matrices.parent))
    assert "hold matrices of this script" in fails(case, capsys)
    assert [path.name for path in matrices.iterdir()] == ["train_data.npy"]


def test_scores_of_images_that_have_changed_do_not_count_as_finished(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    images = place.images()
    data = ["--out_dir", str(place.root / "data"), "--mvtype", "pushpins_loco"]
    make, argv = matrices_case(place, images, *data, "--im_size", str(IM_SIZE))
    make(argv)
    score = scores_case(place, "--pyramid_level", "224", data=place.root / "data")
    score[0](score[1])
    before = files_below(place.out)
    good, bad = (images / f"pushpins/test/{part}" for part in ("good", "logical_anomalies"))
    (good / "000.png").write_bytes((bad / "000.png").read_bytes())
    make(argv)
    assert "000.png is newer than" in capsys.readouterr().err
    make([*argv, "--overwrite"])
    assert "was made with images_sha256" in fails(score, capsys)
    assert files_below(place.out) == before


def test_a_demo_data_set_is_not_replaced_with_what_lies_beside(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out_dir", str(place.out), "--scale", ".02", "--n_train", "1", "--n_test", "1"]
    make_demo_dataset.main(argv)
    (place.out / "notes.txt").write_text("mine")
    before = files_below(place.out)
    again = [*argv, "--seed", "1", "--overwrite"]
    assert "notes.txt" in fails((make_demo_dataset.main, again), capsys)
    assert files_below(place.out) == before
    (place.out / "notes.txt").unlink()
    make_demo_dataset.main(again)
    assert files_below(place.out) != before


@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [
        ("| true", 2, ""),
        (">/dev/full", 2, "error: the output: No space left on device"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_a_reader_that_goes_away(redirection: str, status: int, words: str) -> None:
    code = "from command_line import *; run_script(lambda argv: print('x' * 9) or say('y'), [])"
    command = f"set -o pipefail; '{sys.executable}' -c \"{code}\" {redirection}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, env={}
    )
    assert result.returncode == status
    assert words in result.stderr
    assert "Exception" not in result.stderr


def test_debug_shows_the_traceback(place: Place) -> None:
    main, argv = matrices_case(place, place.root / "nowhere", "--debug")
    with pytest.raises(Exception, match="dataset_dir must"):
        run_script(main, argv)


# ---------------------------------------------------------------- file systems


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system in memory, or skip the test."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system (root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("script", ["data_to_matrices", "sinbad_single_layer", "calc_anom_ensm"])
def test_read_only_file_system(
    script: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(place.out, "ro"):
        if script == "data_to_matrices":
            case = matrices_case(place, place.drawn)
        elif script == "sinbad_single_layer":
            case = scores_case(place, "--pyramid_level", "224")
        else:
            for level in (7, 14):
                write_scores(place, level, 1)
            case = ensemble_case(place)
        line = fails(case, capsys)
        assert str(place.out) in line
        assert "Read-only file system; choose a folder that is not read-only" in line


def test_full_disk_while_matrices_are_written(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(place.out, "size=1m"):
        line = fails(matrices_case(place, place.drawn, "--im_size", "512"), capsys)
        assert "No space left on device; free some space" in line
        assert files_below(place.out) == {}


def test_full_disk_while_scores_are_written(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(place.out, "size=64k"):
        (place.out / "filler").write_bytes(bytes(32 * 1024))
        reps = ["--pyramid_level", "224", "--rep", "0-19", "--crop_size_ratio", ".7"]
        line = fails(scores_case(place, *reps), capsys)
        assert "No space left on device; free some space" in line
        assert not (place.out / ".sinbad_partial").exists()
        (place.out / "filler").unlink()
        for name in files_below(place.out):  # what is there is whole
            np.load(place.out / name)
