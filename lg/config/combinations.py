"""Combinations of values that cannot take effect together.

Each rule is an `if` that yields the key to change and the advice. Choices and ranges already hold
when the rules run, and `lg.config.load` raises the first fault.
"""

from __future__ import annotations

from collections.abc import Iterator

from yacs.config import CfgNode

from lg.config.defaults import DEFAULT_VALUES, flatten, is_guided
from lg.config.image_combinations import image_faults
from lg.config.rules import FAMILIES
from lg.config.student_combinations import Fault, student_faults

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
_PROJECTED = ("linear", "gram")  # values of INTER_TRANSFORM with projection heads
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
    yield from _guidance(cfg)
    yield from _guidance_schedule(cfg)
    yield from _offline(cfg)
    yield from _schedule(cfg)
    yield from _training(cfg)
    yield from _validation(cfg)
    yield from image_faults(cfg)
    yield from _processes(cfg)


def _resnet(cfg: CfgNode) -> Iterator[Fault]:
    depth, resnet = cfg.CNN.DEPTH, cfg.RESNET
    if not _uses_resnet(cfg):
        for key in _changed(cfg, "CNN", "RESNET"):
            advice = f"neither MODEL.TYPE nor the guide is a ResNet: set it to {_default(key)}."
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
        for key in _changed(cfg, "TRANSFORMER"):
            if key not in _READ_BY_TIMM:
                yield key, f"timm/NAME fixes it: set it to {_default(key)}."
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
            for key in _changed(cfg, name):
                names = " or ".join(families)
                yield key, f"only MODEL.TYPE {names} reads it: set it to {_default(key)}."


def _guidance(cfg: CfgNode) -> Iterator[Fault]:
    options = cfg.DISTILLATION
    blocks = options.INTER_STUDENT_INDEX
    if options.ENABLE_INTER and not blocks:
        yield (
            "DISTILLATION.INTER_STUDENT_INDEX",
            "DISTILLATION.ENABLE_INTER needs at least one block to guide, such as [0, 6, 11], and "
            "as many guide stages.",
        )
    if options.ENABLE_INTER and blocks == "mix" and not options.INTER_TEACHER_INDEX:
        yield (
            "DISTILLATION.INTER_TEACHER_INDEX",
            "DISTILLATION.INTER_STUDENT_INDEX mix needs at least one guide stage, such as [0, 1, "
            "2].",
        )
    if options.ENABLE_INTER and blocks == "mix" and options.INTER_TRANSFORM not in _PROJECTED:
        yield (
            "DISTILLATION.INTER_STUDENT_INDEX",
            f"DISTILLATION.INTER_TRANSFORM {options.INTER_TRANSFORM} has no heads that could mix "
            "blocks: choose linear or gram, or set this to a list of blocks.",
        )
    if blocks == "mix":
        blocks = options.INTER_TEACHER_INDEX  # as many mixtures as guide stages
    if options.ENABLE_INTER and len(options.INTER_TEACHER_INDEX) != len(blocks):
        yield (
            "DISTILLATION.INTER_TEACHER_INDEX",
            f"give one entry for each of the {len(blocks)} entries of "
            "DISTILLATION.INTER_STUDENT_INDEX.",
        )
    is_list = options.INTER_STUDENT_INDEX != "mix"
    if options.ENABLE_INTER and is_list and len(set(blocks)) != len(blocks):
        yield (
            "DISTILLATION.INTER_STUDENT_INDEX",
            "each student block can be guided once: remove the repeated entry.",
        )
    for kind in ("INTER", "LOGIT"):
        switch = f"ENABLE_{kind}"
        if options[switch] and options[f"{kind}_WEIGHT"] == 0:
            advice = f"imitation has no effect: raise it, or set DISTILLATION.{switch} False."
            yield f"DISTILLATION.{kind}_WEIGHT", advice
    if options.ENABLE_LOGIT and options.LOGIT_LOSS == "hard" and options.LOGIT_TEMP != 1:
        yield (
            "DISTILLATION.LOGIT_TEMP",
            "hard targets have no temperature: set it to 1, or DISTILLATION.LOGIT_LOSS to soft.",
        )
    if options.LOGIT_STANDARDIZE and not (options.ENABLE_LOGIT and options.LOGIT_LOSS == "soft"):
        yield (
            "DISTILLATION.LOGIT_STANDARDIZE",
            "it needs DISTILLATION.ENABLE_LOGIT True and DISTILLATION.LOGIT_LOSS soft: set those, "
            "or this False.",
        )
    if options.FEATURE_PLACE != "file" and not options.OFFLINE:
        yield (
            "DISTILLATION.FEATURE_PLACE",
            "only DISTILLATION.OFFLINE uses stored features: set it True, or this to file.",
        )


