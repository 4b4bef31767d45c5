"""The digits included in scikit-learn: 1,797 handwritten digits of 8 x 8 pixels in 10 classes.

They need no files and no download.
Source: the test part of UCI's Optical Recognition of Handwritten Digits,
https://archive.ics.uci.edu/dataset/80
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from lg.datasets.base import ImageDataset, stratified_order

NUM_TRAIN = 1200  # of 1,797, the other 597 are for testing; there is no official split
TEST_SPLIT_SEED = 0  # must never change: results are compared across versions


class Digits(ImageDataset):
    """1,200 training or 597 test images of a fixed random split, in scikit-learn's order.

    Attributes:
        pixels: [n, 8, 8] uint8, the 17 gray levels scaled to 0..255.
        sources: [n] int64, position of each image in scikit-learn's set.
    """

    def __init__(
        self, root: str | os.PathLike[str] = "", split: str = "train", download: bool = False
    ) -> None:
        """Load a split.

        Args:
            root: Ignored.
            split: train, or test (also called val).
            download: Ignored.
        """
        from sklearn.datasets import load_digits

        name = "digits"
        split = "train" if split == "train" else "test"
        bunch = load_digits()
        order = stratified_order(bunch.target, TEST_SPLIT_SEED)
        sources = np.sort(order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:])
        super().__init__(name, split, [str(digit) for digit in range(10)], bunch.target[sources])
        levels = bunch.images[sources].astype(np.int64)  # 0..16
        self.pixels = ((levels * 255 + 8) // 16).astype(np.uint8)
        self.sources = sources

    def image(self, index: int) -> Image.Image:
        rgb = Image.fromarray(self.pixels[index]).convert("RGB")
        return rgb if self.pixel_format.channels == 3 else self._to_gray(rgb)

    def describe(self, index: int) -> str:
        return f"digits/{self.split} image {index} (scikit-learn's {self.sources[index]})"
