"""CIFAR-100: 60,000 images of 32 x 32 in 100 classes.

Layout: `cifar-100-python/{train,test,meta}`, from the official "python version".
Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009),
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from lg.datasets.base import ImageDataset
from lg.datasets.files import fetch, require
from lg.errors import DataError
from lg.files.safe_pickle import load_table

FOLDER = "cifar-100-python"
ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
SIZE = 32  # pixels


class CIFAR100(ImageDataset):
    """The fine labels of CIFAR-100: 50,000 training and 10,000 test images if complete.

    The files may contain fewer images than the official ones, or in another order.

    Attributes:
        pixels: [n, 3, 32, 32] uint8, read-only; one array, which forked workers share.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, download: bool = False) -> None:
        """Read a split.

        Args:
            root: Folder that contains `cifar-100-python`.
            split: train, or test (also called val).
            download: Download missing files with torchvision, which checks the official MD5. Only
                tested with a mock of torchvision, without a network.

        Raises:
            DataError: Files are missing, damaged, unsafe or inconsistent.
        """
        name = "cifar100"
        split = "train" if split == "train" else "test"
        folder = Path(root) / FOLDER
        if download:
            fetch(_download, FOLDER, folder, ("train", "test", "meta"), name)
        remedy = (
            f"set download=True (DATA_LOADER.DOWNLOAD True), or unpack {ADDRESS} in {root}, "
            f"which then contains {FOLDER}/train, {FOLDER}/test and {FOLDER}/meta"
        )
        require([folder / split, folder / "meta"], name, remedy)
        class_names = load_table(folder / "meta", ["fine_label_names"])["fine_label_names"]
        table = load_table(folder / split, ["data", "fine_labels"])
        super().__init__(name, split, class_names, table["fine_labels"])
        data, shape = table["data"], (len(self), 3 * SIZE * SIZE)  # red, then green, then blue
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != shape:
            raise DataError(
                f"{folder / split}: data is not a uint8 array of shape {shape}, one row per label; "
                "download it again"
            )
        self.pixels = data.reshape(-1, 3, SIZE, SIZE)

    def image(self, index: int) -> Image.Image:
        rgb = Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))
        return rgb if self.pixel_format.channels == 3 else self._to_gray(rgb)

    def describe(self, index: int) -> str:
        return f"{FOLDER}/{self.split} image {index}"


def _download(folder: Path) -> None:
    from torchvision.datasets import CIFAR100 as Official

    Official(str(folder), train=True, download=True)
