"""What a run shows and keeps: console, `log.txt` with json_stats lines, TensorBoard. Only the main
process speaks."""

from __future__ import annotations

import contextlib
import decimal
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import simplejson
from tqdm import tqdm

from lg.files.atomic import GrowingFile

if TYPE_CHECKING:
    from lg.logs.tensorboard import Board

TAG = "json_stats: "


def json_line(kind: str, stats: Mapping[str, Any]) -> str:
    """One `json_stats: {...}` line: sorted keys, floats to 4 decimals (below 1, to 4 significant
    digits)."""
    return TAG + simplejson.dumps(
        {**_decimals(stats), "_type": kind}, sort_keys=True, use_decimal=True
    )


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """All stats of a log file, in order, each with its kind under `_type`.

    A line that is cut short, as a killed run may leave one, is passed over.
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

    The file is appended to, and made again where it was removed. TensorBoard points beyond
    `first_step`, left by a run that went on from an earlier checkpoint, are hidden. What cannot be
    shown or kept is missing there; a log never ends a run.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        enabled: bool = True,
        console: bool = True,
        file_name: str = "log.txt",
    ) -> None:
        """Opens nothing before there is something to write.

        Args:
            out_dir: the run's folder.
            enabled: False on all but the main process: nothing is shown or written.
            console: whether messages are also printed.
            file_name: of the log in `out_dir`.
        """
        self.out_dir = Path(out_dir)
        self.console = enabled and console
        self._file = GrowingFile(self.out_dir / file_name) if enabled else None
        self._board: Board | None = None
        self._bar: tqdm | None = None
        self._faults: set[str] = set()  # what the user knows of
        self.enabled = enabled
        if enabled and _is_cut(self.out_dir / file_name):
            self._write("")

    def open_board(self, first_step: int) -> None:
        """Starts TensorBoard; steps from `first_step` on of earlier runs in the folder are
        hidden."""
        if self.enabled:
            from lg.logs.tensorboard import Board  # slow to import

            self._board = Board(self.out_dir / "tensorboard", first_step=first_step)
            self._note(self._board.fault, "TensorBoard curves")

    def say(self, message: str) -> None:
        """A line for people: console and file."""
        self._print(message)
        self._write(message)

    def warn(self, message: str) -> None:
        """A warning for people: standard error and file."""
        self._print(f"Warning: {message}", sys.stderr)
        self._write(f"Warning: {message}")

    def stats(self, kind: str, stats: Mapping[str, Any]) -> None:
        """A json_stats line in the file."""
        self._write(json_line(kind, stats))

    def write(self, text: str) -> None:
        """Text for the file alone."""
        self._write(text)

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """TensorBoard scalars, tag -> value."""
        if self._board is not None:
            self._note(self._board.add(step, values), "TensorBoard curves")

    def start_bar(self, title: str, *, total: int, done: int = 0) -> None:
        """Shows a progress bar where the console is a terminal."""
        if self.console and sys.stderr.isatty():
            shown = {"leave": False, "dynamic_ncols": True, "unit": "step"}
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar = tqdm(total=total, initial=done, desc=title, **shown)

    def advance(self, summary: str | None = None) -> None:
        """One step done; `summary`, when given, stands beside the bar, or on a line of its own
        where there is no bar."""
        if self._bar is not None:
            try:
                self._bar.update()
                if summary:
                    self._bar.set_postfix_str(summary)
            except OSError:  # the terminal is gone
                self._bar = None
        elif summary:
            self._print(summary)

    def end_bar(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Closes everything."""
        self.end_bar()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _print(self, message: str, stream: TextIO | None = None) -> None:
        if self.console:
            with contextlib.suppress(OSError):  # a terminal that is gone, a file on a full disk
                tqdm.write(message, file=stream or sys.stdout)
                (stream or sys.stdout).flush()

    def _write(self, text: str) -> None:
        if self._file is not None:
            # A name or message may hold what UTF-8 cannot; a log never stops a run for that.
            piece = (text.rstrip("\n") + "\n").encode("utf-8", errors="backslashreplace")
            self._note(self._file.append(piece), str(self._file.path))

    def _note(self, fault: OSError | None, what: str) -> None:
        """Says once what is not written, on standard error, whatever the console shows."""
        if fault is not None and what not in self._faults:
            self._faults.add(what)
            with contextlib.suppress(OSError):
                tqdm.write(
                    f"Warning: {what} cannot be written ({fault.strerror or fault}); parts will be "
                    "missing, and training goes on.",
                    file=sys.stderr,
                )


def format_time(seconds: float) -> str:
    """Seconds as 1d 02h 03m, 2h 03m, 3m 04s or 5s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h {minutes:02d}m"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _is_cut(path: Path) -> bool:
    """Whether the last line has no end, as a machine that lost its power may leave it."""
    try:
        with path.open("rb") as stream:
            return stream.seek(0, 2) > 0 and stream.seek(-1, 2) >= 0 and stream.read(1) != b"\n"
    except OSError:
        return False


def _decimals(value: Any) -> Any:
    """Floats as decimals of the digits worth keeping; null for what JSON has no number for."""
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
