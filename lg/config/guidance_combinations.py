"""Combinations of values about guidance that cannot take effect.

They are rules as in `lg.config.combinations`.
"""

from __future__ import annotations

from collections.abc import Iterator

from yacs.config import CfgNode

from lg.config.rules import Fault, changed, default_text

_PROJECTED = ("linear", "gram")  # values of INTER_TRANSFORM with projection heads


def guidance_faults(cfg: CfgNode) -> Iterator[Fault]:
    """Yield the faults of guided blocks, losses, schedule and stored features."""
    yield from _blocks(cfg)
    yield from _switches(cfg)
    yield from _schedule(cfg)
    yield from _offline(cfg)


def _blocks(cfg: CfgNode) -> Iterator[Fault]:
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


def _switches(cfg: CfgNode) -> Iterator[Fault]:
    options = cfg.DISTILLATION
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


def _schedule(cfg: CfgNode) -> Iterator[Fault]:
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
        for key in changed(cfg, "DISTILLATION.ADAPTIVE_WINDOW", "DISTILLATION.ADAPTIVE_THRESHOLD"):
            yield (
                key,
                f"only DISTILLATION.SCHEDULE adaptive reads it: set it to {default_text(key)}.",
            )
    elif length < 3 or max(length, 300) <= 2 * options.ADAPTIVE_WINDOW:
        yield (
            "DISTILLATION.ADAPTIVE_WINDOW",
            "the adaptive schedule needs two windows, together shorter than the training "
            f"(OPTIM.MAX_EPOCH {length}; below 300, windows are relative to 300 epochs): "
            "lower it, or set DISTILLATION.SCHEDULE to another value.",
        )
    elif weak and not changed(cfg, "DISTILLATION.ADAPTIVE_THRESHOLD"):
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
