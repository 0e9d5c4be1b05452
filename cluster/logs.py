"""What happened, for machines: one JSON object a line, in one file a stage and rank.

<run_dir>/logs/<stage>-<rank>.jsonl        what a rank did and measured
<run_dir>/logs/<stage>-driver.jsonl        when the stage began and ended, workers that it lost
"""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

FOLDER = "logs"
DRIVER = "driver"  # stands where ranks have their number


class Log:
    """Lines that all name the job, the stage and the rank.

    Lines are appended whole, so that they outlive a process that is killed.
    """

    def __init__(self, run_dir: Path, *, job: str, stage: str, rank: int | str) -> None:
        self.path = run_dir / FOLDER / f"{stage.replace(':', '-')}-{rank}.jsonl"
        self.rank = rank
        self._names = {"job": job, "stage": stage, "rank": rank}

    def write(self, event: str, *, step: int | None = None, **values: Any) -> None:
        """One line.

        Args:
            step: of the optimizer, where the event belongs to one.
            values: what JSON can hold; numbers that are not finite become null.
        """
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, **self._names, "step": step, "event": event, **_plain(values)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
