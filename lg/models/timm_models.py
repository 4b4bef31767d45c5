"""Any model that timm provides, by its name.

Which modules are the blocks of such a model, and how they return their maps, is inferred from the
model: the names of classes give candidates, and one image run through the model shows their
outputs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from torch import nn

from lg.errors import first_few
from lg.models.backbone import Backbone, MapLayout, probe_layouts

# Names of classes that are one residual block, and of similar names that are not: stages, and
# attention of the class token alone.
_BLOCK_CLASS = re.compile(
    "Block|Bottleneck|Residual|MBConv|DepthwiseSeparableConv|SelectiveKernelBasic|XceptionModule|"
    "DlaBasic"
)
_NO_BLOCK_CLASS = re.compile("Stage|Class")
# Names of attributes under which such classes are not blocks.
_NO_BLOCK_PLACE = re.compile("stem|patch_embed|downsample|head|final|global_block|incre_modules")
# Blocks that group tokens by mask unit: they cannot be reshaped to a map.
_SHUFFLED_CLASS = "HieraBlock"
_MAX_LISTED = 30  # module names in an error message


def timm_model(
    name: str,
    *,
    img_size: int,
    in_channels: int,
    num_classes: int,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    block_names: Sequence[str] = (),
    pretrained: Mapping[str, torch.Tensor] | None = None,
) -> Backbone:
    """Return the timm model `name`, with blocks found by running it once.

    Args:
        name: A name of `timm.list_models()`, with or without a tag; nothing is downloaded.
        img_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        num_classes: K.
        drop_rate: Dropout as the model defines it, in most models before the head.
        drop_path_rate: Stochastic depth of the last block; None keeps the model's default.
        block_names: Names of the blocks' modules, or patterns (`stages.*.blocks.*`, where `*` does
            not match a dot), to replace the blocks that are found.
        pretrained: A state dict of this model as timm or its authors publish it; None for fresh
            weights. timm resizes positions and adapts the input convolution; a classifier for
            another number of classes stays fresh; everything else must fit.

    Raises:
        ValueError: Unknown name, unsupported image size or rate, no blocks found, or weights of
            another model.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them all"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    settings = {
        "img_size": img_size,
        "in_chans": in_channels,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
    }
    if pretrained is None:
        net = _create(name, **settings, num_classes=num_classes)
    else:
        net = _create_pretrained(name, pretrained, num_classes, settings)
    candidates = _named_blocks(net, block_names) if block_names else _find_blocks(net)
    try:
        layouts = probe_layouts(net, candidates, image_shape=(in_channels, img_size, img_size))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        raise _size_error(name, img_size, error) from error
    blocks = _blocks_with_maps(net, candidates, layouts, named=bool(block_names))
    return Backbone(net, family="timm", block_names=list(blocks), layouts=list(blocks.values()))


def _blocks_with_maps(
    net: nn.Module,
    candidates: Sequence[str],
    layouts: Mapping[str, MapLayout | None],
    *,
    named: bool,
) -> dict[str, MapLayout]:
    """Return the candidates that return a map; all of them must, if the user named them."""
    blocks = {
        block: layout
        for block, layout in layouts.items()
        if layout is not None and type(net.get_submodule(block)).__name__ != _SHUFFLED_CLASS
    }
    mapless = [block for block in candidates if block not in blocks]
    if named and mapless:
        raise ValueError(
            f"block_names has {', '.join(mapless[:5])}, which return no feature map, or one that "
            f"the next module overwrites: leave them out. The model has {_outline(net)}"
        )
    if not blocks:
        raise ValueError(
            "no blocks that return feature maps were found: set block_names to patterns such as "
            f"'features.*'. The model has {_outline(net)}"
        )
    return blocks


