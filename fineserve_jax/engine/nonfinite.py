"""What is told of numbers that are not finite."""

from collections.abc import Collection


def nonfinite_message(
    model: str, num_output_tokens: int, stage: str | None, logits_processors: Collection[str] = ()
) -> str:
    """What went wrong, where and what to do.

    Args:
        model: name of the model.
        num_output_tokens: of the request before.
        stage: whose output is the first that is not finite; None if nobody looked.
        logits_processors: that the request names, which may have made them so.
    """
    what = f"the logits of model {model!r} are not finite (NaN or infinity) after {num_output_tokens} output tokens"
    if logits_processors:
        what += f", as the model or logits_processors={list(logits_processors)} leave them"
    return f"{what}; {where_from(stage)}"


def where_from(stage: str | None) -> str:
    """Where to look for the fault, or how to find that out."""
    if stage is None:
        return "set check_finite to be told which layer's output is the first such, and check the model's weights"
    return f"the output of {stage} is the first such: check its weights and the model's configuration"
