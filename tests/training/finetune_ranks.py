"""Fine-tuning of many small models; run by one process or by torchrun.

python finetune_ranks.py CONFIGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torchrec_pt import pipeline
from torchrec_pt.config import RunConfig
from torchrec_pt.distributed import joined_ranks


def main(configs: Path) -> None:
    with joined_ranks():
        for config in json.loads(configs.read_text()):
            pipeline.finetune(RunConfig.model_validate(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
