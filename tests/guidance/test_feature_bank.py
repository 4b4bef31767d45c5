"""Stored guide features: replay, provenance, refusal, and the same bytes after a kill."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lg.augment.recipe import TestTransform
from lg.augment.view import View, padded_crop, plain_views, shifted
from lg.datasets import build_dataset
from lg.datasets.base import fingerprint, stratified_subset
from lg.datasets.loader import Batch, TestSamples, test_loader
from lg.errors import BankError
from lg.guidance import FeatureBank, FrozenTeacher
from lg.guidance.bank_file import Provenance
from lg.guidance.feature_bank import from_nearest, replay
from lg.guidance.precompute import check_space, precompute
from lg.models import resnet

LAYERS = [0, 1, 2]
SHAPES = [[16, 16, 16], [32, 8, 8], [64, 4, 4]]
FACTS: dict[str, Any] = {
    "guide": "ResNet-8",
    "weights": "a" * 64,
    "dataset": "digits",
    "split": "train",
    "count": 1200,
    "fingerprint": "b" * 64,
    "image_size": 16,
    "guide_image_size": 16,
}


def make_guide(size: int = 16) -> FrozenTeacher:
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
    """Stores 60 digits, in batches of 8; may be stopped by an error after some of them."""
    guide = make_guide()
    dataset = stratified_subset(build_dataset("digits", "data", "train"), 0.05, 0)
    samples = TestSamples(dataset, TestTransform(image_size=16))

    def batches(done: int) -> Iterator[Batch]:
        loader = test_loader(samples, batch_size=8, num_workers=0, pin_memory=False, first=done)
        for number, batch in enumerate(loader):
            if number == stop_after:
                raise KeyboardInterrupt
            yield batch

    stored = [list(map(float, view)) for view in views]
    precompute(
        guide,
        batches,
        path=path,
        provenance=Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype=dtype, views=stored),
        indices=dataset.indices,
        device=torch.device("cpu"),
        say=lambda text: None,
        advance=lambda count: None,
    )
    return guide


@pytest.fixture(name="path", scope="module")
def path_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.npz"
    make_bank(path)
    return path


def digits_batch(rows: list[int], views: list[View]) -> Batch:
    """Some of the stored digits, whole, as their test transform gives them."""
    dataset = stratified_subset(build_dataset("digits", "data", "train"), 0.05, 0)
    samples = TestSamples(dataset, TestTransform(image_size=16))
    images = torch.stack([samples[row].images for row in rows])
    index = torch.from_numpy(dataset.indices[rows])
    return Batch(images, torch.zeros(len(rows)), index, torch.stack([v.tensor() for v in views]))


# --- Replay ------------------------------------------------------------------------------------


def test_the_full_view_is_the_online_guide_to_storage_precision(path: Path) -> None:
    bank, batch = FeatureBank(path, LAYERS), digits_batch([3, 41, 0], [View()] * 3)
    stored, scores = bank(batch.images, batch.index, batch.view)
    online, _ = make_guide()(batch.images, batch.index, batch.view)
    assert scores is None and bank.feature_dims == [16, 32, 64]
    for mine, theirs in zip(stored, online, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=3e-6)


def test_float32_is_exact_but_for_the_resampling(tmp_path: Path) -> None:
    guide = make_bank(tmp_path / "b.npz", dtype="float32")
    batch = digits_batch([5], [View()])
    stored, _ = FeatureBank(tmp_path / "b.npz", LAYERS)(batch.images, batch.index, batch.view)
    for mine, theirs in zip(stored, guide(batch.images)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_flip_is_a_flip() -> None:
    maps = torch.randn(1, 3, 5, 7)
    flipped = replay(maps, View(flip=True).tensor()[None])
    torch.testing.assert_close(flipped, maps.flip(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (0.25, 0.5), (0.125, 0.375)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_resized_as_interpolate_does(top: float, left: float, flip: bool) -> None:
    maps = torch.randn(2, 3, 8, 8)
    view = View(top, left, 0.5, 0.5, flip)
    y, x = int(top * 8), int(left * 8)
    crop = maps[:, :, y : y + 4, x : x + 4]
    expected = F.interpolate(crop, size=(8, 8), mode="bilinear", align_corners=False)
    mine = replay(maps, torch.stack([view.tensor()] * 2))
    # At the rim of the box the neighbour outside counts, where a cut-out crop has none.
    inner = (mine.flip(3) if flip else mine)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, expected[:, :, 1:-1, 1:-1], rtol=1e-5, atol=1e-5)


def test_a_box_in_sub_pixels_moves_a_ramp_by_as_much() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # the value at x is x
    view = View(top=0.1, left=0.2, height=0.55, width=0.55)
    mine = replay(ramp, view.tensor()[None])[0, 0, 3]
    centres = 0.2 * 8 + 0.55 * (torch.arange(8) + 0.5) - 0.5
    torch.testing.assert_close(mine, centres)


def test_each_image_has_its_own_view_and_its_own_maps(path: Path) -> None:
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
    guide = make_bank(tmp_path / "b.npz", views=[View(), View(flip=True)])
    whole = digits_batch([3, 8], [View(), View()])
    views = torch.stack([View(flip=True).tensor(), View().tensor()])
    images = torch.stack([whole.images[0].flip(2), whole.images[1]])
    online, _ = guide(images)
    banks = [FeatureBank(tmp_path / "b.npz", [2, 0]) for _ in range(2)]
    banks[1].make_resident(torch.device("cpu"))
    for bank in banks:
        stored, _ = bank(images, whole.index, views)
        for mine, theirs in zip(stored, (online[2], online[0]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=3e-6)


def test_every_view_of_the_plain_recipe_is_exact_when_all_are_stored(tmp_path: Path) -> None:
    guide = make_bank(tmp_path / "b.npz", views=plain_views(16, shifts=5, mirrored=True))
    bank = FeatureBank(tmp_path / "b.npz", LAYERS)
    dataset = stratified_subset(build_dataset("digits", "data", "train"), 0.05, 0)
    finish = TestTransform(image_size=16).finish
    random.seed(0)
    drawn = [padded_crop(dataset.image(row), 16, hflip=0.5) for row in range(40)]
    assert len({view for _, view in drawn}) > 20
    images = torch.stack([finish(image) for image, _ in drawn])
    views = torch.stack([view.tensor() for _, view in drawn])
    stored, _ = bank(images, torch.from_numpy(dataset.indices[:40]), views)
    for mine, theirs in zip(stored, guide(images)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=1e-5)


def test_a_view_is_reached_from_the_nearest_stored_one() -> None:
    stored = torch.stack([v.tensor() for v in plain_views(32, shifts=3, mirrored=True)])
    assert stored[0].tolist() == [0, 0, 1, 1, 0] and len(stored) == 18
    views = [View(-3 / 32, 1 / 32), View(0.1, 0.2, 0.5, 0.6, True), View(0.3, 0.1, 0.4, 0.4)]
    view = torch.stack([v.tensor() for v in views])
    nearest, rest = from_nearest(view, stored)
    assert stored[nearest[0]].tolist() == [-1 / 8, 0, 1, 1, 0]
    torch.testing.assert_close(rest[0], View(1 / 32, 1 / 32).tensor())
    assert (stored[nearest[1:], 4] == view[1:, 4]).all() and (rest[:, 4] == 0).all()
    # Where maps do not depend on the rim, both ways give the same.
    maps = shifted(torch.zeros(3, 3, 32, 32), View(top=1.0))  # black
    maps[:, :, 10:20, 12:22] = torch.randn(3, 3, 10, 10)
    anchors = [View._make(v) for v in stored[nearest].tolist()]
    shown = torch.cat([shifted(maps[[row]], anchor) for row, anchor in enumerate(anchors)])
    torch.testing.assert_close(replay(shown, rest), replay(maps, view), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shifts", [0, 2, 7, -1])
def test_shifts_that_cannot_be_are_refused(shifts: int) -> None:
    with pytest.raises(ValueError, match=r"an odd number from 1 to 5"):
        plain_views(16, shifts=shifts, mirrored=False)


def test_maps_in_place_are_the_maps_in_the_file(path: Path) -> None:
    batch = digits_batch([0, 59], [View(0.1, 0.2, 0.5, 0.6, True), View()])
    banks = [FeatureBank(path, LAYERS) for _ in range(2)]
    banks[1].make_resident(torch.device("cpu"))
    for mine, theirs in zip(*(b(*batch[:1], *batch[2:])[0] for b in banks), strict=True):
        assert torch.equal(mine, theirs)


# --- Computing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [0, 1, 5, 7])
def test_a_run_that_was_stopped_gives_the_same_bytes(
    path: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lg.guidance.precompute._SAVE_PERIOD", 0.0)
    begun = tmp_path / "bank.npz"
    with pytest.raises(KeyboardInterrupt):
        make_bank(begun, stop_after=stop_after)
    assert not begun.exists()
    noted = tmp_path / "bank.npz.partial" / "progress.json"
    assert (json.loads(noted.read_text())["done"] if noted.exists() else 0) == 8 * stop_after
    make_bank(begun)
    assert begun.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["bank.npz"]


def test_what_was_begun_for_another_guide_is_not_gone_on_with(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lg.guidance.precompute._SAVE_PERIOD", 0.0)
    begun = tmp_path / "bank.npz"
    with pytest.raises(KeyboardInterrupt):
        make_bank(begun, stop_after=3)
    noted = tmp_path / "bank.npz.partial" / "progress.json"
    noted.write_text(noted.read_text().replace("a" * 64, "c" * 64))
    arrays = np.lib.format.open_memmap(noted.with_name("layer_0.npy"), mode="r+")
    arrays[:24] = 7
    make_bank(begun)
    assert begun.read_bytes() == path.read_bytes()


def test_the_size_is_said_and_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16")
    twice = replace(provenance, views=[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    disk = SimpleNamespace(total=10**14, used=0, free=10**11)
    monkeypatch.setattr("lg.guidance.precompute.shutil.disk_usage", lambda path: disk)
    assert ": 2.87 GB" in check_space(tmp_path / "bank.npz", twice, 100_000)
    said = check_space(tmp_path / "bank.npz", provenance, 1_000_000)
    assert ": 14.34 GB, twice that while it is written" in said  # 7,168 numbers of 2 bytes
    with pytest.raises(
        BankError, match=r"takes 14336.00 GB, twice that .* only 100.00 GB are free in"
    ):
        check_space(tmp_path / "bank.npz", provenance, 10**9)


def test_maps_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    guide = make_guide()
    torch.nn.init.constant_(guide.model.net.bn1.weight, 1e6)
    batch = digits_batch([0], [View()])
    with pytest.raises(BankError, match=r"maps reach .*, which float16 cannot hold"):
        precompute(
            guide,
            lambda done: [batch],
            path=tmp_path / "b.npz",
            provenance=Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16"),
            indices=np.arange(1),
            device=torch.device("cpu"),
            say=print,
            advance=lambda count: None,
        )


# --- What is refused ---------------------------------------------------------------------------


def test_a_file_cut_by_a_byte(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:100], b""):
        (tmp_path / "cut.npz").write_bytes(cut)
        with pytest.raises(BankError, match=r"is no whole feature file .*; precompute it again"):
            FeatureBank(tmp_path / "cut.npz", LAYERS)
    with pytest.raises(BankError, match=r"none.npz does not exist. .*precompute_feature.py"):
        FeatureBank(tmp_path / "none.npz", LAYERS)


def rewrite(path: Path, to: Path, **changes: bytes | None) -> None:
    """A copy of a bank with parts replaced or left out."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        for name in source.namelist():
            content = changes.get(name.partition(".")[0], source.read(name))
            if content is not None:
                target.writestr(name, content)


