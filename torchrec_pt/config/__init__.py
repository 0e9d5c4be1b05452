"""Every configuration type of a run.

A run is one TOML file. Each type is a frozen pydantic model that forbids unknown keys, so a
misspelt key is an error that names its neighbour.
"""

from __future__ import annotations

from torchrec_pt.config.data import (
    Columns,
    DataConfig,
    Feature,
    Filters,
    GivenSplit,
    LeaveOneOutSplit,
    RatioSplit,
    Split,
    TemporalSplit,
)
from torchrec_pt.config.export import ExportConfig, IndexConfig
from torchrec_pt.config.model import (
    AutoencoderConfig,
    BackboneConfig,
    ModelConfig,
    TableConfig,
    TransformerConfig,
    TwoTowerConfig,
)
from torchrec_pt.config.objectives import (
    Autoencoder,
    Contrastive,
    Denoising,
    ItemPrediction,
    MaskedItem,
    Negatives,
    NextItem,
    NextSegment,
    Objective,
    PredictionNegatives,
)
from torchrec_pt.config.run import (
    Candidates,
    EvaluateConfig,
    RunConfig,
    ShowConfig,
)
from torchrec_pt.config.section import Section
from torchrec_pt.config.tasks import (
    CtrConfig,
    FinetuneConfig,
    InteractionName,
    PairConfig,
    RankingConfig,
    RatingConfig,
    TaskConfig,
    TransferConfig,
    transfer_of,
)
from torchrec_pt.config.training import PretrainConfig, TrainConfig
from torchrec_pt.config.tune import Domain, TuneConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BackboneConfig",
    "Candidates",
    "Columns",
    "Contrastive",
    "CtrConfig",
    "DataConfig",
    "Denoising",
    "Domain",
    "EvaluateConfig",
    "ExportConfig",
    "Feature",
    "Filters",
    "FinetuneConfig",
    "GivenSplit",
    "IndexConfig",
    "InteractionName",
    "ItemPrediction",
    "LeaveOneOutSplit",
    "MaskedItem",
    "ModelConfig",
    "Negatives",
    "NextItem",
    "NextSegment",
    "Objective",
    "PairConfig",
    "PredictionNegatives",
    "PretrainConfig",
    "RankingConfig",
    "RatingConfig",
    "RatioSplit",
    "RunConfig",
    "Section",
    "ShowConfig",
    "Split",
    "TableConfig",
    "TaskConfig",
    "TemporalSplit",
    "TrainConfig",
    "TransferConfig",
    "TransformerConfig",
    "TuneConfig",
    "TwoTowerConfig",
    "transfer_of",
]
