#!/usr/bin/env python3
"""Compare lg with the results of the published code and print the largest differences.

    python benchmarks/parity.py                  # every architecture, about a minute on two cores
    python benchmarks/parity.py pvt-ti t2t-7     # some of them

Both sides have the same weights, drawn from the names of the tensors, and the same images. The
numbers of the published code are in tests/reference. Writes parity.json. The exit status is 1 if a
difference exceeds its limit (LIMITS below).
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.report import TRANSFORMERS, config_path, make_parser, write_json  # noqa: E402
from lg import builders  # noqa: E402
from lg.guidance import FrozenTeacher  # noqa: E402
from tests.reference_fill import fill, reference_input  # noqa: E402

REFERENCE = ROOT / "tests" / "reference"
LABELS = torch.tensor([3, 42])
NUM_STEPS = 3  # of five recorded steps; rounding errors grow with every step
# The guide is filled below; stochastic depth would need the same random draws.
EXACT = ["DISTILLATION.TEACHER_WEIGHTS", "null", "TRANSFORMER.DROP_PATH_RATE"]
MODELS = (*TRANSFORMERS, "t2t-14", "deit-ti_logit", "r-18", "r-56")
# The recorded gradient norms of CNNs contain float32 rounding errors, amplified by batch norms.
LIMITS = {"logits": 1e-4, "features": 1e-4, "losses": 1e-4, "steps": 1e-3, "steps of CNNs": 2e-3}


@dataclass
class Parity:
    """The largest differences of one architecture; None if nothing is recorded.

    Attributes:
        model: One of MODELS.
        parameters: Number of parameters.
        keys: State dict keys, their shapes and their order are equal.
        groups: The parameter groups of the optimiser are equal.
        logits: Absolute.
        features: Absolute, over all blocks.
        losses: Relative, of the imitation loss by transform.
        steps: Relative, of losses and gradient norm in the first steps, by config.
    """

    model: str
    parameters: int
    keys: bool
    groups: bool | None
    logits: float
    features: float
    losses: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)

    def holds(self) -> bool:
        """Return whether every difference is within its limit."""
        steps = "steps of CNNs" if self.model.startswith("r-") else "steps"
        worst = {
            "logits": self.logits,
            "features": self.features,
            "losses": max(self.losses.values(), default=0.0),
            steps: max(self.steps.values(), default=0.0),
        }
        within = all(error <= LIMITS[kind] for kind, error in worst.items())
        return within and self.keys and self.groups is not False


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="*", choices=MODELS, metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/parity.json"))
    args = parser.parse_args()
    print(
        f"{'model':<14}{'parameters':>11}  {'keys':<6}{'groups':<8}{'logits':>9}{'features':>10}"
        f"{'linear':>10}{'attention':>11}{'similarity':>12}{'steps':>9}{'guided':>9}"
    )
    rows = []
    for name in args.models or MODELS:
        rows.append(measure(name))
        print(line(rows[-1]), flush=True)
    print("\nlogits, features: absolute; losses by transform, first three steps: relative.")
    write_json(args.out, limits=LIMITS, rows=[asdict(r) for r in rows])
    missed = [row.model for row in rows if not row.holds()]
    sys.exit(f"beyond the limits: {', '.join(missed)}" if missed else 0)


def measure(name: str) -> Parity:
    """Measure one architecture."""
    _, guided, _, _ = build(name)
    logits, features = forward_errors(name)
    return Parity(
        model=name,
        parameters=sum(p.numel() for p in guided.student.parameters()),
        keys=keys_equal(name),
        groups=groups_equal(name) if has_groups(name) else None,
        logits=logits,
        features=features,
        losses={t: loss_error(name, t) for t in transforms(name)},
        steps={kind: step_error(name, kind) for kind in step_kinds(name)},
    )


def line(row: Parity) -> str:
    """Return one row of the table."""

    def shown(value: float | None, width: int) -> str:
        return f"{'-' if value is None else f'{value:.1e}':>{width}}"

    words = {True: "equal", False: "DIFFER", None: "-"}
    return (
        f"{row.model:<14}{row.parameters:>11,}  {words[row.keys]:<6}{words[row.groups]:<8}"
        f"{shown(row.logits, 9)}{shown(row.features, 10)}{shown(row.losses.get('linear'), 10)}"
        f"{shown(row.losses.get('attention'), 11)}{shown(row.losses.get('similarity'), 12)}"
        f"{shown(row.steps.get('base'), 9)}{shown(row.steps.get('ours'), 9)}"
    )


def stem(name: str, kind: str = "ours") -> str:
    """Return the name of a model's file of numbers, without its suffix."""
    if name.startswith("r-"):
        return f"{name}_c100"
    return f"{name.removesuffix('_logit')}_c100_{kind}" + "_logit" * name.endswith("_logit")


def numbers(name: str, kind: str = "ours", ending: str = ".npz") -> Any:
    """Load a file of recorded numbers."""
    return np.load(REFERENCE / f"{stem(name, kind)}{ending}")


