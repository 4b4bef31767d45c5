"""Stored features: replay, provenance, rejected banks, and equal bytes after an interruption."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.augment.view import View, plain_views, shifted
from lg.datasets import build_dataset
from lg.datasets.base import fingerprint, stratified_subset
from lg.datasets.loader import Batch, Samples, test_loader
from lg.errors import BankError
from lg.guidance import FeatureBank, FrozenTeacher
from lg.guidance.bank_file import Provenance, bank_path
from lg.guidance.precompute import check_space, precompute
from lg.guidance.replay import from_nearest, replay
from lg.models import resnet

LAYERS = [0, 1, 2]
SHAPES = [[16, 16, 16], [32, 8, 8], [64, 4, 4]]
FACTS: dict[str, Any] = {
    "teacher": "ResNet-8",
    "weights": "a" * 64,
    "dataset": "digits",
    "split": "train",
    "count": 1200,
    "fingerprint": "b" * 64,
    "image_size": 16,
    "teacher_image_size": 16,
}


def make_teacher(size: int = 16) -> FrozenTeacher:
    torch.manual_seed(0)
    return FrozenTeacher(
        resnet(depth=8, img_size=size, num_classes=10), indices=LAYERS, image_size=size
    )


def make_bank(
    path: Path,
    *,
    stop_after: int | None = None,
    dtype: str = "float16",
    views: Any = ((0, 0, 1, 1, 0),),
) -> FrozenTeacher:
    """Store 60 digits in batches of 8; optionally interrupt after some batches."""
    teacher = make_teacher()
    dataset = stratified_subset(build_dataset("digits", "data", "train"), 0.05, 0)
    samples = Samples(dataset, BatchTestTransform(image_size=16))

    def batches(done: int) -> Iterator[Batch]:
        loader = test_loader(samples, batch_size=8, num_workers=0, pin_memory=False, first=done)
        for number, batch in enumerate(loader):
            if number == stop_after:
                raise KeyboardInterrupt
            yield batch

    stored = [list(map(float, view)) for view in views]
    precompute(
        teacher,
        batches,
        folder=path,
        provenance=Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype=dtype, views=stored),
        indices=dataset.indices,
        device=torch.device("cpu"),
    )
    return teacher


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(name="path", scope="module")
def path_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank"
    make_bank(path)
    return path


def digits_batch(rows: list[int], views: list[View]) -> Batch:
    """Return some of the stored digits, whole, after the test transform."""
    dataset = stratified_subset(build_dataset("digits", "data", "train"), 0.05, 0)
    samples = Samples(dataset, BatchTestTransform(image_size=16))
    batch = samples.__getitems__([(0, row) for row in rows])
    return batch._replace(view=torch.stack([v.tensor() for v in views]))


# --- Replay ------------------------------------------------------------------------------------


def test_the_full_view_equals_the_online_maps_to_storage_precision(path: Path) -> None:
    bank, batch = FeatureBank(path, LAYERS), digits_batch([3, 41, 0], [View()] * 3)
    stored, logits = bank(batch.images, batch.index, batch.view)
    online, _ = make_teacher()(batch.images, batch.index, batch.view)
    assert logits is None and bank.feature_dims == [16, 32, 64]
    for mine, theirs in zip(stored, online, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=3e-6)


def test_float32_is_exact_up_to_resampling(tmp_path: Path) -> None:
    teacher = make_bank(tmp_path / "bank", dtype="float32")
    batch = digits_batch([5], [View()])
    stored, _ = FeatureBank(tmp_path / "bank", LAYERS)(batch.images, batch.index, batch.view)
    for mine, theirs in zip(stored, teacher(batch.images)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_flip_mirrors_the_maps() -> None:
    maps = torch.randn(1, 3, 5, 7)
    flipped = replay(maps, View(flip=True).tensor()[None])
    torch.testing.assert_close(flipped, maps.flip(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (0.25, 0.5), (0.125, 0.375)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_resized_like_interpolate(top: float, left: float, flip: bool) -> None:
    maps = torch.randn(2, 3, 8, 8)
    view = View(top, left, 0.5, 0.5, flip)
    y, x = int(top * 8), int(left * 8)
    crop = maps[:, :, y : y + 4, x : x + 4]
    expected = F.interpolate(crop, size=(8, 8), mode="bilinear", align_corners=False)
    mine = replay(maps, torch.stack([view.tensor()] * 2))
    # At the border of the box, replay also reads the neighbours outside, which a crop lacks.
    inner = (mine.flip(3) if flip else mine)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, expected[:, :, 1:-1, 1:-1], rtol=1e-5, atol=1e-5)


def test_a_subpixel_box_shifts_a_ramp() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # the value at x is x
    view = View(top=0.1, left=0.2, height=0.55, width=0.55)
    mine = replay(ramp, view.tensor()[None])[0, 0, 3]
    centres = 0.2 * 8 + 0.55 * (torch.arange(8) + 0.5) - 0.5
    torch.testing.assert_close(mine, centres)


def test_mixed_precision_does_not_round_coordinates() -> None:
    maps = torch.randn(3, 16, 28, 28)
    views = torch.stack(
        [View().tensor(), View(flip=True).tensor(), View(0.1, 0.2, 0.3, 0.4).tensor()]
    )
    single = replay(maps, views)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = replay(maps, views)
    assert torch.equal(mixed, single) and mixed.dtype == torch.float32
    torch.testing.assert_close(mixed[0], maps[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], maps[1].flip(2), rtol=1e-5, atol=1e-5)


def test_each_image_gets_its_own_view_and_maps(path: Path) -> None:
    views = [View(), View(0.25, 0.0, 0.5, 0.5), View(flip=True)]
    bank, batch = FeatureBank(path, [2, 0]), digits_batch([7, 7, 9], views)
    together, _ = bank(batch.images, batch.index, batch.view)
    for row in range(3):
        one, _ = bank(batch.images[row : row + 1], batch.index[[row]], batch.view[[row]])
        for mine, theirs in zip(one, together, strict=True):
            torch.testing.assert_close(mine[0], theirs[row])
    assert [m.shape[1] for m in together] == [64, 16]  # in tap order
    assert not torch.allclose(together[0][0], together[0][1])


def test_mirrored_maps_make_flips_exact(tmp_path: Path) -> None:
    teacher = make_bank(tmp_path / "bank", views=[View(), View(flip=True)])
    whole = digits_batch([3, 8], [View(), View()])
    views = torch.stack([View(flip=True).tensor(), View().tensor()])
    images = torch.stack([whole.images[0].flip(2), whole.images[1]])
    online, _ = teacher(images)
    banks = [FeatureBank(tmp_path / "bank", [2, 0]) for _ in range(2)]
    banks[1].make_resident(torch.device("cpu"))
    for bank in banks:
        stored, _ = bank(images, whole.index, views)
        for mine, theirs in zip(stored, (online[2], online[0]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=3e-6)


def test_every_view_of_the_plain_recipe_is_exact_when_all_are_stored(tmp_path: Path) -> None:
    teacher = make_bank(tmp_path / "bank", views=plain_views(16, shifts=5, mirrored=True))
    bank = FeatureBank(tmp_path / "bank", LAYERS)
    dataset = stratified_subset(build_dataset("digits", "data", "train"), 0.05, 0)
    samples = Samples(dataset, BatchTransform(image_size=16, strong=False))
    images, _, index, views = samples.__getitems__([(0, row) for row in range(40)])
    assert len(views.unique(dim=0)) > 20
    stored, _ = bank(images, index, views)
    for mine, theirs in zip(stored, teacher(images)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=1e-5)


def test_a_view_starts_from_the_nearest_stored_one() -> None:
    stored = torch.stack([v.tensor() for v in plain_views(32, shifts=3, mirrored=True)])
    assert stored[0].tolist() == [0, 0, 1, 1, 0] and len(stored) == 18
    views = [View(-3 / 32, 1 / 32), View(0.1, 0.2, 0.5, 0.6, True), View(0.3, 0.1, 0.4, 0.4)]
    view = torch.stack([v.tensor() for v in views])
    nearest, rest = from_nearest(view, stored)
    assert stored[nearest[0]].tolist() == [-1 / 8, 0, 1, 1, 0]
    torch.testing.assert_close(rest[0], View(1 / 32, 1 / 32).tensor())
    assert (stored[nearest[1:], 4] == view[1:, 4]).all() and (rest[:, 4] == 0).all()
    # Where the border does not matter, both ways give the same maps.
    maps = shifted(torch.zeros(3, 3, 32, 32), View(top=1.0))  # black
    maps[:, :, 10:20, 12:22] = torch.randn(3, 3, 10, 10)
    anchors = [View._make(v) for v in stored[nearest].tolist()]
    shown = torch.cat([shifted(maps[[row]], anchor) for row, anchor in enumerate(anchors)])
    torch.testing.assert_close(replay(shown, rest), replay(maps, view), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shifts", [0, 2, 7, -1])
def test_invalid_shifts_are_rejected(shifts: int) -> None:
    with pytest.raises(ValueError, match=r"an odd number from 1 to 5"):
        plain_views(16, shifts=shifts, mirrored=False)


def test_resident_maps_equal_mapped_ones(path: Path) -> None:
    batch = digits_batch([0, 59], [View(0.1, 0.2, 0.5, 0.6, True), View()])
    banks = [FeatureBank(path, LAYERS) for _ in range(2)]
    banks[1].make_resident(torch.device("cpu"))
    for mine, theirs in zip(*(b(*batch[:1], *batch[2:])[0] for b in banks), strict=True):
        assert torch.equal(mine, theirs)


# --- Computing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [0, 1, 5, 7])
def test_an_interrupted_run_ends_with_the_same_bytes(
    path: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lg.guidance.precompute._SAVE_PERIOD", 0.0)
    bank = tmp_path / "bank"
    with pytest.raises(KeyboardInterrupt):
        make_bank(bank, stop_after=stop_after)
    assert json.loads((bank / "progress.json").read_text())["done"] == 8 * stop_after
    with pytest.raises(BankError, match=r"bank is incomplete: .* command again; it resumes"):
        FeatureBank(bank, LAYERS)
    make_bank(bank)
    assert content(bank) == content(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


@pytest.mark.parametrize("other", ["weights", "images"])
def test_an_interrupted_run_on_other_inputs_is_not_resumed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr("lg.guidance.precompute._SAVE_PERIOD", 0.0)
    bank = tmp_path / "bank"
    with pytest.raises(KeyboardInterrupt):
        make_bank(bank, stop_after=3)
    if other == "weights":
        progress = bank / "progress.json"
        progress.write_text(progress.read_text().replace("a" * 64, "c" * 64))
    else:
        np.save(bank / "indices.npy", np.load(bank / "indices.npy")[::-1])
    np.lib.format.open_memmap(bank / "layer_0.npy", mode="r+")[:24] = 7
    make_bank(bank)
    assert content(bank) == content(path)


def test_a_complete_bank_is_kept_or_replaced(path: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(path, bank)
    make_bank(bank, stop_after=0)  # would be interrupted if there were something to compute
    assert content(bank) == content(path)
    mapped = FeatureBank(bank, LAYERS)
    make_bank(bank, dtype="float32")
    assert np.load(bank / "layer_0.npy").dtype == np.float32
    batch = digits_batch([3], [View()])  # a training that has the old bank open keeps it
    for mine, expected in zip(
        mapped(batch.images, batch.index, batch.view)[0],
        FeatureBank(path, LAYERS)(batch.images, batch.index, batch.view)[0],
        strict=True,
    ):
        assert torch.equal(mine, expected)


def test_the_size_is_reported_and_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16")
    twice = replace(provenance, views=[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    disk = SimpleNamespace(total=10**14, used=0, free=10**11)
    monkeypatch.setattr("lg.guidance.precompute.shutil.disk_usage", lambda path: disk)
    assert ": 2.87 GB" in check_space(tmp_path / "bank", twice, 100_000)
    text = check_space(tmp_path / "bank", provenance, 1_000_000)
    assert text.endswith(": 14.34 GB (100.0 GB free)")  # 7,168 numbers of 2 bytes
    with pytest.raises(BankError, match=r"needs 14336.00 GB, but .* has 100.00 GB left"):
        check_space(tmp_path / "bank", provenance, 10**9)


def test_other_files_are_never_overwritten(path: Path, tmp_path: Path) -> None:
    provenance = Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16")
    shutil.copytree(path, tmp_path / "bank")
    assert check_space(tmp_path / "bank", provenance, 60)
    (tmp_path / "bank" / "thesis.tex").touch()
    with pytest.raises(BankError, match=r"holds other files \(thesis.tex\). Set --out to a new"):
        check_space(tmp_path / "bank", provenance, 60)
    with pytest.raises(BankError, match="is a file; features are stored in a folder"):
        check_space(tmp_path / "bank" / "thesis.tex", provenance, 60)


def test_maps_too_large_for_half_precision_are_rejected(tmp_path: Path) -> None:
    teacher = make_teacher()
    torch.nn.init.constant_(teacher.model.net.bn1.weight, 1e6)
    batch = digits_batch([0], [View()])
    with pytest.raises(BankError, match=r"maps reach .*, which float16 cannot hold"):
        precompute(
            teacher,
            lambda done: [batch],
            folder=tmp_path / "bank",
            provenance=Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16"),
            indices=np.arange(1),
            device=torch.device("cpu"),
        )


# --- Rejected banks ----------------------------------------------------------------------------


@pytest.fixture(name="copy")
def copy_fixture(path: Path, tmp_path: Path) -> Path:
    """A copy of the bank, to damage."""
    shutil.copytree(path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["layer_1.npy", "indices.npy", "provenance.json"])
def test_a_truncated_file_is_rejected(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:20], b""):
        (copy / name).write_bytes(cut)
        with pytest.raises(
            BankError, match=r"copy cannot be read \(.*\)\. Compute .* again"
        ) as error:
            FeatureBank(copy, LAYERS)
        assert "\n" not in str(error.value)


def test_a_missing_bank_is_reported_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"none does not exist. .*precompute_feature.py"):
        FeatureBank(tmp_path / "none", LAYERS)


class Payload:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["layer_1.npy", "indices.npy"])
def test_a_pickle_is_never_loaded(copy: Path, name: str) -> None:
    np.save(copy / name, np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(BankError, match="Python objects in dtype"):
        FeatureBank(copy, LAYERS)
    (copy / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(BankError, match="magic string is not correct"):
        FeatureBank(copy, LAYERS)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("layer_1.npy", Path.unlink, "No such file or directory: .*layer_1.npy"),
        ("layer_1.npy", (60, 1, 3, 8, 8), r"layer_1.npy is float16 of .* \(60, 1, 32, 8, 8\)"),
        ("layer_1.npy", (59, 1, 32, 8, 8), r"layer_1.npy is float16 of shape \(59,"),
        ("layer_1.npy", (60, 32, 8, 8), r"layer_1.npy is float16 of shape \(60, 32, 8, 8\)"),
        ("indices.npy", (60,), r"indices.npy is float16 of shape \(60,\)"),
        ("provenance.json", lambda file: file.write_text("{}"), "other entries than this version"),
        ("provenance.json", lambda file: file.write_bytes(b"\xff"), "codec can't decode"),
    ],
)
def test_an_inconsistent_bank_is_rejected(
    copy: Path, name: str, damage: tuple[int, ...] | Callable[[Path], Any], message: str
) -> None:
    if callable(damage):
        damage(copy / name)
    else:
        np.save(copy / name, np.zeros(damage, "f2"))
    with pytest.raises(BankError, match=rf"cannot be read \(.*{message}"):
        FeatureBank(copy, LAYERS)


def test_indices_of_other_length_are_rejected(copy: Path) -> None:
    np.save(copy / "indices.npy", np.arange(59))
    with pytest.raises(BankError, match=r"expected float16 of shape \(59, 1, 16, 16, 16\)"):
        FeatureBank(copy, LAYERS)


def test_layers_that_are_not_stored_are_rejected(path: Path) -> None:
    with pytest.raises(BankError, match="holds blocks 0, 1, 2 of the guide, not 3, 5"):
        FeatureBank(path, [0, 3, 5])


def test_differences_from_a_training_are_listed(path: Path) -> None:
    bank = FeatureBank(path, LAYERS)
    right = {"indices": bank.indices, "shapes": SHAPES, **FACTS}
    bank.check(**right)
    bank.check(**{**right, "weights": None})  # unknown without the teacher's file
    for change, message in (
        ({"dataset": "cifar100"}, "dataset digits (expected cifar100)"),
        ({"fingerprint": "d" * 64}, "fingerprint bbbbbbbbbbbb... (expected dddddddddddd...)"),
        ({"count": 1300}, "count 1200 (expected 1300)"),
        ({"weights": "e" * 64}, "weights aaaaaaaaaaaa... (expected eeeeeeeeeeee...)"),
        ({"image_size": 224}, "image size 16 (expected 224)"),
        ({"teacher_image_size": 32}, "teacher image size 16 (expected 32)"),
        ({"teacher": "ResNet-56"}, "teacher ResNet-8 (expected ResNet-56)"),
        ({"shapes": [[16, 32, 32], *SHAPES[1:]]}, "shapes [(16, 16, 16), (32, 8, 8),"),
    ):
        with pytest.raises(BankError, match=f"does not match this training: {re.escape(message)}"):
            bank.check(**{**right, **change})
    with pytest.raises(BankError, match=r"it lacks 5[0-9] of the 60 training images"):
        bank.check(**{**right, "indices": np.arange(60)})


# --- Files of the original code ----------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_the_original_code_loads(tmp_path: Path, save: Callable[..., None]) -> None:
    maps = [np.random.default_rng(0).standard_normal((9, c, s, s)) for c, s in ((16, 8), (32, 4))]
    save(tmp_path / "old.npz", first=maps[0].astype("f4"), second=maps[1].astype("f4"))
    bank = FeatureBank(tmp_path / "old.npz", [0, 1])
    assert bank.provenance is None and len(bank) == 9
    images = torch.zeros(2, 3, 16, 16)
    found, _ = bank(images, torch.tensor([4, 8]), torch.stack([View().tensor()] * 2))
    for mine, expected in zip(found, maps, strict=True):
        np.testing.assert_allclose(mine, expected[[4, 8]], rtol=1e-4, atol=1e-5)
    bank.check(indices=np.arange(9), shapes=[(16, 8, 8), (32, 4, 4)], dataset="x", count=9)
    with pytest.raises(BankError, match=r"count 9 \(expected 10\)"):
        bank.check(indices=np.arange(10), shapes=[(16, 8, 8), (32, 4, 4)], count=10)


def test_a_damaged_file_of_the_original_code_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "old.npz"
    maps = np.zeros((9, 16, 8, 8), "f4")
    np.savez(file, first=maps)
    whole = file.read_bytes()
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:100], b""):
        file.write_bytes(cut)
        with pytest.raises(BankError, match=r"old.npz cannot be read \(File is not a zip file\)"):
            FeatureBank(file, [0])
    for arrays, message in (
        ({"first": np.array([Payload()], dtype=object)}, "allow_pickle=False"),
        ({"first": maps, "second": maps[:8]}, "the arrays hold 8, 9 images"),
        ({"first": maps[:, None]}, "expected float arrays with 4 dimensions only"),
        ({}, "expected float arrays"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(BankError, match=rf"old.npz cannot be read \(.*{message}"):
            FeatureBank(file, [0])


def test_a_published_path_means_the_folder_once_there_is_one(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "maps.npz"
    assert bank_path(file) == tmp_path / "maps"
    file.touch()
    assert bank_path(file) == file
    shutil.copytree(path, tmp_path / "maps")
    assert bank_path(file) == tmp_path / "maps" == FeatureBank(file, LAYERS).path


# --- Provenance --------------------------------------------------------------------------------


def test_the_fingerprint_identifies_the_data_set() -> None:
    train, test = (build_dataset("digits", "data", split) for split in ("train", "test"))
    prints = [fingerprint(train), fingerprint(stratified_subset(train, 0.1, 3)), fingerprint(test)]
    assert prints[0] == prints[1] != prints[2]
    train.labels = train.labels[::-1].copy()
    assert fingerprint(train) != prints[0]


def test_provenance_survives_json() -> None:
    provenance = Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16")
    assert Provenance.from_json(provenance.to_json()) == provenance
    other = replace(provenance, versions={"torch": "2"})
    assert other.to_json() != provenance.to_json()


def test_banks_without_a_resize_rule_are_squashed() -> None:
    provenance = Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16")
    values = json.loads(replace(provenance, resize="crop").to_json())
    assert Provenance.from_json(json.dumps(values)).resize == "crop"
    del values["resize"]
    assert Provenance.from_json(json.dumps(values)).resize == "squash"
    for broken in ({**values, "color": 1}, {k: v for k, v in values.items() if k != "teacher"}):
        with pytest.raises(ValueError, match="other entries"):
            Provenance.from_json(json.dumps(broken))
