"""How a model that is made for vectors of texts makes them."""

from __future__ import annotations

import dataclasses
from typing import Literal

Pooling = Literal["mean", "last"]


@dataclasses.dataclass(frozen=True, slots=True)
class PoolingSettings:
    """What the files of a model that is made for vectors of texts say.

    Attributes:
        pooling: of which tokens the hidden states are taken: the mean of all, or the last token's alone.
        normalize: whether vectors are scaled to length 1.
        has_head: whether it has an output head besides; one without can neither write nor score text.
    """

    pooling: Pooling
    normalize: bool
    has_head: bool = True
