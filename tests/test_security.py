"""Files from elsewhere run no code: every payload here is live, and none may run.

Other payloads are tested beside the code that they attack: pickles of CIFAR-100 in tests/datasets,
feature files in tests/guidance, checkpoints in test_checkpoint.py, YAML in tests/config.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from torchvision.datasets import utils

import lg
from lg import builders, trainer
from lg.augment.view import View
from lg.datasets import build_dataset
from lg.datasets.loader import Batch
from lg.errors import BankError, CheckpointError, DataError
from lg.guidance import FeatureBank, FrozenTeacher
from lg.guidance.bank_file import Provenance
from lg.guidance.precompute import precompute
from lg.models import resnet

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs/digits"
SMALL = ["DEVICE", "cpu", "DATA_LOADER.NUM_WORKERS", 0, "TRAIN.FRACTION", 0.1]


class Payload:
    """Creates the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(name="mark")
def mark_fixture(tmp_path: Path) -> Iterator[Path]:
    """A file that every payload would create; checks at the end that none did."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "a payload ran"


def runs(load: Callable[[], Any], mark: Path) -> bool:
    """Return whether a payload is live: a load that trusts the file runs it."""
    load()
    ran = mark.exists()
    mark.unlink(missing_ok=True)
    return ran


# --- Weights -----------------------------------------------------------------------------------


def test_weights(mark: Path, path: str) -> None:
    cfg = lg.load_config(DIGITS / "r-8_digits.yaml", ["TEST.WEIGHTS", path, *SMALL])
    trainer.test(cfg)


def train_weights(mark: Path, path: str) -> None:
    out = ["OUT_DIR", mark.parent / "out", "TRAIN.BATCH_SIZE", 30]
    cfg = lg.load_config(DIGITS / "r-8_digits.yaml", ["TRAIN.WEIGHTS", path, *SMALL, *out])
    trainer.train(cfg)


def resume(mark: Path, path: str) -> None:
    folder = mark.parent / "out/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "model_epoch_0001.pyth")
    out = ["OUT_DIR", folder.parent, "TRAIN.BATCH_SIZE", 30]
    trainer.train(lg.load_config(DIGITS / "r-8_digits.yaml", [*SMALL, *out]))


def teacher_weights(mark: Path, path: str) -> None:
    opts = ["DISTILLATION.TEACHER_WEIGHTS", path]
    builders.build_guided(lg.load_config(DIGITS / "vit_digits_ours.yaml", opts))


def timm_teacher_weights(mark: Path, path: str) -> None:
    opts = ["DISTILLATION.TEACHER_WEIGHTS", path, "DISTILLATION.TEACHER_MODEL", "timm/test_resnet"]
    opts += ["CNN.DEPTH", 56, "DISTILLATION.TEACHER_IMG_SIZE", 32]
    builders.build_guided(lg.load_config(DIGITS / "vit_digits_ours.yaml", opts))


def pretrained(mark: Path, path: str) -> None:
    config = mark.parent / "timm.yaml"
    config.write_text("MODEL: {TYPE: timm/test_resnet}")
    lg.build_model(lg.load_config(config, ["MODEL.PRETRAINED", path]))


LOADERS = [test_weights, train_weights, resume, teacher_weights, timm_teacher_weights, pretrained]
test_weights.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["model_state", "cfg", "all"])
@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_weights_run_no_code(mark: Path, load: Callable[[Path, str], None], place: str) -> None:
    state: Any = {"model_state": {"w": torch.ones(2)}, "cfg": "", "epoch": 0, "test_err": 1.0}
    evil = Payload(mark)
    state = evil if place == "all" else state | {place: evil}
    for new in (True, False):
        path = mark.parent / f"{load.__name__}{new}.pyth"
        torch.save(state, path, _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match=r"never loaded|No checkpoint in .* can be used"):
            load(mark, str(path))
        assert not mark.exists()
        assert runs(lambda path=path: torch.load(path, weights_only=False), mark)
        shutil.rmtree(mark.parent / "out", ignore_errors=True)


def test_the_name_of_a_file_does_not_change_how_it_is_loaded(mark: Path) -> None:
    for name in ("a.safetensors", "a.npz", "a.pkl", "a"):
        (mark.parent / name).write_bytes(pickle.dumps({"model_state": Payload(mark)}))
        with pytest.raises(CheckpointError):
            lg.load_weights(resnet(depth=8, img_size=16, num_classes=10), mark.parent / name)
        assert runs(lambda name=name: pickle.loads((mark.parent / name).read_bytes()), mark)


def test_the_config_of_a_checkpoint_runs_no_code(
    mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On resume it is compared with the config of the run."""
    out = [*SMALL, "OUT_DIR", mark.parent / "out", "TRAIN.BATCH_SIZE", 30, "OPTIM.MAX_EPOCH", 1]
    cfg = lg.load_config(DIGITS / "r-8_digits.yaml", out)
    trainer.train(cfg)
    (path,) = (mark.parent / "out/checkpoints").glob("*.pyth")
    state = torch.load(path, weights_only=True)
    for text in (f"DESC: !!python/object/apply:os.system ['touch {mark}']", "[", "a", {"a": 1}):
        torch.save(state | {"cfg": text}, path)
        capsys.readouterr()
        trainer.train(cfg)
        assert (
            "other settings than before: the old config cannot be read." in capsys.readouterr().err
        )


