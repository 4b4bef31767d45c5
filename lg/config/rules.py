"""What each key accepts: model families, types, choices and ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from yacs.config import CfgNode

from lg.config.defaults import DEFAULT_VALUES, flatten

Fault = tuple[str, str]  # the key to change, and the advice
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
_WIDE = ("WIDE_LAST", "LIFT")
_PYRAMID = (*_SHAPE, "PATCH_SIZE", "MLP_RATIO")
# The one table of families: MODEL.TYPE -> how to build it.
FAMILIES: dict[str, Family] = {
    "DeiT": Family("deit", one=(*_PLAIN, *_WIDE)),
    "T2TViT": Family("t2t", one=(*_PLAIN, *_WIDE), section="T2T"),
    "PiT": Family("pit", one=("PATCH_SIZE", "MLP_RATIO", *_RATES), stages=_SHAPE, section="PIT"),
    "PVT": Family("pvt", one=_RATES, stages=_PYRAMID, section="PVT"),
    "PVTv2": Family("pvtv2", one=_RATES, stages=(*_PYRAMID, "PATCH_STRIDE"), section="PVT"),
    "ConViT": Family("convit", one=_PLAIN, section="CONVIT"),
    "CvT": Family(
        "cvt", stages=(*_PYRAMID, "PATCH_STRIDE", "PATCH_PADDING", *_RATES), section="CVT"
    ),
}
MODEL_TYPES = (*FAMILIES, "ResNet", "timm/NAME")


# Elements of the lists that are empty by default, unless they are whole numbers.
_EMPTY_LISTS = {
    "MODEL.BLOCKS": str,
    "DATA_LOADER.MEAN": float,
    "DATA_LOADER.STD": float,
    "DATA_LOADER.WINDOW": float,
}


def accepted_types(key: str) -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Return the types of a single value and of the elements of a list; either may be empty.

    A key whose default is None accepts null as well.
    """
    default = DEFAULT_VALUES[key]
    if key == "DISTILLATION.INTER_STUDENT_INDEX":
        return (str,), (int,)  # mix, or a list of blocks
    if isinstance(default, list):
        empty_type = _EMPTY_LISTS.get(key, int)
        return (), (type(default[0]) if default else empty_type,)
    if default is not None:
        return (type(default),), ()
    if not key.startswith("TRANSFORMER."):
        return (str,), ()
    number: type = float if key.endswith(("MLP_RATIO", *_RATES)) else int
    return (number,), (number,)


# The activations of timm 1.0.20 and later, without identity.
ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "gelu_tanh"),
    *("quick_gelu", "silu", "swish", "mish", "sigmoid", "tanh"),
    *("hard_sigmoid", "hard_swish", "hard_mish", "hardsigmoid", "hardswish"),
)

# "timm/NAME" stands for timm/ followed by a model name.
CHOICES: dict[str, tuple[str, ...]] = {
    "MODEL.TYPE": MODEL_TYPES,
    "MODEL.LOSS_FUN": ("cross_entropy",),
    "MODEL.INIT": ("default", "mimetic"),
    "CVT.QKV_PROJ_METHOD": ("dw_bn", "avg", "linear"),
    "CNN.ACTIVATION_FUN": ACTIVATIONS,
    "RESNET.TRANS_FUN": ("basic_transform", "bottleneck_transform"),
    "DISTILLATION.INTER_TRANSFORM": ("linear", "gram", "attention", "similarity"),
    "DISTILLATION.INTER_LOSS": ("l2",),
    "DISTILLATION.LOGIT_LOSS": ("soft", "hard"),
    "DISTILLATION.SCHEDULE": ("static", "until", "decay_linear", "decay_cosine", "adaptive"),
    "DISTILLATION.TEACHER_MODEL": ("ResNet", "timm/NAME"),
    "DISTILLATION.TEACHER_BN": ("eval", "batch"),
    "DISTILLATION.FEATURE_PLACE": ("file", "device"),
    "OPTIM.OPTIMIZER": ("sgd", "adam", "adamw", "muon", "nadamuon"),
    "OPTIM.LR_POLICY": ("cos", "lin", "exp", "steps"),
    "TRAIN.DATASET": ("", *DATASET_NAMES),
    "TRAIN.SPLIT": ("train",),
    "TRAIN.BALANCE": ("none", "weights", "sampling"),
    "TRAIN.RESIZE": ("squash", "letterbox", "crop"),
    "TEST.RESIZE": ("", "squash", "letterbox", "crop"),
    "TRAIN.COMPILE": ("none", "default", "reduce-overhead", "max-autotune"),
    "DATA_LOADER.BACKEND": ("auto", "workers", "device"),
    "DATA_LOADER.NORMALIZE": ("imagenet", "auto", "values"),
    "DATA_LOADER.ON_ERROR": ("stop", "skip"),
    "TRAIN.AMP_DTYPE": ("auto", "bf16", "fp16"),
    "TEST.DATASET": ("", *DATASET_NAMES),
    "TEST.SPLIT": ("val", "test", "train"),
    "LAUNCH.MODE": ("local", "slurm", "submitit_local"),
    "LOG_DEST": ("stdout", "file"),
    "LOG_TRACKER": ("none", "wandb", "mlflow", "trackio"),
    "DIST_BACKEND": ("nccl", "gloo"),
    "DEVICE": ("auto", "cpu", "cuda", "mps"),
}

Range = tuple[Callable[[Any], bool], str]  # a test, and the words for what passes it


