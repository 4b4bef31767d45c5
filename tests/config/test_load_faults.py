"""Errors in configs: unknown keys, wrong types and invalid YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lg
from tests.config.config_cases import Write, fault, leaf

# --- Unknown keys, types, ranges ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("TRAIN: {BATCH_SIZ: 3}", "TRAIN.BATCH_SIZ", "TRAIN.BATCH_SIZE"),
        ("BATCH_SIZE: 3", "BATCH_SIZE", "TEST.BATCH_SIZE, TRAIN.BATCH_SIZE"),
        ("TRIAN: {SPLIT: a}", "TRIAN", "TRAIN"),
        ("OPTIM: {LEARNING_POLICY: cos}", "OPTIM.LEARNING_POLICY", "OPTIM.LR_POLICY"),
        ("optim: {base_lr: 3}", "optim", "OPTIM"),
        ("log_period: 3", "log_period", "LOG_PERIOD"),
        ("TRAIN: {1: 3}", "TRAIN.1", ""),
        ("2001-01-01: 3", "2001-01-01", ""),
        ("null: 3", "None", ""),
        ('"a\\nb": 3', r"a\nb", ""),
    ],
)
def test_an_unknown_key_names_file_key_and_nearest(
    write: Write, text: str, key: str, near: str
) -> None:
    message = fault(write(text))
    assert message.startswith(f"Unknown config key '{key}' in ") and "run.yaml" in message
    assert near in message and (not near or "Nearest known keys: " in message)


def test_an_unknown_key_in_a_base_names_the_base(write: Write) -> None:
    write("LOG_PERIODE: 3", "base.yaml")
    text = fault(write("_BASE_: base.yaml"))
    assert "LOG_PERIODE" in text and "base.yaml. Nearest known keys: LOG_PERIOD, " in text
    text = fault(write(), "train.batch_size", "5")
    assert text.startswith("Unknown config key 'train.batch_size' on the command line.")
    assert "TRAIN.BATCH_SIZE" in text


WRONG = [
    ("LOG_PERIOD: true", "LOG_PERIOD is True (bool)", "a whole number"),
    ("LOG_PERIOD: 3.0", "LOG_PERIOD is 3.0 (float)", "a whole number"),
    ("LOG_PERIOD: null", "LOG_PERIOD is None (NoneType)", "a whole number"),
    ("LOG_PERIOD: [3]", "LOG_PERIOD is [3] (list)", "a whole number"),
    ("LOG_PERIOD: {a: b}", "LOG_PERIOD is {'a': 'b'} (dict)", "a whole number"),
    ("OPTIM: {BASE_LR: big}", "OPTIM.BASE_LR is 'big' (str)", "a number"),
    ("OPTIM: {BASE_LR: true}", "OPTIM.BASE_LR is True (bool)", "a number"),
    ("VERBOSE: 1", "VERBOSE is 1 (int)", "True or False"),
    ("DESC: 5", "DESC is 5 (int)", "text"),
    ("DESC: 2001-01-01", "DESC is datetime.date(2001, 1, 1) (date)", "text"),
    ("OUT_DIR: 5", "OUT_DIR is 5 (int)", "null or text"),
    ("MODEL: {TYPE: [a]}", "MODEL.TYPE is ['a'] (list)", "text"),
    ("OPTIM: {STEPS: 3}", "OPTIM.STEPS is 3 (int)", "a list of whole numbers"),
    ("OPTIM: {STEPS: [1.0]}", "OPTIM.STEPS is [1.0] (list)", "a list of whole numbers"),
    ("PORT_RANGE: [[1, 2], [3]]", "PORT_RANGE is [[1, 2], [3]] (list)", "a list of whole numbers"),
    ("CVT: {WITH_CLS_TOKEN: [1]}", "CVT.WITH_CLS_TOKEN is [1] (list)", "a list of True or False"),
    (
        "TRANSFORMER: {DEPTH: a}",
        "DEPTH is 'a' (str)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {DEPTH: 1.5}",
        "DEPTH is 1.5 (float)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {DEPTH: [a]}",
        "DEPTH is ['a'] (list)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {DEPTH: [[1]]}",
        "DEPTH is [[1]] (list)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {DEPTH: [null]}",
        "DEPTH is [None] (list)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {DEPTH: [true]}",
        "DEPTH is [True] (list)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {DEPTH: []}",
        "DEPTH is [] (list)",
        "null or a whole number or a list of whole numbers",
    ),
    (
        "TRANSFORMER: {MLP_RATIO: [x]}",
        "RATIO is ['x'] (list)",
        "null or a number or a list of numbers",
    ),
    ("TRAIN: 3", "TRAIN is 3, set in ", ""),
    ("TRAIN:", "TRAIN is None, set in ", ""),
    ("TRAIN: [SPLIT]", "TRAIN is ['SPLIT'], set in ", ""),
]


@pytest.mark.parametrize(("text", "expected", "wanted"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_type_is_an_error(write: Write, text: str, expected: str, wanted: str) -> None:
    message = fault(write(text))
    assert expected in message and "run.yaml" in message
    assert f"it takes {wanted}." in message if wanted else "it is a section" in message


# --- YAML --------------------------------------------------------------------------------------


def test_a_key_given_twice_is_an_error(write: Write) -> None:
    text = fault(write("LOG_PERIOD: 1\nTRAIN:\n  SPLIT: train\n  SPLIT: train\n"))
    assert "the key 'SPLIT' is given twice" in text and 'run.yaml", line 4, column 3' in text
    text = fault(write("TRAIN: {}\nDESC: a\nTRAIN: {}"))
    assert "the key 'TRAIN' is given twice" in text and "line 3, column 1" in text
    assert "nest its sections" in fault(write("TRAIN.BATCH_SIZE: 3\nTRAIN: {BATCH_SIZE: 4}"))


def test_anchors_and_merge_keys_work(write: Write) -> None:
    cfg = lg.load_config(write("TRAIN: &a {BATCH_SIZE: 64}\nTEST: {<<: *a, PERIOD: 2}"))
    assert (cfg.TRAIN.BATCH_SIZE, cfg.TEST.BATCH_SIZE, cfg.TEST.PERIOD) == (64, 64, 2)
    cfg = lg.load_config(write("TRAIN: &a {BATCH_SIZE: 64}\nTEST: {<<: *a, BATCH_SIZE: 32}"))
    assert (cfg.TRAIN.BATCH_SIZE, cfg.TEST.BATCH_SIZE) == (64, 32)


PAYLOADS = [
    "!!python/object/apply:os.system ['touch {0}']",
    "DESC: !!python/object/apply:os.system ['touch {0}']",
    "DESC: !!python/object/new:os.system ['touch {0}']",
    "_BASE_: !!python/object/apply:os.system ['touch {0}']",
    "DESC: !!python/name:os.system",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_python_in_yaml_is_rejected_and_not_run(write: Write, tmp_path: Path, payload: str) -> None:
    mark = tmp_path / "ran"
    assert "is not plain YAML" in fault(write(payload.format(mark)))
    override = payload.partition(": ")[2].format(mark)
    fault(write(), "LOG_PERIOD", override or payload.format(mark))
    fault(write(), "LOG_PERIOD", f"__import__('os').system('touch {mark}')")
    assert not mark.exists()


def test_only_yaml_files_are_read(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\ncfg = {{}}\n"
    for name in ("config.py", "config", "config.json", "config.yaml.py"):
        assert "use a YAML file ending in .yaml or .yml" in fault(write(code, name))
        assert f"{name} (named by _BASE_ in " in fault(write(f"_BASE_: {name}"))
    assert not mark.exists()
    assert "Is a directory" in fault(write("", "folder.yaml/x.yaml").parent)
    assert "No such file" in fault(tmp_path / "none.yaml")
    fault("")
    fault("a" * 300 + ".yaml")


INVALID = {
    "a list": "- a",
    "a word": "hello",
    "two documents": "DESC: a\n---\nDESC: b",
    "a tab": "TRAIN:\n\tBATCH_SIZE: 3",
    "an open bracket": "OPTIM: {STEPS: [1, 2}",
    "a control character": 'DESC: "\x01"',
    "a zero byte": b"DESC: \x00",
    "UTF-16": "DESC: a".encode("utf-16"),
    "Latin-1": "DESC: é".encode("latin-1"),
    "a list as a key": "[1, 2]: 3",
    "a month 13": "DESC: 2001-13-01",
    "an unknown tag": "DESC: !foo bar",
    "a tag that does not fit": "LOG_PERIOD: !!int abc",
    "an unknown alias": "TRAIN: *none",
    "a section inside itself": "TRAIN: &a {BATCH_SIZE: *a}",
    "a list inside itself": "PORT_RANGE: &a [*a, *a]",
    "a merge given twice": "TRAIN: &a {SPLIT: train}\nTEST: {<<: *a, <<: *a}",
    "too deep lists": "DESC: " + "[" * 600 + "]" * 600,
    "a long unknown key": "a" * 900 + ": 3",
    "infinity": "OPTIM: {WEIGHT_DECAY: .inf}",
    "a float that overflows": "OPTIM: {WEIGHT_DECAY: 1e999}",
    "not a number": "TRAIN: {MIXUP_ALPHA: .nan}",
}


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID)
def test_invalid_yaml_is_a_config_error(write: Write, text: str | bytes) -> None:
    fault(write(text))


def test_an_alias_bomb_is_rejected_quickly(write: Write) -> None:
    lines = ["A0: &a0 [x]"]
    lines += [f"A{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path = write("TRAIN: {SPLIT: {" + ", ".join(lines) + "}}")
    assert fault(path).startswith("TRAIN.SPLIT is {'A0': ['x'], 'A1': [")


VALID = {
    "an empty file": ("", "LOG_PERIOD", 10),
    "a comment": ("# nothing\n", "LOG_PERIOD", 10),
    "an empty document": ("---\n...\n", "LOG_PERIOD", 10),
    "a byte-order mark": ("\ufeffLOG_PERIOD: 3", "LOG_PERIOD", 3),
    "Windows line ends": ("LOG_PERIOD: 3\r\nDESC: a\r\n", "DESC", "a"),
    "unicode": ("DESC: héé漢😀", "DESC", "héé漢😀"),
    "an empty section": ("TRAIN: {}", "TRAIN.SPLIT", "train"),
    "yes": ("TRAIN: {MIXED_PRECISION: yes}", "TRAIN.MIXED_PRECISION", True),
    "a number in quotes": ('LOG_PERIOD: "3"', "LOG_PERIOD", 3),
    "a list in quotes": ('PORT_RANGE: "[1, 2]"', "PORT_RANGE", [1, 2]),
    "underscores": ("LOG_PERIOD: 1_000", "LOG_PERIOD", 1000),
    "a long text": ("DESC: " + "a" * 100_000, "DESC", "a" * 100_000),
}


@pytest.mark.parametrize(("text", "key", "value"), VALID.values(), ids=VALID)
def test_unusual_but_valid_yaml_loads(write: Write, text: str, key: str, value: Any) -> None:
    assert leaf(lg.load_config(write(text)), key) == value


INVALID_VALUES = [
    *("{a: b}", "{[]: 1}", "*a", "a: b: c", "[1", "!!int abc", "2001-99-99", "...", "---", "é"),
    *("\0", "%", "1j", "{1}", "b'a'", '"a', "lambda: 0", "1e400", "nan", "", "null", "[" * 600),
]


@pytest.mark.parametrize("text", INVALID_VALUES, ids=lambda text: ascii(text)[:20])
def test_an_invalid_override_is_a_config_error(write: Write, text: str) -> None:
    for key in ("LOG_PERIOD", "OPTIM.STEPS", "VERBOSE", "TRANSFORMER.DEPTH"):
        if key != "TRANSFORMER.DEPTH" or text not in ("", "null", "---"):  # these mean null
            assert fault(write(), key, text).startswith(f"{key} is ")


@pytest.mark.parametrize("key", ["", ".", "TRAIN.", ".TRAIN", "TRAIN.SPLIT.X", "_BASE_", 5, None])
def test_an_invalid_key_on_the_command_line_is_a_config_error(write: Write, key: Any) -> None:
    assert fault(write(), key, "3").startswith("Unknown config key ")
