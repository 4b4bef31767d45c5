"""Facts about images, and training that skips unreadable ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lg
from lg import builders, trainer
from lg.builders import data as data_builders
from lg.datasets import build_dataset, stratified_subset
from lg.datasets.base import (
    EMPTY_CLASS,
    MISSING,
    UNTRAINED_CLASS,
    ImageDataset,
    fingerprint,
)
from lg.datasets.digits import Digits
from lg.datasets.image import PixelFormat
from lg.datasets.scan import (
    drop_unreadable,
    find_unreadable,
    inspect_image,
    scan,
)
from lg.distributed import World
from lg.errors import DataError
from lg.guidance import FeatureBank
from tests.run_cases import CONFIGS, TINY, dotted, key_values

EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90 degrees


def picture(seed: int, width: int = 12, height: int = 9) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, *, train: int = 6, val: int = 3) -> Path:
    """Create two classes with the given numbers of images per split."""
    for number, split in enumerate(["train"] * train + ["val"] * val):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            picture(2 * number + label).save(folder / f"{number}.png")
    return root


def spoil(root: Path) -> list[str]:
    """Make three training images and a test image unreadable; return their paths."""
    bad = [root / "train/cat/1.png", root / "train/dog/0.png", root / "train/dog/link.png"]
    bad[0].write_bytes(b"")
    bad[1].write_text("no image\n" * 9)
    bad[2].symlink_to("/nowhere/at/all.png")
    tested = min((root / "val/dog").iterdir())
    tested.write_bytes(tested.read_bytes()[:-100])
    return [str(path) for path in (*bad, tested)]


def config(root: Path, out_dir: Path, **changes: Any) -> Any:
    values = {
        **TINY,
        "OUT_DIR": out_dir,
        "MODEL.NUM_CLASSES": 2,
        "TRAIN.DATASET": "image_folder",
        "TEST.DATASET": "image_folder",
        "DATA_LOADER.ROOT": root,
        "TRAIN.FRACTION": 1.0,
        "TRAIN.BATCH_SIZE": 4,
        "OPTIM.MAX_EPOCH": 2,
    } | dotted(changes)
    return lg.load_config(CONFIGS / "digits/vit_digits_base.yaml", key_values(values))


def test_the_mode_of_stored_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path) / "train/cat"
    for mode, name in (("P", "p.png"), ("L", "g.jpg"), ("CMYK", "c.jpg"), ("RGBA", "a.png")):
        picture(0).convert(mode).save(folder / name)
    levels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(levels).save(folder / "deep.tif")
    train = build_dataset("image_folder", tmp_path, "train")
    modes = {Path(train.describe(i)).name: inspect_image(train, i).mode for i in range(len(train))}
    stored = {"p.png": "P", "g.jpg": "L", "c.jpg": "CMYK", "a.png": "RGBA", "deep.tif": "I;16"}
    assert modes == {**dict.fromkeys(modes, "RGB"), **stored}


def test_damage_after_the_first_frame_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    picture(0).save(path, save_all=True, append_images=[picture(1), picture(2)])
    path.write_bytes(path.read_bytes()[:-200])
    assert PixelFormat().open(path).size == (12, 9)


def test_image_facts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path) / "train/cat"
    same = picture(3, 4, 6)
    same.save(folder / "a.png")
    same.save(folder / "b.bmp")
    same.transpose(Image.Transpose.ROTATE_90).save(folder / "c.png", exif=EXIF)
    Image.fromarray(np.asarray(same).reshape(4, 6, 3)).save(folder / "d.png")
    paths = spoil(tmp_path)[:3]
    train = build_dataset("image_folder", tmp_path, "train")
    facts = scan(train, num_threads=3)
    assert facts == [inspect_image(train, position) for position in range(len(train))]
    by_name = {Path(train.describe(i)).name: fact for i, fact in enumerate(facts[:10])}
    a, b, c, d = (by_name[name] for name in ("a.png", "b.bmp", "c.png", "d.png"))
    assert (a.width, a.height, d.width, d.height) == (4, 6, 6, 4)
    assert a.digest == b.digest == c.digest and len(a.digest) == 16
    assert d.digest != a.digest, "the same pixels in another shape"
    assert [fact.fault for fact in facts if fact.fault] == [
        f"{paths[0]}: the image file is empty; download it again",
        f"{paths[1]}: the file is not an image that Pillow can read; remove or convert it",
        f"{paths[2]}: the image cannot be read (No such file or directory); check that the file, "
        "or the target of a link, exists and is readable",
    ]


def test_a_set_in_one_file_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = Digits(split="test")
    facts = scan(digits, num_threads=2)
    assert {(f.fault, f.width, f.height, f.mode) for f in facts} == {("", 8, 8, "")}
    assert len({fact.digest for fact in facts}) == 597
    monkeypatch.setattr(Digits, "image", lambda self, index: pytest.fail("opened"))
    assert find_unreadable(digits, num_threads=1) == {}


def test_dropping_images_keeps_indices_in_the_full_set(tmp_path: Path) -> None:
    paths = spoil(make_folder(tmp_path))
    train = build_dataset("image_folder", tmp_path, "train")
    unreadable = find_unreadable(train, num_threads=2)
    assert {train.describe(i) for i in unreadable} == set(paths[:3]) and len(train) == 13
    left = drop_unreadable(train, unreadable)
    assert left.indices.tolist() == [i for i in range(13) if i not in unreadable]
    assert left.labels.tolist() == train.labels[left.indices].tolist()
    part = stratified_subset(train, 0.7, seed=1)
    bad = find_unreadable(part, num_threads=1)
    again = drop_unreadable(part, bad)
    assert {i for i, fact in enumerate(scan(part, num_threads=1)) if fact.fault} == set(bad)
    assert bad and set(again.indices) == set(part.indices) - set(unreadable)
    assert [i for i in range(len(again)) if again.describe(i) in paths] == []
    assert drop_unreadable(part, {}) is part
    assert pickle.loads(pickle.dumps(again)).indices.tolist() == again.indices.tolist()


def test_skipped_images_are_noted(tmp_path: Path) -> None:
    bad = spoil(make_folder(tmp_path, train=2))
    train = build_dataset("image_folder", tmp_path, "train")
    unreadable = find_unreadable(train, num_threads=1)
    expected = (
        "skipped 3 of the 5 images of image_folder/train, which cannot be read "
        f"(DATA_LOADER.ON_ERROR skip). The first: {bad[0]}: the image file is empty; download "
        "it again"
    )
    assert drop_unreadable(train, unreadable).notes == [expected]
    (tmp_path / "train/cat/0.png").write_bytes(b"")
    (tmp_path / "train/dog/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^none of the 5 images of image_folder/train can be read"):
        drop_unreadable(train, find_unreadable(train, num_threads=1))


def test_faults_are_tolerated_by_kind(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "val/wolf").mkdir()
    picture(0).save(tmp_path / "val/wolf/a.png")
    with pytest.raises(DataError, match=r"train/empty contains no images"):
        build_dataset("image_folder", tmp_path, "train")
    train = build_dataset("image_folder", tmp_path, "train", tolerate=[EMPTY_CLASS])
    assert (train.num_classes, len(train)) == (3, 12)
    assert [fault.kind for fault in train.faults] == [EMPTY_CLASS]
    with pytest.raises(DataError, match="has the class 'wolf', which"):
        build_dataset("image_folder", tmp_path, "val", tolerate=[EMPTY_CLASS, MISSING])
    val = build_dataset("image_folder", tmp_path, "val", tolerate=[UNTRAINED_CLASS])
    assert val.labels.tolist() == [0] * 3 + [1] * 3
    assert [fault.kind for fault in val.faults] == [UNTRAINED_CLASS]
    assert stratified_subset(val, 0.5, seed=0).faults == val.faults


def test_a_split_without_images_is_always_rejected(tmp_path: Path) -> None:
    (tmp_path / "train/cat").mkdir(parents=True)
    for tolerate in ([], [EMPTY_CLASS]):
        with pytest.raises(DataError, match="train/cat contains no images"):
            build_dataset("image_folder", tmp_path, "train", tolerate=tolerate)


def test_the_fingerprint_includes_unreadable_images(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "train/cat/0.png"
    train = build_dataset("image_folder", tmp_path, "train")
    whole, content = fingerprint(train), path.read_bytes()
    path.write_bytes(content[:-60])
    assert fingerprint(train) != whole
    path.write_bytes(content)
    assert fingerprint(train) == whole


@pytest.mark.parametrize("backend", ["workers", "device"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_stops_at_the_first_bad_image(
    tmp_path: Path, backend: str, num_workers: int
) -> None:
    path = make_folder(tmp_path / "set") / "train/dog/3.png"
    path.write_bytes(path.read_bytes()[:-80])
    changes = {"DATA_LOADER__BACKEND": backend, "DATA_LOADER__NUM_WORKERS": num_workers}
    with pytest.raises(DataError) as caught:
        trainer.train(config(tmp_path / "set", tmp_path / "run", **changes))
    assert str(caught.value).startswith(f"{path}: the image is damaged") and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize("backend", ["workers", "device"])
def test_training_skips_and_reports_unreadable_images(
    tmp_path: Path, backend: str, capsys: pytest.CaptureFixture
) -> None:
    paths = spoil(make_folder(tmp_path / "set"))
    changes = {"DATA_LOADER__ON_ERROR": "skip", "DATA_LOADER__BACKEND": backend}
    cfg = config(tmp_path / "set", tmp_path / "run", **changes)
    trainer.train(cfg)
    output = capsys.readouterr()
    warned = [line for line in output.err.splitlines() if line.startswith("Warning: skipped")]
    assert [line.partition(", which")[0] for line in warned] == [
        "Warning: skipped 3 of the 13 images of image_folder/train",
        "Warning: skipped 1 of the 6 images of image_folder/val",
    ]
    assert paths[0] in warned[0] and paths[3] in warned[1]
    assert "Top-1 of 5 images" in output.out
    assert trainer.test(cfg).count == 5


def test_batches_are_the_same_after_a_resume_with_skipped_images(tmp_path: Path) -> None:
    spoil(make_folder(tmp_path / "set"))
    cfg = config(tmp_path / "set", tmp_path / "run", DATA_LOADER__ON_ERROR="skip")
    seen = []
    for first in (0, 1):
        data = builders.fetch_data(cfg, World())
        device = builders.build_device(cfg, World())
        loader = builders.build_train_loader(cfg, data[0], World(), device)
        loader.start(0, first)
        seen.append([next(loader) for _ in range(4 - first)])
        loader.close()
    for mine, theirs in zip(seen[0][1:], seen[1], strict=True):
        assert mine.index.equal(theirs.index) and mine.images.equal(theirs.images)
    assert {int(i) for batch in seen[0] for i in batch.index} <= set(data[0].indices.tolist())


def test_missing_files_can_be_skipped(tmp_path: Path) -> None:
    folder, entries = tmp_path / "chaoyang", []
    for number in range(4):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"train/{number}.png")
        entries.append(f'{{"name": "train/{number}.png", "label": {number}}}')
    (folder / "train.json").write_text(f"[{','.join(entries)}]")
    os.unlink(folder / "train/2.png")
    options = {"TRAIN__DATASET": "chaoyang", "MODEL__NUM_CLASSES": 4, "TRAIN__BATCH_SIZE": 3}
    with pytest.raises(DataError, match=r"1 of its 4 images are missing"):
        builders.build_train_data(config(tmp_path, tmp_path, **options))
    cfg = config(tmp_path, tmp_path, DATA_LOADER__ON_ERROR="skip", **options)
    assert builders.build_train_data(cfg).indices.tolist() == [0, 1, 3]
    listed = build_dataset("chaoyang", tmp_path, "train", tolerate=[MISSING])
    assert len(listed) == 4 and [fault.kind for fault in listed.faults] == [MISSING]


def test_stored_features_match_a_set_with_skipped_images(tmp_path: Path) -> None:
    import precompute_feature

    spoil(make_folder(tmp_path / "set"))
    weights, bank = tmp_path / "guide.pyth", tmp_path / "bank"
    options = {"DATA_LOADER__ON_ERROR": "skip", "DISTILLATION__ENABLE_INTER": True}
    options |= {"CNN__DEPTH": 8, "DISTILLATION__INTER_TEACHER_INDEX": [0, 2]}
    options |= {"DISTILLATION__INTER_STUDENT_INDEX": [0, 1]}
    options |= {"DISTILLATION__TEACHER_WEIGHTS": weights, "TRAIN__MIXUP_ALPHA": 0.0}
    options |= {"TRAIN__CUTMIX_ALPHA": 0.0, "DISTILLATION__TEACHER_IMG_SIZE": 16}
    options |= {"DISTILLATION__OFFLINE": True, "DISTILLATION__FEATURE_FILE": bank}
    cfg = config(tmp_path / "set", tmp_path / "run", **options)
    model = builders.build_teacher(cfg, trained=False)
    torch.save(lg.published_state_dict(model), weights)
    precompute_feature.run(precompute_feature.parse_args(["--cfg", "x.yaml"]), cfg)
    stored = FeatureBank(bank, [0, 2])
    assert stored.provenance is not None and (stored.provenance.count, len(stored)) == (13, 10)
    assert stored.indices.tolist() == builders.build_train_data(cfg).indices.tolist()
    trainer.train(cfg)
    assert (tmp_path / "run/model.pyth").is_file()
    assert "Warning: skipped 3 of the 13 images of" in (tmp_path / "run/log.txt").read_text()


def test_only_the_main_process_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)

    def arrive(values: list, **_: Any) -> None:
        assert values == [None]
        values[0] = {4: "damaged"}

    def scanned(dataset: ImageDataset, **_: Any) -> None:
        pytest.fail("another process scanned the images")

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        get_rank=lambda: 1,
        broadcast_object_list=arrive,
    )
    monkeypatch.setattr("lg.distributed.world.dist", fake)
    monkeypatch.setattr(data_builders, "find_unreadable", scanned)
    cfg = config(tmp_path, tmp_path, DATA_LOADER__ON_ERROR="skip")
    assert builders.build_train_data(cfg).indices.tolist() == [0, 1, 2, 3, *range(5, 12)]
