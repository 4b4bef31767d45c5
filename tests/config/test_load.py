"""Loading: the published keys and configs, `_BASE_` and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import lg
from lg.config import changed_keys, dump_config, flatten
from lg.config.defaults import DEFAULTS, PATHS
from tests.config.config_cases import (
    PUBLISHED_CONFIGS,
    PUBLISHED_DEFAULTS,
    Write,
    fault,
    leaf,
    nested,
)

# --- Published configs -------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key, _ in flatten(PUBLISHED_DEFAULTS)])
def test_every_published_key_keeps_its_default(write: Write, key: str) -> None:
    wanted = leaf(PUBLISHED_DEFAULTS, key)
    value = leaf(DEFAULTS, key)
    assert value == wanted and type(value) is type(wanted)
    if key != "OUT_DIR":  # its default depends on the file name
        assert leaf(lg.load_config(write()), key) == wanted


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_every_published_config_loads_to_its_values(write: Write, name: str) -> None:
    config = PUBLISHED_CONFIGS[name]
    cfg = lg.load_config(write(yaml.safe_dump(config), name))
    wanted = dict(flatten(PUBLISHED_DEFAULTS)) | dict(flatten(config))
    wanted.setdefault("OUT_DIR", None)
    wanted["OUT_DIR"] = wanted["OUT_DIR"] or f"work_dirs/{Path(name).stem}"
    loaded = dict(flatten(cfg))
    assert {key: loaded[key] for key in wanted} == wanted
    own = {k: v for k, v in loaded.items() if k not in wanted}
    assert own == {k: v for k, v in flatten(DEFAULTS) if k in own}


def test_the_configs_here_resolve_to_the_19_published_ones() -> None:
    assert len(PUBLISHED_CONFIGS) == 19
    root = Path(__file__).parents[2]
    for name, config in PUBLISHED_CONFIGS.items():
        loaded = dict(flatten(lg.load_config(root / name)))
        wanted = dict(flatten(DEFAULTS)) | dict(flatten(config))
        wanted["OUT_DIR"] = f"work_dirs/{Path(name).stem}"
        assert loaded == wanted, name


# --- The loaded config -------------------------------------------------------------------------


def test_the_config_is_frozen_and_independent_of_the_defaults(write: Write) -> None:
    cfg = lg.load_config(write())
    with pytest.raises(AttributeError):
        cfg.LOG_PERIOD = 3
    with pytest.raises(AttributeError):
        cfg.TRAIN.BATCH_SIZE = 3
    cfg.PORT_RANGE.append(3)
    assert lg.load_config(write()).PORT_RANGE == [10000, 65000]


def test_out_dir_is_named_after_the_config(write: Write) -> None:
    assert lg.load_config(write(name="a.b_ours.yaml")).OUT_DIR == "work_dirs/a.b_ours"
    assert lg.load_config(write("OUT_DIR: null", "c.yml")).OUT_DIR == "work_dirs/c"
    assert lg.load_config(write("OUT_DIR: ''", "d.yaml")).OUT_DIR == "work_dirs/d"
    assert lg.load_config(write("OUT_DIR: x/y")).OUT_DIR == "x/y"
    assert lg.load_config(write("OUT_DIR: x/y"), ["OUT_DIR", "z"]).OUT_DIR == "z"


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_the_dumped_config_reads_back_to_the_same_values(write: Write, name: str) -> None:
    path = write(yaml.safe_dump(PUBLISHED_CONFIGS[name]))
    cfg = lg.load_config(path, ["OPTIM.MIN_LR", "1e-7", "DESC", "é\u2028 'a': # \"b\"\n"])
    again = lg.load_config(write(dump_config(cfg), "config.yaml"))
    assert dict(flatten(again)) == dict(flatten(cfg))
    assert [type(v) for _, v in flatten(again)] == [type(v) for _, v in flatten(cfg)]
    assert changed_keys(dump_config(cfg), dump_config(again)) == ([], [])


def test_changed_keys_lists_the_differences() -> None:
    old, new = "A: {B: 1, C: 2}\nD: x\n", "A: {B: 1, C: 3}\nE: 5\n"
    assert changed_keys(old, new) == (["E: None -> 5", "D: x -> None"], ["A.C: 2 -> 3"])
    assert changed_keys("NUM_GPUS: 1", "NUM_GPUS: 2") == (["NUM_GPUS: 1 -> 2"], [])
    assert changed_keys("LOG_PERIOD: 1", "LOG_PERIOD: 2") == ([], [])  # affects no result
    assert changed_keys("- no config", new) == (["the old config cannot be read"], [])


# --- _BASE_ ------------------------------------------------------------------------------------


def test_later_bases_override_earlier_ones_and_the_file_overrides_all(write: Write) -> None:
    write("{LOG_PERIOD: 1, NUM_GPUS: 2, DESC: a, RNG_SEED: 7}", "bases/a.yaml")
    write("{LOG_PERIOD: 2, NUM_GPUS: 4, TRAIN: {BATCH_SIZE: 64}}", "bases/b.yaml")
    path = write("_BASE_: [bases/a.yaml, bases/b.yaml]\nLOG_PERIOD: 3", "run.yaml")
    cfg = lg.load_config(path, ["DESC", "line"])
    assert (cfg.LOG_PERIOD, cfg.NUM_GPUS, cfg.RNG_SEED, cfg.DESC) == (3, 4, 7, "line")
    assert cfg.TRAIN.BATCH_SIZE == 64


def test_bases_nest_each_relative_to_its_own_file(write: Write, tmp_path: Path) -> None:
    write("{LOG_PERIOD: 1, DESC: root, RNG_SEED: 5}", "root.yaml")
    write("_BASE_: ../root.yaml\nDESC: middle\nTEST: {PERIOD: 4}", "middle/m.yaml")
    path = write("_BASE_: ../middle/m.yaml\nTEST: {BATCH_SIZE: 9}", "leaf/l.yaml")
    cfg = lg.load_config(path)
    assert (cfg.LOG_PERIOD, cfg.DESC, cfg.RNG_SEED) == (1, "middle", 5)
    assert (cfg.TEST.PERIOD, cfg.TEST.BATCH_SIZE) == (4, 9)
    assert lg.load_config(write(f"_BASE_: {tmp_path}/root.yaml")).DESC == "root"


def test_a_base_in_the_home_folder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write("DESC: home", "home/b.yaml").parent
    monkeypatch.setenv("HOME", str(home))
    assert lg.load_config(write("_BASE_: ~/b.yaml")).DESC == "home"
    assert lg.load_config("~/b.yaml").DESC == "home"


def test_a_base_reached_twice_is_not_circular(write: Write) -> None:
    write("DESC: d", "d.yaml")
    write("_BASE_: d.yaml\nDESC: left", "left.yaml")
    write("_BASE_: d.yaml\nRNG_SEED: 3", "right.yaml")
    cfg = lg.load_config(write("_BASE_: [left.yaml, right.yaml]"))
    # The right one is later, with everything that it inherits.
    assert (cfg.DESC, cfg.RNG_SEED) == ("d", 3)


def test_circular_bases_name_the_files(write: Write) -> None:
    write("_BASE_: sub/two.yaml", "one.yaml")
    write("_BASE_: [../three.yaml]", "sub/two.yaml")
    write("_BASE_: ./sub/../one.yaml", "three.yaml")
    text = fault(write("_BASE_: one.yaml"))
    positions = [text.index(f"{n}.yaml") for n in ("one", "two", "three")]
    assert positions == sorted(positions)
    assert text.count("one.yaml") == 2 and "run.yaml" not in text and "circular" in text
    assert "self.yaml" in fault(write("_BASE_: self.yaml", "self.yaml"))


def test_a_missing_base_names_the_file_that_refers_to_it(write: Write) -> None:
    write("_BASE_: none.yaml", "middle.yaml")
    text = fault(write("_BASE_: middle.yaml"))
    assert "none.yaml (named by _BASE_ in " in text and "middle.yaml)" in text
    assert "No such file" in text and "run.yaml" not in text


@pytest.mark.parametrize("base", ["null", "5", "{a: b}", "[1]", "[[a.yaml]]", "[null]"])
def test_base_takes_a_path_or_a_list_of_paths(write: Write, base: str) -> None:
    text = fault(write(f"_BASE_: {base}"))
    assert text.startswith("_BASE_ is ") and "run.yaml; it takes a path or a list of paths" in text


def test_an_empty_list_of_bases_is_allowed(write: Write) -> None:
    assert lg.load_config(write("_BASE_: []\nDESC: a")).DESC == "a"


# --- Overrides ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("OPTIM.BASE_LR", "5e-4", 0.0005),
        ("OPTIM.BASE_LR", "1", 1.0),
        ("LOG_PERIOD", "20", 20),
        ("VERBOSE", "False", False),
        ("VERBOSE", "off", False),
        ("DISTILLATION.TEACHER_WEIGHTS", "a/b.pyth", "a/b.pyth"),
        ("DISTILLATION.TEACHER_WEIGHTS", "null", None),
        ("DISTILLATION.TEACHER_WEIGHTS", "None", None),
        ("DISTILLATION.TEACHER_WEIGHTS", "", None),
        ("DISTILLATION.TEACHER_WEIGHTS", "0123", "0123"),
        ("TRAIN.WEIGHTS", "", ""),
        ("TRAIN.WEIGHTS", "2024", "2024"),
        ("OUT_DIR", "1e3", "1e3"),
        ("DESC", "'quoted'", "quoted"),
        ("DESC", "[a, b]: #c", "[a, b]: #c"),
        ("DESC", "true", "true"),
        ("PVT.SR_RATIO", "[4,2,1,1]", [4, 2, 1, 1]),
        ("PVT.SR_RATIO", "4,2", [4, 2]),
        ("PVT.SR_RATIO", "(4, 2)", [4, 2]),
        ("MODEL.BLOCKS", "[]", []),
        ("TRANSFORMER.DEPTH", "[1,2]", [1, 2]),
        ("TRANSFORMER.DEPTH", "null", None),
        ("TRANSFORMER.MLP_RATIO", "2.5", 2.5),
        ("LOG_PERIOD", 7, 7),
        ("OUT_DIR", Path("a/b"), "a/b"),
    ],
)
def test_an_override_is_read_in_the_type_of_its_key(
    write: Write, key: str, text: Any, value: Any
) -> None:
    # Switched off explicitly; otherwise keys of guidance would be rejected as without effect.
    off = ["DISTILLATION.ENABLE_INTER", "False"]
    family = ["MODEL.TYPE", "PVT"] if key.startswith("PVT.") else []
    loaded = leaf(lg.load_config(write(), [*off, *family, key, text]), key)
    assert loaded == value and type(loaded) is type(value)


def test_a_float_without_a_point_is_a_number_in_yaml(write: Write) -> None:
    cfg = lg.load_config(write("OPTIM: {BASE_LR: 5e-4, WEIGHT_DECAY: 1}\nVERBOSE: no"))
    assert cfg.OPTIM.BASE_LR == 0.0005
    assert cfg.OPTIM.WEIGHT_DECAY == 1.0 and type(cfg.OPTIM.WEIGHT_DECAY) is float
    assert cfg.VERBOSE is False


def test_the_last_override_wins_and_overrides_are_pairs(write: Write) -> None:
    assert lg.load_config(write(), ["RNG_SEED", "2", "RNG_SEED", "3"]).RNG_SEED == 3
    text = fault(write(), "RNG_SEED", "2", "LOG_PERIOD")
    assert "'LOG_PERIOD', has no value" in text
    assert "TRAIN.DATASET" in fault(write(), "TRAIN", "5")
    text = fault(write(), "LOG_PERIOD", "1.5")
    assert text == "LOG_PERIOD is 1.5 (float), set on the command line; it takes a whole number."


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_is_expanded_in_paths(
    write: Write, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    opts = ["MODEL.TYPE", "timm/test_vit"] if key == "MODEL.PRETRAINED" else []
    if key.startswith("DISTILLATION"):
        opts = ["DISTILLATION.ENABLE_LOGIT", "True"]
    for cfg in (
        lg.load_config(write(), [*opts, key, "~/a/b"]),
        lg.load_config(write(yaml.dump(nested({key: "~/a/b"}))), opts),
    ):
        assert leaf(cfg, key) == "/home/me/a/b"
