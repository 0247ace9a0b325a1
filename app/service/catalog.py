"""What is live here: the snapshot that requests take, and what is known of versions beside it.

Knows nothing of where snapshots come from or of requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from app.domain import Encoding, Snapshot, TaskVersion
from app.engine.artifact import version_of
from app.engine.plan import make_plan
from app.rollout import VersionRecord

_SHORTEST = Encoding(input_ids=(0, 0, 0), token_type_ids=(0, 0, 0))


@dataclass(slots=True)
class Catalog:
    """`snapshot` is replaced whole, in one assignment; a request keeps the one that it began with."""

    snapshot: Snapshot
    num_layers: int
    left_out: Mapping[str, str] = field(default_factory=dict)  # task@version → why it is not served here

    def passes_alone(self, version: TaskVersion) -> float:
        """What `version` costs when nothing else is asked."""
        return round(make_plan(_SHORTEST, [version], self.num_layers).passes, 4)

    def describe(self, record: VersionRecord) -> TaskVersion:
        """A version as its card says, whether it is resident or not."""
        return described(record.card, record.digest, record.version)


@lru_cache(maxsize=4096)
def described(card: str, digest: str, number: int) -> TaskVersion:
    return version_of(json.loads(card), digest, number)
