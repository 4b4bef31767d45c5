"""`--mode info`: parameters, multiply-adds, and which block imitates which block of the guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yacs.config import CfgNode

from lg.builders.guides import build_teacher, model_name
from lg.builders.models import build_model, tap_indices
from lg.config import is_guided
from lg.guidance import MixedHeads
from lg.guidance.losses import PROJECTED
from lg.models.backbone import Backbone
from lg.models.complexity import complexity
from lg.models.taps import map_shapes


@dataclass(frozen=True)
class BlockRow:
    """One block of a model and the shape of its feature map.

    Attributes:
        index: As in INTER_STUDENT_INDEX and INTER_TEACHER_INDEX.
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
        """Height and width, for display."""
        return f"{self.height} x {self.width}"


@dataclass(frozen=True)
class ModelFacts:
    """Size and cost of one model.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds of the forward pass of one image.
        image_size: Height and width of that image in pixels.
        blocks: All blocks that can be tapped, in forward order.
        fixed: Parameters that are never trained.
    """

    params: int
    macs: int
    image_size: int
    blocks: list[BlockRow]
    fixed: int = 0


def info(cfg: CfgNode) -> None:
    """Print size, cost and blocks of the models of a config."""
    print("\n".join(describe_config(cfg)))


def describe_config(cfg: CfgNode) -> list[str]:
    """Return the lines of `--mode info`; needs no data and no weights."""
    model, options = cfg.MODEL, cfg.DISTILLATION
    channels = model.IN_CHANNELS
    student = build_model(cfg, pretrained=False)
    facts = measure_model(student, image_size=model.IMG_SIZE, in_channels=channels)
    if not is_guided(cfg):
        return describe(model_name(cfg, model.TYPE), facts, num_classes=model.NUM_CLASSES)
    teacher = build_teacher(cfg, trained=False)
    taps, guide_taps = tap_indices(cfg, student, teacher)
    is_mixed = options.INTER_STUDENT_INDEX == "mix"
    return describe(
        model_name(cfg, model.TYPE),
        facts,
        num_classes=model.NUM_CLASSES,
        guide_name=model_name(cfg, options.TEACHER_MODEL),
        guide=measure_model(teacher, image_size=options.TEACHER_IMG_SIZE, in_channels=channels),
        taps=[] if is_mixed else [*zip(taps, guide_taps, strict=True)],
        mixed=guide_taps if is_mixed else [],
        with_heads=options.ENABLE_INTER and options.INTER_TRANSFORM in PROJECTED,
    )


def measure_model(model: Backbone, *, image_size: int, in_channels: int) -> ModelFacts:
    """Run one image through a model and return its facts; leave the model unchanged."""
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
    mixed: Sequence[int] = (),
    with_heads: bool = False,
) -> list[str]:
    """Return one line per model and the table of blocks.

    Args:
        name: The student's type.
        student: The student's facts.
        num_classes: K.
        guide_name: The guide's type.
        guide: The guide's facts; None without guidance.
        taps: Pairs (student block, guide block).
        mixed: Guide blocks that are imitated by mixtures of all student blocks.
        with_heads: Whether 1x1 convolutions project the maps to the guide's channels.
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
        if guide is not None and mixed:
            heads = _count_mixed(student.blocks, [guide.blocks[i] for i in mixed])
        lines.append(f"Projection heads: {heads:,} parameters, trained, not part of the weights")
    if guide is not None and mixed:
        stages = ", ".join(f"{i} {guide.blocks[i].module}" for i in mixed)
        lines.append(f"A learned mixture of all blocks imitates each of the guide's {stages}")
    width = max(len("module"), *(len(row.module) for row in student.blocks))
    title = f"  {'block':>5}  {'module':<{width}}  {'channels':>8}  {'map':<9}"
    lines += ["", (title + ("  imitates" if partners else "")).rstrip()]
    for row in student.blocks:
        text = f"  {row.index:>5}  {row.module:<{width}}  {row.channels:>8}  {row.size:<9}"
        if row.index in partners:
            text += f"  {_imitated(row, partners[row.index])}"
        lines.append(text.rstrip())
    return lines


def _count_mixed(blocks: Sequence[BlockRow], guide_blocks: Sequence[BlockRow]) -> int:
    """Return the number of parameters of the heads of a mixture."""
    mine, theirs = ([(b.channels, b.height, b.width) for b in s] for s in (blocks, guide_blocks))
    return sum(p.numel() for p in MixedHeads(mine, theirs).parameters())


def _cost(facts: ModelFacts) -> str:
    fixed = f" ({facts.fixed:,} fixed)" if facts.fixed else ""
    return f"{facts.params:,} parameters{fixed}, {facts.macs / 1e9:.3f} GMACs per image"


def _imitated(mine: BlockRow, theirs: BlockRow) -> str:
    """Describe the guide's block of a tap; both maps are resized to the larger height and width."""
    compared = f"{max(mine.height, theirs.height)} x {max(mine.width, theirs.width)}"
    return (
        f"{theirs.index} {theirs.module}: {theirs.channels} channels, {theirs.size}, "
        f"compared at {compared}"
    )
