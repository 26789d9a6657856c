"""Requests for embeddings, and their answers, as OpenAI's endpoint has them, with this project's own fields besides."""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Strict

from fineserve_jax.engine.embedding import PromptEmbedding
from fineserve_jax.engine.prompts import prompt_list
from fineserve_jax.entrypoints.openai_api.bodies import Neutral
from fineserve_jax.entrypoints.openai_api.fields import OPTION_FIELDS, FieldError
from fineserve_jax.entrypoints.openai_api.json_objects import encode_json
from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.loaders.pooling_settings import Pooling
from fineserve_jax.request.request_options import RequestOptions, Switch
from fineserve_jax.validation import Validated, json_kind, refused_as, shown

MAX_INPUTS = 2048
"""Most inputs of a request, as OpenAI's endpoint has it."""
OF_ANSWERS = frozenset({"tpot_slo_s", "num_speculative_tokens"})
"""Options that say something of the tokens of an answer, of which an embedding has none."""
EMBEDDING_OPTIONS = OPTION_FIELDS - OF_ANSWERS
EMBEDDING_NEUTRAL: Neutral = {"user": (None, "")}

Dimensions = Annotated[
    int,
    Strict(),
    Field(ge=1),
    refused_as("{field}={shown} is no number of dimensions; leave it out"),
]


class EmbeddingFields(Validated):
    """What a request for embeddings says of its vectors. A bad value raises `RequestError`.

    Attributes:
        encoding_format: numbers, or the base64 of little-endian f32[hidden].
        dimensions: how many values vectors are to have, which is honoured if the model's have as many.
        pooling: of which tokens the hidden states are taken; None: as the server says, or the model's files.
        normalize: scale vectors to length 1; None: as the model's files say, and those of language models are.
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Dimensions | None = None
    pooling: Pooling | None = None
    normalize: Switch | None = None


def embedding_fields(body: Mapping[str, Any]) -> tuple[list[Any], EmbeddingFields, RequestOptions]:
    """The inputs of a body, each text or a list of token ids, how they are embedded, and what else is asked.

    null stands for a field's absence.

    Raises:
        RequestError: an unknown field, or one that cannot be honoured.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in EMBEDDING_NEUTRAL}
    if "input" not in given:
        raise FieldError("the request has no input; give text, a list of token ids, or a list of these")
    inputs = _inputs(given.pop("input"))
    for name in OF_ANSWERS & given.keys():
        raise FieldError(f"{name} is for answers, which embeddings have none; leave it out", "unsupported_parameter")
    options = {name: given.pop(name) for name in EMBEDDING_OPTIONS & given.keys()}
    if unknown := given.keys() - EmbeddingFields.model_fields:
        known = ("input", *EmbeddingFields.model_fields, *sorted(EMBEDDING_OPTIONS), *EMBEDDING_NEUTRAL)
        raise FieldError(
            f"unknown field {', '.join(map(repr, sorted(unknown)))}; a request may have: {', '.join(known)}"
        )
    return inputs, EmbeddingFields(**given), RequestOptions(**options)


def _inputs(given: Any) -> list[Any]:
    if not isinstance(given, str | list):
        raise FieldError(f"input is a JSON {json_kind(given)}; give text, a list of token ids, or a list of these")
    inputs = prompt_list(given)
    for index, one in enumerate(inputs):
        if not isinstance(one, str | list):
            raise FieldError(f"input {index} is a JSON {json_kind(one)}; give text, or a list of token ids")
    if not inputs:
        raise FieldError("input is an empty list; give at least one text")
    return inputs


def check_dimensions(fields: EmbeddingFields, model: str, hidden_size: int) -> None:
    """Raises `FieldError` for another number of values than the model's vectors have."""
    if fields.dimensions not in (None, hidden_size):
        what = f"vectors of {model!r} have {hidden_size} values, and it was not made to give fewer"
        raise FieldError(
            f"dimensions={shown(fields.dimensions)} is not served: {what}; leave it out", "unsupported_parameter"
        )


def embeddings_body(
    fields: EmbeddingFields, model: str, found: Sequence[PromptEmbedding], used: Mapping[str, Any]
) -> bytes:
    """The body of an answer, as JSON; it is encoded vector by vector, so that other threads have their turn.

    Args:
        used: further members.
    """
    entries = []
    for index, one in enumerate(found):
        assert one.vector is not None, "what has no vector was refused"
        vector = one.vector.astype("<f4")
        told = vector.tolist() if fields.encoding_format == "float" else base64.b64encode(vector.tobytes()).decode()
        entries.append(encode_json({"object": "embedding", "index": index, "embedding": told}))
    num_tokens = sum(len(one.token_ids) for one in found)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    rest = encode_json({"model": model, "usage": usage, **used})
    return b'{"object":"list","data":[' + b",".join(entries) + b"]," + rest[1:]
