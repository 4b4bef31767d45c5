"""The formats of `--mode export`: how each is written and loaded."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from torch import nn
from yacs.config import CfgNode

from lg.errors import ConfigError, ExportError

METADATA_FILE = "metadata.json"  # inside a .pt2 file
_SHAPES = {"images": {0: torch.export.Dim("batch")}}
_TIMM_RESIZE = {"squash": "squash", "letterbox": "border", "crop": "center"}  # timm's names


class TimmRecipe(NamedTuple):
    """The arguments of `timm.create_model` that build a model.

    Attributes:
        architecture: A name in `timm.list_models()`.
        arguments: Those that differ from the defaults of that name, except the classes.
    """

    architecture: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        model: In evaluation mode, on the CPU.
        shape: C, S, S of its input.
        facts: See `lg.tools.export.describe`.
        recipe: How timm builds the model; needed by the format timm only.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    facts: dict[str, str]
    recipe: TimmRecipe | None = None

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The model as a graph that takes batches of any size."""
        # Two images, because torch treats a size of 1 as fixed.
        example = torch.zeros(2, *self.shape)
        program = torch.export.export(self.model, (example,), dynamic_shapes=_SHAPES)
        program.example_inputs = None  # the file would keep them
        return program


def check_packages(formats: Sequence[str]) -> None:
    """Check that the packages of some formats are installed.

    Raises:
        ExportError: The message names those that are missing and how to install them.
    """
    needed = {package for name in formats for package in FORMATS[name].packages}
    missing = sorted(package for package in needed if importlib.util.find_spec(package) is None)
    if missing:
        raise ExportError(
            f"--format {' '.join(formats)} needs {', '.join(missing)}: pip install -e '.[export]'"
        )


def _write_onnx(source: Source, path: Path) -> None:
    exported = torch.onnx.export(
        source.program,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_SHAPES,  # for the name of the dimension
        dynamo=True,
        verbose=False,
    )
    assert exported is not None  # with dynamo
    exported.model.metadata_props.update(source.facts)
    exported.save(path)


def _load_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


def _write_torch(source: Source, path: Path) -> None:
    text = json.dumps(source.facts, ensure_ascii=False)
    with warnings.catch_warnings():
        # Weights that are views of one storage; the comparison shows whether they are complete.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(source.program, path, extra_files={METADATA_FILE: text})


