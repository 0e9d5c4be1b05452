"""Programs asked in a process that has torch, and nothing of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

# Of each case: the file, the inputs in order, and where its answers go.
SCRIPT = """
import sys, torch
cases = torch.load(sys.argv[1])
found = []
for file, given in cases:
    if file.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(file)
        names = [port.name for port in session.get_inputs()]
        def ask(*given):
            by_name = {name: one.numpy() for name, one in zip(names, given)}
            return torch.from_numpy(session.run(None, by_name)[0])
    elif file.endswith(".aoti.pt2"):
        ask = torch._inductor.aoti_load_package(file)
    else:
        ask = torch.export.load(file).module()
    # Whole, and its first row alone: sizes are free.
    found.append((ask(*given), ask(*[one[:1] for one in given])))
torch.save(found, sys.argv[1])
ours = {"torchrec_pt", "torchrec", "fbgemm_gpu"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
"""


def answers_alone(
    cases: list[tuple[Path, list[Tensor]]], folder: Path
) -> list[tuple[Tensor, Tensor]]:
    """Of each program file and its inputs: the answer, and that of the first row alone."""
    path = folder / "cases.pt"
    torch.save([(str(file), given) for file, given in cases], path)
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[tuple[Tensor, Tensor]] = torch.load(path)
    return found
