"""TensorBoard curves that survive a killed run and a full disk.

torch's SummaryWriter writes in a thread: a killed run loses queued points, and after a disk error
the thread prints a traceback and drops all later points.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """The scalars of one run, in a file of its own beside those of earlier runs."""

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int) -> None:
        """Name the file; `add` creates it.

        Args:
            folder: The folder that TensorBoard reads.
            first_step: Points from this step on in older files of the folder are hidden.
        """
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = Path(folder) / name
        start = SessionLog(status=SessionLog.START)
        self._header = _records(
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=first_step, session_log=start),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append a point to several curves: all of the points are on the disk afterwards, or none.

        Args:
            step: The position on the x axis.
            values: Tag to value.

        Raises:
            OSError: The points cannot be written.
        """
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        records = _records(event)
        self._path.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been removed
        with open(self._path, "ab", buffering=0) as file:
            size = file.tell()
            records = records if size else self._header + records
            try:
                while records:
                    records = records[file.write(records) :]
            except OSError:
                file.truncate(size)  # TensorBoard reads nothing after a cut record
                raise


def _records(*events: Event) -> bytes:
    """Encode events as in a file, each with its length and checksums."""
    stream = BytesIO()
    writer = RecordWriter(stream)
    for event in events:
        writer.write(event.SerializeToString())
    return stream.getvalue()
