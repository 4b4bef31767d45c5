"""Transform single PIL images, in the workers of the loader."""

from __future__ import annotations

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision import transforms

from lg.augment.view import View, padded_crop, random_resized_crop


class TrainTransform:
    """Training transform of one image: the strong or the plain recipe.

    Strong: random resized crop (bicubic), flip, timm's RandAugment (`rand-m9-mstd0.5-inc1`),
    normalise, erase a box with noise (probability 0.25).
    Plain: resize, random crop with padding of an eighth of the side, flip, normalise.
    Mean and standard deviation are ImageNet's. All draws come from the global generators.
    """

    def __init__(self, *, image_size: int, strong: bool, hflip: float = 0.5) -> None:
        self.image_size = image_size
        self.hflip = hflip
        self.draw_view = random_resized_crop if strong else padded_crop
        if strong:
            _, *rest = create_transform(
                input_size=image_size,
                is_training=True,
                color_jitter=0.4,  # timm ignores it with RandAugment
                auto_augment="rand-m9-mstd0.5-inc1",
                interpolation="bicubic",
                re_prob=0.25,
                re_mode="pixel",
                re_count=1,
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
                separate=True,  # crop and flip are replaced, since the view must be known
            )
            _replace_posterize(rest)
            self.finish = transforms.Compose(rest)
        else:
            self.finish = _normalise()

    def __call__(self, image: Image.Image) -> tuple[Tensor, View]:
        """Transform an RGB image of any size to ([3, S, S] float32, its view)."""
        image, view = self.draw_view(image, self.image_size, hflip=self.hflip)
        return self.finish(image), view


class TestTransform:
    """Test transform of one image: the whole image, resized (bicubic) to S x S, normalised."""

    __test__ = False  # not a test case

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size
        self.finish = _normalise()

    def __call__(self, image: Image.Image) -> tuple[Tensor, View]:
        """Transform an RGB image of any size to ([3, S, S] float32, the full view)."""
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return self.finish(image), View()


def _replace_posterize(parts: list[transforms.Compose]) -> None:
    """Support 0 bits in posterize, which timm draws at magnitudes of 10 and above.

    Newer versions of Pillow reject 0 bits; the result is black as in older versions.
    """
    for operation in (
        op for part in parts for t in part.transforms for op in getattr(t, "ops", ())
    ):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1)) if bits < 8 else image


def _normalise() -> transforms.Compose:
    return transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )
