"""Combinations of values that cannot take effect together.

Each rule is an `if` that yields the key to change and the advice. Choices and ranges already hold
when the rules run, and `lg.config.load` raises the first fault.
"""

from __future__ import annotations

from collections.abc import Iterator

from yacs.config import CfgNode

from lg.config.defaults import flatten, is_guided
from lg.config.guidance_combinations import guidance_faults
from lg.config.image_combinations import image_faults
from lg.config.rules import FAMILIES, Fault, changed, default_text
from lg.config.student_combinations import student_faults

# Keys of TRANSFORMER and whole sections that only some families read -> these families.
_READERS = {
    f"TRANSFORMER.{key}": [
        name for name, family in FAMILIES.items() if key in (*family.one, *family.stages)
    ]
    for key in ("PATCH_STRIDE", "PATCH_PADDING", "WIDE_LAST", "LIFT")
} | {
    section: [name for name, family in FAMILIES.items() if family.section == section]
    for section in dict.fromkeys(family.section for family in FAMILIES.values() if family.section)
}
_WITH_BETAS = ("adam", "adamw", "muon", "nadamuon")
# Keys of OPTIM -> the key, and its values, with which they have an effect.
_READ_WITH = {
    "OPTIM.MOMENTUM": ("OPTIM.OPTIMIZER", ("sgd", "muon", "nadamuon")),
    "OPTIM.DAMPENING": ("OPTIM.OPTIMIZER", ("sgd",)),
    "OPTIM.NESTEROV": ("OPTIM.OPTIMIZER", ("sgd",)),
    "OPTIM.BETA1": ("OPTIM.OPTIMIZER", _WITH_BETAS),
    "OPTIM.BETA2": ("OPTIM.OPTIMIZER", _WITH_BETAS),
    "OPTIM.LR_MULT": ("OPTIM.LR_POLICY", ("steps",)),
}
_READ_BY_TIMM = ("TRANSFORMER.DROP_RATE", "TRANSFORMER.DROP_PATH_RATE")


def faults(cfg: CfgNode) -> Iterator[Fault]:
    """Yield the faults of a config, group by group."""
    yield from _resnet(cfg)
    yield from _timm(cfg)
    yield from _other_families(cfg)
    yield from student_faults(cfg)
    yield from guidance_faults(cfg)
    yield from _schedule(cfg)
    yield from _training(cfg)
    yield from _validation(cfg)
    yield from image_faults(cfg)
    yield from _processes(cfg)


def _resnet(cfg: CfgNode) -> Iterator[Fault]:
    depth, resnet = cfg.CNN.DEPTH, cfg.RESNET
    if not _uses_resnet(cfg):
        for key in changed(cfg, "CNN", "RESNET"):
            advice = f"neither MODEL.TYPE nor the guide is a ResNet: set it to {default_text(key)}."
            yield key, advice
        return
    if depth not in (18, 34, 50, 101, 152) and (depth < 8 or depth % 6 != 2):
        yield (
            "CNN.DEPTH",
            "use 6n+2 (8, 14, 20, 32, 44, 56, 110: CIFAR form) or 18, 34, 50, 101, 152 (ImageNet "
            "form).",
        )
    block = "bottleneck_transform" if depth in (50, 101, 152) else "basic_transform"
    if block != resnet.TRANS_FUN:
        yield "RESNET.TRANS_FUN", f"CNN.DEPTH {depth} needs {block}."
    if block == "basic_transform" and resnet.NUM_GROUPS != 1:
        yield "RESNET.NUM_GROUPS", "only bottleneck blocks have grouped convolutions: set it to 1."
    if block == "basic_transform" and resnet.WIDTH_PER_GROUP != 64:
        yield "RESNET.WIDTH_PER_GROUP", "only bottleneck blocks have this width: set it to 64."


