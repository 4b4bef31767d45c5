"""Builds the preprocessing of images: the facts that tests, prediction and exports share."""

from __future__ import annotations

from yacs.config import CfgNode

from lg.augment.preprocessing import Preprocessing


def build_preprocessing(cfg: CfgNode, *, training: bool = False) -> Preprocessing:
    """Build the preprocessing of tests and prediction, or that of training images."""
    resize = cfg.TRAIN.RESIZE if training else cfg.TEST.RESIZE or cfg.TRAIN.RESIZE
    return Preprocessing(image_size=cfg.MODEL.IMG_SIZE, resize=resize)
