"""Submit a run to a cluster: LAUNCH.MODE slurm, or submitit_local, which runs the same job here.

A job that is preempted or reaches its time limit saves, is requeued and resumes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from lg.errors import ConfigError, first_line


class Job:
    """The work of each process of a job; submitit stores it and runs it again after a requeue.

    Attributes:
        entry: Called in each process, once processes can find each other.
    """

    def __init__(self, entry: Callable[[], None]) -> None:
        self.entry = entry

    def __call__(self) -> None:
        """Call `entry`; if the cluster stopped it, make submitit requeue the job."""
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            self.entry()
        except SystemExit as end:
            for signum in cluster_signals():
                if end.code == 128 + signum:
                    signal.raise_signal(signum)  # for submitit's handler, now that all is saved
                    time.sleep(10)  # the first process requeues the job, which ends the others
            raise

    def checkpoint(self) -> Any:
        """Return what submitit runs after a requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    entry: Callable[[], None],
    *,
    mode: str,
    folder: str,
    resources: Mapping[str, Any],
    max_retries: int,
) -> str:
    """Submit a job in which each process calls `entry()`.

    Args:
        entry: A function that can be pickled.
        mode: slurm or submitit_local.
        folder: Where the job's output goes, in files whose names begin with the job number.
        resources: What the job requests, as `submitit.AutoExecutor.update_parameters` takes it.
        max_retries: How often the job is requeued at its time limit; preemptions do not count.

    Returns:
        A line with the job number and the file of its output.

    Raises:
        ConfigError: submitit is not installed, or the cluster is unavailable or rejects the job.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            f"LAUNCH.MODE is {mode}, which needs submitit: pip install -e '.[slurm]', or set "
            "LAUNCH.MODE local."
        ) from None
    cluster = "slurm" if mode == "slurm" else "local"
    try:
        executor = submitit.AutoExecutor(
            folder=folder, cluster=cluster, **{f"{cluster}_max_num_timeout": max_retries}
        )
        executor.update_parameters(**resources)
        job = executor.submit(Job(entry))
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(
            f"LAUNCH.MODE is {mode}, but the job could not be submitted ({first_line(error)}): "
            "check LAUNCH.* and that this machine can reach the cluster, or set LAUNCH.MODE local."
        ) from None
    return f"Submitted job {job.job_id}. Its output: {job.paths.stdout}"


def cluster_signals() -> tuple[int, ...]:
    """Return the signals that a cluster sends before it ends a job of submitit."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return ()
    return (getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"),)