def _timm(cfg: CfgNode) -> Iterator[Fault]:
    model = cfg.MODEL
    if model.TYPE.startswith("timm/"):
        for key in changed(cfg, "TRANSFORMER"):
            if key not in _READ_BY_TIMM:
                yield key, f"timm/NAME fixes it: set it to {default_text(key)}."
        if model.PRETRAINED and cfg.TRAIN.WEIGHTS:
            yield (
                "MODEL.PRETRAINED",
                "TRAIN.WEIGHTS would replace these weights: set one of the two to ''.",
            )
        return
    if model.BLOCKS:
        yield "MODEL.BLOCKS", "only timm/NAME models need block names: set it to []."
    if model.PRETRAINED:
        yield (
            "MODEL.PRETRAINED",
            "only timm/NAME models have pretrained weights: set it to '', or give weights of this "
            "project as TRAIN.WEIGHTS.",
        )


def _other_families(cfg: CfgNode) -> Iterator[Fault]:
    for name, families in _READERS.items():
        if cfg.MODEL.TYPE not in families:
            for key in changed(cfg, name):
                names = " or ".join(families)
                yield key, f"only MODEL.TYPE {names} reads it: set it to {default_text(key)}."


def _schedule(cfg: CfgNode) -> Iterator[Fault]:
    optim, values = cfg.OPTIM, dict(flatten(cfg))
    for key in changed(cfg, *_READ_WITH):
        switch, allowed = _READ_WITH[key]
        if values[switch] not in allowed:
            yield (
                key,
                f"it has no effect with {switch} {values[switch]}, only with "
                f"{', '.join(allowed)}: set it to {default_text(key)}.",
            )
    if optim.LR_POLICY == "steps":
        if not optim.STEPS:
            yield (
                "OPTIM.STEPS",
                "OPTIM.LR_POLICY steps needs the epochs of its steps, such as [100, 150].",
            )
        if sorted(set(optim.STEPS)) != optim.STEPS:
            yield "OPTIM.STEPS", "list the epochs once each, in increasing order."
    else:
        if optim.MIN_LR > optim.BASE_LR:
            yield "OPTIM.MIN_LR", f"it must not exceed OPTIM.BASE_LR {optim.BASE_LR}."
        if optim.LR_POLICY == "exp" and optim.MIN_LR <= 0:
            yield "OPTIM.MIN_LR", "it must be above 0 for OPTIM.LR_POLICY exp."
        if optim.STEPS:
            yield (
                "OPTIM.STEPS",
                "it has no effect unless OPTIM.LR_POLICY is steps: set it, or set this to [].",
            )
    if optim.WARMUP_EPOCHS > optim.MAX_EPOCH:
        yield (
            "OPTIM.WARMUP_EPOCHS",
            f"it must not exceed OPTIM.MAX_EPOCH {optim.MAX_EPOCH}: set it to "
            f"{optim.MAX_EPOCH // 10} (a tenth of that), or OPTIM.MAX_EPOCH to "
            f"{10 * optim.WARMUP_EPOCHS}.",
        )
    is_plain = optim.MOMENTUM == 0 or optim.DAMPENING != 0
    if optim.OPTIMIZER == "sgd" and optim.NESTEROV and is_plain:
        yield (
            "OPTIM.NESTEROV",
            "Nesterov momentum needs OPTIM.MOMENTUM above 0 and OPTIM.DAMPENING 0: change those, "
            "or set this False.",
        )
    if optim.EMA_UPDATE_PERIOD > 0 and optim.EMA_ALPHA == 0:
        yield (
            "OPTIM.EMA_ALPHA",
            "the weight average would never change: raise it, or set OPTIM.EMA_UPDATE_PERIOD 0.",
        )


