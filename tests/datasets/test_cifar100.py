"""CIFAR-100 files of all pickle protocols are read without running code in them."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lg.datasets import build_dataset
from lg.datasets.cifar100 import CIFAR100
from lg.errors import DataError
from lg.files.safe_pickle import ARRAYS

NAMES = ["apple", "bear", "cup"]
LABELS = [2, 0, 1, 1]
DATA = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)


def batch(**changes: Any) -> dict[str, Any]:
    return {"data": DATA, "fine_labels": LABELS, "filenames": ["a"] * 4} | changes


def write(root: Path, content: bytes | None = None, protocol: int = 2, **changes: Any) -> Path:
    """Write a fake set whose training file is `content` or a changed batch."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}, protocol))
    (folder / "test").write_bytes(pickle.dumps(batch(data=DATA[:2], fine_labels=[0, 1]), protocol))
    train = pickle.dumps(batch(**changes), protocol) if content is None else content
    (folder / "train").write_bytes(train)
    return root


def python2_pickle(module: bytes = b"numpy.core.multiarray") -> bytes:
    """Assemble a batch as Python 2 with an old NumPy wrote it, with byte strings only."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text  # BINSTRING

    reconstruct = (
        b"c" + module + b"\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85"
        + string(b"b") + b"\x87R"
    )  # fmt: skip
    dtype = (
        b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        + b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )  # fmt: skip
    state = b"(K\x01K\x04M\x00\x0c\x86" + dtype + b"\x89" + string(DATA.tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    return (
        b"\x80\x02}(" + string(b"data") + reconstruct + state + string(b"fine_labels") + labels
        + b"u."
    )  # fmt: skip


def check(dataset: CIFAR100) -> None:
    assert dataset.labels.tolist() == LABELS
    assert dataset.class_names == NAMES
    assert dataset.pixels.dtype == np.uint8 and dataset.pixels.shape == (4, 3, 32, 32)
    for i in range(4):
        image = dataset.image(i)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        planes = DATA[i].reshape(3, 32, 32)
        assert image.getpixel((5, 7)) == tuple(int(planes[c, 7, 5]) for c in range(3))
    assert dataset.describe(3) == "cifar-100-python/train image 3"


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    check(CIFAR100(write(tmp_path, protocol=protocol), "train"))


def test_column_order_and_label_array(tmp_path: Path) -> None:
    data, labels = np.asfortranarray(DATA), np.array(LABELS, dtype=">i4")
    for protocol in (2, 5):
        root = write(tmp_path, protocol=protocol, data=data, fine_labels=labels)
        check(CIFAR100(root, "train"))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_python2_files(tmp_path: Path, module: bytes) -> None:
    content = python2_pickle(module)
    assert pickle.loads(content, encoding="latin1")["data"].tolist() == DATA.tolist()
    check(CIFAR100(write(tmp_path, content), "train"))


def test_bytes_keys(tmp_path: Path) -> None:
    content = pickle.dumps({key.encode(): value for key, value in batch().items()}, 2)
    write(tmp_path, content)
    meta = pickle.dumps({b"fine_label_names": [name.encode() for name in NAMES]}, 2)
    (tmp_path / "cifar-100-python" / "meta").write_bytes(meta)
    check(CIFAR100(tmp_path, "train"))


def test_splits(tmp_path: Path) -> None:
    write(tmp_path)
    for split in ("val", "test"):
        held_out = build_dataset("cifar100", tmp_path, split)
        assert (held_out.split, held_out.labels.tolist()) == ("test", [0, 1])
    with pytest.raises(DataError, match="split of cifar100 is 'valid': set it to train, val"):
        build_dataset("cifar100", tmp_path, "valid")


def test_dataset_can_be_pickled(tmp_path: Path) -> None:
    check(pickle.loads(pickle.dumps(CIFAR100(write(tmp_path), "train"))))


class Payload:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def object_array(item: Any) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = item
    return array


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["column", "label", "object array", "key", "all"])
def test_payload_is_not_executed(tmp_path: Path, place: str, protocol: int) -> None:
    mark = tmp_path / "fired"
    evil = Payload(os.system, f"touch {mark}")
    content = {
        "column": lambda: batch(extra=evil),
        "label": lambda: batch(fine_labels=[0, 1, 2, evil]),
        "object array": lambda: batch(data=object_array(evil)),
        "key": lambda: batch() | {evil: 1},
        "all": lambda: evil,
    }[place]()
    write(tmp_path, pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=r"train: .*(system|dtype 'O8')"):
        CIFAR100(tmp_path, "train")
    assert not mark.exists()
    pickle.loads(pickle.dumps(content, protocol))
    assert mark.exists(), "the payload does not work"


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("true",), r"(posix|nt)\.system"),
        (eval, ("1",), r"(__builtin__|builtins)\.eval"),
        (getattr, ("", "join"), r"(__builtin__|builtins)\.getattr"),
        (np.load, ("x",), r"numpy\.load"),
        (np.int64, (1,), r"numpy\.int64"),
        (bytearray, (b"x",), r"(__builtin__|builtins)\.bytearray"),
    ],
)
def test_the_error_names_file_and_function(
    tmp_path: Path, function: Any, arguments: tuple, named: str
) -> None:
    write(tmp_path, extra=Payload(function, *arguments))
    with pytest.raises(DataError, match=rf"train: it tries to call {named}, .*nothing was run"):
        CIFAR100(tmp_path, "train")


def test_object_arrays_are_rejected(tmp_path: Path) -> None:
    """Object arrays are rejected even if all of their items are harmless."""
    write(tmp_path, data=object_array("harmless"))
    with pytest.raises(DataError, match="dtype 'O8'"):
        CIFAR100(tmp_path, "train")


def test_stand_ins_cannot_be_altered(tmp_path: Path) -> None:
    """BUILD on a stand-in class must not set its attributes."""
    for name in (b"numpy\nndarray", b"numpy\ndtype", b"_codecs\nencode"):
        write(tmp_path, b"\x80\x02c" + name + b"\nN}X\x01\x00\x00\x00xK\x01s\x86b.")
        with pytest.raises(DataError, match="train: this is not the expected"):
            CIFAR100(tmp_path, "train")
    assert not any(hasattr(stand_in, "x") for stand_in in ARRAYS.values())
    check(CIFAR100(write(tmp_path), "train"))


def test_codecs_other_than_latin1_are_rejected(tmp_path: Path) -> None:
    import _codecs

    write(tmp_path, extra=Payload(_codecs.encode, "x", "rot13"))
    with pytest.raises(DataError, match="text encoded by 'rot13'"):
        CIFAR100(tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fine_labels": [0, 1, 2]}, r"train: data is not a uint8 array of shape \(3, 3072\)"),
        ({"fine_labels": [0, 1, 2, 3]}, "label of image 3 is 3, but the 3 classes"),
        ({"fine_labels": [0, 1, 2, -1]}, "label of image 3 is -1"),
        ({"fine_labels": [0, 1, 2, 0.5]}, "labels are float64"),
        ({"data": DATA[:, :3071]}, r"data is not a uint8 array of shape \(4, 3072\)"),
        ({"data": DATA.astype(np.int16)}, "data is not a uint8 array"),
        ({"data": [1, 2, 3, 4]}, "data is not a uint8 array"),
    ],
)
def test_inconsistent_files(tmp_path: Path, changes: dict, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        CIFAR100(write(tmp_path, **changes), "train")


@pytest.mark.parametrize(
    "content", [b"", b"<html>", pickle.dumps([1]), pickle.dumps(batch())[:900]]
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"train: this is not the expected.*download it again"):
        CIFAR100(write(tmp_path, content), "train")


def test_missing_column(tmp_path: Path) -> None:
    write(tmp_path, pickle.dumps({"data": DATA, "coarse_labels": LABELS}, 2))
    with pytest.raises(DataError, match="expected pickled dict with data, fine_labels"):
        CIFAR100(tmp_path, "train")


def test_missing_files_and_no_download(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        CIFAR100(tmp_path, "train")
    message = str(caught.value)
    assert f"{tmp_path}/cifar-100-python/train is missing; set download=True" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz" in message
    assert list(tmp_path.iterdir()) == []


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> list[str]:
    roots: list[str] = []

    class Official:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert train and download
            roots.append(root)
            write(Path(root))
            if fail:
                raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Official)
    return roots


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = fake_torchvision(monkeypatch)
    check(CIFAR100(tmp_path / "data", "train", download=True))
    check(CIFAR100(tmp_path / "data", "train", download=True))
    assert len(roots) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-100-python"]


def test_download_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchvision(monkeypatch)
    mine = pickle.dumps(batch(fine_labels=[1, 1, 1, 1]), 2)
    folder = write(tmp_path, mine) / "cifar-100-python"
    (folder / "meta").unlink()
    assert CIFAR100(tmp_path, "train", download=True).labels.tolist() == [1, 1, 1, 1]
    assert (folder / "train").read_bytes() == mine


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchvision(monkeypatch, fail=True)
    with pytest.raises(DataError, match=r"download into .* failed .File not found or corrupted"):
        CIFAR100(tmp_path / "data", "train", download=True)
    assert list((tmp_path / "data").iterdir()) == []