def _load_torch(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(path).module()


def _write_timm(source: Source, path: Path) -> None:
    assert source.recipe is not None
    net = source.model.net
    assert isinstance(net, nn.Module)
    facts = source.facts
    names = json.loads(facts["class_names"])
    twin = _build_twin(source.recipe, net, num_classes=len(names))
    defaults: Any = twin.pretrained_cfg
    config = {
        "architecture": source.recipe.architecture,
        "num_classes": len(names),
        "model_args": source.recipe.arguments,
        "label_names": names,
        "pretrained_cfg": {
            "num_classes": len(names),
            "input_size": list(source.shape),
            "mean": json.loads(facts["mean"]),
            "std": json.loads(facts["std"]),
            "interpolation": facts["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": _TIMM_RESIZE[facts["resize"]],
            # Where timm finds the layers to adapt to other channels and classes.
            "first_conv": defaults.get("first_conv"),
            "classifier": defaults.get("classifier"),
        },
    }
    path.mkdir()
    weights = {key: value.clone().contiguous() for key, value in net.state_dict().items()}
    _match_epsilons(weights, net, twin)
    safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (path / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _build_twin(recipe: TimmRecipe, net: nn.Module, *, num_classes: int) -> nn.Module:
    """Build timm's model and check that the network has the same layers.

    Raises:
        ExportError: It differs.
    """
    twin = timm.create_model(recipe.architecture, num_classes=num_classes, **recipe.arguments)
    own, other = ({key: tuple(v.shape) for key, v in n.state_dict().items()} for n in (net, twin))
    differing = [key for key in (own | other) if own.get(key) != other.get(key)]
    if differing:
        raise ExportError(
            f"timm's {recipe.architecture} differs from this model ({', '.join(differing[:3])}): "
            "use --format onnx or torch."
        )
    return twin


def _match_epsilons(weights: dict[str, torch.Tensor], net: nn.Module, twin: nn.Module) -> None:
    """Scale convolutions whose LayerNorm has another epsilon in timm's model, as in PVTv2.

    The results stay the same, because LayerNorm(s x) with s^2 eps equals LayerNorm(x) with eps.
    """
    for name, norm in twin.named_modules():
        own = net.get_submodule(name)
        if not (isinstance(norm, nn.LayerNorm) and isinstance(own, nn.LayerNorm)):
            continue
        if norm.eps == own.eps:
            continue
        parent = name.rpartition(".")[0]
        for child, module in twin.get_submodule(parent).named_children():
            if isinstance(module, nn.Conv2d):
                for key in (f"{parent}.{child}.{part}" for part, _ in module.named_parameters()):
                    weights[key] *= math.sqrt(norm.eps / own.eps)


def _load_timm(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def timm_recipe(cfg: CfgNode) -> TimmRecipe:
    """Return how timm builds the model of a config.

    Raises:
        ConfigError: timm has no such family.
    """
    kind = cfg.MODEL.TYPE
    if kind.startswith("timm/"):
        name = kind.removeprefix("timm/").partition(".")[0]
        recipe = TimmRecipe(name, _accepted_size(name, cfg.MODEL.IMG_SIZE))
    elif kind in _RECIPES:
        recipe = _RECIPES[kind](cfg)
    else:
        have = ", ".join(_RECIPES)
        raise ConfigError(
            f"MODEL.TYPE is {kind}, which timm does not have (it has {have} and timm/NAME): use "
            "--format onnx or torch."
        )
    if cfg.MODEL.IN_CHANNELS != 3:
        recipe.arguments["in_chans"] = cfg.MODEL.IN_CHANNELS
    return recipe


def _accepted_size(name: str, img_size: int) -> dict[str, int]:
    """Return img_size as an argument, if the model has it."""
    try:
        timm.create_model(name, img_size=img_size)
    except TypeError:
        return {}
    return {"img_size": img_size}


def _deit(cfg: CfgNode) -> TimmRecipe:
    kind = "distilled_" if cfg.DISTILLATION.ENABLE_LOGIT else ""
    return TimmRecipe(f"deit_tiny_{kind}patch16_224", _plain(cfg))


def _convit(cfg: CfgNode) -> TimmRecipe:
    arguments = _plain(cfg)
    arguments["embed_dim"] //= arguments["num_heads"]  # timm multiplies them
    arguments["local_up_to_layer"] = cfg.CONVIT.LOCAL_LAYERS
    arguments["locality_strength"] = cfg.CONVIT.LOCALITY_STRENGTH
    return TimmRecipe("convit_tiny", arguments)


def _plain(cfg: CfgNode) -> dict[str, Any]:
    settings = cfg.TRANSFORMER
    return {
        "img_size": cfg.MODEL.IMG_SIZE,
        "patch_size": settings.PATCH_SIZE,
        "embed_dim": settings.HIDDEN_DIM,
        "depth": settings.DEPTH,
        "num_heads": settings.NUM_HEADS,
        "mlp_ratio": settings.MLP_RATIO,
    }


def _pit(cfg: CfgNode) -> TimmRecipe:
    settings = cfg.TRANSFORMER
    heads = _per_stage(cfg, "NUM_HEADS")
    return TimmRecipe(
        "pit_ti_224",
        {
            "img_size": cfg.MODEL.IMG_SIZE,
            "patch_size": settings.PATCH_SIZE,
            "stride": cfg.PIT.STRIDE,
            "base_dims": [c // h for c, h in zip(settings.HIDDEN_DIM, heads, strict=True)],
            "depth": _per_stage(cfg, "DEPTH"),
            "heads": heads,
            "mlp_ratio": settings.MLP_RATIO,
        },
    )


def _pvtv2(cfg: CfgNode) -> TimmRecipe:
    expected = {"PATCH_SIZE": [7, 3, 3, 3], "PATCH_STRIDE": [4, 2, 2, 2]}
    for key, fixed in expected.items():
        if _per_stage(cfg, key) != fixed[: len(cfg.TRANSFORMER.HIDDEN_DIM)]:
            raise ConfigError(
                f"TRANSFORMER.{key} is {cfg.TRANSFORMER[key]}, and timm's PVTv2 has {fixed}: use "
                "--format onnx or torch."
            )
    return TimmRecipe(
        "pvt_v2_b0",
        {
            "depths": _per_stage(cfg, "DEPTH"),
            "embed_dims": cfg.TRANSFORMER.HIDDEN_DIM,
            "num_heads": _per_stage(cfg, "NUM_HEADS"),
            "sr_ratios": cfg.PVT.SR_RATIO,
            "mlp_ratios": _per_stage(cfg, "MLP_RATIO"),
        },
    )


def _per_stage(cfg: CfgNode, key: str) -> list[Any]:
    value = cfg.TRANSFORMER[key]
    return value if isinstance(value, list) else [value] * len(cfg.TRANSFORMER.HIDDEN_DIM)


_RECIPES: dict[str, Callable[[CfgNode], TimmRecipe]] = {
    "DeiT": _deit,
    "PiT": _pit,
    "PVTv2": _pvtv2,
    "ConViT": _convit,
}


class Format(NamedTuple):
    """One way to write a model.

    Attributes:
        place: Name of the file, or of the folder.
        packages: Packages it needs besides those of this project.
        write: Writes a model to a path.
        load: Loads what `write` wrote: images [N, C, S, S] to logits [N, K], on the CPU.
    """

    place: str
    packages: tuple[str, ...]
    write: Callable[[Source, Path], None]
    load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]


FORMATS = {
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "torch": Format("model.pt2", (), _write_torch, _load_torch),
    "timm": Format("timm", (), _write_timm, _load_timm),
}
