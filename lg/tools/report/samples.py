"""Test images as the model sees them, and heat-map overlays.

Shapes: B images, S image side in pixels, h x w heat map.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lg import builders
from lg.augment.batched import to_pixels
from lg.augment.preprocessing import Preprocessing
from lg.datasets.base import DatasetSubset, evenly_spaced
from lg.distributed import World
from lg.tools.report.subject import Tested

_SIDE = 128  # pixels of a picture
_FAINT, _STRONG = 0.15, 0.85  # opacity of the least and the greatest heat


def one_per_class(labels: np.ndarray, number: int) -> list[int]:
    """Return the positions of the first images of at most `number` classes, evenly spaced."""
    known, first = np.unique(labels, return_index=True)
    return sorted(int(first[k]) for k in evenly_spaced(len(known), number))


def load_images(tested: Tested, indices: Sequence[int]) -> Tensor:
    """Return test images at ascending `indices` as the model sees them, [B, C, S, S]."""
    subset = DatasetSubset(tested.dataset, np.array(indices))
    with closing(builders.build_test_loader(tested.cfg, subset, World(), tested.device)) as loader:
        return torch.cat([batch.to(tested.device).images for batch in loader])


def pictures(images: Tensor, preprocessing: Preprocessing) -> list[Image.Image]:
    """Return images as the model sees them, [B, C, S, S], as pictures."""
    pixels = to_pixels(images, preprocessing.mean, preprocessing.std).cpu().numpy()
    return [_enlarged(Image.fromarray(each)) for each in pixels]


def _enlarged(image: Image.Image) -> Image.Image:
    side = max(_SIDE, min(image.width, 2 * _SIDE))
    rule = Image.Resampling.NEAREST if image.width < _SIDE else Image.Resampling.BICUBIC
    return image.resize((side, side), rule)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Return a picture with a heat map [h, w] of values from 0 to 1 laid over it."""
    import matplotlib  # slow to import

    mask = Image.fromarray((255 * heat.numpy()).round().astype(np.uint8))
    level = np.asarray(mask.resize(picture.size, Image.Resampling.BILINEAR)) / 255
    colors = 255 * matplotlib.colormaps["inferno"](level)[..., :3]
    opacity = (_FAINT + (_STRONG - _FAINT) * level)[..., None]
    grey = np.asarray(picture.convert("L"))[..., None]
    return Image.fromarray(((1 - opacity) * grey + opacity * colors).round().astype(np.uint8))
