"""Class activation maps (Grad-CAM, arXiv 1610.02391): the regions that support the predicted class.

Shapes: B images, S image side in pixels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lg.models.backbone import Backbone
from lg.models.taps import map_shapes
from lg.tools.report.attention import MIN_SIDE


def class_activation(model: Backbone, images: Tensor) -> tuple[int, Tensor] | None:
    """Return Grad-CAM maps of the predicted classes, from the last block that affects them.

    Where a class token is classified, the patches of the last block do not affect the logits. Maps
    of at least MIN_SIDE x MIN_SIDE positions are preferred.

    Args:
        model: In evaluation mode.
        images: [B, C, S, S], on the model's device.

    Returns:
        (block, [B, S, S], each map from 0 to 1), or None if no map affects them.

    Raises:
        ImportError: pytorch-grad-cam is not installed.
    """
    from pytorch_grad_cam import GradCAM  # an extra
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with torch.no_grad():
        predicted = model(images).argmax(dim=1).tolist()
    targets = [ClassifierOutputTarget(label) for label in predicted]
    shapes = map_shapes(
        model,
        range(len(model.blocks)),
        image_size=images.shape[-1],
        in_channels=images.shape[1],
    )
    for index in sorted(range(len(shapes)), key=lambda k: (min(shapes[k][1:]) < MIN_SIDE, -k)):
        layout = model.layouts[index]
        if layout.item is not None:  # the package reads single outputs
            continue
        reshape = partial(model.to_map, index)
        with GradCAM(model, [model.blocks[index]], reshape_transform=reshape) as explain:
            maps = torch.from_numpy(explain(images.clone(), targets))
        if bool((maps.amax(dim=(1, 2)) > 0).any()):
            return index, maps
    return None