# --- Feature files -----------------------------------------------------------------------------


def test_a_feature_file_of_the_original_code_runs_nothing(mark: Path) -> None:
    path = mark.parent / "old.npz"
    maps = np.array([Payload(mark)] * 4, dtype=object).reshape(1, 2, 2, 1)
    np.savez(path, first=maps)
    assert not mark.exists()
    with pytest.raises(BankError, match=r"Object arrays cannot be loaded"):
        FeatureBank(path, [0])
    assert not mark.exists()
    assert runs(lambda: np.load(path, allow_pickle=True)["first"], mark)


def test_an_unfinished_bank_runs_nothing(mark: Path) -> None:
    """Somebody else may have put its files there; it is computed again."""
    folder = mark.parent / "bank"
    facts = {"teacher": "a", "weights": "b", "dataset": "c", "split": "d", "fingerprint": "e"}
    sizes = {"count": 4, "image_size": 16, "teacher_image_size": 16}
    shapes = [[16, 16, 16]]
    provenance = Provenance(**facts, **sizes, layers=[0], shapes=shapes, dtype="float32")
    progress = {"provenance": provenance.to_json(), "done": 2}
    folder.mkdir()
    np.save(folder / "indices.npy", np.arange(4))
    (folder / "progress.json").write_text(json.dumps(progress))
    evil = np.array([Payload(mark)] * 4, dtype=object)
    np.save(folder / "layer_0.npy", evil, allow_pickle=True)
    assert runs(lambda: np.load(folder / "layer_0.npy", allow_pickle=True), mark)
    begun: list[int] = []
    images = torch.rand(4, 3, 16, 16)

    def batches(done: int) -> list[Batch]:
        begun.append(done)
        return [Batch(images, torch.zeros(4), torch.arange(4), torch.zeros(4, 5))]

    guide = FrozenTeacher(resnet(depth=8, img_size=16, num_classes=10), indices=[0], image_size=16)
    precompute(
        guide,
        batches,
        folder=folder,
        provenance=provenance,
        indices=np.arange(4),
        device=torch.device("cpu"),
    )
    assert begun == [0] and not mark.exists()
    stored, _ = FeatureBank(folder, [0])(
        images, torch.arange(4), torch.stack([View().tensor()] * 4)
    )
    torch.testing.assert_close(stored[0], guide(images)[0][0])


