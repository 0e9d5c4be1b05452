"""A progress bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class StageProgress:
    """Steps of one training stage. Only the first rank shows anything.

    Args:
        console: where to draw; None draws nothing.
        start: steps done before, when resuming.
        with_lines: without a terminal, also say something between the start and the end.
    """

    def __init__(
        self,
        console: Console | None,
        name: str,
        num_steps: int,
        start: int = 0,
        *,
        with_lines: bool = True,
    ) -> None:
        self.console = console
        self.with_lines = with_lines
        self.name = name
        self.num_steps = num_steps
        self.done = start
        self._started_at = self._last_line_at = time.monotonic()
        self._start = start
        self._num_rows = 0
        self._note = ""
        self._bar: Progress | None = None

    def __enter__(self) -> StageProgress:
        if self.console is not None and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.name, total=self.num_steps, completed=self.done, text=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.console is not None and kind is None:
            seconds = time.monotonic() - self._started_at
            took = self.done - self._start
            self.console.print(
                f"{self.name}: {took} steps in {seconds:.0f} s {self._note}", highlight=False
            )

    def note(self, text: str) -> None:
        """What stands at the end of the line until the next note, such as a validation metric."""
        self._note = text

    def advance(self, loss: float, num_rows: int) -> None:
        self.done += 1
        self._num_rows += num_rows
        if self.console is None:
            return
        now = time.monotonic()
        rate = self._num_rows / max(now - self._started_at, 1e-9)
        text = f"loss {loss:.4f}  {rate:,.0f} rows/s  {self._note}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=text)
        elif self.with_lines and now - self._last_line_at >= SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            steps = self.done - self._start
            left = (now - self._started_at) / steps * (self.num_steps - self.done)
            self.console.print(
                f"{self.name}: step {self.done}/{self.num_steps}  {text}  {left:.0f} s left",
                highlight=False,
            )
