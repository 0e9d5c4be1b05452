"""Every backbone and every task, and the programs of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import tiny_config
from tests.programs.answers import ALL_FEATURES, random_learner
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.learner import Learner
from torchrec_pt.programs.encoders import Program
from torchrec_pt.programs.export import programs_of
from torchrec_pt.programs.ports import FeatureInputs

# float32 sums in another order; numbers are divided by the largest answer.
CLOSE = 3e-6

BACKBONES: dict[str, dict[str, Any]] = {
    "bidirectional": {"num_layers": 2},
    "causal": {"attention": "causal", "num_layers": 2, "similarity": "cosine"},
    "rotary": {"positions": "rotary"},
    "relative_time": {"positions": "relative_time"},
    "causal relative_time": {"positions": "relative_time", "attention": "causal"},
    "without content": {"item_content": False},
    "two_tower": {"backbone": "two_tower", "hidden_dims": [8]},
    "autoencoder": {"backbone": "autoencoder", "hidden_dims": [8, 12]},
    "linear autoencoder": {"backbone": "autoencoder", "hidden_dims": [], "variational": True},
}
EVERY_LAYER = ["inner", "outer", "hadamard", "concat", "fm", "cross", "dot"]
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "inner": ("ranking", {}),
    "linear": ("ranking", {"head": "linear"}),
    "mlp": ("ranking", {"head": "mlp", "loss": "bpr", "interactions": EVERY_LAYER}),
    "ctr": ("ctr", {"positive_rating": 3, "interactions": EVERY_LAYER}),
    "focal ctr": ("ctr", {"positive_rating": 3, "loss": "focal", "attention_heads": 4}),
    "clicks alone": ("ctr", {"negatives": {"num": 2}}),
    "rating": ("rating", {"context_length": 3}),
    "long context": ("rating", {"context_length": 12, "context": "others"}),
}


def run_config(backbone: str, task: str | None) -> RunConfig:
    model = {"dim": 16, "num_layers": 1, "max_length": 6, **BACKBONES[backbone]}
    if "backbone" in model:
        del model["num_layers"]
    tasks = {} if task is None else {TASKS[task][0]: TASKS[task][1]}
    return tiny_config(Path(), ALL_FEATURES, model=model, finetune=tasks)


def learner_of(backbone: str, task: str | None, data: PreparedDataset) -> Learner:
    name = None if task is None else TASKS[task][0]
    return random_learner(run_config(backbone, task), data, name)


def programs(
    learner: Learner, data: PreparedDataset, *, is_int8: bool = False
) -> dict[str, Program]:
    features = {of: FeatureInputs(data, of) for of in ("user", "item", "interaction")}
    return programs_of(learner, features, is_int8=is_int8)
