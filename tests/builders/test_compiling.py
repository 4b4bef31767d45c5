"""Compiled training: one graph with its taps, the same numbers, and the fallback."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lg.builders.compiling import compile_student
from lg.device import Precision
from lg.guidance import GuidedStudent
from lg.models import resnet

COMPILE = torch.compile


def one_graph(module: Any, **_: Any) -> Any:
    """Trace like torch.compile, in one graph or not at all, without generating code."""
    return COMPILE(module, backend="aot_eager", fullgraph=True)


def student() -> GuidedStudent:
    torch.manual_seed(0)
    model = resnet(depth=8, img_size=16, num_classes=5)
    return GuidedStudent(model, indices=[2, 0, 2], teacher_dims=[7, 3, 4])


def compiled(guided: GuidedStudent, said: list[str], mode: str = "default") -> Any:
    precision = Precision(torch.device("cpu"))
    images = torch.randn(4, 3, 16, 16)
    return compile_student(
        guided, mode, example=images, precision=precision, say=said.append, warn=said.append
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


def test_a_compiled_student_gives_the_same_maps_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", one_graph)
    plain, guided, said = student(), student(), []
    module = compiled(guided, said)
    assert module is not guided and "Compiled the student in" in said[0]
    images = torch.randn(6, 3, 16, 16)
    results = []
    for model in (plain.train(), module.train()):
        logits, maps = model(images)
        (logits.square().sum() + sum(m.square().sum() for m in maps)).backward()
        results.append([logits, *maps])
    assert [m.shape[1] for m in results[0][1:]] == [7, 3, 4]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(plain.parameters(), guided.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert list(guided.state_dict()) == list(plain.state_dict())
    # In evaluation too, and state dicts do not change.
    torch.testing.assert_close(module.eval()(images), plain.eval()(images))


def test_the_trial_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", one_graph)
    guided = student()
    before = {k: v.clone() for k, v in guided.state_dict().items()}
    torch.manual_seed(5)
    compiled(guided, [])
    drawn = torch.rand(3)
    torch.manual_seed(5)
    torch.randn(4, 3, 16, 16)  # the example
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(v, before[k]) for k, v in guided.state_dict().items())
    assert all(p.grad is None for p in guided.parameters())


def test_a_student_that_cannot_be_compiled_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, **_: Any) -> Any:
        def fail(images: torch.Tensor) -> None:
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    guided, said = student(), []
    assert compiled(guided, said, "max-autotune") is guided
    assert said == [
        "TRAIN.COMPILE max-autotune failed (no compiler here): the student runs uncompiled."
    ]


def test_taps_keep_nothing_between_passes() -> None:
    guided = student().train()
    guided(torch.randn(2, 3, 16, 16))
    assert guided._outputs == {}
    guided.eval()(torch.randn(2, 3, 16, 16))
    assert guided._outputs == {}


@pytest.mark.slow
def test_the_real_compiler() -> None:
    plain, guided, said = student().train(), student(), []
    module = compiled(guided, said)
    assert module is not guided, said
    images = torch.randn(6, 3, 16, 16)
    for mine, theirs in zip(
        (lambda o: [o[0], *o[1]])(module.train()(images)),
        (lambda o: [o[0], *o[1]])(plain(images)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
