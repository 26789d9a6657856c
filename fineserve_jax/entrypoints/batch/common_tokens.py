"""How many tokens of a job's prompts need not be computed, since an earlier prompt begins with them, too."""

from fineserve_jax.kv.prefix_cache import hash_blocks
from fineserve_jax.request.request import Request

MAX_BLOCKS = 1 << 17
"""Most blocks that are remembered, the latest: some 16 MiB."""


class CommonTokens:
    """What a prefix cache that never forgets could save, as far as blocks are remembered here.

    Args:
        page_size: tokens of a block; only whole ones are shared.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._seen: dict[bytes, None] = {}  # hashes of blocks, those seen last at the end

    def note(self, request: Request, num_samples: int = 1) -> int:
        """Remembers a prompt; how many of its tokens an earlier one, or sample, of its model and format begins with, as
        far as they need not be computed for it: of all its samples together."""
        size, seen, common, begins_alike = self._page_size, self._seen, 0, True
        stop = (request.num_prompt_tokens - 1) // size  # its last token is computed in any case
        if not stop:
            return 0
        most = request.num_shareable_tokens // size
        for block_hash, _ in hash_blocks(request.token_ids, size, request.prefix_root, 0, stop):
            begins_alike = begins_alike and block_hash in seen and common < most
            common += begins_alike
            seen.pop(block_hash, None)
            seen[block_hash] = None
        while len(seen) > MAX_BLOCKS:
            del seen[next(iter(seen))]
        return (common + (num_samples - 1) * min(stop, most)) * size
