"""TensorBoard's event file, written by the training thread itself.

SummaryWriter writes from a thread of its own: on a full disk that prints a traceback there, and
loses what comes last without a word.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from torchrec_pt.files import WriteError, cannot_write


class EventFile:
    """A new event file in `folder`.

    A write that fails is raised by the next `check`, which all ranks can make one of together:
    the loss of a curve need not end an epoch.
    """

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._failure: OSError | None = None
        self._write(Event(file_version="brain.Event:2"))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=scalar(name, value)))

    def check(self) -> None:
        """
        Raises:
            WriteError: something could not be written since the last time.
        """
        if self._failure is not None:
            raise WriteError(cannot_write(self.path, self._failure))

    def _write(self, event: Event) -> None:
        if self._failure is not None:
            return
        event.wall_time = time.time()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            self._failure = error
