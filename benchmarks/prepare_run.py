"""One preparation by the library, in a process of its own: a line of JSON with time and memory.

    python benchmarks/prepare_run.py LOG FORMAT OUT

Of a log of ingest_log.py: users, items and times, split by leave-one-out. The time leaves out the
imports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from turn_costs import MIB, status_bytes

from torchrec_pt.config import DataConfig
from torchrec_pt.data.prepare import prepare


def main() -> None:
    log, format, out = sys.argv[1:]
    data = {"path": log, "format": format, "columns": {"timestamp": "timestamp"}, "prepared": out}
    config = DataConfig.model_validate(data)
    idle = status_bytes("VmHWM")
    started, cpu_started = time.perf_counter(), time.process_time()
    prepare(config, Path(out), seed=0)
    found = {
        "wall_s": round(time.perf_counter() - started, 3),
        "cpu_s": round(time.process_time() - cpu_started, 3),
        "peak_mib": round(status_bytes("VmHWM") / MIB, 1),
        "idle_mib": round(idle / MIB, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
