"""A tiny synthetic data set in LOCO's layout, its matrices, the folders of reference arrays."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data_to_matrices import make_matrices
from sinbad import errors

IM_SIZE = 64  # pixels, side of the preprocessed images
COUNTS = {
    "train/good": 5,
    "validation/good": 3,
    "test/good": 3,
    "test/logical_anomalies": 2,
    "test/structural_anomalies": 2,
}
GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"

torch.set_num_threads(2)  # recorded beside scores, so worker processes take the same number
os.environ["OMP_NUM_THREADS"] = "2"
errors.log_to_stderr()


def draw_image(part: str, number: int, size: tuple[int, int] = (85, 50)) -> Image.Image:
    """Draw pins in a box; one too many or a scratch where the part is of anomalies."""
    rng = np.random.default_rng([list(COUNTS).index(part), number])
    noise = rng.integers(90, 120, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    n_pins = 5 if part.endswith("logical_anomalies") else 3
    for pin in range(n_pins):
        x = 8 + 15 * pin + int(rng.integers(0, 5))
        y = int(rng.integers(8, size[1] - 20))
        draw.ellipse((x, y, x + 9, y + 9), fill=(230, 200, int(rng.integers(0, 90))))
    if part.endswith("structural_anomalies"):
        draw.line((0, 0, size[0], int(rng.integers(10, size[1]))), fill=(10, 10, 10), width=4)
    return image


def draw_class(folder: Path, size: tuple[int, int] = (85, 50)) -> None:
    """Draw all parts of one class."""
    for part, count in COUNTS.items():
        (folder / part).mkdir(parents=True)
        for number in range(count):
            draw_image(part, number, size).save(folder / part / f"{number:03d}.png")


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one class, pushpins, of 15 small images. Never write there."""
    folder = tmp_path_factory.mktemp("dataset_loco")
    draw_class(folder / "pushpins")
    return folder


@pytest.fixture(scope="session")
def data_dir(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the matrices of both test subsets of pushpins, 64 x 64. Never write there."""
    folder = tmp_path_factory.mktemp("data_matrices")
    make_matrices(dataset_dir, folder, ["pushpins_loco", "pushpins_struct"], IM_SIZE)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of every file below a folder, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Place:
    """Where a case may write: copies of the images and matrices, and the output folder."""

    root: Path
    drawn: Path
    matrices: Path

    @property
    def out(self) -> Path:
        """The output folder, which must stay empty."""
        return self.root / "out"

    def images(self) -> Path:
        """Return a copy of the synthetic data set."""
        return Path(shutil.copytree(self.drawn, self.root / "images"))

    def data(self) -> Path:
        """Return a copy of the matrices of pushpins_loco."""
        name = "pushpins_loco"
        shutil.copytree(self.matrices / name, self.root / "data" / name)
        return self.root / "data"


@pytest.fixture
def place(tmp_path: Path, dataset_dir: Path, data_dir: Path) -> Place:
    """Return where a case of wrong input may write."""
    return Place(tmp_path, dataset_dir, data_dir)
