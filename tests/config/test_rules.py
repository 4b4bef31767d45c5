"""Ranges, choices, and combinations of values that cannot take effect."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from yacs.config import CfgNode

import lg
from lg.config import combinations, flatten, guidance_combinations, student_combinations
from lg.config.defaults import DEFAULTS
from lg.config.rules import DATASET_NAMES, RANGES, accepted_types
from lg.datasets import DATASETS
from tests.config.config_cases import Write, fault, leaf, nested

INFINITY = float("inf")
# Values just outside each range.
BEYOND: dict[str, list[Any]] = {
    "at least 1": [0],
    "at least 2": [1],
    "at least 0 and finite": [-1, INFINITY],
    "greater than 0 and finite": [0, -1.0, INFINITY],
    "at least 0 and below 1": [-1, 1.0],
    "mix, or a list of block numbers from 0": [-1],
    "below 0 and finite": [0, -INFINITY],
    "between 0 and 1": [-0.1, 1.1],
    "greater than 0 and at most 1": [0, 1.1],
    "at least 0 and below 2^32": [-1, 2**32],
    "two ports between 1 and 65535": [0, 65536],
    "a file name without a folder, ending in .yaml or .yml": ["", "..", "a/b.yaml", "log.txt"],
}


@pytest.mark.parametrize("key", RANGES)
def test_every_range_holds_at_its_ends(write: Write, key: str) -> None:
    is_list, is_float = isinstance(leaf(DEFAULTS, key), list), float in accepted_types(key)[0]
    words = RANGES[key][1]
    for value in [*BEYOND[words], *([float("nan")] if is_float else [])]:
        if value == INFINITY and not is_float:
            continue
        message = fault(write(yaml.safe_dump(nested({key: [value, value] if is_list else value}))))
        assert message.startswith(f"{key} is ") and f"it must be {words}." in message


def test_every_number_has_a_range() -> None:
    free = {k for k, v in flatten(DEFAULTS) if type(v) in (int, float) and k not in RANGES}
    assert free == set()


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("MODEL: {TYPE: Deit}", "Did you mean DeiT?"),
        ("MODEL: {TYPE: timm/}", "timm/NAME"),
        ("OPTIM: {OPTIMIZER: SGD}", "allowed: sgd, adam, adamw, muon, nadamuon."),
        (
            "CVT: {QKV_PROJ_METHOD: [dw_bn, dw, avg]}",
            "allowed: dw_bn, avg, linear. Did you mean dw_bn",
        ),
        ("TRAIN: {DATASET: cifar10}", "Did you mean cifar100?"),
        ("DISTILLATION: {INTER_LOSS: l1}", "allowed: l2."),
        ("LAUNCH: {MODE: cloud}", "allowed: local, slurm, submitit_local."),
    ],
)
def test_a_choice_names_what_is_allowed(write: Write, text: str, advice: str) -> None:
    key = ".".join([*yaml.safe_load(text), *next(iter(yaml.safe_load(text).values()))])
    message = fault(write(text))
    assert message.startswith(f"{key} is ") and advice in message and "run.yaml" in message


def test_any_timm_model_may_be_named(write: Write) -> None:
    assert lg.load_config(write("MODEL: {TYPE: timm/resnet18}")).MODEL.TYPE == "timm/resnet18"


# --- Combinations ------------------------------------------------------------------------------

INTER = {
    "DISTILLATION.ENABLE_INTER": True,
    "DISTILLATION.INTER_TEACHER_INDEX": [0, 1],
    "DISTILLATION.INTER_STUDENT_INDEX": [0, 6],
}
MIX = {**INTER, "DISTILLATION.INTER_STUDENT_INDEX": "mix"}
OFFLINE = {**INTER, "DISTILLATION.OFFLINE": True, "DISTILLATION.FEATURE_FILE": "f.pt"}
LOGIT = {"DISTILLATION.ENABLE_LOGIT": True}
STEPS = {"OPTIM.LR_POLICY": "steps"}

# The keys of TRANSFORMER that timm/NAME does not read, with words of the advice.
TIMM_IGNORES = {
    f"TRANSFORMER.{key}": f"timm/NAME fixes it: set it to {default}."
    for key, default in {
        **dict.fromkeys(["PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING", "HIDDEN_DIM"], "null"),
        **dict.fromkeys(["DEPTH", "NUM_HEADS", "MLP_RATIO", "ATTENTION_DROP_RATE"], "null"),
        "LN_EPS": "1e-06",
    }.items()
}
# A value of each key of the CNN, and words of the advice if there is no CNN.
CNN_UNREAD: dict[str, tuple[Any, str]] = {
    "CNN.DEPTH": (20, "neither MODEL.TYPE nor the guide is a ResNet: set it to 56"),
    "CNN.ACTIVATION_FUN": ("gelu", "set it to relu"),
    "CNN.ACTIVATION_INPLACE": (False, "set it to True"),
    "CNN.BN_EPS": (1e-3, "nor the guide"),
    "CNN.BN_MOMENTUM": (0.2, "nor the guide"),
    "CNN.ZERO_INIT_FINAL_BN_GAMMA": (True, "nor the guide"),
    "RESNET.TRANS_FUN": ("bottleneck_transform", "nor the guide"),
    "RESNET.NUM_GROUPS": (2, "nor the guide"),
    "RESNET.WIDTH_PER_GROUP": (32, "nor the guide"),
    "RESNET.STRIDE_1X1": (False, "nor the guide"),
}
# A value of each key that some families read, and words of the advice for the others.
OTHER_FAMILY: dict[str, tuple[Any, str]] = {
    "T2T.TOKEN_DIM": (32, "only MODEL.TYPE T2TViT reads it: set it to 64"),
    "T2T.KERNEL_SIZE": ([5, 3], "T2TViT"),
    "T2T.STRIDE": ([2, 2], "T2TViT"),
    "T2T.PADDING": ([1, 1], "T2TViT"),
    "PIT.STRIDE": (4, "only MODEL.TYPE PiT"),
    "PVT.SR_RATIO": ([2, 1], "only MODEL.TYPE PVT or PVTv2"),
    "CONVIT.LOCAL_LAYERS": (3, "only MODEL.TYPE ConViT"),
    "CONVIT.LOCALITY_STRENGTH": (2.0, "only MODEL.TYPE ConViT"),
    "CVT.WITH_CLS_TOKEN": ([True], "only MODEL.TYPE CvT"),
    "CVT.QKV_PROJ_METHOD": (["avg"], "CvT"),
    "CVT.KERNEL_QKV": ([5], "CvT"),
    "CVT.STRIDE_KV": ([1], "CvT"),
    "CVT.STRIDE_Q": ([2], "CvT"),
    "CVT.PADDING_KV": ([2], "CvT"),
    "CVT.PADDING_Q": ([2], "CvT"),
}
# At least one broken config for each rule: the key to change, the values, and words of the advice.
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("CNN.DEPTH", {"CNN.DEPTH": 57}, "6n+2"),
    ("RESNET.TRANS_FUN", {"CNN.DEPTH": 50}, "needs bottleneck_transform"),
    ("RESNET.NUM_GROUPS", {"RESNET.NUM_GROUPS": 2}, "set it to 1"),
    ("RESNET.WIDTH_PER_GROUP", {"RESNET.WIDTH_PER_GROUP": 32}, "set it to 64"),
    *((k, {"MODEL.TYPE": "DeiT", k: value}, advice) for k, (value, advice) in CNN_UNREAD.items()),
    *(
        (k, {"MODEL.TYPE": "timm/resnet18", k: 0.5 if k.endswith(("RATE", "EPS")) else 2}, advice)
        for k, advice in TIMM_IGNORES.items()
    ),
    (
        "MODEL.PRETRAINED",
        {"MODEL.TYPE": "timm/resnet18", "MODEL.PRETRAINED": "a", "TRAIN.WEIGHTS": "b"},
        "set one of the two",
    ),
    ("MODEL.BLOCKS", {"MODEL.BLOCKS": ["a"]}, "timm/NAME"),
    ("MODEL.PRETRAINED", {"MODEL.PRETRAINED": "a.pth"}, "project as TRAIN.WEIGHTS"),
    (
        "TRANSFORMER.PATCH_STRIDE",
        {"MODEL.TYPE": "DeiT", "TRANSFORMER.PATCH_STRIDE": 4},
        "only MODEL.TYPE PVTv2 or CvT reads it: set it to null.",
    ),
    (
        "TRANSFORMER.PATCH_PADDING",
        {"MODEL.TYPE": "PVTv2", "TRANSFORMER.PATCH_PADDING": [1]},
        "only MODEL.TYPE CvT reads it: set it to null.",
    ),
    ("MODEL.INIT", {"MODEL.TYPE": "CvT", "MODEL.INIT": "mimetic"}, "CvT has no plain multi-head"),
    *(
        ("TRAIN.PATCH_DROP", {"MODEL.TYPE": kind, "TRAIN.PATCH_DROP": 0.5}, advice)
        for kind, advice in [
            ("PiT", "needs all patches, because it downsamples"),
            ("ConViT", "gated attention depends on the distances"),
            ("ResNet", "MODEL.TYPE ResNet has no patches"),
        ]
    ),
    (
        "TRAIN.PATCH_DROP",
        {
            **INTER,
            "MODEL.TYPE": "DeiT",
            "TRAIN.PATCH_DROP": 0.5,
            "DISTILLATION.INTER_TRANSFORM": "similarity",
        },
        "each image keeps different positions",
    ),
    (
        "TRAIN.PATCH_DROP",
        {
            **MIX,
            "MODEL.TYPE": "DeiT",
            "TRAIN.PATCH_DROP": 0.5,
            "TRANSFORMER.LIFT": 64,
        },
        "resizes maps of blocks of different widths",
    ),
    (
        "TRANSFORMER.LIFT",
        {"MODEL.TYPE": "DeiT", "TRANSFORMER.LIFT": 64, "TRANSFORMER.WIDE_LAST": 64},
        "set one of the two to 0",
    ),
    (
        "TRANSFORMER.WIDE_LAST",
        {"MODEL.TYPE": "T2TViT", "TRANSFORMER.WIDE_LAST": 64, "TRANSFORMER.HIDDEN_DIM": 64},
        "it must exceed TRANSFORMER.HIDDEN_DIM 64",
    ),
    (
        "TRANSFORMER.WIDE_LAST",
        {"MODEL.TYPE": "ConViT", "TRANSFORMER.WIDE_LAST": 64},
        "only MODEL.TYPE DeiT or T2TViT reads it: set it to 0",
    ),
    (
        "MODEL.INIT",
        {"MODEL.TYPE": "DeiT", "MODEL.INIT": "mimetic", "TRAIN.WEIGHTS": "w"},
        "TRAIN.WEIGHTS sets the initial weights",
    ),
    *((k, {"MODEL.TYPE": "DeiT", k: value}, advice) for k, (value, advice) in OTHER_FAMILY.items()),
    (
        "DISTILLATION.INTER_STUDENT_INDEX",
        {"DISTILLATION.ENABLE_INTER": True},
        "at least one block",
    ),
    (
        "DISTILLATION.INTER_TEACHER_INDEX",
        {**INTER, "DISTILLATION.INTER_TEACHER_INDEX": [0]},
        "each of the 2 entries",
    ),
    (
        "DISTILLATION.INTER_TEACHER_INDEX",
        {**MIX, "DISTILLATION.INTER_TEACHER_INDEX": []},
        "least one",
    ),
    (
        "DISTILLATION.INTER_STUDENT_INDEX",
        {**MIX, "DISTILLATION.INTER_TRANSFORM": "attention"},
        "choose linear or gram",
    ),
    (
        "DISTILLATION.INTER_STUDENT_INDEX",
        {**INTER, "DISTILLATION.INTER_STUDENT_INDEX": [6, 6]},
        "repeated",
    ),
    (
        "DISTILLATION.INTER_WEIGHT",
        {**INTER, "DISTILLATION.INTER_WEIGHT": 0.0},
        "no effect: raise it, or set DISTILLATION.ENABLE_INTER False",
    ),
    (
        "DISTILLATION.LOGIT_WEIGHT",
        {**LOGIT, "DISTILLATION.LOGIT_WEIGHT": 0.0},
        "no effect: raise it, or set DISTILLATION.ENABLE_LOGIT False",
    ),
    (
        "DISTILLATION.LOGIT_TEMP",
        {**LOGIT, "DISTILLATION.LOGIT_LOSS": "hard", "DISTILLATION.LOGIT_TEMP": 2.0},
        "no temperature",
    ),
    (
        "DISTILLATION.LOGIT_STANDARDIZE",
        {**LOGIT, "DISTILLATION.LOGIT_LOSS": "hard", "DISTILLATION.LOGIT_STANDARDIZE": True},
        "LOGIT_LOSS soft: set those, or this False",
    ),
    *(
        (key, {**INTER, "DISTILLATION.SCHEDULE": kind, "OPTIM.MAX_EPOCH": 9, key: value}, advice)
        for kind, key, value, advice in [
            ("until", "DISTILLATION.SCHEDULE_EPOCH", 9, "below OPTIM.MAX_EPOCH 9, at least 1"),
            ("decay_linear", "DISTILLATION.SCHEDULE_EPOCH", 10, "exceed OPTIM.MAX_EPOCH 9"),
            ("adaptive", "DISTILLATION.SCHEDULE_EPOCH", 5, "adaptive does not read it"),
            ("static", "DISTILLATION.ADAPTIVE_WINDOW", 5, "set it to 50"),
            ("until", "DISTILLATION.SCHEDULE_EPOCH", 0, "below OPTIM.MAX_EPOCH 9, at least 1"),
            ("adaptive", "DISTILLATION.ADAPTIVE_WINDOW", 150, "two windows"),
        ]
    ),
    (
        "DISTILLATION.ADAPTIVE_THRESHOLD",
        {
            **INTER,
            "DISTILLATION.SCHEDULE": "adaptive",
            "DISTILLATION.INTER_TRANSFORM": "attention",
        },
        "set it nearer to 0",
    ),
    (
        "DISTILLATION.FEATURE_PLACE",
        {**INTER, "DISTILLATION.FEATURE_PLACE": "device"},
        "set it True",
    ),
    *(
        ("DISTILLATION.OFFLINE", {**OFFLINE, key: value}, advice)
        for key, value, advice in [
            ("DISTILLATION.ENABLE_INTER", False, "only DISTILLATION.ENABLE_INTER uses"),
            ("DISTILLATION.FEATURE_FILE", None, "name the stored features"),
            ("DISTILLATION.ENABLE_LOGIT", True, "ENABLE_LOGIT False"),
            ("DISTILLATION.TEACHER_BN", "batch", "TEACHER_BN eval"),
            ("TRAIN.MIXUP_ALPHA", 1.0, "MIXUP_ALPHA"),
            ("TRAIN.CUTMIX_ALPHA", 1.0, "CUTMIX_ALPHA 0"),
        ]
    ),
    ("OPTIM.STEPS", STEPS, "such as [100, 150]"),
    ("OPTIM.STEPS", {**STEPS, "OPTIM.STEPS": [3, 3]}, "increasing order"),
    ("OPTIM.MIN_LR", {"OPTIM.MIN_LR": 0.2}, "OPTIM.BASE_LR 0.1"),
    ("OPTIM.MIN_LR", {"OPTIM.LR_POLICY": "exp"}, "above 0"),
    ("OPTIM.STEPS", {"OPTIM.STEPS": [3]}, "no effect"),
    ("OPTIM.WARMUP_EPOCHS", {"OPTIM.WARMUP_EPOCHS": 201}, "OPTIM.MAX_EPOCH 200"),
    ("OPTIM.NESTEROV", {"OPTIM.DAMPENING": 0.1}, "DAMPENING 0"),
    ("OPTIM.BETA1", {"OPTIM.BETA1": 0.8}, "OPTIM.OPTIMIZER sgd, only with adam, adamw, muon, nad"),
    (
        "OPTIM.MOMENTUM",
        {"OPTIM.OPTIMIZER": "adamw", "OPTIM.MOMENTUM": 0.8},
        "OPTIMIZER adamw, only with sgd, muon, nadamuon: set it to 0.9.",
    ),
    ("OPTIM.LR_MULT", {"OPTIM.LR_MULT": 0.5}, "LR_POLICY cos, only with steps: set it to 0.1."),
    ("OPTIM.EMA_ALPHA", {"OPTIM.EMA_UPDATE_PERIOD": 1, "OPTIM.EMA_ALPHA": 0.0}, "never change"),
    ("TRAIN.AMP_DTYPE", {"TRAIN.AMP_DTYPE": "bf16"}, "TRAIN.MIXED_PRECISION"),
    (
        "TRAIN.COMPILE",
        {"TRAIN.COMPILE": "max-autotune", "TRAIN.ACCUM_STEPS": 2},
        "set this to default",
    ),
    ("TRAIN.DETERMINISTIC", {"TRAIN.DETERMINISTIC": True}, "CUDNN.BENCHMARK may pick"),
    (
        "TRAIN.DETERMINISTIC",
        {
            "TRAIN.DETERMINISTIC": True,
            "CUDNN.BENCHMARK": False,
            "TRAIN.COMPILE": "max-autotune",
        },
        "set that to default",
    ),
    (
        "TRAIN.BATCH_SIZE",
        {"NUM_GPUS": 2, "TRAIN.ACCUM_STEPS": 3},
        "multiple of NUM_GPUS x TRAIN.ACCUM_STEPS = 6",
    ),
    ("TRAIN.BATCH_SIZE", {"TRAIN.BATCH_SIZE": 4, "TRAIN.ACCUM_STEPS": 4}, "at least 2 images"),
    ("TEST.SPLIT", {"TEST.SPLIT": "train", "TRAIN.VAL_FRACTION": 0.1}, "set it to test"),
    ("TRAIN.EARLY_STOP", {"TRAIN.EARLY_STOP": 3}, "TRAIN.VAL_FRACTION, such as 0.1"),
    ("TEST.BATCH_SIZE", {"NUM_GPUS": 4, "TEST.BATCH_SIZE": 3}, "at least NUM_GPUS 4"),
    ("NUM_GPUS", {"NUM_GPUS": 16}, "MAX_GPUS_PER_NODE 8"),
    (
        "NUM_GPUS",
        {"LAUNCH.MODE": "slurm", "NUM_GPUS": 12, "TRAIN.BATCH_SIZE": 120},
        "a multiple of that",
    ),
    ("PORT_RANGE", {"PORT_RANGE": [5, 4]}, "[first, last]"),
]


@pytest.mark.parametrize(("key", "values", "advice"), BROKEN)
def test_every_impossible_combination_is_named(
    write: Write, key: str, values: dict[str, Any], advice: str
) -> None:
    message = fault(write(yaml.safe_dump(nested(values))))
    value = (dict(flatten(DEFAULTS)) | values)[key]
    assert message.startswith(f"{key} is {value!r}") and advice in message and message.endswith(".")
    assert (key in values) == (".yaml" in message)


def test_every_rule_for_combinations_is_tested() -> None:
    rules = {
        (module.__file__, node.lineno)
        for module in (combinations, guidance_combinations, student_combinations)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Yield)
    }
    reached = set()
    for _, values, _ in BROKEN:
        cfg = CfgNode(nested(dict(flatten(DEFAULTS)) | values))
        found = innermost = combinations.faults(cfg)
        next(found)
        while innermost.gi_yieldfrom is not None:
            innermost = innermost.gi_yieldfrom
        frame = innermost.gi_frame
        reached.add((frame.f_code.co_filename, frame.f_lineno))
    assert reached == rules


def test_blocks_are_mix_or_a_list(write: Write) -> None:
    path = write(yaml.safe_dump(nested(INTER)))
    for text, value in (("mix", "mix"), ("[0,3]", [0, 3]), ("[ 1, 2 ]", [1, 2])):
        cfg = lg.load_config(path, ["DISTILLATION.INTER_STUDENT_INDEX", text])
        assert value == cfg.DISTILLATION.INTER_STUDENT_INDEX
    key = "DISTILLATION.INTER_STUDENT_INDEX"
    assert "it must be mix, or a list" in fault(path, key, "mixed")
    for text in ("3", "[mix]", "null"):
        assert "it takes text or a list of whole numbers" in fault(path, key, text)


@pytest.mark.parametrize("extra", [INTER, MIX, OFFLINE, {**STEPS, "OPTIM.STEPS": [3, 9]}])
def test_similar_combinations_that_are_valid_load(write: Write, extra: dict[str, Any]) -> None:
    loaded = dict(flatten(lg.load_config(write(yaml.safe_dump(nested(extra))))))
    assert {k: loaded[k] for k in extra} == extra


def test_the_names_of_data_sets_are_those_of_the_code() -> None:
    assert set(DATASETS) == set(DATASET_NAMES)


def test_a_resnet_may_have_these_depths(write: Write) -> None:
    kinds = {8: "basic", 20: "basic", 110: "basic", 18: "basic", 34: "basic"}
    for depth, kind in (kinds | {50: "bottleneck", 101: "bottleneck", 152: "bottleneck"}).items():
        opts = ["CNN.DEPTH", str(depth), "RESNET.TRANS_FUN", f"{kind}_transform"]
        assert depth == lg.load_config(write(), opts).CNN.DEPTH
    for depth in (2, 7, 9, 19, 51, 154):
        assert "6n+2" in fault(write(), "CNN.DEPTH", str(depth))


def test_settings_of_guidance_that_is_off_are_an_error(write: Write) -> None:
    path = write("DISTILLATION: {INTER_WEIGHT: 9.0}\n")
    message = fault(path)
    assert message.startswith("DISTILLATION.INTER_WEIGHT is 9.0") and "ENABLE_INTER" in message
    # Guidance that is switched off explicitly takes its settings along, as for an unguided run of a
    # guided config.
    cfg = lg.load_config(path, ["DISTILLATION.ENABLE_INTER", "False"])
    assert leaf(cfg, "DISTILLATION.INTER_WEIGHT") == 2.5
    # One kind of imitation does not read the settings of the other.
    path = write(yaml.safe_dump(nested(INTER)))
    message = fault(path, "DISTILLATION.LOGIT_TEMP", "4")
    assert "LOGIT_TEMP is 4.0, set on the command line" in message
    assert message.endswith("set DISTILLATION.ENABLE_LOGIT True.")
    off = ["DISTILLATION.ENABLE_LOGIT", "False", "DISTILLATION.LOGIT_TEMP", "4"]
    assert leaf(lg.load_config(path, off), "DISTILLATION.LOGIT_TEMP") == 4