def build(name: str, kind: str = "ours", *options: str) -> tuple:
    """Return config, student, guide and loss of a model, with the weights of the reference."""
    rates = "[0.0,0.0,0.0]" if name == "cvt-13" else "0.0"
    opts = [*EXACT, rates, *options]
    if name.endswith("_logit"):
        opts += ["DISTILLATION.ENABLE_LOGIT", "True"]
    cfg = lg.load_config(config_path(name.removesuffix("_logit"), "c100", kind), opts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guide is filled below
        guided, guide, loss = lg.build_guided(cfg)
    models = [(guided.student, "")]
    if isinstance(guide, FrozenTeacher):
        models.append((guide.model, "teacher."))
    for model, prefix in models:
        shapes = {k: v.shape for k, v in lg.published_state_dict(model).items()}
        lg.load_published_state_dict(model, fill(shapes, prefix=prefix))
    for i, head in enumerate(guided.heads):
        own = f"feature_transforms.{i}."
        drawn = fill({own + k: v.shape for k, v in head.state_dict().items()})
        head.load_state_dict({k.removeprefix(own): v for k, v in drawn.items()})
    return cfg, guided, guide, loss


def keys_equal(name: str) -> bool:
    """Return whether the published state dict has the recorded keys and shapes, in order."""
    _, guided, _, _ = build(name)
    file = stem(name, "ours" if name.endswith("_logit") else "base")
    recorded = json.loads((REFERENCE / f"{file}.keys.json").read_text())
    state = lg.published_state_dict(guided.student)
    return [(k, list(v.shape)) for k, v in state.items()] == [*recorded.items()]


def has_groups(name: str) -> bool:
    """Return whether the parameter groups of a model are recorded."""
    return stem(name, "base") in json.loads((REFERENCE / "param_groups.json").read_text())


def groups_equal(name: str) -> bool:
    """Return whether the optimiser's groups contain the recorded parameters."""
    cfg, guided, _, _ = build(name, "base")
    groups = {
        group["name"]: sorted(
            guided.student.keys.published(own.removeprefix("student.net."))
            for own in group["parameter_names"]
        )
        for group in builders.build_optimizer(cfg, guided).param_groups
    }
    return groups == json.loads((REFERENCE / "param_groups.json").read_text())[stem(name, "base")]


@torch.no_grad()
def forward_errors(name: str) -> tuple[float, float]:
    """Return the largest difference of logits, and of maps (values, mean, standard deviation).

    Raises:
        ValueError: The maps differ in number or shape.
    """
    cfg, guided, _, _ = build(name)
    model, recorded = guided.student.eval(), numbers(name)
    images = reference_input(cfg.MODEL.IMG_SIZE)
    logits, maps = lg.feature_maps(model, images, range(len(model.blocks)))
    shapes = [recorded[k].tolist() for k in recorded.files if k.endswith("_shape")]
    if [list(m.shape) for m in maps] != shapes:
        raise ValueError(f"{name} has maps {[list(m.shape) for m in maps]}, recorded: {shapes}")
    worst = 0.0
    for index, feature in enumerate(maps):
        key = f"feature_{index:02d}"
        spread = np.array([feature.mean().item(), feature.std(correction=0).item()])
        part = feature[:, :4, :3, :3].numpy()
        worst = max(worst, float(np.abs(spread - recorded[f"{key}_mean_std"]).max()))
        worst = max(worst, float(np.abs(part - recorded[f"{key}_slice"]).max()))
    return float(np.abs(logits.numpy() - recorded["logits"]).max()), worst


def _loss_key(transform: str) -> str:
    return f"guidance_loss_{'eval' if transform == 'linear' else transform}"


def transforms(name: str) -> list[str]:
    """Return the recorded imitation losses; the published code has no similarity for PiT."""
    return [t for t in ("linear", "attention", "similarity") if _loss_key(t) in numbers(name).files]


@torch.no_grad()
def loss_error(name: str, transform: str) -> float:
    """Return the relative difference of the summed imitation loss."""
    cfg, guided, guide, loss = build(name, "ours", "DISTILLATION.INTER_TRANSFORM", transform)
    images = reference_input(cfg.MODEL.IMG_SIZE)
    guided.train().student.eval()  # as recorded: with maps, batch norms frozen
    logits, maps = guided(images)
    targets = F.one_hot(LABELS, cfg.MODEL.NUM_CLASSES).float()
    total = loss(logits, maps, targets, *guide(images, None, None))["inter"].item()
    expected = float(numbers(name)[_loss_key(transform)])
    return abs(total - expected) / abs(expected)


def step_kinds(name: str) -> list[str]:
    """Return the kinds of config whose first steps are recorded."""
    kinds = ("base", "ours")
    found = [k for k in kinds if (REFERENCE / f"{stem(name, k)}.trajectory.npz").exists()]
    return found[:1] if name.startswith("r-") else found


def step_error(name: str, kind: str) -> float:
    """Return the largest relative difference of losses and gradient norm in the first steps.

    CNNs run in float64: with batches of two, 55 batch norms and rectifiers amplify float32 rounding
    errors to percents after one step. float64 reproduces the recorded numbers.
    """
    dtype = torch.float64 if name.startswith("r-") else torch.float32
    rows = first_steps(name, kind, dtype=dtype)
    expected = numbers(name, kind, ".trajectory.npz")["values"][:NUM_STEPS]
    return float(np.nanmax(np.abs(rows - expected) / np.maximum(np.abs(expected), 1e-12)))


def first_steps(name: str, kind: str, *, dtype: torch.dtype) -> np.ndarray:
    """Return [NUM_STEPS, 4]: classification loss, imitation loss, total loss, gradient norm."""
    cfg, guided, guide, loss = build(name, kind)
    guided.to(dtype).train()
    optimizer = builders.build_optimizer(cfg, guided)
    images = reference_input(cfg.MODEL.IMG_SIZE).to(dtype)
    targets = F.one_hot(LABELS, cfg.MODEL.NUM_CLASSES).to(dtype)
    rows = []
    for _ in range(NUM_STEPS):
        logits, maps = guided(images)
        terms = loss(logits, maps, targets, *guide(images, None, None))
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in guided.parameters() if p.grad is not None]
        )
        optimizer.step()
        rows.append([v.item() for v in (terms["cls"], terms["inter"], terms["loss"], norm)])
    return np.array(rows)


if __name__ == "__main__":
    main()
