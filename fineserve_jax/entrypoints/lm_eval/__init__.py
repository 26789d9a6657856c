"""The engine as a model of EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

    python -m fineserve_jax.entrypoints.lm_eval run --model fineserve_jax \\
        --model_args pretrained=smollm2-135m,kv_precision=int4 --tasks arc_easy

is the harness's own command, with this model registered. Releases behind 0.4.13 find it by its entry point, in the
group `lm_eval.models`: there `lm_eval run --model fineserve_jax` does the same.
"""

from fineserve_jax.entrypoints.lm_eval.model import FineServeLM

__all__ = ["FineServeLM"]