# --- Data sets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["test", "meta"])
def test_cifar_files_run_no_code(mark: Path, part: str) -> None:
    folder = mark.parent / "cifar-100-python"
    folder.mkdir()
    pixels = np.zeros((2, 3072), np.uint8)
    for name in ("train", "test"):
        content = {"data": pixels, "fine_labels": [0, 1]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b"]}))
    table = pickle.loads((folder / part).read_bytes())
    (folder / part).write_bytes(pickle.dumps(table | {"extra": Payload(mark)}))
    with pytest.raises(DataError, match=rf"{part}: it tries to call .*system, .*nothing was run"):
        build_dataset("cifar100", mark.parent, "test")
    assert runs(lambda: pickle.loads((folder / part).read_bytes()), mark)


def element(kind: int, content: bytes) -> bytes:
    """Return one element of a MATLAB 5 file."""
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(matlab_class: int, name: bytes, content: bytes, *, length: int = 1) -> bytes:
    flags, shape = struct.pack("<II", matlab_class, 0), struct.pack("<ii", 1, length)
    return element(14, element(6, flags) + element(5, shape) + element(1, name) + content)


@pytest.mark.parametrize("kind", ["function handle", "opaque object", "cells", "text", "pickle"])
def test_mat_files_run_no_code(mark: Path, kind: str) -> None:
    """Code that MATLAB would run is rejected because it is not a number."""
    folder = mark.parent / "flowers"
    (folder / "jpg").mkdir(parents=True)
    savemat(folder / "setid.mat", {"trnid": [[1]], "valid": [[1]], "tstid": [[1]]})
    file = folder / "imagelabels.mat"
    command = f"system('touch {mark}')"
    code = matrix(4, b"", element(16, command.encode()), length=len(command))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    if kind == "function handle":
        file.write_bytes(header + matrix(16, b"labels", code))
        assert type(loadmat(file)["labels"]).__name__ == "MatlabFunction"
    elif kind == "opaque object":
        parts = element(1, b"labels") + element(1, b"MCOS") + element(1, b"function_handle") + code
        file.write_bytes(header + element(14, element(6, struct.pack("<II", 17, 0)) + parts))
        assert any(type(v).__name__ == "MatlabOpaque" for v in loadmat(file).values())
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(mark)))
    else:
        cells = np.array([[command]], dtype=object)
        savemat(file, {"labels": cells if kind == "cells" else command})
    with pytest.raises(DataError, match=r"labels (is not a list of|cannot be read)"):
        build_dataset("flowers", mark.parent, "train")


@pytest.mark.parametrize(
    "name", ["../../{0}", "{0}", "train/../../x.JPG", "train/$(touch {0}).JPG", "|touch {0}"]
)
def test_lists_of_images_run_no_code_and_stay_in_their_folder(mark: Path, name: str) -> None:
    folder = mark.parent / "chaoyang"
    (folder / "train").mkdir(parents=True)
    entry = {"name": name.format(mark), "label": 0, "__reduce__": ["os.system", f"touch {mark}"]}
    (folder / "train.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=r"entry 0 of .* is |images are missing"):
        build_dataset("chaoyang", mark.parent, "train").image(0)


def tampered_archive(path: Path, mark: Path) -> None:
    """Write a complete archive with members outside of the folder it is unpacked to."""
    with tarfile.open(path, "w:gz") as archive:
        for name in ("cifar-100-python/train", "jpg/image_00001.jpg", "../../ran", str(mark)):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("cifar-100-python/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(mark.parent)
        archive.addfile(link)
        inside = tarfile.TarInfo("cifar-100-python/link/ran")
        archive.addfile(inside, io.BytesIO())


@pytest.mark.parametrize("name", ["cifar100", "flowers"])
def test_tampered_archives_are_not_unpacked(
    mark: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision compares the official MD5 first; the download is removed with its folder."""
    fetched: list[str] = []

    def serve(url: str, filename: str | Path, *args: Any, **options: Any) -> None:
        fetched.append(url)
        tampered_archive(Path(filename), mark)

    monkeypatch.setattr(utils, "_urlretrieve", serve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **options: url)
    unpacked: list[Any] = []
    monkeypatch.setattr(utils, "extract_archive", lambda *args, **options: unpacked.append(args))
    with pytest.raises(DataError, match=r"download into .* failed .File not found or corrupted"):
        build_dataset(name, mark.parent / "data", "train", download=True)
    assert len(fetched) == 1 and unpacked == []
    assert list((mark.parent / "data").iterdir()) == []