def _guidance_schedule(cfg: CfgNode) -> Iterator[Fault]:
    options, length = cfg.DISTILLATION, cfg.OPTIM.MAX_EPOCH
    kind, epoch = options.SCHEDULE, options.SCHEDULE_EPOCH
    is_until, decays = kind == "until", kind.startswith("decay")
    if is_until and not 0 < epoch < length:
        yield (
            "DISTILLATION.SCHEDULE_EPOCH",
            f"DISTILLATION.SCHEDULE until ends guidance after this epoch: set it below "
            f"OPTIM.MAX_EPOCH {length}, at least 1.",
        )
    if decays and epoch > length:
        yield "DISTILLATION.SCHEDULE_EPOCH", f"it must not exceed OPTIM.MAX_EPOCH {length}."
    if epoch and not (is_until or decays):
        yield (
            "DISTILLATION.SCHEDULE_EPOCH",
            f"DISTILLATION.SCHEDULE {kind} does not read it: set this to 0, or that to until, "
            "decay_linear or decay_cosine.",
        )
    weak = options.INTER_TRANSFORM in ("attention", "similarity") and not options.ENABLE_LOGIT
    if kind != "adaptive":
        for key in _changed(cfg, "DISTILLATION.ADAPTIVE_WINDOW", "DISTILLATION.ADAPTIVE_THRESHOLD"):
            yield key, f"only DISTILLATION.SCHEDULE adaptive reads it: set it to {_default(key)}."
    elif length < 3 or max(length, 300) <= 2 * options.ADAPTIVE_WINDOW:
        yield (
            "DISTILLATION.ADAPTIVE_WINDOW",
            "the adaptive schedule needs two windows, together shorter than the training "
            f"(OPTIM.MAX_EPOCH {length}; below 300, windows are relative to 300 epochs): "
            "lower it, or set DISTILLATION.SCHEDULE to another value.",
        )
    elif weak and not _changed(cfg, "DISTILLATION.ADAPTIVE_THRESHOLD"):
        yield (
            "DISTILLATION.ADAPTIVE_THRESHOLD",
            f"losses of DISTILLATION.INTER_TRANSFORM {options.INTER_TRANSFORM} are so small that "
            "guidance would end after two windows: set it nearer to 0, such as -0.0002.",
        )


def _offline(cfg: CfgNode) -> Iterator[Fault]:
    options, key = cfg.DISTILLATION, "DISTILLATION.OFFLINE"
    if not options.OFFLINE:
        return
    if not options.ENABLE_INTER:
        yield (
            key,
            "only DISTILLATION.ENABLE_INTER uses stored features: set it True, or this False.",
        )
    if not options.FEATURE_FILE:
        yield key, "name the stored features in DISTILLATION.FEATURE_FILE."
    if options.ENABLE_LOGIT:
        yield (
            key,
            "the guide's logits are not stored: set DISTILLATION.ENABLE_LOGIT False, or this "
            "False.",
        )
    if options.TEACHER_BN == "batch":
        yield (
            key,
            "stored features do not depend on the statistics of a batch: set "
            "DISTILLATION.TEACHER_BN eval, or this False.",
        )
    if cfg.TRAIN.MIXUP_ALPHA > 0 or cfg.TRAIN.CUTMIX_ALPHA > 0:
        yield (
            key,
            "features of mixed images are not stored: set TRAIN.MIXUP_ALPHA and "
            "TRAIN.CUTMIX_ALPHA 0, or this False.",
        )


def _schedule(cfg: CfgNode) -> Iterator[Fault]:
    optim, values = cfg.OPTIM, dict(flatten(cfg))
    for key in _changed(cfg, *_READ_WITH):
        switch, allowed = _READ_WITH[key]
        if values[switch] not in allowed:
            yield (
                key,
                f"it has no effect with {switch} {values[switch]}, only with "
                f"{', '.join(allowed)}: set it to {_default(key)}.",
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


def _changed(cfg: CfgNode, *names: str) -> list[str]:
    """Return the keys of sections, or single keys, whose values differ from the defaults."""
    values = dict(flatten(cfg))
    return [
        key
        for key, default in DEFAULT_VALUES.items()
        if (key in names or key.partition(".")[0] in names) and values[key] != default
    ]


def _default(key: str) -> str:
    """Return a default as it is written in YAML."""
    value = DEFAULT_VALUES[key]
    return "null" if value is None else str(value)


def _uses_resnet(cfg: CfgNode) -> bool:
    guide = cfg.DISTILLATION.TEACHER_MODEL if is_guided(cfg) else ""
    return "ResNet" in (cfg.MODEL.TYPE, guide)


def _compares_images(cfg: CfgNode) -> bool:
    """Tell whether training needs several images at once, for batch statistics or similarity."""
    options = cfg.DISTILLATION
    similarity = options.ENABLE_INTER and options.INTER_TRANSFORM == "similarity"
    batch_norm = is_guided(cfg) and options.TEACHER_BN == "batch"
    return cfg.MODEL.TYPE in ("ResNet", "CvT") or similarity or batch_norm
