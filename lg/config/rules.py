"""What the values of the config tree may be: types of null keys, choices, ranges and combinations.

Plain data over flattened keys, read by `lg.config.load`. A rule here is all it takes to make a
setting that cannot take effect an error when the config is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lg.config.defaults import DEFAULTS

Values = Mapping[str, Any]
Range = tuple[Callable[[Any], bool], str]  # a test, and what passes it

DATASET_NAMES = ("digits", "cifar100", "flowers", "tiny_imagenet", "chaoyang", "image_folder")


class Family(NamedTuple):
    """Where a family of models is built and which config keys it reads.

    Attributes:
        function: The function that builds it, in the module of the same name in `lg.models`. It
            takes the keys as keyword arguments in lower case.
        one: Keys of TRANSFORMER that hold one value.
        stages: Keys of TRANSFORMER that hold one value per stage. A single value applies to every
            stage, except for HIDDEN_DIM, whose length is the number of stages.
        section: The family's own section, if it has one.
    """

    function: str
    one: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    section: str | None = None


_RATES = ("DROP_RATE", "DROP_PATH_RATE", "ATTENTION_DROP_RATE")
_SHAPE = ("HIDDEN_DIM", "DEPTH", "NUM_HEADS")
_PLAIN = ("PATCH_SIZE", *_SHAPE, "MLP_RATIO", *_RATES)
_PYRAMID = (*_SHAPE, "PATCH_SIZE", "MLP_RATIO")
# The one table of families: MODEL.TYPE -> how to build it.
FAMILIES: dict[str, Family] = {
    "DeiT": Family("deit", one=_PLAIN),
    "T2TViT": Family("t2t", one=_PLAIN, section="T2T"),
    "PiT": Family("pit", one=("PATCH_SIZE", "MLP_RATIO", *_RATES), stages=_SHAPE, section="PIT"),
    "PVT": Family("pvt", one=_RATES, stages=_PYRAMID, section="PVT"),
    "PVTv2": Family("pvtv2", one=_RATES, stages=(*_PYRAMID, "PATCH_STRIDE"), section="PVT"),
    "ConViT": Family("convit", one=_PLAIN, section="CONVIT"),
    "CvT": Family(
        "cvt", stages=(*_PYRAMID, "PATCH_STRIDE", "PATCH_PADDING", *_RATES), section="CVT"
    ),
}
MODEL_TYPES = (*FAMILIES, "ResNet", "timm/NAME")

_COUNTS = ("PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING", "HIDDEN_DIM", "DEPTH", "NUM_HEADS")
_RATIOS = ("MLP_RATIO", "DROP_RATE", "DROP_PATH_RATE", "ATTENTION_DROP_RATE")

# Keys that may be null, with the types they otherwise take; a list holds one or more of the others.
NULLABLE: dict[str, tuple[type, ...]] = {
    **{f"TRANSFORMER.{k}": (int, list) for k in _COUNTS},
    **{f"TRANSFORMER.{k}": (int, float, list) for k in _RATIOS},
    "DISTILLATION.TEACHER_WEIGHTS": (str,),
    "DISTILLATION.FEATURE_FILE": (str,),
    "OUT_DIR": (str,),
}

# Lists whose elements all have one type.
TYPED_LISTS: dict[str, type] = {
    "MODEL.BLOCKS": str,
    "T2T.KERNEL_SIZE": int,
    "T2T.STRIDE": int,
    "T2T.PADDING": int,
    "PVT.SR_RATIO": int,
    "CVT.WITH_CLS_TOKEN": bool,
    "CVT.QKV_PROJ_METHOD": str,
    "CVT.KERNEL_QKV": int,
    "CVT.STRIDE_KV": int,
    "CVT.STRIDE_Q": int,
    "CVT.PADDING_KV": int,
    "CVT.PADDING_Q": int,
    "DISTILLATION.INTER_TEACHER_INDEX": int,
    "DISTILLATION.INTER_STUDENT_INDEX": int,
    "OPTIM.STEPS": int,
    "PORT_RANGE": int,
}

# What timm 1.0.20 and later have by name; without identity, which is none.
ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "gelu_tanh"),
    *("quick_gelu", "silu", "swish", "mish", "sigmoid", "tanh"),
    *("hard_sigmoid", "hard_swish", "hard_mish", "hardsigmoid", "hardswish"),
)

# "timm/NAME" stands for timm/ followed by a model name.
CHOICES: dict[str, tuple[str, ...]] = {
    "MODEL.TYPE": MODEL_TYPES,
    "MODEL.LOSS_FUN": ("cross_entropy",),
    "CVT.QKV_PROJ_METHOD": ("dw_bn", "avg", "linear"),
    "CNN.ACTIVATION_FUN": ACTIVATIONS,
    "RESNET.TRANS_FUN": ("basic_transform", "bottleneck_transform"),
    "DISTILLATION.INTER_TRANSFORM": ("linear", "attention", "similarity"),
    "DISTILLATION.INTER_LOSS": ("l2",),
    "DISTILLATION.LOGIT_LOSS": ("soft", "hard"),
    "DISTILLATION.TEACHER_MODEL": ("ResNet", "timm/NAME"),
    "DISTILLATION.TEACHER_BN": ("eval", "batch"),
    "DISTILLATION.FEATURE_PLACE": ("file", "device"),
    "OPTIM.OPTIMIZER": ("sgd", "adam", "adamw"),
    "OPTIM.LR_POLICY": ("cos", "lin", "exp", "steps"),
    "TRAIN.DATASET": ("", *DATASET_NAMES),
    "TRAIN.SPLIT": ("train",),
    "TRAIN.COMPILE": ("none", "default", "reduce-overhead", "max-autotune"),
    "DATA_LOADER.BACKEND": ("auto", "workers", "device"),
    "DATA_LOADER.ON_ERROR": ("stop", "skip"),
    "TRAIN.AMP_DTYPE": ("auto", "bf16", "fp16"),
    "TEST.DATASET": ("", *DATASET_NAMES),
    "TEST.SPLIT": ("val", "test", "train"),
    "LAUNCH.MODE": ("local", "slurm", "submitit_local"),
    "LOG_DEST": ("stdout", "file"),
    "DIST_BACKEND": ("nccl", "gloo"),
    "DEVICE": ("auto", "cpu", "cuda", "mps"),
}


def _each(rule: Range, keys: str) -> dict[str, Range]:
    return dict.fromkeys(keys.split(), rule)


def _at_least(low: float) -> Range:
    return (lambda v: low <= v < math.inf), f"at least {low}"


_BLOCKS = ((lambda v: 1 <= v <= 10_000), "at least 1 and at most 10,000")
_POSITIVE = ((lambda v: 0 < v < math.inf), "greater than 0 and finite")
_FRACTION = ((lambda v: 0 <= v < 1), "at least 0 and below 1")
_SHARE = ((lambda v: 0 <= v <= 1), "between 0 and 1")
_PART = ((lambda v: 0 < v <= 1), "greater than 0 and at most 1")
_FILE_NAME = (
    (lambda v: v.endswith((".yaml", ".yml")) and "/" not in v and "\\" not in v),
    "a file name without a folder, ending in .yaml or .yml",
)

# key -> (test of the value or of each element, what is allowed)
RANGES: dict[str, Range] = {
    **_each(
        _at_least(1),
        """
        MODEL.IMG_SIZE MODEL.IN_CHANNELS MODEL.NUM_CLASSES RESNET.NUM_GROUPS
        RESNET.WIDTH_PER_GROUP DISTILLATION.TEACHER_IMG_SIZE OPTIM.MAX_EPOCH TRAIN.BATCH_SIZE
        TRAIN.ACCUM_STEPS TRAIN.KEEP_CHECKPOINTS TEST.BATCH_SIZE TEST.PERIOD PREC_TIME.NUM_ITER
        NUM_GPUS MAX_GPUS_PER_NODE LAUNCH.CPUS_PER_GPU LAUNCH.MEM_PER_GPU
        LAUNCH.TIME_LIMIT LOG_PERIOD TRANSFORMER.PATCH_SIZE TRANSFORMER.PATCH_STRIDE
        TRANSFORMER.HIDDEN_DIM TRANSFORMER.NUM_HEADS T2T.TOKEN_DIM T2T.KERNEL_SIZE
        T2T.STRIDE PIT.STRIDE PVT.SR_RATIO CVT.KERNEL_QKV CVT.STRIDE_KV CVT.STRIDE_Q
        """,
    ),
    **_each(
        _at_least(0),
        """
        TRANSFORMER.PATCH_PADDING T2T.PADDING CVT.PADDING_KV CVT.PADDING_Q CONVIT.LOCAL_LAYERS
        DISTILLATION.INTER_TEACHER_INDEX DISTILLATION.INTER_STUDENT_INDEX DISTILLATION.INTER_WEIGHT
        OPTIM.STEPS OPTIM.MIN_LR OPTIM.WEIGHT_DECAY OPTIM.WARMUP_EPOCHS OPTIM.EMA_ALPHA
        OPTIM.EMA_UPDATE_PERIOD OPTIM.CLIP_GRAD_NORM TRAIN.MIXUP_ALPHA TRAIN.CUTMIX_ALPHA
        DATA_LOADER.NUM_WORKERS PREC_TIME.WARMUP_ITER LAUNCH.MAX_RETRY
        """,
    ),
    **_each(
        _POSITIVE,
        """
        CNN.BN_EPS TRANSFORMER.LN_EPS TRANSFORMER.MLP_RATIO CONVIT.LOCALITY_STRENGTH
        DISTILLATION.LOGIT_TEMP OPTIM.BASE_LR OPTIM.HEAD_LR_RATIO
        """,
    ),
    **_each(
        _FRACTION,
        """
        TRANSFORMER.DROP_RATE TRANSFORMER.DROP_PATH_RATE TRANSFORMER.ATTENTION_DROP_RATE
        OPTIM.MOMENTUM OPTIM.BETA1 OPTIM.BETA2 TRAIN.LABEL_SMOOTHING
        """,
    ),
    **_each(
        _SHARE,
        """
        DISTILLATION.LOGIT_WEIGHT OPTIM.DAMPENING TRAIN.HFLIP
        """,
    ),
    **_each(
        _PART,
        """
        CNN.BN_MOMENTUM OPTIM.LR_MULT OPTIM.WARMUP_FACTOR TRAIN.FRACTION
        """,
    ),
    **_each(_BLOCKS, "CNN.DEPTH TRANSFORMER.DEPTH"),
    # Python's clocks count no further than some hundred years.
    "DATA_LOADER.TIMEOUT": (
        (lambda v: 0 <= v <= 10**8),
        "at least 0 and at most 100,000,000",
    ),
    "RNG_SEED": ((lambda v: 0 <= v < 2**32), "at least 0 and below 2^32"),
    "PORT_RANGE": ((lambda v: 1 <= v <= 65535), "two ports between 1 and 65535"),
    "CFG_DEST": _FILE_NAME,
}


def _guided(v: Values) -> bool:
    return v["DISTILLATION.ENABLE_INTER"] or v["DISTILLATION.ENABLE_LOGIT"]


def _depth_needs(v: Values) -> str | None:
    """The residual function that CNN.DEPTH calls for; None when the depth itself is impossible."""
    depth = v["CNN.DEPTH"]
    if depth in (50, 101, 152):
        return "bottleneck_transform"
    return "basic_transform" if depth in (18, 34) or (depth >= 8 and (depth - 2) % 6 == 0) else None


def _uses_resnet(v: Values) -> bool:
    return v["MODEL.TYPE"] == "ResNet" or (
        _guided(v) and v["DISTILLATION.TEACHER_MODEL"] == "ResNet"
    )


def _share_per_process(v: Values) -> int:
    return int(v["NUM_GPUS"] * v["TRAIN.ACCUM_STEPS"])


def _compares_images(v: Values) -> bool:
    """Whether one image alone cannot be trained on: batch statistics, or similarity of images."""
    similar = v["DISTILLATION.ENABLE_INTER"] and v["DISTILLATION.INTER_TRANSFORM"] == "similarity"
    batch_norm = _guided(v) and v["DISTILLATION.TEACHER_BN"] == "batch"
    return v["MODEL.TYPE"] in ("ResNet", "CvT") or similar or batch_norm


_OFFLINE = "DISTILLATION.OFFLINE"
_TIMM_IGNORES = [f"TRANSFORMER.{k}" for k in (*_COUNTS, "MLP_RATIO", "ATTENTION_DROP_RATE")]
_CNN_KEYS = [f"{section}.{key}" for section in ("CNN", "RESNET") for key in DEFAULTS[section]]
# Keys that only some families read -> these families
_OWN_KEYS = {
    f"TRANSFORMER.{key}": [name for name, family in FAMILIES.items() if key in family.stages]
    for key in ("PATCH_STRIDE", "PATCH_PADDING")
} | {
    f"{section}.{key}": [name for name, family in FAMILIES.items() if family.section == section]
    for section in dict.fromkeys(family.section for family in FAMILIES.values() if family.section)
    for key in DEFAULTS[section]
}


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    return DEFAULTS[section][name]


# (key to blame, test for a broken combination, what to do): checked in order, after every choice
# and range holds.
COMBINATIONS: list[tuple[str, Callable[[Values], bool], str | Callable[[Values], str]]] = [
    (
        "CNN.DEPTH",
        lambda v: _uses_resnet(v) and _depth_needs(v) is None,
        "a ResNet has depth 6n+2 (8, 14, 20, 32, 44, 56, 110: CIFAR form) or 18, 34, 50, 101, 152 "
        "(ImageNet form).",
    ),
    (
        "RESNET.TRANS_FUN",
        lambda v: _uses_resnet(v) and v["RESNET.TRANS_FUN"] != _depth_needs(v),
        lambda v: f"CNN.DEPTH {v['CNN.DEPTH']} needs {_depth_needs(v)}.",
    ),
    (
        "RESNET.NUM_GROUPS",
        lambda v: (
            _uses_resnet(v)
            and v["RESNET.TRANS_FUN"] == "basic_transform"
            and v["RESNET.NUM_GROUPS"] != 1
        ),
        "grouped convolutions exist in bottleneck blocks only: set it to 1.",
    ),
    (
        "RESNET.WIDTH_PER_GROUP",
        lambda v: (
            _uses_resnet(v)
            and v["RESNET.TRANS_FUN"] == "basic_transform"
            and v["RESNET.WIDTH_PER_GROUP"] != 64
        ),
        "it widens bottleneck blocks only: set it to 64.",
    ),
    (
        "MODEL.BLOCKS",
        lambda v: bool(v["MODEL.BLOCKS"]) and not v["MODEL.TYPE"].startswith("timm/"),
        "only timm/NAME models take block names; the others know their blocks: set it to [].",
    ),
    (
        "MODEL.PRETRAINED",
        lambda v: bool(v["MODEL.PRETRAINED"]) and not v["MODEL.TYPE"].startswith("timm/"),
        "only timm/NAME models have pretrained weights: set it to '', or give weights of this "
        "project's own as TRAIN.WEIGHTS.",
    ),
    (
        "MODEL.PRETRAINED",
        lambda v: bool(v["MODEL.PRETRAINED"] and v["TRAIN.WEIGHTS"]),
        "TRAIN.WEIGHTS would replace these weights: set one of the two to ''.",
    ),
    *(
        (
            key,
            lambda v, key=key: v["MODEL.TYPE"].startswith("timm/") and v[key] is not None,
            "timm/NAME says its sizes by its name: set it to null, or leave it out.",
        )
        for key in _TIMM_IGNORES
    ),
    (
        "TRANSFORMER.LN_EPS",
        lambda v: (
            v["MODEL.TYPE"].startswith("timm/")
            and v["TRANSFORMER.LN_EPS"] != DEFAULTS["TRANSFORMER"]["LN_EPS"]
        ),
        "timm/NAME says its norms by its name: leave it out.",
    ),
    *(
        (
            key,
            lambda v, key=key: not _uses_resnet(v) and v[key] != _default(key),
            lambda v, key=key: (
                f"neither MODEL.TYPE nor a guide is a ResNet: leave it at {_default(key)}."
            ),
        )
        for key in _CNN_KEYS
    ),
    *(
        (
            key,
            lambda v, key=key, users=users: (
                v["MODEL.TYPE"] not in users and v[key] != _default(key)
            ),
            lambda v, key=key, users=users: (
                f"only MODEL.TYPE {' and '.join(users)} reads it: leave it at "
                f"{'null' if _default(key) is None else _default(key)}."
            ),
        )
        for key, users in _OWN_KEYS.items()
    ),
    (
        "DISTILLATION.INTER_STUDENT_INDEX",
        lambda v: v["DISTILLATION.ENABLE_INTER"] and not v["DISTILLATION.INTER_STUDENT_INDEX"],
        "DISTILLATION.ENABLE_INTER needs at least one block to guide, such as [0, 6, 11], and as "
        "many guide stages.",
    ),
    (
        "DISTILLATION.INTER_TEACHER_INDEX",
        lambda v: (
            v["DISTILLATION.ENABLE_INTER"]
            and len(v["DISTILLATION.INTER_TEACHER_INDEX"])
            != len(v["DISTILLATION.INTER_STUDENT_INDEX"])
        ),
        lambda v: (
            "it pairs one to one with DISTILLATION.INTER_STUDENT_INDEX, which has "
            f"{len(v['DISTILLATION.INTER_STUDENT_INDEX'])} entries."
        ),
    ),
    (
        "DISTILLATION.INTER_STUDENT_INDEX",
        lambda v: (
            v["DISTILLATION.ENABLE_INTER"]
            and len(set(v["DISTILLATION.INTER_STUDENT_INDEX"]))
            != len(v["DISTILLATION.INTER_STUDENT_INDEX"])
        ),
        "each student block can be guided once: remove the repeated entry.",
    ),
    (
        "DISTILLATION.INTER_WEIGHT",
        lambda v: v["DISTILLATION.ENABLE_INTER"] and v["DISTILLATION.INTER_WEIGHT"] == 0,
        "imitation that counts nothing: raise it, or set DISTILLATION.ENABLE_INTER False.",
    ),
    (
        "DISTILLATION.LOGIT_WEIGHT",
        lambda v: v["DISTILLATION.ENABLE_LOGIT"] and v["DISTILLATION.LOGIT_WEIGHT"] == 0,
        "imitation that counts nothing: raise it, or set DISTILLATION.ENABLE_LOGIT False.",
    ),
    (
        "DISTILLATION.LOGIT_TEMP",
        lambda v: (
            v["DISTILLATION.ENABLE_LOGIT"]
            and v["DISTILLATION.LOGIT_LOSS"] == "hard"
            and v["DISTILLATION.LOGIT_TEMP"] != 1
        ),
        "hard targets have no temperature: set it to 1 or DISTILLATION.LOGIT_LOSS to soft.",
    ),
    (
        _OFFLINE,
        lambda v: v[_OFFLINE] and not v["DISTILLATION.ENABLE_INTER"],
        "stored features serve DISTILLATION.ENABLE_INTER, which is False: switch that on or this "
        "off.",
    ),
    (
        _OFFLINE,
        lambda v: v[_OFFLINE] and not v["DISTILLATION.FEATURE_FILE"],
        "DISTILLATION.FEATURE_FILE must name the stored features.",
    ),
    (
        _OFFLINE,
        lambda v: v[_OFFLINE] and v["DISTILLATION.ENABLE_LOGIT"],
        "the guide's class scores are not stored: set DISTILLATION.ENABLE_LOGIT False, or this "
        "False.",
    ),
    (
        _OFFLINE,
        lambda v: v[_OFFLINE] and v["DISTILLATION.TEACHER_BN"] == "batch",
        "stored features cannot follow the statistics of each batch: set DISTILLATION.TEACHER_BN "
        "eval, or this False.",
    ),
    (
        _OFFLINE,
        lambda v: v[_OFFLINE] and (v["TRAIN.MIXUP_ALPHA"] > 0 or v["TRAIN.CUTMIX_ALPHA"] > 0),
        "the features of a mixed image are not those of its parts: set TRAIN.MIXUP_ALPHA and "
        "TRAIN.CUTMIX_ALPHA 0, or this False.",
    ),
    (
        "DISTILLATION.FEATURE_PLACE",
        lambda v: v["DISTILLATION.FEATURE_PLACE"] != "file" and not v[_OFFLINE],
        "there are no stored features without DISTILLATION.OFFLINE: set that True, or this to "
        "file.",
    ),
    (
        "OPTIM.MIN_LR",
        lambda v: v["OPTIM.LR_POLICY"] != "steps" and v["OPTIM.MIN_LR"] > v["OPTIM.BASE_LR"],
        lambda v: f"it must not exceed OPTIM.BASE_LR {v['OPTIM.BASE_LR']}.",
    ),
    (
        "OPTIM.MIN_LR",
        lambda v: v["OPTIM.LR_POLICY"] == "exp" and v["OPTIM.MIN_LR"] <= 0,
        "OPTIM.LR_POLICY exp falls to MIN_LR by equal factors and needs it above 0.",
    ),
    (
        "OPTIM.STEPS",
        lambda v: v["OPTIM.LR_POLICY"] == "steps" and not v["OPTIM.STEPS"],
        "OPTIM.LR_POLICY steps needs the epochs of its steps, such as [100, 150].",
    ),
    ("OPTIM.STEPS", lambda v: v["OPTIM.STEPS"] != sorted(set(v["OPTIM.STEPS"])), "it must rise."),
    (
        "OPTIM.STEPS",
        lambda v: v["OPTIM.LR_POLICY"] != "steps" and bool(v["OPTIM.STEPS"]),
        "it has no effect unless OPTIM.LR_POLICY is steps: set that, or this to [].",
    ),
    (
        "OPTIM.WARMUP_EPOCHS",
        lambda v: v["OPTIM.WARMUP_EPOCHS"] > v["OPTIM.MAX_EPOCH"],
        lambda v: f"it must not exceed OPTIM.MAX_EPOCH {v['OPTIM.MAX_EPOCH']}.",
    ),
    (
        "OPTIM.NESTEROV",
        lambda v: (
            v["OPTIM.OPTIMIZER"] == "sgd"
            and v["OPTIM.NESTEROV"]
            and (v["OPTIM.MOMENTUM"] == 0 or v["OPTIM.DAMPENING"] != 0)
        ),
        "Nesterov momentum needs OPTIM.MOMENTUM above 0 and OPTIM.DAMPENING 0: change those, or "
        "set this False.",
    ),
    (
        "OPTIM.EMA_ALPHA",
        lambda v: v["OPTIM.EMA_UPDATE_PERIOD"] > 0 and v["OPTIM.EMA_ALPHA"] == 0,
        "a weight average that never moves: raise it, or set OPTIM.EMA_UPDATE_PERIOD 0.",
    ),
    (
        "TRAIN.AMP_DTYPE",
        lambda v: v["TRAIN.AMP_DTYPE"] != "auto" and not v["TRAIN.MIXED_PRECISION"],
        "it has no effect unless TRAIN.MIXED_PRECISION is True: set that, or this to auto.",
    ),
    (
        "TRAIN.COMPILE",
        lambda v: (
            v["TRAIN.COMPILE"] in ("reduce-overhead", "max-autotune") and v["TRAIN.ACCUM_STEPS"] > 1
        ),
        "CUDA graphs reuse the memory of gradients that TRAIN.ACCUM_STEPS adds up: set this to "
        "default, or that to 1.",
    ),
    (
        "TRAIN.BATCH_SIZE",
        lambda v: v["TRAIN.BATCH_SIZE"] % _share_per_process(v) != 0,
        lambda v: (
            f"it must be a multiple of NUM_GPUS x TRAIN.ACCUM_STEPS = {_share_per_process(v)}."
        ),
    ),
    (
        "TRAIN.BATCH_SIZE",
        lambda v: _compares_images(v) and v["TRAIN.BATCH_SIZE"] == _share_per_process(v),
        "each process and micro-batch gets a single image, which batch statistics and similarity "
        "cannot do with: raise it, or lower TRAIN.ACCUM_STEPS.",
    ),
    (
        "TEST.BATCH_SIZE",
        lambda v: v["TEST.BATCH_SIZE"] < v["NUM_GPUS"],
        lambda v: f"it must be at least NUM_GPUS {v['NUM_GPUS']}.",
    ),
    (
        "NUM_GPUS",
        lambda v: v["LAUNCH.MODE"] != "slurm" and v["NUM_GPUS"] > v["MAX_GPUS_PER_NODE"],
        lambda v: (
            f"it must not exceed MAX_GPUS_PER_NODE {v['MAX_GPUS_PER_NODE']}; for several machines "
            f"use torchrun or LAUNCH.MODE slurm."
        ),
    ),
    (
        "NUM_GPUS",
        lambda v: (
            v["NUM_GPUS"] > v["MAX_GPUS_PER_NODE"] and v["NUM_GPUS"] % v["MAX_GPUS_PER_NODE"] != 0
        ),
        lambda v: (
            f"several machines get MAX_GPUS_PER_NODE {v['MAX_GPUS_PER_NODE']} processes each: it "
            "must be a multiple of that."
        ),
    ),
    (
        "PORT_RANGE",
        lambda v: len(v["PORT_RANGE"]) != 2 or v["PORT_RANGE"][0] > v["PORT_RANGE"][1],
        "it takes [first, last].",
    ),
]
