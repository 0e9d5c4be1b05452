"""Programs that sleep until they are asked for a turn: a line in, a line of JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Contestant:
    """A program of Python that calls `take_turns_asked`, on the CPU with one thread by default.

    `answer` waits for it, first of all until it is ready: RuntimeError if it ends before.

    Args:
        python: the interpreter, for peers in an environment of their own.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: object,
        python: str | Path = sys.executable,
        **environment: object,
    ) -> None:
        settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1, **environment}
        self.process = subprocess.Popen(
            [str(python), str(program), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {name: str(value) for name, value in settings.items()},
        )

    def send(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print, too
                return json.loads(line)
        raise RuntimeError(f"{self.process.args}: exit status {self.process.wait()}")

    def ask(self, word: str) -> dict[str, Any]:
        self.send(word)
        return self.answer()

    def close(self) -> None:
        """The end of its input ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self) -> None:
        self.process.wait()


def take_turns_asked(ready: dict[str, Any], turn: Callable[[str], dict[str, Any]]) -> None:
    """The other end: say that it is ready, then answer each word until there are no more."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(line.strip())), flush=True)
