"""Every config file against a golden table: its model, its tapped blocks and its guide."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from yacs.config import CfgNode

import lg
from lg.config import flatten
from lg.guidance.bank_file import bank_folder
from lg.models import Backbone
from lg.models.complexity import complexity

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(
    p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml") if p.parent.name != "_base_"
)
# Name of the data in config files -> its name in the code, classes and training images.
DATA = {
    "c100": ("cifar100", 100, 50_000),
    "flowers": ("flowers", 102, 2_040),
    "tiny": ("tiny_imagenet", 200, 100_000),
    "chaoyang": ("chaoyang", 4, 4_021),
}
KINDS = ("base", "ours", "ours_offline")
# Model -> folder, parameters per data set (in the order of DATA, without projection heads), blocks,
# (channels, side) of the three tapped maps at 224 pixels.
MODELS: dict[str, tuple[str, list[int], int, list[tuple[int, int]]]] = {
    "deit-ti": ("deit", [5_543_716, 5_544_102, 5_563_016, 5_525_188], 12, [(192, 14)] * 3),
    "t2t-7": ("t2t", [4_078_922, 4_079_436, 4_104_622, 4_054_250], 7, [(256, 14)] * 3),
    "t2t-14": ("t2t", [21_199_050, 21_199_820, 21_237_550, 21_162_090], 14, [(384, 14)] * 3),
    "pit-ti": (
        "pit",
        [4_615_972, 4_616_486, 4_641_672, 4_591_300],
        12,
        [(64, 27), (128, 14), (256, 7)],
    ),
    "pvt-ti": (
        "pvt",
        [12_767_588, 12_768_614, 12_818_888, 12_718_340],
        8,
        [(64, 56), (128, 28), (512, 7)],
    ),
    "pvtv2-b0": (
        "pvtv2",
        [3_435_460, 3_435_974, 3_461_160, 3_410_788],
        8,
        [(32, 56), (64, 28), (256, 7)],
    ),
    "convit-ti": ("convit", [5_536_812, 5_537_198, 5_556_112, 5_518_284], 12, [(192, 14)] * 3),
    "cvt-13": (
        "cvt",
        [19_650_980, 19_651_750, 19_689_480, 19_614_020],
        13,
        [(64, 56), (384, 14), (384, 14)],
    ),
}
GRID = {
    f"{folder}/{model}_{data}_{kind}.yaml": (count, blocks, taps if kind != "base" else [])
    for model, (folder, counts, blocks, taps) in MODELS.items()
    for data, count in zip(DATA, counts, strict=True)
    for kind in KINDS
}
# Parameters, number of blocks and tapped maps of every config.
GOLDEN: dict[str, tuple[int, int, list[tuple[int, int]]]] = GRID | {
    "deit/deit-1m_c100-tenth_base.yaml": (1_019_236, 5, []),
    "deit/deit-1m_c100-tenth_ours.yaml": (1_019_236, 5, [(128, 8), (128, 8), (128, 8)]),
    "deit/deit-1m_flowers_ours.yaml": (1_037_926, 5, [(128, 8), (128, 8), (128, 8)]),
    "digits/r-8_digits.yaml": (78_042, 3, []),
    "digits/vit_digits_base.yaml": (678_634, 6, []),
    "digits/vit_digits_ours.yaml": (678_634, 6, [(96, 4), (96, 4), (96, 4)]),
    "digits/vit_digits_ours_offline.yaml": (678_634, 6, [(96, 4), (96, 4), (96, 4)]),
    "pvtv2/pvtv2-b0_flowers_best.yaml": (3_435_974, 8, [(32, 16), (64, 8), (256, 2)]),
    "pvtv2/pvtv2-b0_flowers_best_96.yaml": (3_435_974, 8, [(32, 24), (64, 12), (256, 3)]),
    "resnet/r-18_c100.yaml": (11_227_812, 4, []),
    "resnet/r-20_c100-tenth.yaml": (278_324, 3, []),
    "resnet/r-20_flowers.yaml": (278_454, 3, []),
    "resnet/r-56_c100.yaml": (861_620, 3, []),
    "resnet/r-56_flowers.yaml": (861_750, 3, []),
    "resnet/r-56_tiny.yaml": (868_120, 3, []),
    "resnet/r-56_chaoyang.yaml": (855_380, 3, []),
    "timm/convnext-atto_flowers.yaml": (3_407_262, 12, []),
}


@cache
def load(name: str) -> CfgNode:
    return lg.load_config(CONFIGS / name)


@cache
def build(architecture: str) -> Backbone:
    """Build the model of a config, once for all configs with the same model."""
    return lg.build_model(load(architecture))


@cache
def giga_macs(model: str) -> str:
    """Return the GMACs per image to two digits, for which the number of classes is irrelevant."""
    name = next(n for n in LEAVES if Path(n).stem.startswith(f"{model}_c100"))
    macs = complexity(build(architecture_of(name)), load(name).MODEL.IMG_SIZE)["macs"]
    return f"{macs / 1e9:.2f}"


def architecture_of(name: str) -> str:
    """Return the first config that builds the same model."""
    sections = ("MODEL", "TRANSFORMER", "T2T", "PIT", "PVT", "CONVIT", "CVT")

    def key(leaf: str) -> list:
        cfg = load(leaf)
        cnn = cfg.CNN if cfg.MODEL.TYPE == "ResNet" else None
        return [*(cfg[s] for s in sections), cnn]

    return next(leaf for leaf in LEAVES if key(leaf) == key(name))


def test_every_config_is_in_the_table_and_the_grid_is_whole() -> None:
    assert sorted(GOLDEN) == LEAVES
    assert len(GRID) == 8 * 4 * 3


def test_no_two_configs_are_the_same() -> None:
    seen: dict[str, str] = {}
    for name in LEAVES:
        # OUT_DIR is derived from the file name, so it differs between any two.
        values = repr([(k, v) for k, v in flatten(load(name)) if k != "OUT_DIR"])
        assert seen.setdefault(values, name) == name


@pytest.mark.parametrize("name", LEAVES)
def test_a_config_builds_and_taps_as_in_the_table(name: str) -> None:
    parameters, blocks, taps = GOLDEN[name]
    model, options = build(architecture_of(name)), load(name).DISTILLATION
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.blocks) == blocks
    tapped = [model.layouts[index] for index in options.INTER_STUDENT_INDEX]
    assert [(layout.channels, layout.size[0]) for layout in tapped] == taps
    assert bool(taps) == options.ENABLE_INTER


@pytest.mark.parametrize("name", GRID)
def test_a_config_of_the_grid_matches_its_data_and_its_guide(name: str) -> None:
    cfg = load(name)
    data, _, kind = Path(name).stem.partition("_")[2].partition("_")
    guide_name = f"r-56_{data}"
    dataset, classes, _ = DATA[data]
    guide = load(f"resnet/{guide_name}.yaml")
    for one in (cfg, guide):
        assert one.TRAIN.DATASET == one.TEST.DATASET == dataset
        assert classes == one.MODEL.NUM_CLASSES
        assert one.TRAIN.SPLIT == "train" and one.TEST.SPLIT != "train"
    assert cfg.MODEL.IMG_SIZE == 224
    if kind != "base":
        options = cfg.DISTILLATION
        assert f"work_dirs/{guide_name}/model.pyth" == options.TEACHER_WEIGHTS
        assert f"{guide.OUT_DIR}/model.pyth" == options.TEACHER_WEIGHTS
        assert options.TEACHER_IMG_SIZE == guide.MODEL.IMG_SIZE == 32
        assert cfg.CNN == guide.CNN and cfg.RESNET == guide.RESNET
        assert (kind == "ours_offline") == options.OFFLINE
        if options.OFFLINE:
            assert bank_folder(options.FEATURE_FILE) == Path(f"temp/{guide_name}")
        else:
            assert options.FEATURE_FILE is None


@pytest.mark.parametrize("name", [name for name in GRID if not name.endswith("_base.yaml")])
def test_a_guided_config_changes_only_the_guidance(name: str) -> None:
    plain = load(name.replace("_ours_offline", "_base").replace("_ours", "_base"))
    values, others = dict(flatten(load(name))), dict(flatten(plain))
    changed = {key for key in values if values[key] != others[key]}
    assert all(key.startswith("DISTILLATION.") or key == "OUT_DIR" for key in changed)
    # The tapped blocks: the first one and two later ones.
    taps = values["DISTILLATION.INTER_STUDENT_INDEX"]
    assert taps[0] == 0 < taps[1] < taps[2] < GOLDEN[name][1]
    # They are published for CIFAR-100 and the same for the other data sets.
    folder, _, stem = name.partition("/")
    published = load(f"{folder}/{stem.partition('_')[0]}_c100_ours.yaml").DISTILLATION
    assert taps == published.INTER_STUDENT_INDEX


@pytest.mark.parametrize("name", LEAVES)
def test_a_config_starts_with_its_purpose_and_its_commands(name: str) -> None:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header and len(header) >= 2
    commands = [line.lstrip("# ") for line in header if line.startswith("#   python ")]
    assert commands[-1] == f"python run_net.py --mode train --cfg configs/{name}"
    if name.endswith("_offline.yaml"):
        guide = Path(load(name).DISTILLATION.TEACHER_WEIGHTS).parent.name
        config = next(leaf for leaf in LEAVES if Path(leaf).stem == guide)
        size = load(name).MODEL.IMG_SIZE
        command = (
            f"python precompute_feature.py --cfg configs/{config} "
            f"--ckpt work_dirs/{guide}/model.pyth" + f" --image-size {size}" * (size != 224)
        )
        if name.startswith("digits/"):  # small enough to store all views
            command = f"python precompute_feature.py --cfg configs/{name} --shifts 5"
        assert commands[0] == command
    assert max(map(len, lines)) <= 130


COSTED = [*GRID, "resnet/r-18_c100.yaml", *(f"resnet/r-56_{data}.yaml" for data in DATA)]


@pytest.mark.parametrize("name", COSTED)
def test_a_config_states_its_cost(name: str) -> None:
    model, data, *kind = Path(name).stem.split("_")
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    cost = next(line for line in lines if line.startswith("# Cost: "))
    if model == "convit-ti":  # more on CUDA, where its two attentions are applied separately
        cost = cost.replace("; 1.33 on CUDA", "")
    guide = f"; the guide adds {giga_macs('r-56')} GMACs" if kind == ["ours"] else ""
    assert cost == (
        f"# Cost: {giga_macs(model)} GMACs per image (forward), {load(name).OPTIM.MAX_EPOCH} "
        f"epochs of {DATA[data][2]:,} images{guide}."
    )


def test_configs_state_the_published_accuracy() -> None:
    texts = {n: (CONFIGS / n).read_text() for n in GRID if "Published" in (CONFIGS / n).read_text()}
    expected = {
        "deit/deit-ti_c100": (65.08, 78.15),
        "t2t/t2t-7_c100": (69.37, 78.35),
        "pit/pit-ti_c100": (73.58, 78.48),
        "pvt/pvt-ti_c100": (69.22, 77.07),
        "pvtv2/pvtv2-b0_c100": (77.44, 79.30),
        "convit/convit-ti_c100": (75.32, 78.95),
        "deit/deit-ti_flowers": (50.06, 68.50),
        "deit/deit-ti_chaoyang": (82.00, 84.20),
    }
    assert {n.rpartition("_")[0] for n in texts} == set(expected)
    for stem, (base, ours) in expected.items():
        assert f"Published top-1: {base:.2f} %" in texts[f"{stem}_base.yaml"]
        assert f"Published top-1: {ours:.2f} %" in texts[f"{stem}_ours.yaml"]
