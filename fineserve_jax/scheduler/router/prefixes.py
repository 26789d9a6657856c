"""What was sent to a replica lately, which its prefix cache is therefore expected to hold.

The replica itself is not asked: it may be in another process or on another machine, and what is under way to it is not
cached yet. So this can be wrong, in what it then costs to compute a prefix again, and never in an answer.
"""

from collections import OrderedDict
from collections.abc import Sequence


class SentPrefixes:
    """Blocks of prompts by their chained hashes (`kv.prefix_cache.hash_blocks`), the least recently sent forgotten
    first.

    Args:
        most_blocks: that are remembered: as many as the replica's memory holds pages.
    """

    def __init__(self, most_blocks: int) -> None:
        self._most = most_blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def num_known(self, block_hashes: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks were sent."""
        return next(
            (n for n, block_hash in enumerate(block_hashes) if block_hash not in self._blocks), len(block_hashes)
        )

    def note(self, block_hashes: Sequence[bytes]) -> None:
        """A prompt with these blocks was sent."""
        for block_hash in reversed(block_hashes):  # so that a prefix is forgotten from its end on
            self._blocks[block_hash] = None
            self._blocks.move_to_end(block_hash)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
