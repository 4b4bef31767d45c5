"""What values may be: ranges, choices, and combinations that cannot take effect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import lg
from lg.config import flatten
from lg.config.defaults import DEFAULTS
from lg.config.rules import COMBINATIONS, NULLABLE, RANGES, TYPED_LISTS
from tests.config.config_cases import Write, fault, leaf, writer


@pytest.fixture(name="write")
def write_fixture(tmp_path: Path) -> Write:
    return writer(tmp_path)


def beyond(key: str) -> list[Any]:
    """Values just outside the range that the words of a rule state."""
    text = RANGES[key][1]
    if text.startswith("at least"):
        low = int(text.split()[2])
        high = {"below 1": 1.0, "below 2^32": 2**32}.get(text.partition(" and ")[2])
        return [low - 1] + ([] if high is None else [high])
    return {
        "greater than 0 and finite": [0, -1.0, float("inf")],
        "between 0 and 1": [-0.1, 1.1],
        "greater than 0 and at most 1": [0, 1.1],
        "two ports between 1 and 65535": [0, 65536],
        "a file name without a folder, ending in .yaml or .yml": ["", "..", "a/b.yaml", "log.txt"],
    }[text]


@pytest.mark.parametrize("key", RANGES)
def test_every_range_holds_at_its_ends(write: Write, key: str) -> None:
    default = leaf(DEFAULTS, key)
    is_float = isinstance(default, float) or float in NULLABLE.get(key, ())
    for value in [*beyond(key), *([float("nan")] if is_float else [])]:
        if isinstance(value, (int, float)) and not is_float:
            value = int(value)
        given = [value, value] if key in TYPED_LISTS else value
        section, _, name = key.rpartition(".")
        tree = {section: {name: given}} if section else {name: given}
        message = fault(write(yaml.safe_dump(tree)))
        assert message.startswith(f"{key} is ") and f"it must be {RANGES[key][1]}." in message


def test_every_number_has_a_range() -> None:
    free = {k for k, v in flatten(DEFAULTS) if type(v) in (int, float) and k not in RANGES}
    assert free == set()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MODEL: {TYPE: Deit}", "Did you mean DeiT?"),
        ("MODEL: {TYPE: timm/}", "timm/NAME"),
        ("OPTIM: {OPTIMIZER: SGD}", "allowed: sgd, adam, adamw."),
        (
            "CVT: {QKV_PROJ_METHOD: [dw_bn, dw, avg]}",
            "allowed: dw_bn, avg, linear. Did you mean dw_bn",
        ),
        ("TRAIN: {DATASET: cifar10}", "Did you mean cifar100?"),
        ("DISTILLATION: {INTER_LOSS: l1}", "allowed: l2."),
        ("LAUNCH: {MODE: cloud}", "allowed: local, slurm, submitit_local."),
    ],
)
def test_a_choice_names_what_is_allowed(write: Write, text: str, said: str) -> None:
    key = ".".join([*yaml.safe_load(text), *next(iter(yaml.safe_load(text).values()))])
    message = fault(write(text))
    assert message.startswith(f"{key} is ") and said in message and "run.yaml" in message


def test_any_timm_model_may_be_named(write: Write) -> None:
    assert lg.load_config(write("MODEL: {TYPE: timm/resnet18}")).MODEL.TYPE == "timm/resnet18"


# --- Combinations ------------------------------------------------------------------------------

INTER = {
    "DISTILLATION.ENABLE_INTER": True,
    "DISTILLATION.INTER_TEACHER_INDEX": [0, 1],
    "DISTILLATION.INTER_STUDENT_INDEX": [0, 6],
}
OFFLINE = {**INTER, "DISTILLATION.OFFLINE": True, "DISTILLATION.FEATURE_FILE": "f.pt"}
STEPS = {"OPTIM.LR_POLICY": "steps"}

TIMM_IGNORES = [
    f"TRANSFORMER.{key}"
    for key in (
        "PATCH_SIZE",
        "PATCH_STRIDE",
        "PATCH_PADDING",
        "HIDDEN_DIM",
        "DEPTH",
        "NUM_HEADS",
        "MLP_RATIO",
        "ATTENTION_DROP_RATE",
    )
]
# A value of each key of the CNN, and the advice where there is none.
CNN_OF_NO_USE: dict[str, tuple[Any, str]] = {
    "CNN.DEPTH": (20, "neither MODEL.TYPE nor a guide is a ResNet: leave it at 56"),
    "CNN.ACTIVATION_FUN": ("gelu", "leave it at relu"),
    "CNN.ACTIVATION_INPLACE": (False, "leave it at True"),
    "CNN.BN_EPS": (1e-3, "nor a guide"),
    "CNN.BN_MOMENTUM": (0.2, "nor a guide"),
    "CNN.ZERO_INIT_FINAL_BN_GAMMA": (True, "nor a guide"),
    "RESNET.TRANS_FUN": ("bottleneck_transform", "nor a guide"),
    "RESNET.NUM_GROUPS": (2, "nor a guide"),
    "RESNET.WIDTH_PER_GROUP": (32, "nor a guide"),
    "RESNET.STRIDE_1X1": (False, "nor a guide"),
}
# A value of each key that belongs to one family, and the advice to any other.
OTHER_FAMILY: dict[str, tuple[Any, str]] = {
    "T2T.TOKEN_DIM": (32, "only MODEL.TYPE T2TViT reads it: leave it at 64"),
    "T2T.KERNEL_SIZE": ([5, 3], "T2TViT"),
    "T2T.STRIDE": ([2, 2], "T2TViT"),
    "T2T.PADDING": ([1, 1], "T2TViT"),
    "PIT.STRIDE": (4, "only MODEL.TYPE PiT"),
    "PVT.SR_RATIO": ([2, 1], "only MODEL.TYPE PVT and PVTv2"),
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
# One broken config for each row of COMBINATIONS, in its order, and a word of the advice.
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"CNN.DEPTH": 57}, "6n+2"),
    ({"CNN.DEPTH": 50}, "needs bottleneck_transform"),
    ({"RESNET.NUM_GROUPS": 2}, "set it to 1"),
    ({"RESNET.WIDTH_PER_GROUP": 32}, "set it to 64"),
    ({"MODEL.BLOCKS": ["a"]}, "timm/NAME"),
    ({"MODEL.PRETRAINED": "a.pth"}, "own as TRAIN.WEIGHTS"),
    (
        {"MODEL.TYPE": "timm/resnet18", "MODEL.PRETRAINED": "a", "TRAIN.WEIGHTS": "b"},
        "set one of the two",
    ),
    *(
        ({"MODEL.TYPE": "timm/resnet18", key: 0.5 if key.endswith("RATE") else 2}, "leave it out")
        for key in TIMM_IGNORES
    ),
    ({"MODEL.TYPE": "timm/resnet18", "TRANSFORMER.LN_EPS": 1e-3}, "its norms by its name"),
    *(({"MODEL.TYPE": "DeiT", key: value}, said) for key, (value, said) in CNN_OF_NO_USE.items()),
    ({"MODEL.TYPE": "DeiT", "TRANSFORMER.PATCH_STRIDE": 4}, "only MODEL.TYPE PVTv2 and CvT reads"),
    ({"MODEL.TYPE": "PVTv2", "TRANSFORMER.PATCH_PADDING": [1]}, "CvT reads it: leave it at null."),
    *(({"MODEL.TYPE": "DeiT", key: value}, said) for key, (value, said) in OTHER_FAMILY.items()),
    ({"DISTILLATION.ENABLE_INTER": True}, "at least one block"),
    ({**INTER, "DISTILLATION.INTER_TEACHER_INDEX": [0]}, "which has 2 entries"),
    ({**INTER, "DISTILLATION.INTER_STUDENT_INDEX": [6, 6]}, "repeated"),
    ({**INTER, "DISTILLATION.INTER_WEIGHT": 0.0}, "counts nothing"),
    (
        {"DISTILLATION.ENABLE_LOGIT": True, "DISTILLATION.LOGIT_WEIGHT": 0.0},
        "ENABLE_LOGIT False",
    ),
    (
        {
            "DISTILLATION.ENABLE_LOGIT": True,
            "DISTILLATION.LOGIT_LOSS": "hard",
            "DISTILLATION.LOGIT_TEMP": 2.0,
        },
        "no temperature",
    ),
    ({**OFFLINE, "DISTILLATION.ENABLE_INTER": False}, "ENABLE_INTER, which is False"),
    ({**OFFLINE, "DISTILLATION.FEATURE_FILE": None}, "FEATURE_FILE must name"),
    ({**OFFLINE, "DISTILLATION.ENABLE_LOGIT": True}, "ENABLE_LOGIT False"),
    ({**OFFLINE, "DISTILLATION.TEACHER_BN": "batch"}, "TEACHER_BN eval"),
    ({**OFFLINE, "TRAIN.CUTMIX_ALPHA": 1.0}, "CUTMIX_ALPHA 0"),
    ({**INTER, "DISTILLATION.FEATURE_PLACE": "device"}, "set that True"),
    ({"OPTIM.MIN_LR": 0.2}, "OPTIM.BASE_LR 0.1"),
    ({"OPTIM.LR_POLICY": "exp"}, "above 0"),
    (STEPS, "such as [100, 150]"),
    ({**STEPS, "OPTIM.STEPS": [3, 3]}, "rise"),
    ({"OPTIM.STEPS": [3]}, "no effect"),
    ({"OPTIM.WARMUP_EPOCHS": 201}, "OPTIM.MAX_EPOCH 200"),
    ({"OPTIM.DAMPENING": 0.1}, "DAMPENING 0"),
    ({"OPTIM.EMA_UPDATE_PERIOD": 1, "OPTIM.EMA_ALPHA": 0.0}, "never moves"),
    ({"TRAIN.AMP_DTYPE": "bf16"}, "TRAIN.MIXED_PRECISION"),
    ({"TRAIN.COMPILE": "max-autotune", "TRAIN.ACCUM_STEPS": 2}, "set this to default"),
    ({"NUM_GPUS": 2, "TRAIN.ACCUM_STEPS": 3}, "multiple of NUM_GPUS x TRAIN.ACCUM_STEPS = 6"),
    ({"TRAIN.BATCH_SIZE": 4, "TRAIN.ACCUM_STEPS": 4}, "a single image"),
    ({"NUM_GPUS": 4, "TEST.BATCH_SIZE": 3}, "at least NUM_GPUS 4"),
    ({"NUM_GPUS": 16}, "MAX_GPUS_PER_NODE 8"),
    ({"LAUNCH.MODE": "slurm", "NUM_GPUS": 12, "TRAIN.BATCH_SIZE": 120}, "multiple of that"),
    ({"PORT_RANGE": [5, 4]}, "[first, last]"),
]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        for place in [tree.setdefault(s, {}) for s in sections] or [tree]:
            place[name] = value
    return tree


@pytest.mark.parametrize("row", range(max(len(COMBINATIONS), len(BROKEN))))
def test_every_impossible_combination_is_named(write: Write, row: int) -> None:
    values, said = BROKEN[row]
    key, broken, _ = COMBINATIONS[row]
    resolved = dict(flatten(DEFAULTS)) | values
    assert next(r for r, (_, test, _) in enumerate(COMBINATIONS) if test(resolved)) == row
    assert broken(resolved)
    message = fault(write(yaml.safe_dump(nested(values))))
    assert message.startswith(f"{key} is ") and said in message and message.endswith(".")
    assert (f"{key} is {resolved[key]!r}" in message) and (key in values) == (".yaml" in message)


@pytest.mark.parametrize("extra", [INTER, OFFLINE, {**STEPS, "OPTIM.STEPS": [3, 9]}])
def test_the_sound_neighbours_of_the_broken_ones_load(write: Write, extra: dict) -> None:
    loaded = dict(flatten(lg.load_config(write(yaml.safe_dump(nested(extra))))))
    assert {k: loaded[k] for k in extra} == extra


def test_a_resnet_may_have_these_depths(write: Write) -> None:
    kinds = {8: "basic", 20: "basic", 110: "basic", 18: "basic", 34: "basic"}
    for depth, kind in (kinds | {50: "bottleneck", 101: "bottleneck", 152: "bottleneck"}).items():
        opts = ["CNN.DEPTH", str(depth), "RESNET.TRANS_FUN", f"{kind}_transform"]
        assert depth == lg.load_config(write(), opts).CNN.DEPTH
    for depth in (2, 7, 9, 19, 51, 154):
        assert "6n+2" in fault(write(), "CNN.DEPTH", str(depth))


def test_guidance_that_nobody_switched_on_is_an_error(write: Write) -> None:
    path = write("DISTILLATION: {INTER_WEIGHT: 9.0}\n")
    message = fault(path)
    assert message.startswith("DISTILLATION.INTER_WEIGHT is 9.0") and "ENABLE_INTER" in message
    # Switched off in so many words, as for a run without guidance of a guided config, is fine.
    cfg = lg.load_config(path, ["DISTILLATION.ENABLE_INTER", "False"])
    assert leaf(cfg, "DISTILLATION.INTER_WEIGHT") == 9.0
