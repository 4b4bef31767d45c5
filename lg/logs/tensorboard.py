"""TensorBoard curves, each point on the disk at once.

TensorBoard's own writer keeps points for up to two minutes, which a killed run loses for good, and
ends the run when the disk is full.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lg.files.atomic import GrowingFile


class Board:
    """The curves of one run, in a file of their own beside those of earlier runs."""

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int) -> None:
        """Writes the head of the file.

        Args:
            folder: where TensorBoard looks.
            first_step: points from here on in the folder's other files are hidden.
        """
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        head = _records(
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )
        self._file = GrowingFile(Path(folder) / name, header=head)
        self.fault = self._file.append(b"")

    def add(self, step: int, values: Mapping[str, float]) -> OSError | None:
        """Points of several curves, tag -> value; returns what the disk refused."""
        now = time.time()
        return self._file.append(
            _records(
                *(
                    Event(
                        wall_time=now,
                        step=step,
                        summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]),
                    )
                    for tag, value in values.items()
                )
            )
        )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Bytes(bytearray):
    """A stream into memory."""

    write = bytearray.extend


def _records(*events: Event) -> bytes:
    """Events as they stand in a file, each with its length and checksums."""
    found = _Bytes()
    writer = RecordWriter(found)
    for event in events:
        writer.write(event.SerializeToString())
    return bytes(found)