def _each(test: Callable[[Any], bool], words: str, keys: str) -> dict[str, Range]:
    return dict.fromkeys(keys.split(), (test, words))


# Key -> test of the value, or of each element of a list.
RANGES: dict[str, Range] = {
    **_each(
        lambda v: v >= 1,
        "at least 1",
        """
        MODEL.IMG_SIZE MODEL.IN_CHANNELS MODEL.NUM_CLASSES CNN.DEPTH RESNET.NUM_GROUPS
        RESNET.WIDTH_PER_GROUP DISTILLATION.TEACHER_IMG_SIZE DISTILLATION.ADAPTIVE_WINDOW
        OPTIM.MAX_EPOCH TRAIN.BATCH_SIZE TRAIN.ACCUM_STEPS TRAIN.KEEP_CHECKPOINTS
        TEST.BATCH_SIZE TEST.PERIOD PREC_TIME.NUM_ITER NUM_GPUS MAX_GPUS_PER_NODE
        LAUNCH.CPUS_PER_GPU LAUNCH.MEM_PER_GPU LAUNCH.TIME_LIMIT LOG_PERIOD
        TRANSFORMER.PATCH_SIZE TRANSFORMER.PATCH_STRIDE TRANSFORMER.HIDDEN_DIM
        TRANSFORMER.DEPTH TRANSFORMER.NUM_HEADS T2T.KERNEL_SIZE T2T.STRIDE PIT.STRIDE
        PVT.SR_RATIO CVT.KERNEL_QKV CVT.STRIDE_KV CVT.STRIDE_Q
        """,
    ),
    **_each(
        lambda v: 0 <= v < math.inf,
        "at least 0 and finite",
        """
        TRANSFORMER.WIDE_LAST TRANSFORMER.LIFT TRANSFORMER.PATCH_PADDING T2T.PADDING
        CVT.PADDING_KV CVT.PADDING_Q CONVIT.LOCAL_LAYERS DISTILLATION.INTER_TEACHER_INDEX
        DISTILLATION.INTER_WEIGHT DISTILLATION.SCHEDULE_EPOCH OPTIM.STEPS OPTIM.MIN_LR
        OPTIM.WEIGHT_DECAY OPTIM.WARMUP_EPOCHS OPTIM.EMA_ALPHA OPTIM.EMA_UPDATE_PERIOD
        OPTIM.CLIP_GRAD_NORM TRAIN.MIXUP_ALPHA TRAIN.CUTMIX_ALPHA DATA_LOADER.NUM_WORKERS
        DATA_LOADER.TIMEOUT PREC_TIME.WARMUP_ITER LAUNCH.MAX_RETRY TRAIN.EARLY_STOP
        """,
    ),
    **_each(
        lambda v: 0 < v < math.inf,
        "greater than 0 and finite",
        """
        CNN.BN_EPS TRANSFORMER.LN_EPS TRANSFORMER.MLP_RATIO CONVIT.LOCALITY_STRENGTH
        DISTILLATION.LOGIT_TEMP OPTIM.BASE_LR OPTIM.HEAD_LR_RATIO
        """,
    ),
    **_each(
        lambda v: 0 <= v < 1,
        "at least 0 and below 1",
        """
        TRANSFORMER.DROP_RATE TRANSFORMER.DROP_PATH_RATE TRANSFORMER.ATTENTION_DROP_RATE
        OPTIM.MOMENTUM OPTIM.BETA1 OPTIM.BETA2 TRAIN.LABEL_SMOOTHING TRAIN.VAL_FRACTION
        TRAIN.PATCH_DROP
        """,
    ),
    **_each(
        lambda v: 0 <= v <= 1,
        "between 0 and 1",
        "DISTILLATION.LOGIT_WEIGHT OPTIM.DAMPENING TRAIN.HFLIP DATA_LOADER.MEAN",
    ),
    **_each(
        lambda v: 0 < v <= 1,
        "greater than 0 and at most 1",
        "CNN.BN_MOMENTUM OPTIM.LR_MULT OPTIM.WARMUP_FACTOR TRAIN.FRACTION DATA_LOADER.STD",
    ),
    "DISTILLATION.INTER_STUDENT_INDEX": (
        lambda v: v == "mix" or (isinstance(v, int) and v >= 0),
        "mix, or a list of block numbers from 0",
    ),
    "DISTILLATION.ADAPTIVE_THRESHOLD": (lambda v: -math.inf < v < 0, "below 0 and finite"),
    # The Performer has half as many random features as token channels.
    "T2T.TOKEN_DIM": (lambda v: v >= 2, "at least 2"),
    **dict.fromkeys(
        ("RNG_SEED", "TRAIN.SPLIT_SEED"), (lambda v: 0 <= v < 2**32, "at least 0 and below 2^32")
    ),
    "PORT_RANGE": (lambda v: 1 <= v <= 65535, "two ports between 1 and 65535"),
    "CFG_DEST": (
        lambda v: v.endswith((".yaml", ".yml")) and "/" not in v and "\\" not in v,
        "a file name without a folder, ending in .yaml or .yml",
    ),
}


def changed(cfg: CfgNode, *names: str) -> list[str]:
    """Return the keys of sections, or single keys, whose values differ from the defaults."""
    values = dict(flatten(cfg))
    return [
        key
        for key, default in DEFAULT_VALUES.items()
        if (key in names or key.partition(".")[0] in names) and values[key] != default
    ]


def default_text(key: str) -> str:
    """Return a default as it is written in YAML."""
    value = DEFAULT_VALUES[key]
    return "null" if value is None else str(value)
