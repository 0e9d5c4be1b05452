"""Whether this machine has what the library needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "ray", "polars", "pyarrow")


def report(console: Console) -> bool:
    """Print the findings; False when something needed is missing or broken."""
    table = Table(show_header=False)
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if not name.startswith("fbgemm"):
                table.add_row(name, "[red]missing[/red]; run: make setup")
    table.add_row("cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()}")
    table.add_row("CPU vectors", torch.backends.cpu.get_cpu_capability())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gigabytes = found.total_memory / 2**30
        table.add_row(
            f"GPU {index}", f"{found.name}, {gigabytes:.0f} GiB, sm_{found.major}{found.minor}"
        )
    if not torch.cuda.is_available():
        table.add_row("GPU", "none")
    checks = {"kernels": _check_kernels, "TorchRec lookup": _check_lookup}
    sound = True
    for name, check in checks.items():
        try:
            table.add_row(name, check())
        except Exception as error:  # any failure is a finding here
            sound = False
            table.add_row(name, f"[red]{str(error).splitlines()[0]}[/red]")
    console.print(table)
    return sound


def _check_kernels() -> str:
    from torchrec_pt import ops
    from torchrec_pt.ops.infonce import infonce_loss
    from torchrec_pt.ops.reference import infonce_loss_rows

    query, keys = torch.randn(7, 16), torch.randn(9, 16)
    target = torch.arange(7)
    difference = abs(
        float(infonce_loss(query, keys, target))
        - float(infonce_loss_rows(query, keys, target).mean())
    )
    if difference > 1e-5:
        raise RuntimeError(f"infonce is off by {difference:.1e}; rebuild with make setup")
    info = ops.build_info()
    return f"built by {info['compiler']}, CUDA {info['cuda_archs']}; infonce agrees with float64"


def _check_lookup() -> str:
    from torchrec_pt.data.batch import lookup_ids
    from torchrec_pt.models.item_table import ItemTable

    table = ItemTable(10, 8)
    table.collection.to_empty(device=torch.device("cpu"))
    torch.nn.init.ones_(table.weight)
    if table(lookup_ids(torch.tensor([3, 3, 9]))).sum().item() != 24:
        raise RuntimeError("a table of ones does not give ones; reinstall torchrec and fbgemm")
    return "works"
