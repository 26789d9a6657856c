"""KV memory: the device arena, and who owns which of its pages.

Host side, without a device: `classes` (kinds of page), `slab_size` (how long a slab is), `policies` (who may
use which slab), `slabs` with its parts `pool` and `tags` (the allocator), `manager` (pages by request),
`stats` and `usage` (accounts), `integrity` (audit).
"""
