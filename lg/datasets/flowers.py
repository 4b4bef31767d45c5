"""Oxford Flowers-102: 8,189 photographs of flowers in 102 classes.

Layout: `flowers/` with `jpg/image_00001.jpg` etc., `imagelabels.mat` and `setid.mat`; torchvision's
folder name `flowers-102` works too.
Source: Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes
(ICVGIP 2008), https://www.robots.ox.ac.uk/~vgg/data/flowers/102/
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lg.datasets.files import FileDataset, fetch, require
from lg.errors import DataError

FOLDER = "flowers"
TORCHVISION_FOLDER = "flowers-102"
ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
ENTRIES = ("jpg", "imagelabels.mat", "setid.mat")

# The lists of setid.mat in each split. Training uses the official training and validation images,
# ten of each per class.
SPLIT_KEYS = {"train": ("trnid", "valid"), "test": ("tstid",)}

# In the order of the labels 1..102 of imagelabels.mat.
_NAMES = """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold,
    tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot,
    king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily,
    balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger,
    grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
    sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly,
    ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy,
    daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup,
    oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium,
    bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata,
    japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum,
    spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose,
    thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani,
    clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress,
    canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow,
    mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""
CLASS_NAMES = tuple(" ".join(name.split()) for name in _NAMES.split(","))


class Flowers(FileDataset):
    """2,040 training (trnid and valid) or 6,149 test (tstid) images, sorted by id."""

    def __init__(self, root: str | os.PathLike[str], split: str, download: bool = False) -> None:
        """List a split.

        Args:
            root: Folder that contains `flowers` (or `flowers-102`).
            split: train, or test (also called val).
            download: Download missing files with torchvision, which checks the official MD5s. Only
                tested with a mock of torchvision, without a network.

        Raises:
            DataError: Files are missing, damaged or inconsistent.
        """
        name = "flowers"
        split = "train" if split == "train" else "test"
        folder = Path(root) / FOLDER
        if not folder.exists() and (Path(root) / TORCHVISION_FOLDER).exists():
            folder = Path(root) / TORCHVISION_FOLDER
        if download:
            fetch(_download, TORCHVISION_FOLDER, folder, ENTRIES, name)
        remedy = (
            "set download=True (DATA_LOADER.DOWNLOAD True), or download 102flowers.tgz, "
            f"imagelabels.mat and setid.mat from {ADDRESS} into {folder} and unpack the first "
            f"there, which creates {folder / 'jpg'}"
        )
        require([folder / entry for entry in ENTRIES], name, remedy)
        label_of = _vector(folder / "imagelabels.mat", "labels") - 1  # by image id - 1
        ids = np.concatenate([_vector(folder / "setid.mat", key) for key in SPLIT_KEYS[split]])
        ids.sort()
        if ids[0] < 1 or ids[-1] > len(label_of):
            raise DataError(
                f"{folder / 'setid.mat'}: it lists image ids {ids[0]}..{ids[-1]}, but "
                f"imagelabels.mat labels 1..{len(label_of)}; download both again"
            )
        paths = [str(folder / "jpg" / f"image_{each:05d}.jpg") for each in ids]
        super().__init__(name, split, CLASS_NAMES, label_of[ids - 1], paths)


def _vector(path: Path, key: str) -> np.ndarray:
    """Read a list of whole numbers from a .mat file as [n] int64."""
    from scipy.io import loadmat

    try:
        return loadmat(path)[key].ravel().astype(np.int64)
    except Exception as error:  # a damaged file may raise anything
        raise DataError(
            f"{path}: {key} cannot be read ({type(error).__name__}: {error}); download it again "
            f"from {ADDRESS}"
        ) from error


def _download(folder: Path) -> None:
    from torchvision.datasets import Flowers102 as Official

    Official(str(folder), split="train", download=True)
