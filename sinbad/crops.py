"""Crop grids: how many crops an image has, and where they lie. Standard library only."""

import math
from dataclasses import dataclass

from sinbad import errors


@dataclass(frozen=True)
class CropGrid:
    """The crops of one size over a square image, row by row.

    Attributes
    ----------
    im_size : side of the image in pixels
    ratio : side of a crop over that of the image, in (0, 1)
    crop_num_edge : the stride is `im_size` over this
    """

    im_size: int
    ratio: float
    crop_num_edge: int

    @property
    def side(self) -> int:
        """Side of a crop in pixels."""
        return math.floor(self.im_size * self.ratio)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top left corners (y, x) of all crops in pixels, row by row.

        UserError if crops or stride are less than a pixel.
        """
        stride = self.im_size // self.crop_num_edge
        if self.side < 1 or stride < 1:
            raise errors.UserError(
                "crops and their stride must be at least 1 pixel, got crop_size_ratio "
                f"{self.ratio} and crop_num_edge {self.crop_num_edge} at {self.im_size} pixels"
            )
        starts = [i * stride for i in range((self.im_size - self.side) // stride + 1)]
        return [(y, x) for y in starts for x in starts]

    def __len__(self) -> int:
        return len(self.corners)


@dataclass(frozen=True)
class Geometry:
    """Where the crops of a grid lie in an image: in its square, of which the image fills a part.

    Attributes
    ----------
    grid : the crops of the square
    extent : (width, height) of the image in the square's top left corner, in pixels
    """

    grid: CropGrid
    extent: tuple[int, int]
