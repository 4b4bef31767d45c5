"""`--mode keys` and hints for keys, values and files that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import lg
from lg.config.defaults import DEFAULT_VALUES
from lg.errors import ConfigError
from lg.tools.keys import describe_keys, print_keys

CONFIG = Path(__file__).parents[2] / "configs/digits/vit_digits_base.yaml"


def test_every_key_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    keys = describe_keys()
    assert {key: value for key, (value, _) in keys.items()} == DEFAULT_VALUES
    bare = [key for key, (_, meaning) in keys.items() if not meaning]
    # Keys that share a line or a comment with others.
    assert {key.partition(".")[0] for key in bare} == {"T2T", "CVT", "TRAIN", "LAUNCH"}
    assert len(bare) < 16
    assert keys["MODEL.IMG_SIZE"] == (224, "side of the square input image, pixels")
    assert keys["RNG_SEED"] == (1, ">= 0")
    print_keys(pattern="img_size")
    printed = capsys.readouterr().out
    assert "MODEL.IMG_SIZE  (default 224)\n    side of the square input image, pixels" in printed
    assert "TEACHER_IMG_SIZE" in printed and "RNG_SEED" not in printed
    with pytest.raises(ConfigError, match="No key matches 'zebra'"):
        print_keys(pattern="zebra")


@pytest.mark.parametrize(
    ("opts", "hint"),
    [
        (["OPTIM.LR", "1"], "Did you mean OPTIM.BASE_LR?"),
        (["TRAIN.EPOCHS", "1"], "Did you mean OPTIM.MAX_EPOCH?"),
        (["DEVICE", "gpu"], "Did you mean cuda?"),
        (["MODEL.TYPE", "deit_tiny_patch16_224"], "Did you mean timm/deit_tiny_patch16_224?"),
        (["TRAIN.BATCH_SIZE=64"], "write TRAIN.BATCH_SIZE 64 instead of TRAIN.BATCH_SIZE=64"),
        (["DESC", "a", "RNG_SEED=3", "x"], "write RNG_SEED 3 instead of RNG_SEED=3"),
    ],
)
def test_common_mistakes_get_the_right_hint(opts: list[str], hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        lg.load_config(CONFIG, opts)
    assert hint in str(error.value)


def test_a_mistyped_file_names_similar_ones() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*digits/vit_digits_base\.yaml"):
        lg.load_config(CONFIG.with_name("vit_digit_base.yaml"))
