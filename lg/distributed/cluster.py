"""Handing a run to a cluster: LAUNCH.MODE slurm, or submitit_local, which runs the same job here.

A job that the cluster takes back, or whose time is up, saves, goes back into the queue and goes on
from its checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lg.errors import ConfigError


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Attributes:
        name: Of the job.
        num_processes: In all, one a GPU.
        max_per_node: Processes that one machine takes.
        on_gpus: Whether each process needs a GPU.
        cpus: Cores a process.
        memory_gb: Memory a process, GB.
        minutes: Time limit.
        max_retries: How often it goes on when its time is up; preemptions do not count.
        partition: Of the cluster.
        gpu_type: Feature that machines must have; empty: any.
        comment: For the cluster's people.
        email: Told when the job ends; empty: nobody.
    """

    name: str
    num_processes: int
    max_per_node: int
    on_gpus: bool
    cpus: int
    memory_gb: int
    minutes: int
    max_retries: int
    partition: str
    gpu_type: str
    comment: str
    email: str

    @property
    def per_node(self) -> int:
        """Processes on each machine."""
        return min(self.num_processes, self.max_per_node)

    def parameters(self) -> dict[str, Any]:
        """The same under submitit's names."""
        asked: dict[str, Any] = {
            "name": self.name,
            "nodes": self.num_processes // self.per_node,
            "tasks_per_node": self.per_node,
            "gpus_per_node": self.per_node if self.on_gpus else 0,
            "cpus_per_task": self.cpus,
            "mem_gb": self.memory_gb * self.per_node,
            "timeout_min": self.minutes,
            "slurm_partition": self.partition,
        }
        if not self.on_gpus:
            del asked["gpus_per_node"]
        if self.comment:
            asked["slurm_comment"] = self.comment
        if self.gpu_type and self.on_gpus:
            asked["slurm_constraint"] = self.gpu_type
        if self.email:
            asked["slurm_additional_parameters"] = {"mail-user": self.email, "mail-type": "END"}
        return asked


class Job:
    """What each process of a job does. submitit stores it, and runs it again when the job goes on.

    Attributes:
        entry: Called with `args` in each process, once they can find each other.
        args: Plain values.
    """

    def __init__(self, entry: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.entry, self.args = entry, args

    def __call__(self) -> None:
        """Does the work; after a stop that the cluster asked for, has submitit requeue the job."""
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            self.entry(*self.args)
        except SystemExit as end:
            asked = next((s for s in cluster_signals() if end.code == 128 + s), None)
            if asked is None:
                raise
            signal.raise_signal(asked)  # submitit's handler, which saving had to come before
            time.sleep(10)  # the first process requeues the job meanwhile, which ends the others
            raise

    def checkpoint(self) -> Any:
        """What submitit stores to go on with."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    entry: Callable[..., None],
    args: tuple[Any, ...],
    *,
    mode: str,
    folder: str,
    resources: Resources,
) -> str:
    """Submits a job in which each process calls `entry(*args)`.

    Args:
        entry: A function of this project.
        args: Plain values.
        mode: slurm or submitit_local.
        folder: Gets the job's output, in files that begin with its number.
        resources: What it asks for.

    Returns:
        A line that says which job it is and where its output goes.

    Raises:
        ConfigError: submitit is not installed, or the cluster is not there or refuses.
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
            folder=folder, cluster=cluster, **{f"{cluster}_max_num_timeout": resources.max_retries}
        )
        executor.update_parameters(**resources.parameters())
        job = executor.submit(Job(entry, args))
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ConfigError(
            f"LAUNCH.MODE is {mode}, but the job could not be submitted ({reason}): check LAUNCH.* "
            "and that this machine can reach the cluster, or set LAUNCH.MODE local."
        ) from None
    return f"Submitted job {job.job_id}. Its output: {job.paths.stdout}"


def cluster_signals() -> tuple[int, ...]:
    """What a cluster sends before it takes the machine away, in a job that submitit runs."""
    if "SUBMITIT_EXECUTOR" not in os.environ or sys.platform == "win32":
        return ()
    return (getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"),)
