"""Compiled training: one graph with its taps, the same numbers, and the fallback."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lg.builders.compiling import compile_student, limit_compile_workers
from lg.device import Precision
from lg.guidance import FrozenTeacher, GuidedStudent, NoGuide
from lg.models import resnet

COMPILE = torch.compile


def one_graph(module: Any, **_: Any) -> Any:
    """Trace like torch.compile, in one graph or not at all, without generating code."""
    return COMPILE(module, backend="aot_eager", fullgraph=True)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each graph that is compiled, in one graph or not at all."""
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph

    def counted(module: Any, **_: Any) -> Any:
        return COMPILE(module, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", counted)
    return compiled


def student() -> GuidedStudent:
    torch.manual_seed(0)
    model = resnet(depth=8, img_size=16, num_classes=5)
    return GuidedStudent(model, indices=[2, 0, 2], teacher_dims=[7, 3, 4])


def teacher() -> FrozenTeacher:
    torch.manual_seed(1)
    return FrozenTeacher(
        resnet(depth=8, img_size=8, num_classes=5), indices=[2, 0], image_size=8
    ).eval()


def compiled(
    guided: GuidedStudent, said: list[str], mode: str = "default", guide: Any = None
) -> Any:
    return compiled_pair(guided, guide or NoGuide(), said, mode)[0]


def compiled_pair(guided: GuidedStudent, guide: Any, said: list[str], mode: str) -> Any:
    precision = Precision(torch.device("cpu"))
    images = torch.randn(4, 3, 16, 16)
    return compile_student(
        guided, guide, mode, example=images, precision=precision, info=said.append, warn=said.append
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
        def fail(images: torch.Tensor, imitate: bool) -> None:
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    guided, said = student(), []
    assert compiled(guided, said, "max-autotune") is guided
    assert said == [
        "TRAIN.COMPILE max-autotune failed (no compiler here): student and guide run uncompiled."
    ]


def test_a_capture_that_fails_in_the_third_call_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are recorded in the second call and replayed in the third."""
    calls: list[str] = []

    def captured(module: Any, **_: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            name = type(module).__name__
            calls.append(name)
            assert all(p.grad is None for p in guided.parameters())
            if calls.count(name) == 3 and name == failing:
                raise RuntimeError("capture failed")
            return module(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", captured)
    for failing in ("GuidedStudent", "FrozenTeacher", "none"):
        calls.clear()
        guided, guide, said = student(), teacher(), []
        pair = compiled_pair(guided, guide, said, "reduce-overhead")
        assert calls.count("GuidedStudent") == 3
        assert (pair == (guided, guide)) == (failing != "none")
        assert ("capture failed" in said[0]) == (failing != "none")


def test_a_compiled_guide_gives_the_same_maps_and_compiles_once(compilations: list[int]) -> None:
    guide = teacher()
    images, index, view = torch.randn(4, 3, 16, 16), torch.arange(4), torch.rand(4, 5)
    expected, _ = guide(images, index, view)
    called = compiled_pair(student(), guide, [], "default")[1]
    before = len(compilations)
    found, logits = called(images, index, view)
    assert len(compilations) == before == 2 and logits is None
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("ends", [False, True])
def test_the_end_of_guidance_is_compiled_and_tried_in_advance(
    ends: bool, compilations: list[int]
) -> None:
    example, precision = torch.randn(4, 3, 16, 16), Precision(torch.device("cpu"))
    module, _ = compile_student(
        student(),
        NoGuide(),
        "default",
        example=example,
        precision=precision,
        ends=ends,
        info=str,
        warn=pytest.fail,
    )
    assert len(compilations) == 1 + ends
    for imitate in (True, False):  # as in training
        module(example, imitate=imitate)
    assert len(compilations) == 2


def test_an_end_of_guidance_that_cannot_be_compiled_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def partial(module: Any, **_: Any) -> Any:
        def call(images: torch.Tensor, imitate: bool) -> Any:
            if not imitate:
                raise RuntimeError("no such kernel")
            return module(images, imitate)

        return call

    monkeypatch.setattr(torch, "compile", partial)
    guided, said = student(), []
    module, _ = compile_student(
        guided,
        NoGuide(),
        "default",
        example=torch.randn(4, 3, 16, 16),
        precision=Precision(torch.device("cpu")),
        ends=True,
        info=said.append,
        warn=said.append,
    )
    assert module is guided and "no such kernel" in said[0]


def test_processes_share_the_cores_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", 16)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "16")
    limit_compile_workers(8)
    assert config.compile_threads == 16
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    limit_compile_workers(8)
    assert config.compile_threads == 2
    limit_compile_workers(8)
    assert config.compile_threads == 1


def test_taps_keep_nothing_between_passes() -> None:
    guided = student().train()
    guided(torch.randn(2, 3, 16, 16))
    assert guided._taps.outputs == {}
    guided.eval()(torch.randn(2, 3, 16, 16))
    assert guided._taps.outputs == {}


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
