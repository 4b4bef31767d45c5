"""What a config builds: parameters, multiply-adds, and which block imitates what of the guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lg.models.backbone import Backbone
from lg.models.taps import map_shapes
from lg.tools.timing import complexity


@dataclass(frozen=True)
class BlockRow:
    """One block of a model, as it came out of running an image.

    Attributes:
        index: As INTER_STUDENT_INDEX and INTER_TEACHER_INDEX count.
        module: Name inside the network.
        channels: C of its map.
        height: H of its map.
        width: W of its map.
    """

    index: int
    module: str
    channels: int
    height: int
    width: int

    @property
    def size(self) -> str:
        """The map's size in words."""
        return f"{self.height} x {self.width}"


@dataclass(frozen=True)
class ModelFacts:
    """What there is to say about one model.

    Attributes:
        params: Parameters.
        macs: Multiply-adds of one image's forward pass.
        image_size: Height and width of that image in pixels.
        blocks: All that can be tapped, in forward order.
        fixed: Those of the parameters that are never trained.
    """

    params: int
    macs: int
    image_size: int
    blocks: list[BlockRow]
    fixed: int = 0


def measure_model(model: Backbone, *, image_size: int, in_channels: int) -> ModelFacts:
    """Run one image through a model and note what it is made of; the model stays as it was."""
    shapes = map_shapes(
        model, range(len(model.blocks)), image_size=image_size, in_channels=in_channels
    )
    counts = complexity(model, image_size, in_channels)
    rows = [
        BlockRow(index, name, *shape)
        for index, (name, shape) in enumerate(zip(model.block_names, shapes, strict=True))
    ]
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return ModelFacts(counts["params"], counts["macs"], image_size, rows, fixed)


def describe(
    name: str,
    student: ModelFacts,
    *,
    num_classes: int,
    guide_name: str = "",
    guide: ModelFacts | None = None,
    taps: Sequence[tuple[int, int]] = (),
    with_heads: bool = False,
) -> list[str]:
    """Return the lines of `--mode info`.

    Args:
        name: The model's type.
        student: Its facts.
        num_classes: K.
        guide_name: The guide's type.
        guide: Its facts; None without guidance.
        taps: Pairs (student block, guide block).
        with_heads: Whether a 1x1 convolution projects each tapped map to the guide's channels.
    """
    lines = [
        f"{name}, images of {student.image_size} x {student.image_size}, {num_classes} classes: "
        f"{_cost(student)}"
    ]
    partners: dict[int, BlockRow] = {}
    if guide is not None:
        lines.append(
            f"Guide {guide_name}, images of {guide.image_size} x {guide.image_size}: {_cost(guide)}"
        )
        partners = {mine: guide.blocks[theirs] for mine, theirs in taps}
    if with_heads:
        heads = sum((student.blocks[i].channels + 1) * row.channels for i, row in partners.items())
        lines.append(f"Projection heads: {heads:,} parameters, trained and left out of the weights")
    width = max(len("module"), *(len(row.module) for row in student.blocks))
    title = f"  {'block':>5}  {'module':<{width}}  {'channels':>8}  {'map':<9}"
    lines += ["", (title + ("  imitates" if partners else "")).rstrip()]
    for row in student.blocks:
        text = f"  {row.index:>5}  {row.module:<{width}}  {row.channels:>8}  {row.size:<9}"
        if row.index in partners:
            text += f"  {_imitated(row, partners[row.index])}"
        lines.append(text.rstrip())
    return lines


def _cost(facts: ModelFacts) -> str:
    fixed = f" ({facts.fixed:,} fixed)" if facts.fixed else ""
    return f"{facts.params:,} parameters{fixed}, {facts.macs / 1e9:.3f} GMACs an image"


def _imitated(mine: BlockRow, theirs: BlockRow) -> str:
    """The guide's side of a tap; both maps are resized to the larger height and width."""
    compared = f"{max(mine.height, theirs.height)} x {max(mine.width, theirs.width)}"
    return (
        f"{theirs.index} {theirs.module}: {theirs.channels} channels, {theirs.size}, "
        f"compared at {compared}"
    )
