"""Where models look: distances in pixels, maps for every family, and Grad-CAM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lg.augment.preprocessing import Preprocessing
from lg.datasets.base import evenly_spaced
from lg.models import resnet, timm_model
from lg.tools.report.activation import class_activation
from lg.tools.report.attention import (
    SpatialAttention,
    block_distances,
    distances,
    image_attention,
    mean_distances,
)
from lg.tools.report.samples import one_per_class, overlay, pictures
from tests.models.test_families import SMALL, build

CLASS_TOKEN = {"t2t", "pit", "pvt", "convit", "cvt", "deit"}  # classified by a token


def test_distances_are_pixels_between_centres() -> None:
    far = distances((2, 2), (2, 2), 32)
    assert far[0].tolist() == pytest.approx([0, 16, 16, 16 * 2**0.5])
    # One key in the middle of the image, the centres of four queries around it.
    assert distances((2, 2), (1, 1), 32).flatten().tolist() == pytest.approx([8 * 2**0.5] * 4)


def test_mean_distance_weights_places_and_ignores_the_class_token() -> None:
    to_itself, everywhere = torch.eye(5), torch.full((5, 5), 0.2)
    next_door = torch.zeros(5, 5)
    next_door[[1, 2, 3, 4], [2, 1, 4, 3]] = 0.5  # the right or left neighbour ...
    next_door[:, 0] = 0.5  # ... and the class token, which has no place
    weights = torch.stack([to_itself, next_door, everywhere])[None]
    found = mean_distances(SpatialAttention(weights, 1, (2, 2), (2, 2)), 32)
    assert found[0].tolist() == pytest.approx([0, 16, (16 + 16 + 16 * 2**0.5) / 4])


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_distances_and_maps(name: str) -> None:
    torch.manual_seed(0)
    model, images = build(name).eval(), torch.randn(9, 3, 32, 32)  # more than one batch of 8
    found = block_distances(model, images)
    assert [each.block for each in found] == list(range(len(model.blocks)))
    for each in found:  # a fresh model attends almost everywhere alike
        assert all(0 < head < 32 for head in each.heads)
        if name != "convit":  # which starts local
            assert each.mean == pytest.approx(each.uniform, rel=0.15)
    result = image_attention(model, images)
    # The last block of this CvT has only 2 x 2 keys.
    assert result is not None and result[0] == (1 if name == "cvt" else 2)
    assert result[1].amin(dim=(1, 2)).eq(0).all() and result[1].amax(dim=(1, 2)).eq(1).all()


@pytest.mark.parametrize("name", SMALL)
def test_grad_cam_uses_the_last_map_that_is_classified(name: str) -> None:
    pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    model, images = build(name).eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.net.get_classifier().weight)  # a fresh one may be 0
    result = class_activation(model, images)
    assert result is not None
    index, maps = result
    assert index == len(model.blocks) - (2 if name in CLASS_TOKEN else 1)
    assert maps.shape == (2, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    assert not any(m._forward_hooks for m in model.modules())


def test_maps_too_coarse_to_look_at_come_last() -> None:
    """At 16 pixels, the maps of PVTv2 are 4 x 4, 4 x 4 and 2 x 2; all keys are one place."""
    pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    model, images = build("pvtv2", img_size=16).eval(), torch.randn(2, 3, 16, 16)
    nn.init.normal_(model.net.get_classifier().weight)
    result, attention = class_activation(model, images), image_attention(model, images)
    assert result is not None and result[0] == 1
    assert attention is not None and attention[0] == 2
    model, images = build("cvt", img_size=16).eval(), torch.randn(2, 3, 16, 16)
    attention = image_attention(model, images)  # keys: 2 x 2, 2 x 2, 1
    assert attention is not None and attention[0] == 2


def test_grad_cam_finds_what_is_classified() -> None:
    """The class score is the mean of one channel of the map, so that channel is the CAM."""
    pytest.importorskip("pytorch_grad_cam")
    model = resnet(depth=8, img_size=64, num_classes=2).eval()
    seen = {}
    model.blocks[-1].register_forward_hook(lambda _m, _i, output: seen.update(map=output))
    head = model.net.get_classifier()
    nn.init.zeros_(head.weight)
    head.weight.data[1, 5] = 1.0
    head.bias.data = torch.tensor([-9.0, 9.0])
    result = class_activation(model, torch.randn(1, 3, 64, 64))
    assert result is not None
    expected = seen["map"][0, 5].detach()
    peak = int(expected.argmax())
    side = expected.shape[-1]
    row, column = peak // side, peak % side
    place = result[1][0].unflatten(0, (side, -1)).unflatten(2, (side, -1)).mean(dim=(1, 3))
    assert int(place.argmax()) == row * side + column


def test_other_models_are_left_out() -> None:
    """A CNN has no attention, and that of XCiT is between channels."""
    images = torch.randn(2, 3, 32, 32)
    assert block_distances(resnet(depth=8, img_size=32, num_classes=4).eval(), images) == []
    model = timm_model("xcit_nano_12_p16_224", img_size=64, in_channels=3, num_classes=4)
    images = torch.randn(1, 3, 64, 64)
    assert image_attention(model.eval(), images) is None


def test_pictures_of_heat() -> None:
    (picture,) = pictures(torch.zeros(1, 3, 16, 16), Preprocessing(16))
    assert picture.size == (128, 128)
    hot = torch.zeros(4, 4)
    hot[0, 0] = 1.0
    found = overlay(picture, hot)
    red = [found.getpixel(place)[0] for place in ((4, 4), (120, 120))]
    assert red[0] > 200 and red[1] < 130


def test_positions_are_evenly_spaced() -> None:
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4] and evenly_spaced(101, 3) == [0, 50, 100]
    assert one_per_class(np.array([2, 2, 0, 1, 0]), 2) == [0, 2]