def _create_pretrained(
    name: str, weights: Mapping[str, torch.Tensor], num_classes: int, settings: dict[str, Any]
) -> nn.Module:
    """Build the model with all of the weights, then replace its classifier if the classes differ.

    timm loads strictly (except for a few families) only if the number of classes is that of the
    weights. Otherwise it ignores everything else that is missing, too.
    """
    config = timm.get_pretrained_cfg(name)
    entry: Any = config.classifier if config else None  # one name, several or none
    heads = [entry] if isinstance(entry, str) else list(entry or ())
    # Files of the authors may name the head otherwise, or have none.
    known = [len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights]
    reasons = []
    for count in dict.fromkeys([*known[:1], config.num_classes if config else 1000, 0]):
        try:
            with _missing_keys() as missing:
                net = _create(
                    name,
                    **settings,
                    num_classes=count,
                    pretrained=True,
                    pretrained_cfg_overlay={"state_dict": dict(weights), "num_classes": count},
                )
        except _WeightsError as error:
            reasons.append(str(error))
            continue
        # A norm in the classifier's module starts fresh, as the classifier does.
        beside = tuple(f"{h.rpartition('.')[0]}." for h in heads if "." in h)
        lacking = [key for key in missing if not key.startswith(beside)]
        if lacking:
            reasons.append(f"they lack {', '.join(lacking[:5])}")
            continue
        net.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
        if count != num_classes:
            net.reset_classifier(num_classes)  # type: ignore[operator]
        return net
    made_for = f" (made for img_size {config.input_size[-1]})" if config else ""
    raise ValueError(
        f"the pretrained weights do not fit timm/{name}: {reasons[0]}. Use the file that timm or "
        f"the model's authors publish under this name{made_for}"
    )


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Collect the names that a state dict lacks while timm builds a model and loads it.

    timm loads some families without `strict` and reports missing keys only to its log. The model
    does not exist before, so the method of the class is replaced.
    """
    missing: list[str] = []
    load = nn.Module.load_state_dict

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(module, *args, **kwargs)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = noting  # type: ignore[assignment, method-assign]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


class _WeightsError(Exception):
    """Weights that the model cannot load; the message is the reason."""


def _create(name: str, **settings: Any) -> nn.Module:
    """Build the model; settings it does not accept are left out if that changes nothing."""
    img_size = settings["img_size"]
    optional = ("img_size", "drop_rate", "drop_path_rate")
    # A failed attempt may have drawn weights; the next one must start from the same random state.
    random_state = torch.get_rng_state()
    while True:
        try:
            return timm.create_model(name, **settings)
        except TypeError as error:
            unknown = next((key for key in optional if f"'{key}'" in str(error)), "")
            if unknown not in settings:
                raise
            value = settings.pop(unknown)
            if value and unknown != "img_size":
                raise ValueError(
                    f"{unknown} is {value}, but the model has no such rate: set it to 0"
                ) from error
            torch.set_rng_state(random_state)
        except (RuntimeError, KeyError, AttributeError) as error:
            if settings.get("pretrained"):
                reason = " ".join(str(error).split())[:300]
                raise _WeightsError(reason or type(error).__name__) from error
            raise _size_error(name, img_size, error) from error
        except (AssertionError, ValueError, ZeroDivisionError) as error:
            raise _size_error(name, img_size, error) from error


def _size_error(name: str, img_size: int, error: Exception) -> ValueError:
    """Return the error for an unsupported image size, with the size that timm recommends."""
    config = timm.get_pretrained_cfg(name)
    advice = f"it is made for {config.input_size[-1]}" if config else "use another size"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"img_size {img_size} does not fit timm/{name} ({reason}): {advice}")


def _find_blocks(net: nn.Module) -> list[str]:
    """Return the names of the outermost modules whose class is a residual block."""
    found: list[str] = []
    for name, module in net.named_modules():
        kind = type(module).__name__
        is_block = _BLOCK_CLASS.search(kind) and not _NO_BLOCK_CLASS.search(kind)
        inside = found and name.startswith(f"{found[-1]}.")
        elsewhere = any(_NO_BLOCK_PLACE.match(part) for part in name.split("."))
        if name and is_block and not inside and not elsewhere:
            found.append(name)
    return found


def _named_blocks(net: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the modules that match the patterns, in the order of the model.

    Raises:
        ValueError: A pattern matches none.
    """

    def fits(name: str, pattern: str) -> bool:
        parts, wanted = name.split("."), pattern.split(".")
        return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))

    names = [name for name, _ in net.named_modules() if name]
    idle = [p for p in patterns if not any(fits(name, p) for name in names)]
    if idle:
        raise ValueError(
            f"block_names has {', '.join(idle)}, but the model has no such module. It has "
            f"{_outline(net)}"
        )
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]


def _outline(net: nn.Module) -> str:
    """Return the module names of the top levels, numbers replaced by `*`, with their classes."""
    kinds: dict[str, dict[str, None]] = {}
    for name, module in net.named_modules():
        parts = name.split(".")
        if name and len(parts) <= 3:
            folded = ".".join("*" if part.isdigit() else part for part in parts)
            kinds.setdefault(folded, {})[type(module).__name__] = None
    listed = [f"{name} ({'/'.join(list(kind)[:4])})" for name, kind in kinds.items()]
    return first_few(listed, _MAX_LISTED)
