"""What every configuration type is built on."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self, exclude: frozenset[str] = frozenset()) -> str:
        """Stable hash of this section's resolved values; names stages that may be reused."""
        text = json.dumps(self.model_dump(mode="json", exclude=set(exclude)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
