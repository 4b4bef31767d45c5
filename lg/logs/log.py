"""The output of a run: console, `log.txt` with json_stats lines, TensorBoard. Only the main process
writes any of it."""

from __future__ import annotations

import contextlib
import decimal
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import simplejson
from tqdm import tqdm

if TYPE_CHECKING:
    from lg.logs.tensorboard import EventFile
    from lg.logs.tracker import Tracker

TAG = "json_stats: "
# Kind of line -> the kinds whose lines of the same or a later epoch it replaces.
_REPLACED = {
    "train_epoch": ("train_epoch", "test_epoch", "test_ema_epoch", "final_test"),
    "test_epoch": ("test_epoch",),
    "test_ema_epoch": ("test_ema_epoch",),
    "final_test": ("final_test",),
}


def json_line(kind: str, stats: Mapping[str, Any]) -> str:
    """Return a `json_stats: {...}` line: sorted keys, floats to 4 decimals (below 1: 4 significant
    digits), null for non-finite floats."""
    return TAG + simplejson.dumps(
        {**_decimals(stats), "_type": kind}, sort_keys=True, use_decimal=True
    )


def read_run_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the JSON lines of a log that apply to the run's present weights.

    Training an epoch again, after a crash or from the start, replaces the results of that epoch and
    of all later ones; testing it again replaces its test.
    """
    found: list[dict[str, Any]] = []
    latest = dict.fromkeys(_REPLACED, 0.0)  # epochs; most logs repeat none
    for line in read_json_lines(path):
        kinds = _REPLACED.get(line["_type"], ())
        if kinds:
            epoch = _order(line)
            if any(latest[kind] >= epoch for kind in kinds):
                found = [old for old in found if old["_type"] not in kinds or _order(old) < epoch]
            latest[line["_type"]] = epoch
        found.append(line)
    return found


def _order(line: Mapping[str, Any]) -> float:
    """Return the epoch of a line; the final test comes after all epochs."""
    return math.inf if line["_type"] == "final_test" else epoch_number(line)


def epoch_number(line: Mapping[str, Any]) -> int:
    """Return the epoch of a line, counted from 1."""
    return int(str(line["epoch"]).partition("/")[0])


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the stats of a log file in order, each with its kind under `_type`.

    Incomplete lines, as a killed run may leave them, are skipped.
    """
    found = []
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.startswith(TAG):
                with contextlib.suppress(simplejson.JSONDecodeError):
                    found.append(simplejson.loads(line.removeprefix(TAG)))
    return found


class RunLog:
    """Console, log file and TensorBoard of one run.

    The file is appended to, and created again if it was removed or rotated. Output that cannot be
    written is reported once on standard error and never ends the run.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        enabled: bool = True,
        console: bool = True,
    ) -> None:
        """Nothing is opened before there is something to write.

        Args:
            out_dir: The run's folder.
            enabled: False on all but the main process: nothing is printed or written.
            console: Whether messages are also printed.
        """
        self.out_dir = Path(out_dir)
        self.enabled = enabled
        self.console = enabled and console
        self._file = _LogFile(self.out_dir / "log.txt", self._report) if enabled else None
        self._events: EventFile | None = None
        self.tracker: Tracker | None = None  # gets the scalars too; set before `open_curves`
        self._bar: tqdm | None = None
        self._reported: set[str] = set()
        if enabled and _is_cut(self.out_dir / "log.txt"):
            self.write("")

    def open_curves(self, first_step: int) -> None:
        """Start TensorBoard and the tracker; hide TensorBoard's points from `first_step` on."""
        if self.enabled:
            from lg.logs.tensorboard import EventFile  # slow to import

            self._events = EventFile(self.out_dir / "tensorboard", first_step=first_step)
            self.scalars(first_step, {})
            if self.tracker is not None:
                self.tracker.open()

    def info(self, message: str) -> None:
        """Print a message and write it to the file."""
        self._print(message)
        self.write(message)

    def warn(self, message: str) -> None:
        """Print a warning to standard error and write it to the file."""
        self._print(f"Warning: {message}", sys.stderr)
        self.write(f"Warning: {message}")

    def stats(self, kind: str, stats: Mapping[str, Any]) -> None:
        """Write a json_stats line to the file."""
        self.write(json_line(kind, stats))

    def write(self, text: str) -> None:
        """Write text to the file only."""
        if self._file is not None:
            self._file.emit(logging.makeLogRecord({"msg": text.rstrip("\n")}))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to several curves, tag to value."""
        if self._events is not None:
            try:
                self._events.add(step, values)
            except OSError as error:
                self._report("TensorBoard curves", error)
            if self.tracker is not None:
                self.tracker.log(step, values)

    def start_bar(self, title: str, *, total: int, done: int = 0) -> None:
        """Show a progress bar if the console is a terminal."""
        if self.console and sys.stderr.isatty():
            with contextlib.suppress(OSError):  # the terminal was closed
                self._bar = tqdm(
                    total=total,
                    initial=done,
                    desc=title,
                    leave=False,
                    dynamic_ncols=True,
                    unit="step",
                )

    def advance(self, summary: str | None = None) -> None:
        """Count one step; show the summary beside the bar, or print it if there is no bar."""
        if self._bar is not None:
            try:
                self._bar.update()
                if summary:
                    self._bar.set_postfix_str(summary)
            except OSError:  # the terminal was closed
                self._bar = None
        elif summary:
            self._print(summary)

    def close_bar(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Close everything; later messages are not written."""
        self.close_bar()
        self._events = None
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _print(self, message: str, stream: TextIO | None = None) -> None:
        if self.console:
            with contextlib.suppress(OSError):  # a closed terminal, or a file on a full disk
                tqdm.write(message, file=stream or sys.stdout)
                (stream or sys.stdout).flush()

    def _report(self, what: str, error: OSError) -> None:
        """Report once, on standard error, that some output cannot be written."""
        if what not in self._reported:
            self._reported.add(what)
            with contextlib.suppress(OSError):
                tqdm.write(
                    f"Warning: {what} cannot be written ({error.strerror or error}); parts of it "
                    "will be missing. Training continues.",
                    file=sys.stderr,
                )


class _LogFile(WatchedFileHandler):
    """An appended file; errors are passed to `report(path, error)` instead of being raised."""

    def __init__(self, path: Path, report: Callable[[str, OSError], None]) -> None:
        super().__init__(path, delay=True, encoding="utf-8", errors="backslashreplace")
        self._path, self._report_error = path, report

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        assert isinstance(error, OSError), error
        self._report_error(str(self._path), error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported when it was written
            super().close()


def epoch_seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    """Return the time of all epochs of training and tests in the lines of a log."""
    return sum(line.get("time_epoch") or 0.0 for line in lines)


def format_time(seconds: float) -> str:
    """Format seconds as 1d 02h 03m, 2h 03m, 3m 04s or 5s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h {minutes:02d}m"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _is_cut(path: Path) -> bool:
    """Return whether the last line has no line end, as after a power cut."""
    try:
        with path.open("rb") as stream:
            return stream.seek(0, 2) > 0 and stream.seek(-1, 2) >= 0 and stream.read(1) != b"\n"
    except OSError:
        return False


def _decimals(value: Any) -> Any:
    """Round floats to the digits worth keeping; replace non-finite ones by None."""
    if isinstance(value, Mapping):
        return {k: _decimals(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_decimals(v) for v in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        text = f"{value:.4f}" if value == 0 or abs(value) >= 1 else f"{value:.4g}"
        return decimal.Decimal(text)
    return value
