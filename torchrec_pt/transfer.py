"""From a pretraining checkpoint into a model that is to be fine-tuned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torchrec.distributed import DistributedModelParallel

from torchrec_pt import checkpoint


@dataclass(frozen=True)
class TransferReport:
    """Names of tensors: taken over, only in the model, only in the checkpoint."""

    loaded: list[str]
    new: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        """By module: "loaded 29 (backbone 29) tensors; new 14 (ctr 14); dropped 0"."""

        def count(names: list[str]) -> str:
            modules = Counter(_module_of(name) for name in names)
            listed = ", ".join(f"{module} {num}" for module, num in modules.items())
            return f"{len(names)} ({listed})" if names else "0"

        return (
            f"loaded {count(self.loaded)} tensors; new {count(self.new)}; "
            f"dropped {count(self.dropped)}"
        )


def _module_of(tensor: str) -> str:
    """model.backbone.… -> backbone, model.objectives.ctr.… -> ctr"""
    return tensor.removeprefix("model.").removeprefix("objectives.").split(".")[0]


def load_pretrained(path: Path, model: DistributedModelParallel) -> TransferReport:
    """Take over every tensor that the checkpoint holds under the same name.

    Raises:
        CheckpointError: a name in common with another shape, or no name in common.
    """
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    held = {name for name in checkpoint.shapes(path) if name.startswith("model.")}
    loaded = sorted(held & state.keys())
    if not loaded:
        raise checkpoint.CheckpointError(
            f"{path}: has no parameter in common with the model; pretrain the same backbone"
        )
    checkpoint.load(path, {name: state[name] for name in loaded})
    return TransferReport(loaded, sorted(state.keys() - held), sorted(held - state.keys()))
