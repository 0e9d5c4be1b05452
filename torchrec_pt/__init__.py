"""Personalized recommendation from pretrained user and item representations."""

import os

# OpenMP's threads spin while they wait. Where another process wants the cores, a step then
# takes up to ten times as long; asleep they cost nothing measurable. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from torchrec_pt.config import IndexConfig, RunConfig
from torchrec_pt.config_file import load_config

__all__ = [
    "IndexConfig",
    "ItemFilter",
    "Recommender",
    "RunConfig",
    "evaluate",
    "export_embeddings",
    "export_model",
    "export_package",
    "export_run",
    "finetune",
    "load_config",
    "prepare",
    "pretrain",
    "quantize_run",
    "run",
    "write_report",
]
__version__ = "0.1.0"

_LAZY = {
    "ItemFilter": "item_filter",
    "Recommender": "recommender",
    "evaluate": "pipeline",
    "export_embeddings": "export",
    "export_model": "programs.export",
    "export_package": "package",
    "export_run": "pipeline",
    "finetune": "pipeline",
    "prepare": "pipeline",
    "pretrain": "pipeline",
    "quantize_run": "quantization",
    "run": "pipeline",
    "write_report": "report",
}


def __getattr__(name: str) -> object:
    """Import torch and TorchRec (seconds) only when a stage is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"torchrec_pt.{_LAZY[name]}"), name)
