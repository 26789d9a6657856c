"""`python -m fineserve_jax.entrypoints.lm_eval`: the harness's command, which then knows this model."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
