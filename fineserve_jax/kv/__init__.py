"""KV memory: the device arena, and who holds which of its pages. Host side only, no device.

Three storeys; a module imports from its own and from those below it. `classes` (kinds of page), `policies` (who may use
which slab), `slab_size` (how long a slab is) and `errors` are used by all of them.

    audits      integrity   whether all books agree            usage, stats   bytes and counts
                quotas      what tenants and precisions hold   recording      a record of a run

    requests    manager        what each request holds, as `request_pages`
                sharing        how requests come to share pages, as `shared_prefix`, and who computes them
                host_memory    pages of preempted requests     narrowing      older pages in a narrower format

    pages       page_pool      pages are taken, shared, released and evicted here
                compaction     moves pages together            prefix_cache   full pages by their tokens
                page_table     where pages lie, and how many hold each
                operations     what the device has to do with pages
                allocator      hands out pages of slabs; its parts are `slab_pool` and `tags`

What others need they ask of the manager; they do not reach through it to its parts.
"""
