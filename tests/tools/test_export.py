"""Export: every family to every format it has, with parity, metadata and errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import lg
import run_net
from lg.config import load_trained_config
from lg.errors import ConfigError, DataError, ExportError
from lg.models.published import published_state_dict
from lg.tools import export_formats
from lg.tools.export import Parity, compare, export
from lg.tools.predict import build_predictor

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs/digits/vit_digits_base.yaml"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = [f"digit {k} é" for k in range(10)]
# Small models of the seven families and the CNN for 32-pixel images.
PLAIN = "TRANSFORMER.HIDDEN_DIM 32 TRANSFORMER.DEPTH 2 TRANSFORMER.NUM_HEADS 2"
STAGES = "TRANSFORMER.HIDDEN_DIM [16,32] TRANSFORMER.DEPTH [1,1] TRANSFORMER.NUM_HEADS [1,2]"
OVERLAPPING = f"{STAGES} TRANSFORMER.PATCH_SIZE [7,3] TRANSFORMER.PATCH_STRIDE [4,2]"
FAMILIES = {
    "DeiT": f"{PLAIN} TRANSFORMER.PATCH_SIZE 8",
    "T2TViT": f"{PLAIN} TRANSFORMER.PATCH_SIZE 16",
    "PiT": f"{STAGES} TRANSFORMER.PATCH_SIZE 8 PIT.STRIDE 4",
    "PVT": f"{STAGES} TRANSFORMER.PATCH_SIZE [4,2] TRANSFORMER.MLP_RATIO 2 PVT.SR_RATIO [2,1]",
    "PVTv2": f"{OVERLAPPING} TRANSFORMER.MLP_RATIO 2 PVT.SR_RATIO [2,1]",
    "ConViT": f"{PLAIN} TRANSFORMER.PATCH_SIZE 8 CONVIT.LOCAL_LAYERS 1",
    "CvT": f"{OVERLAPPING} TRANSFORMER.PATCH_PADDING [2,1] TRANSFORMER.MLP_RATIO 2 "
    "CVT.WITH_CLS_TOKEN [False,True] CVT.QKV_PROJ_METHOD ['dw_bn','dw_bn'] CVT.KERNEL_QKV [3,3] "
    "CVT.STRIDE_KV [2,2] CVT.STRIDE_Q [1,1] CVT.PADDING_KV [1,1] CVT.PADDING_Q [1,1]",
    "ResNet": "CNN.DEPTH 8",
}
NO_SIZES = " ".join(
    f"TRANSFORMER.{key} null"
    for key in (
        "PATCH_SIZE",
        "HIDDEN_DIM",
        "DEPTH",
        "NUM_HEADS",
        "MLP_RATIO",
        "ATTENTION_DROP_RATE",
    )
)
IN_TIMM = ("DeiT", "PiT", "PVTv2", "ConViT")


def save_checkpoint(path: Path, kind: str, *opts: str) -> Path:
    """Write a model of random weights; those of the classifier, too, are not zero."""
    sizes = f"MODEL.TYPE {kind} MODEL.IMG_SIZE 32 DEVICE cpu {FAMILIES.get(kind, '')}".split()
    cfg = lg.load_config(BASE, [*sizes, *opts])
    torch.manual_seed(0)
    model = lg.build_model(cfg)
    for name, parameter in model.named_parameters():
        if name in model.head_names():
            nn.init.normal_(parameter)
        elif kind == "PVTv2" and ("proj.weight" in name or "sr.weight" in name):
            parameter.data *= 0.05  # the epsilon of the LayerNorm that follows matters
    state = {"model_state": published_state_dict(model), "cfg": cfg.dump(), "class_names": NAMES}
    torch.save(state, path)
    return path


def run_export(weights: Path, *formats: str, out: Path | None = None, opts: tuple[str, ...] = ()):
    cfg = load_trained_config(weights, ["TEST.WEIGHTS", str(weights), *opts])
    return export(cfg, formats=formats, out=out and str(out), images=[])


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_exported_with_parity(kind: str, tmp_path: Path, capsys) -> None:
    weights = save_checkpoint(tmp_path / "model.pyth", kind)
    formats = ("onnx", "torch", "timm") if kind in IN_TIMM else ("onnx", "torch")
    parities = [done.parity for done in run_export(weights, *formats)]
    if kind == "PVTv2":  # 5e-5 without the scaled convolutions
        assert max(each.difference / each.spread for each in parities) < 1e-5
    assert capsys.readouterr().out.count("same class for 32 of 32 images") == len(formats)
    places = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert places == sorted(export_formats.FORMATS[name].place for name in formats)
    check_use(weights, tmp_path / "export", formats)


def check_use(weights: Path, folder: Path, formats: tuple[str, ...]) -> None:
    """Classify images of another batch size as a user would, without this project."""
    predictor = lg.load_predictor(weights, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    expected = np.stack([each.probabilities for each in predictor(pictures)])
    images = torch.stack([as_documented(each, 32, MEAN, STD) for each in pictures])
    torch.testing.assert_close(images, predictor.prepare(pictures), atol=1e-5, rtol=0)
    logits = {"onnx": onnx_logits, "torch": torch_logits, "timm": timm_logits}
    for name in formats:
        place = folder / export_formats.FORMATS[name].place
        found = logits[name](place, images).softmax(dim=1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def as_documented(image: Image.Image, size: int, mean: object, std: object) -> torch.Tensor:
    small = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return torch.from_numpy((small - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


def onnx_logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check_facts(session.get_modelmeta().custom_metadata_map)
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("images", "tensor(float)", [3, 32, 32])
    assert (entry.shape[0], result.shape) == ("batch", ["batch", 10])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def torch_logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    files = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=files)
    check_facts(json.loads(files["metadata.json"]))
    assert program.example_inputs is None
    return program.module()(images).detach()


def check_facts(facts: dict[str, str]) -> None:
    assert json.loads(facts["class_names"]) == NAMES
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == (MEAN, STD)
    assert json.loads(facts["image_size"]) == 32 and facts["resize"] == "squash"


@torch.no_grad()
def timm_logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == NAMES
    recipe = timm.data.resolve_model_data_config(model)
    assert (tuple(recipe["input_size"]), list(recipe["mean"])) == ((3, 32, 32), MEAN)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8))
    prepared = timm.data.create_transform(**recipe, is_training=False)(picture)
    torch.testing.assert_close(prepared, as_documented(picture, 32, MEAN, STD), atol=1e-5, rtol=0)
    tuned = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=7)
    assert tuned(images).shape == (3, 7)
    return model(images)


def test_the_documented_code(tmp_path: Path, monkeypatch, capsys) -> None:
    """The code of docs/export.md classifies a photo as `predict` does, whatever TEST.RESIZE."""
    weights = save_checkpoint(tmp_path / "model.pyth", "DeiT")
    run_export(weights, "onnx", "torch", "timm")
    monkeypatch.chdir(tmp_path / "export")
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((93, 60)).save("photo.jpg")
    text = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    with_onnx, with_torch, with_timm = re.findall("^```python\n(.*?)^```$", text, re.M | re.S)
    model = onnx.load("model.onnx")
    answers = set()
    for rule in ("letterbox", "crop", "squash"):
        next(p for p in model.metadata_props if p.key == "resize").value = rule
        onnx.save(model, "model.onnx")
        cfg = load_trained_config(weights, ["TEST.RESIZE", rule, "TEST.WEIGHTS", str(weights)])
        expected = build_predictor(cfg)("photo.jpg")
        capsys.readouterr()
        exec(with_onnx, {})
        lines = [f"{name} {100 * p:.1f} %" for name, p in expected.top(3)]
        assert capsys.readouterr().out.splitlines() == lines
        answers.add(tuple(lines))
    assert len(answers) == 3  # the rules differ for this photo
    exec(with_timm, {})
    assert capsys.readouterr().out.strip() == expected.class_name
    variables: dict[str, Any] = {}
    exec(with_torch, variables)
    assert variables["logits"].shape == (5, 10)


def test_distilled_deit_and_timm_models(tmp_path: Path, capsys) -> None:
    """A distilled DeiT answers with the mean of its heads; timm models may take no image size."""
    guided = ["DISTILLATION.ENABLE_LOGIT", "True", "CNN.DEPTH", "8"]
    weights = save_checkpoint(tmp_path / "model.pyth", "DeiT", *guided)
    run_export(weights, "timm")
    config = json.loads((tmp_path / "export/timm/config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "deit_tiny_distilled_patch16_224"
    check_use(weights, tmp_path / "export", ("timm",))
    weights = save_checkpoint(
        tmp_path / "timm.pyth", "timm/test_resnet.r160_in1k", *NO_SIZES.split()
    )
    run_export(weights, "timm", out=tmp_path / "resnet")
    check_use(weights, tmp_path / "resnet", ("timm",))
    config = json.loads((tmp_path / "resnet/timm/config.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["model_args"]) == ("test_resnet", {})


@pytest.mark.parametrize(
    ("kind", "opts", "error", "match"),
    [
        ("T2TViT", "", ConfigError, "MODEL.TYPE is T2TViT, which timm does not have"),
        (
            "PVTv2",
            "TRANSFORMER.PATCH_SIZE [5,3]",
            ConfigError,
            r"PATCH_SIZE is \[5, 3\], and timm's",
        ),
        ("PiT", "TRANSFORMER.LN_EPS 0.01", ExportError, "timm export is removed"),
    ],
)
def test_timm_refuses_what_it_builds_otherwise(
    kind: str, opts: str, error: type, match: str, tmp_path: Path
) -> None:
    weights = save_checkpoint(tmp_path / "model.pyth", kind, *opts.split())
    with pytest.raises(error, match=match):
        run_export(weights, "timm")
    assert list(tmp_path.glob("export/*")) == []


@pytest.mark.parametrize("name", ["onnx", "torch", "timm"])
def test_a_wrong_export_is_removed(name: str, tmp_path: Path, monkeypatch) -> None:
    """An earlier export stays."""
    weights = save_checkpoint(tmp_path / "model.pyth", "DeiT")
    (tmp_path / "export").mkdir()
    form = export_formats.FORMATS[name]
    (tmp_path / "export" / form.place).write_text("earlier")
    write: Callable = form.write

    def write_another(source: export_formats.Source, path: Path) -> None:
        with torch.no_grad():
            for parameter in source.model.net.patch_embed.parameters():
                parameter.mul_(1.1)
        write(source, path)
        with torch.no_grad():
            for parameter in source.model.net.patch_embed.parameters():
                parameter.div_(1.1)

    monkeypatch.setitem(export_formats.FORMATS, name, form._replace(write=write_another))
    with pytest.raises(ExportError, match=f"The {name} export is removed, because its logits"):
        run_export(weights, name)
    assert [path.read_text() for path in (tmp_path / "export").iterdir()] == ["earlier"]


def test_what_torch_cannot_record_is_one_line(tmp_path: Path, monkeypatch) -> None:
    weights = save_checkpoint(tmp_path / "model.pyth", "DeiT")

    def fail(source: export_formats.Source, path: Path) -> None:
        raise RuntimeError("dynamic control flow\nmore")

    form = export_formats.FORMATS["onnx"]._replace(write=fail)
    monkeypatch.setitem(export_formats.FORMATS, "onnx", form)
    with pytest.raises(
        ExportError, match=r"exported to onnx \(dynamic control flow\)\. Try another"
    ):
        run_export(weights, "onnx")
    assert list((tmp_path / "export").iterdir()) == []


def test_parity_compares_batches_of_one_and_more() -> None:
    torch.manual_seed(0)
    model, images = nn.Linear(4, 3), torch.randn(9, 4)
    sizes: list[int] = []

    def shifted(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return model(batch) + torch.tensor([0.5, 0.0, 0.0])

    found = compare(model, shifted, images)
    assert sizes == [1, 8] and found.difference == pytest.approx(0.5) and not found.is_met
    assert compare(model, model, images) == Parity(0.0, found.spread, found.largest, 9, 9)
    assert found.largest == float(model(images).abs().max())
    nan = float("nan")
    cases = {9e-5: True, 1.1e-4: False, nan: False}
    assert {d: Parity(d, 1.0, 1.0, 9, 9).is_met for d in cases} == cases
    assert Parity(1e-5, 0.01, 10.0, 9, 9).is_met and not Parity(3e-5, 0.01, 10.0, 9, 9).is_met
    constant = nn.Linear(4, 3)
    nn.init.zeros_(constant.weight)
    with pytest.raises(ExportError, match="same logits for all images"):
        compare(constant, constant, images)


def test_missing_packages_and_images_are_named(tmp_path: Path, monkeypatch) -> None:
    weights = save_checkpoint(tmp_path / "model.pyth", "DeiT")
    folder = f"TRAIN.DATASET image_folder TEST.DATASET image_folder DATA_LOADER.ROOT {tmp_path}/no"
    with pytest.raises(DataError, match=r"test images cannot be used: .*at least 8 .*--images"):
        run_export(weights, "onnx", opts=tuple(folder.split()))
    picture = tmp_path / "one.png"
    Image.new("RGB", (9, 9)).save(picture)
    cfg = load_trained_config(weights, ["TEST.WEIGHTS", str(weights)])
    with pytest.raises(DataError, match="--images names 1 images; the check needs at least 8"):
        export(cfg, formats=["onnx"], out=None, images=[str(picture)])
    find = export_formats.importlib.util.find_spec
    hidden = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(
        export_formats.importlib.util, "find_spec", lambda n: None if n in hidden else find(n)
    )
    needs = r"onnx needs onnxruntime, onnxscript: pip install -e '\.\[export\]'"
    with pytest.raises(ExportError, match=needs):
        export(cfg, formats=["onnx"], out=None, images=[])


def test_the_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """An export that cannot be checked ends with status 1 and one line."""
    weights = save_checkpoint(tmp_path / "model.pyth", "DeiT")
    args = run_net.parse_args(["--mode", "export", "--format", *export_formats.FORMATS])
    assert args.formats == list(export_formats.FORMATS)
    command = f"run_net.py --mode export --format torch TEST.WEIGHTS {weights}".split()
    monkeypatch.setattr(sys, "argv", command)
    run_net.main()
    assert f"torch: {tmp_path}/export/model.pt2 (0." in capsys.readouterr().out
    state = torch.load(weights, weights_only=True)
    for key in ("head.weight", "head.bias"):
        state["model_state"][key].zero_()
    torch.save(state, weights)
    with pytest.raises(SystemExit) as end:
        run_net.main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: The model gives the same logits for all images")
    assert len(error.splitlines()) == 1
