"""What people run: commands, batch jobs, the server and lm-evaluation-harness, with OpenAI's forms, which some share.

Python's own ways in are `fineserve_jax.LLM`, `AsyncLLM` and `Engine`.
"""
