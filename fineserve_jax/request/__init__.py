"""What is asked of the engine: a prompt, how tokens are sampled, and how the request is to be treated.

    sampling_params   how its tokens are chosen, and what of them is told
    request_options   its model, KV formats, tenant, priority and targets
    structured        what its text must be: a JSON schema, a regular expression, a choice, a grammar
    request           the request itself, and how far it has come

Host side only, without jax.
"""
