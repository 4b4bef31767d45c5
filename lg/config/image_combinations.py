"""Combinations of values about images that cannot take effect together.

They are rules as in `lg.config.combinations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from yacs.config import CfgNode

from lg.config.rules import Fault


def image_faults(cfg: CfgNode) -> Iterator[Fault]:
    """Yield the faults of normalisation and window."""
    options, channels = cfg.DATA_LOADER, cfg.MODEL.IN_CHANNELS
    for key in ("MEAN", "STD"):
        count = len(options[key])
        if options.NORMALIZE == "imagenet" and count:
            yield f"DATA_LOADER.{key}", "set DATA_LOADER.NORMALIZE to values, or this to []."
        # auto has both or none: training fills them in.
        is_needed = options.NORMALIZE == "values" or options.MEAN or options.STD
        if options.NORMALIZE != "imagenet" and is_needed and count != channels:
            numbers = "one number" if channels == 1 else f"{channels} numbers"
            yield f"DATA_LOADER.{key}", f"it must hold {numbers}, one per channel of the images."
    window = options.WINDOW
    if window and channels != 1:
        yield (
            "DATA_LOADER.WINDOW",
            "only gray images have one: set MODEL.IN_CHANNELS 1 or this [].",
        )
    if window and not (len(window) == 2 and -math.inf < window[0] < window[1] < math.inf):
        yield "DATA_LOADER.WINDOW", "give [low, high], low below high, or [] for the whole range."
