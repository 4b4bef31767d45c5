"""Train under torchrun; in the first start the second process is killed in its third epoch.

`killed_once.py CONFIG OUT_DIR [KEY VALUE ...]`
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

import lg
from lg import trainer

if __name__ == "__main__":
    config, out_dir, *opts = sys.argv[1:]
    torch.set_num_threads(1)
    train_step, first_start = trainer.train_step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def watched(run: Any, *args: Any, **kwargs: Any) -> Any:
        result = train_step(run, *args, **kwargs)
        if first_start and run.world.rank == 1 and run.progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.train_step = watched  # type: ignore[attr-defined]
    trainer.train(lg.load_config(config, [*opts, "OUT_DIR", out_dir]))
