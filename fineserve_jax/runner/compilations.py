"""What is said of programs that are compiled while requests are served: which, and why they were not there."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

from fineserve_jax.runner.shapes import StepSpec

CAUSES = {
    "format_names": "KV formats that were not served before",
    "max_runs": "requests with pages in several formats",
    "shares": "rows that share prefixes",
}
"""What differs in a spec, by field."""

STAGES = {
    "head": "requests with structured outputs beside others",
    "processed_head": "requests with logits processors",
    "score": "prompts whose tokens are scored",
    "hidden": "prompts whose last layer is kept",
    "layer": "rows that share cached tokens, or completions that are scored",
    "pool": "prompts whose hidden states are pooled",
    "take_tokens": "steps that are called before others are computed",
}
"""What a stage is compiled for again where specs are alike."""


def why_compiled(spec: StepSpec, stages: Sequence[str], compiled_ahead: Iterable[StepSpec]) -> str:
    """Why a warm-up had not compiled these stages of a step.

    Args:
        spec: of the step.
        stages: names of the stages that were compiled for it.
        compiled_ahead: what the warm-up was for.
    """
    alike = [other for other in compiled_ahead if other.shape == spec.shape]
    if not alike:
        return f"{spec.shape} is none of the shapes that were warmed up"
    different = [f.name for f in fields(StepSpec) if getattr(alike[-1], f.name) != getattr(spec, f.name)]
    if different:
        causes = [CAUSES.get(name, f"another {name}") for name in different]
    else:
        causes = [STAGES[name] for name in dict.fromkeys(stages) if name in STAGES]
    return ", ".join(causes) or "arguments of other shapes"