def _training(cfg: CfgNode) -> Iterator[Fault]:
    train = cfg.TRAIN
    if train.AMP_DTYPE != "auto" and not train.MIXED_PRECISION:
        yield (
            "TRAIN.AMP_DTYPE",
            "it has no effect unless TRAIN.MIXED_PRECISION is True: set it, or set this to auto.",
        )
    if train.COMPILE in ("reduce-overhead", "max-autotune") and train.ACCUM_STEPS > 1:
        yield (
            "TRAIN.COMPILE",
            "its CUDA graphs overwrite the gradients that TRAIN.ACCUM_STEPS adds up: set this to "
            "default, or that to 1.",
        )
    if train.DETERMINISTIC and cfg.CUDNN.BENCHMARK:
        yield (
            "TRAIN.DETERMINISTIC",
            "CUDNN.BENCHMARK may pick different algorithms in each run: set it False.",
        )
    if train.DETERMINISTIC and train.COMPILE == "max-autotune":
        yield (
            "TRAIN.DETERMINISTIC",
            "TRAIN.COMPILE max-autotune may choose other kernels at each start: set that to "
            "default.",
        )
    num_parts = cfg.NUM_GPUS * train.ACCUM_STEPS
    if train.BATCH_SIZE % num_parts != 0:
        yield (
            "TRAIN.BATCH_SIZE",
            f"it must be a multiple of NUM_GPUS x TRAIN.ACCUM_STEPS = {num_parts}.",
        )
    if num_parts == train.BATCH_SIZE and _compares_images(cfg):
        yield (
            "TRAIN.BATCH_SIZE",
            "batch statistics and image similarity need at least 2 images per process and "
            "micro-batch: raise it, or lower TRAIN.ACCUM_STEPS.",
        )


def _validation(cfg: CfgNode) -> Iterator[Fault]:
    train, dataset = cfg.TRAIN, cfg.TEST.DATASET or cfg.TRAIN.DATASET
    if train.VAL_FRACTION > 0 and cfg.TEST.SPLIT == "train":
        yield (
            "TEST.SPLIT",
            "with TRAIN.VAL_FRACTION, the test at the end needs images that are not trained on: "
            "set it to test.",
        )
    if train.EARLY_STOP > 0 and train.VAL_FRACTION == 0 and dataset != "image_folder":
        yield (
            "TRAIN.EARLY_STOP",
            "the test set must not decide when training stops: hold out images with "
            "TRAIN.VAL_FRACTION, such as 0.1, or set this to 0.",
        )


def _processes(cfg: CfgNode) -> Iterator[Fault]:
    per_node = cfg.MAX_GPUS_PER_NODE
    if cfg.TEST.BATCH_SIZE < cfg.NUM_GPUS:
        yield "TEST.BATCH_SIZE", f"it must be at least NUM_GPUS {cfg.NUM_GPUS}."
    if per_node < cfg.NUM_GPUS and cfg.LAUNCH.MODE != "slurm":
        yield (
            "NUM_GPUS",
            f"it must not exceed MAX_GPUS_PER_NODE {per_node}; for several machines use torchrun "
            "or LAUNCH.MODE slurm.",
        )
    if per_node < cfg.NUM_GPUS and cfg.NUM_GPUS % per_node != 0:
        yield (
            "NUM_GPUS",
            f"each machine runs MAX_GPUS_PER_NODE {per_node} processes: use a multiple of that.",
        )
    if len(cfg.PORT_RANGE) != 2 or cfg.PORT_RANGE[0] > cfg.PORT_RANGE[1]:
        yield "PORT_RANGE", "give [first, last]."


def _uses_resnet(cfg: CfgNode) -> bool:
    guide = cfg.DISTILLATION.TEACHER_MODEL if is_guided(cfg) else ""
    return "ResNet" in (cfg.MODEL.TYPE, guide)


def _compares_images(cfg: CfgNode) -> bool:
    """Tell whether training needs several images at once, for batch statistics or similarity."""
    options = cfg.DISTILLATION
    similarity = options.ENABLE_INTER and options.INTER_TRANSFORM == "similarity"
    batch_norm = is_guided(cfg) and options.TEACHER_BN == "batch"
    return cfg.MODEL.TYPE in ("ResNet", "CvT") or similarity or batch_norm
