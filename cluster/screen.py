"""What rank 0 prints appears at the driver: in order, whole, and with nothing else in between.

Ray's own forwarding of worker output mixes in every rank and every library, prefixes each
line, and loses what arrives after the driver's end. All of that stays in Ray's log files.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import ray
from ray.exceptions import RayActorError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console


class Screen(io.StringIO):
    """A file to write to from anywhere in the job; each flush is one message to the driver."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self._queue = queue

    def __reduce__(self) -> tuple[type[Screen], tuple[Queue]]:
        return Screen, (self._queue,)

    def flush(self) -> None:
        text = self.getvalue()
        if text:
            self.seek(0)
            self.truncate()
            self._queue.put(text)

    def say(self, line: str) -> None:
        self.write(f"{line}\n")
        self.flush()


class Lines(Console):
    """What the library says, without its tables: those stand in the run's report."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file=file, soft_wrap=True, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        if all(isinstance(one, str) for one in objects):
            super().print(*objects, **options)


@contextlib.contextmanager
def screen_to(file: TextIO) -> Iterator[Screen]:
    """A Screen whose text appears in `file`, all of it by the end of the block."""
    # Ray's own notes, such as that a node is gone. `log_to_driver=False` keeps the workers quiet,
    # and not these.
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def relay() -> None:
        while (text := queue.get()) is not None:
            file.write(text)
            file.flush()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield Screen(queue)
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def failures(by_rank: dict[int, Exception]) -> str:
    """One line: what ended each worker, the same words once."""
    ranks: dict[str, list[str]] = {}
    for rank, error in sorted(by_rank.items()):
        ranks.setdefault(last_line(error), []).append(str(rank))
    return "; ".join(f"rank {', '.join(who)}: {what}" for what, who in ranks.items())


def last_line(error: BaseException) -> str:
    """What happened, without the traceback that Ray's errors carry as text."""
    error = getattr(error, "health_check_failure", error)  # Ray Train's, around another
    if isinstance(error, RayActorError):
        if "node has died" in str(error):
            return "its node died"
        return "its process died, killed or out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 200, placeholder=" …") if lines else type(error).__name__
