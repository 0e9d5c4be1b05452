"""What a model that was fine-tuned for clicks or ratings says of somebody and some items."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from torchrec_pt.build import build_task, load_learner
from torchrec_pt.config import RunConfig
from torchrec_pt.data.batch import Draw
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_rows
from torchrec_pt.learner import Learner
from torchrec_pt.scoring import embed
from torchrec_pt.tasks.asked import NO_INTERACTION, Asked
from torchrec_pt.tasks.pairs import PairTask

ITEMS_AT_A_TIME = 4096


class PairPredictor:
    """All ranks ask it the same.

    Whoever is in the dataset is judged from all that is known of them, labels and all; a bare
    history has items alone.
    """

    def __init__(self, learner: Learner, task: PairTask, ranks: Ranks) -> None:
        self._learner, self._task, self._ranks = learner, task, ranks
        interactions = task.dataset.interactions
        self._known = interactions.with_values(torch.arange(len(interactions.values)))

    @classmethod
    def load(
        cls,
        config: RunConfig,
        name: str,
        checkpoint: Path,
        dataset: PreparedDataset,
        ranks: Ranks,
    ) -> PairPredictor:
        """Of the task "ctr" or "rating", from its fine-tuned stage's checkpoint."""
        task = build_task(config, name, dataset)
        assert isinstance(task, PairTask)
        return cls(load_learner(config, checkpoint, dataset, ranks, [task]), task, ranks)

    def of_user(self, user: int, items: Tensor) -> Tensor:
        """(N,) predictions for the items (N,) int64, in the unit of the labels.

        Args:
            user: their place on the rank that has them, −1 on the others.
        """
        own = torch.tensor([user] if user >= 0 else [], dtype=torch.int64)
        num_known = self._known.offsets[own + 1] - self._known.offsets[own]
        parts = []
        for some in items.split(ITEMS_AT_A_TIME):
            asked = some if user >= 0 else some[:0]
            targets = Jagged.from_lengths(asked, torch.full_like(own, len(some)))
            drawn = torch.full_like(asked, NO_INTERACTION)
            draw = self._task.draw_asked(Asked(own, self._known, num_known, targets, drawn))
            parts.append(gather_rows(self._predict(draw, own)))
        return torch.cat(parts)

    def of_history(self, history: Tensor, items: Tensor) -> Tensor:
        """The same for somebody unknown with this history (T,) int64, oldest first."""
        row = Jagged(history, torch.tensor([0, len(history)]))
        parts = []
        for some in items.split(ITEMS_AT_A_TIME):
            targets = Jagged(some, torch.tensor([0, len(some)]))
            parts.append(
                self._predict(self._task.draw_unrecorded(row, targets), row.offsets[:1] - 1)
            )
        return torch.cat(parts)

    @torch.no_grad()
    def _predict(self, draw: Draw, users: Tensor) -> Tensor:
        device, backbone = self._ranks.device, self._learner.backbone
        return self._task.predict(backbone, embed(backbone, draw, device), users.to(device)).cpu()
