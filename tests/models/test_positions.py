"""Weights of one image size start a model of another: positions are resampled, the rest is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lg
from lg.errors import CheckpointError
from lg.models import Backbone, deit
from lg.models.positions import resample_positions
from tests.models.test_families import PLAIN, SMALL, build


def model(name: str, img_size: int) -> Backbone:
    if name in SMALL:
        return build(name, img_size=img_size)
    distilled = name == "deit_distilled"
    return deit(img_size=img_size, num_classes=10, patch_size=8, distilled=distilled, **PLAIN)


def ramp(table: Tensor, prefix: int, side: int) -> Tensor:
    """Return embeddings whose first channel is the distance from the left edge, of a width of 1."""
    places = ((torch.arange(side) + 0.5) / side).expand(side, side)
    if table.ndim == 4:
        table[:, 0] = places
        return table[0, 0]
    table[0, :prefix, 0] = 7.0
    table[0, prefix:, 0] = places.flatten()
    return table[0, prefix:, 0].unflatten(0, (side, side))


@pytest.mark.parametrize(
    ("name", "key", "prefix", "sides"),
    [
        ("deit", "pos_embed", 1, (8, 16)),
        ("deit_distilled", "pos_embed", 2, (8, 16)),
        ("t2t", "pos_embed", 1, (4, 8)),
        ("pit", "pos_embed", 0, (15, 31)),
        ("pvt", "pos_embed1", 0, (16, 32)),
        ("pvt", "pos_embed2", 1, (8, 16)),
        ("convit", "pos_embed", 0, (8, 16)),
    ],
)
def test_positions_are_resampled(
    name: str, key: str, prefix: int, sides: tuple[int, int], tmp_path: Path
) -> None:
    """Twice the image size: cubic interpolation keeps a ramp away from the edges."""
    torch.manual_seed(0)
    weights = lg.published_state_dict(model(name, 64))
    ramp(weights[key], prefix, sides[0])
    torch.save({"model_state": weights}, tmp_path / "model.pyth")
    larger = model(name, 128)
    with pytest.raises(CheckpointError, match=f"of another shape: .*{key} is"):
        lg.load_weights(larger, tmp_path / "model.pyth")
    facts = lg.load_weights(larger, tmp_path / "model.pyth", any_size=True)
    assert key in facts["resampled"]
    loaded = lg.published_state_dict(larger)
    table = loaded[key]
    found = table[0, 0] if table.ndim == 4 else table[0, prefix:, 0].unflatten(0, (sides[1],) * 2)
    expected = ramp(torch.zeros_like(table), prefix, sides[1])
    inner = (slice(None), slice(3, -3))
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=1e-6)
    if prefix:
        assert torch.equal(table[:, :prefix], weights[key][:, :prefix])
    rest = [name for name in weights if "pos_embed" not in name]
    assert len(rest) > 20 and all(torch.equal(loaded[name], weights[name]) for name in rest)


def test_other_differences_are_still_errors(tmp_path: Path) -> None:
    weights = lg.published_state_dict(build("convit", img_size=64))
    torch.save({"model_state": weights}, tmp_path / "model.pyth")
    wider = build("convit", img_size=128, hidden_dim=64)
    with pytest.raises(CheckpointError, match=r"pos_embed is \[1, 64, 32\]"):
        lg.load_weights(wider, tmp_path / "model.pyth", any_size=True)


def test_smaller_images_average_the_positions() -> None:
    """Halving is antialiased: away from the edges a ramp stays one."""
    table = torch.zeros(1, 257, 4)
    ramp(table, 1, 16)
    found = resample_positions({"pos_embed": table}, {"pos_embed": torch.zeros(1, 65, 4)})
    expected = ramp(torch.zeros(1, 65, 4), 1, 8)
    grid = found["pos_embed"][0, 1:, 0].unflatten(0, (8, 8))
    torch.testing.assert_close(grid[:, 2:-2], expected[:, 2:-2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([1, 16, 16, 96], [1, 16, 36, 96]),  # NesT: blocks, tokens, channels
        ([1, 1 + 16, 8], [1, 2 + 16, 8]),
        ([1, 2, 8], [1, 2 + 16, 8]),
        ([1, 16, 8], [1, 20, 8]),
    ],
)
def test_what_is_no_other_grid_is_left_out(old: list[int], new: list[int]) -> None:
    assert (
        resample_positions({"pos_embed": torch.randn(old)}, {"pos_embed": torch.zeros(new)}) == {}
    )