def as_npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class Payload:
    """What must never run."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_inside_never_runs(path: Path, tmp_path: Path) -> None:
    objects = as_npy(np.array([Payload()], dtype=object), allow_pickle=True)
    for content, said in (
        (objects, "of object and shape .* objects are never loaded"),
        (pickle.dumps(Payload()), "layer_1.npy, which is no array"),
    ):
        rewrite(path, tmp_path / "bad.npz", layer_1=content)
        with pytest.raises(BankError, match=said):
            FeatureBank(tmp_path / "bad.npz", LAYERS)
    rewrite(path, tmp_path / "bad.npz", indices=objects)
    with pytest.raises(BankError, match=r"holds indices.npy of object"):
        FeatureBank(tmp_path / "bad.npz", LAYERS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_1": None}, "lacks arrays that its provenance names"),
        (
            {"layer_1": as_npy(np.zeros((60, 1, 3, 8, 8), "f2"))},
            r"its provenance says \[\(60, 1, 16",
        ),
        ({"layer_1": as_npy(np.zeros((59, 1, 32, 8, 8), "f2"))}, "maps of 60, 59, 60 images"),
        ({"layer_1": as_npy(np.zeros((60, 32, 8, 8), "f2"))}, "with 5 dimensions belongs"),
        (
            {"layer_1": as_npy(np.zeros((60, 1, 32, 8, 8), "f2"))[:-2]},
            "more of layer_1.npy",
        ),
        ({"indices": as_npy(np.arange(59))}, "60 maps for 59 images"),
        ({"provenance": b"{}"}, "other entries than this version writes"),
        ({"provenance": b"\xff"}, "cannot be read"),
    ],
)
def test_parts_that_do_not_belong_together(
    path: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    rewrite(path, tmp_path / "bad.npz", **changes)
    with pytest.raises(BankError, match=said):
        FeatureBank(tmp_path / "bad.npz", LAYERS)


def test_layers_that_are_not_stored(path: Path) -> None:
    with pytest.raises(BankError, match="holds the guide's blocks 0, 1, 2, not 3, 5"):
        FeatureBank(path, [0, 3, 5])


def test_a_bank_of_another_training_says_in_what(path: Path) -> None:
    bank = FeatureBank(path, LAYERS)
    right = {"indices": bank.indices, "shapes": SHAPES, **FACTS}
    bank.check(**right)
    bank.check(**{**right, "weights": None})  # the guide is not at hand: not known
    for change, said in (
        ({"dataset": "cifar100"}, "its dataset is digits, here it is cifar100"),
        ({"fingerprint": "d" * 64}, "its fingerprint is bbbbbbbbbbbb..., here it is dddddddddddd"),
        ({"count": 1300}, "its count is 1200, here it is 1300"),
        ({"weights": "e" * 64}, "its weights is aaaaaaaaaaaa"),
        ({"image_size": 224}, "its image size is 16, here it is 224"),
        ({"guide_image_size": 32}, "its guide image size is 16, here it is 32"),
        ({"guide": "ResNet-56"}, "its guide is ResNet-8"),
        ({"shapes": [[16, 32, 32], *SHAPES[1:]]}, r"its maps are \[\(16, 16, 16\),"),
        ({"indices": np.arange(60)}, "it lacks 5[0-9] of the 60 training images"),
    ):
        with pytest.raises(BankError, match=said):
            bank.check(**{**right, **change})


def test_files_of_the_original_code_load(path: Path, tmp_path: Path) -> None:
    maps = [np.random.default_rng(0).standard_normal((9, c, s, s)) for c, s in ((16, 8), (32, 4))]
    np.savez(tmp_path / "old.npz", first=maps[0].astype("f4"), second=maps[1].astype("f4"))
    bank = FeatureBank(tmp_path / "old.npz", [0, 1])
    assert bank.provenance is None and len(bank) == 9
    images = torch.zeros(2, 3, 16, 16)
    found, _ = bank(images, torch.tensor([4, 8]), torch.stack([View().tensor()] * 2))
    for mine, theirs in zip(found, maps, strict=True):
        np.testing.assert_allclose(mine, theirs[[4, 8]], rtol=1e-4, atol=1e-5)
    bank.check(indices=np.arange(9), shapes=[(16, 8, 8), (32, 4, 4)], dataset="x", count=9)
    with pytest.raises(BankError, match="it holds 9 images, the data set 10"):
        bank.check(indices=np.arange(10), shapes=[(16, 8, 8), (32, 4, 4)], count=10)
    np.savez_compressed(tmp_path / "packed.npz", first=maps[0])
    with pytest.raises(BankError, match=r"is compressed .* write it again with numpy.savez"):
        FeatureBank(tmp_path / "packed.npz", [0])


def test_the_fingerprint_tells_sets_apart() -> None:
    train, test = (build_dataset("digits", "data", split) for split in ("train", "test"))
    prints = [fingerprint(train), fingerprint(stratified_subset(train, 0.1, 3)), fingerprint(test)]
    assert prints[0] == prints[1] != prints[2]
    train.labels = train.labels[::-1].copy()
    assert fingerprint(train) != prints[0]


def test_a_provenance_reads_back() -> None:
    provenance = Provenance(**FACTS, layers=LAYERS, shapes=SHAPES, dtype="float16")
    assert Provenance.from_json(provenance.to_json()) == provenance
    other = replace(provenance, versions={"torch": "2"})
    assert other.to_json() != provenance.to_json()
