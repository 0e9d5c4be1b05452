"""Clients that ask a server one request after the other, in a process of their own.

    python serve_load.py URL NUM_CLIENTS SECONDS

reads bodies from stdin, a JSON object a line, and writes one of `Measured`. A client keeps its
connection and sends its next request when it has the answer to the last (a closed loop).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Measured:
    """Of the answers within the time; `failed` counts those whose status is not 200."""

    per_second: float
    p50_ms: float
    p99_ms: float
    answered: int
    failed: int


def measure_load(url: str, bodies: Sequence[str], num_clients: int, seconds: float) -> Measured:
    words = [sys.executable, __file__, url, str(num_clients), str(seconds)]
    done = subprocess.run(words, input="\n".join(bodies), stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return Measured(**json.loads(done.stdout))


async def _ask_until(
    end: float, url: str, bodies: Iterator[bytes], session: aiohttp.ClientSession
) -> list[tuple[float, bool]]:
    found = []
    while (start := time.perf_counter()) < end:
        async with session.post(url, data=next(bodies)) as answer:
            await answer.read()
            found.append((time.perf_counter() - start, answer.status == 200))
    return found


async def _load(url: str, bodies: Sequence[bytes], num_clients: int, seconds: float) -> Measured:
    connector = aiohttp.TCPConnector(limit=num_clients)
    headers = {"Content-Type": "application/json"}
    turn = itertools.cycle(bodies)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        start = time.perf_counter()
        clients = [_ask_until(start + seconds, url, turn, session) for _ in range(num_clients)]
        found = [one for client in await asyncio.gather(*clients) for one in client]
        took = time.perf_counter() - start
    p50, p99 = np.quantile([latency for latency, _ in found], (0.5, 0.99)) * 1000
    return Measured(
        per_second=round(len(found) / took, 1),
        p50_ms=round(float(p50), 2),
        p99_ms=round(float(p99), 2),
        answered=len(found),
        failed=sum(not is_good for _, is_good in found),
    )


def main() -> None:
    url, num_clients, seconds = sys.argv[1:]
    bodies = [line.encode() for line in sys.stdin.read().splitlines()]
    measured = asyncio.run(_load(url, bodies, int(num_clients), float(seconds)))
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
