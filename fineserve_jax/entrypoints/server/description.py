"""The OpenAPI description of the server, made from the classes that check what it is asked."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.entrypoints.openai_api.bodies import NEUTRAL, Neutral
from fineserve_jax.entrypoints.openai_api.embeddings import (
    EMBEDDING_NEUTRAL,
    EMBEDDING_OPTIONS,
    MAX_INPUTS,
    EmbeddingFields,
)
from fineserve_jax.entrypoints.server.asking import MAX_SAMPLES
from fineserve_jax.loaders import ChatOptions
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import MAX_BIAS, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

REFERENCE = "#/components/schemas/{model}"
Schema = dict[str, Any]


def _object(properties: Mapping[str, Any], *required: str) -> Schema:
    """An object of these and no other members; null stands for a member's absence."""
    nullable = {
        name: schema if name in required or not schema else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in properties.items()
    }
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": nullable}


TEXT: Schema = {"type": "string", "minLength": 1}
PART: Schema = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
CONTENT: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": PART}]}
CALL: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "id": TEXT,
        "type": {"const": "function"},
        "function": _object({"name": TEXT, "arguments": {"type": "string"}}, *("name", "arguments")),
    },
}
CHOSEN: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _object({"name": TEXT}, "name")},
}
"""A function that must be called."""
MESSAGE: Schema = {
    "anyOf": [
        {"type": "object", "required": ["role", "content"], "properties": {"role": TEXT, "content": CONTENT}},
        {
            "type": "object",
            "required": ["role", "tool_calls"],
            "properties": {
                "role": {"const": "assistant"},
                "content": {"type": "null"},
                "tool_calls": {"type": "array", "minItems": 1, "items": CALL},
            },
        },
    ]
}
MESSAGES: Schema = {"type": "array", "minItems": 1, "items": MESSAGE}
ENGINES: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": "null"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STREAMED: Schema = {
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"include_usage": {"type": "boolean"}},
    },
}
TOP: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS}
FORMATS: Schema = {
    "anyOf": [
        _object({"type": {"enum": ["text", "json_object"]}}, "type"),
        _object(
            {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "required": ["name", "schema"],
                    "properties": {"name": TEXT, "schema": {"type": "object"}},
                },
            },
            *("type", "json_schema"),
        ),
    ]
}
BIASES: Schema = {
    "type": "object",
    "maxProperties": MAX_LOGIT_BIAS,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,6})$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}
SAMPLING: Schema = {
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "top_logprobs": TOP,
    "logprobs": {"anyOf": [{"type": "boolean"}, TOP]},
    "response_format": FORMATS,
    "stop": {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
    "logit_bias": BIASES,
}
"""Fields of `SamplingParams` in the forms of OpenAI's API."""
STATUSES = {
    400: "what is asked cannot be honoured",
    401: "the API key is missing or unknown",
    403: "the key's class of service, or the server, does not allow it",
    404: "there is no such model",
    408: "the body, or the first token of who asked to be dropped then, was late",
    413: "the body is too long",
    415: "the body is no JSON",
    429: "too much is asked at once; the header Retry-After says when to come again",
    500: "the model or the engine failed",
    503: "the server begins, or is about to end",
}


def description(models: Mapping[str, KnownModel], has_keys: bool, has_admin: bool = False) -> dict[str, Any]:
    """The description, as JSON.

    Args:
        models: that are served, by name.
        has_keys: whether requests need an API key.
        has_admin: whether there are keys of who may load and unload models.
    """
    schemas: Schema = {"Error": ERROR, **_request_schemas(models)}
    if has_admin:
        schemas["ModelToLoad"] = _object(
            _properties(ModelSource, schemas) | {"name": TEXT, "engines": ENGINES}, "name", "model"
        )
    keyed = has_keys or has_admin
    security = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fineserve-jax", "version": "1"},
        "paths": _paths() | (_admin_paths() if has_admin else {}),
        "components": {"schemas": schemas, **security},
        **({"security": [{"key": []}]} if has_keys else {}),
    }


def _paths() -> Schema:
    read = (400, 401, 403, 404, 408, 413, 415)
    answered = (*read, 429, 500, 503)
    completed = _answer("id", "object", "created", "model", "choices", "usage", streams=True)
    tokenized = _answer("count", "max_model_len", "tokens")
    metrics = {"description": "for Prometheus", "content": {"text/plain": {}}}
    return {
        "/v1/chat/completions": {"post": _operation("ChatCompletionRequest", completed, answered)},
        "/v1/completions": {"post": _operation("CompletionRequest", completed, answered)},
        "/v1/embeddings": {
            "post": _operation("EmbeddingRequest", _answer("object", "data", "model", "usage"), answered)
        },
        "/tokenize": {"post": _operation("TokenizeRequest", tokenized, read)},
        "/v1/models": {"get": _operation(None, _answer("object", "data"), (401,))},
        "/health": {"get": _operation(None, _answer("status"), (503,))},
        "/live": {"get": _operation(None, _answer(), (503,))},
        "/metrics": {"get": _operation(None, metrics, (503,))},
    }


def _admin_paths() -> Schema:
    by_key: Schema = {"security": [{"key": []}]}
    load = _operation("ModelToLoad", _answer("id", "object"), (400, 401, 408, 413, 415, 503))
    unload = _operation(None, _answer("id", "object", "deleted"), (400, 401, 404, 503))
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    abort = {"name": "abort", "in": "query", "schema": {"type": "boolean"}}
    return {
        "/admin/models": {"post": load | by_key},
        "/admin/models/{name}": {"delete": unload | by_key | {"parameters": [name, abort]}},
    }


def _request_schemas(models: Mapping[str, KnownModel]) -> Schema:
    """Bodies of requests, and what they refer to, by name."""
    schemas: Schema = {}
    formats = [*dict.fromkeys(one for model in models.values() for one in model.formats)]
    vocab_size = min((model.model.config.vocab_size for model in models.values()), default=1)
    model: Schema = {"model": {"enum": list(models)}}
    sampling = _properties(SamplingParams, schemas) | SAMPLING
    sampling["stop_token_ids"] = {"type": "array", "items": _token(vocab_size)}
    options = _properties(RequestOptions, schemas) | model
    options |= {"kv_precision": {"enum": [*formats, AUTO]}, "min_kv_precision": {"enum": formats}}
    asked, chat = {**sampling, **options, **_neutral(NEUTRAL), **STREAMED}, _properties(ChatOptions, schemas)
    choices: Schema = {"anyOf": [{"enum": ["auto", "none", "required"]}, CHOSEN]}
    spoken: Schema = {"messages": MESSAGES, **asked, **chat, "tool_choice": choices}
    texts = _object({"prompt": TEXT, **model}, "prompt")
    embedded = {**_properties(EmbeddingFields, schemas), "input": _prompt(vocab_size, MAX_INPUTS)}
    embedded |= {name: options[name] for name in EMBEDDING_OPTIONS} | _neutral(EMBEDDING_NEUTRAL)
    # Vectors have as many values as the model says, so that other numbers are refused.
    embedded["dimensions"] = {"enum": [*dict.fromkeys(one.model.config.hidden_size for one in models.values())]}
    return {
        **schemas,
        "ChatCompletionRequest": _object(spoken, "messages"),
        "CompletionRequest": _object({"prompt": _prompt(vocab_size), **asked, "echo": {"type": "boolean"}}, "prompt"),
        "EmbeddingRequest": _object(embedded, "input"),
        "TokenizeRequest": {"anyOf": [texts, _object({"messages": MESSAGES, **model, **chat}, "messages")]},
    }


def _token(vocab_size: int) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}


def _neutral(neutral: Neutral) -> Schema:
    return {name: {} if taken is None else {"enum": [*taken]} for name, (taken, _) in neutral.items() if taken != ()}


def _prompt(vocab_size: int, most: int = MAX_SAMPLES) -> Schema:
    """Text or token ids, or several such."""
    ids: Schema = {"type": "array", "items": _token(vocab_size), "minItems": 1}
    several = [{"type": "array", "items": one, "minItems": 1, "maxItems": most} for one in (TEXT, ids)]
    return {"anyOf": [TEXT, ids, *several]}


def _properties(settings: type[BaseModel], schemas: Schema) -> Schema:
    """The fields of a settings class. What their types refer to is entered in `schemas`."""
    schema = settings.model_json_schema(ref_template=REFERENCE)
    schemas |= schema.pop("$defs", {})
    return dict(schema["properties"])


def _answer(*required: str, streams: bool = False) -> Schema:
    kind = {"type": "object", "required": list(required)} if required else {"type": ["object", "null"]}
    content: Schema = {"application/json": {"schema": kind}}
    return {"description": "the answer", "content": content | ({"text/event-stream": {}} if streams else {})}


def _operation(body: str | None, answer: Schema, errors: Iterable[int]) -> Schema:
    refused = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    responses = {str(status): {"description": STATUSES[status], "content": refused} for status in errors}
    operation: Schema = {"responses": {"200": answer, **responses}}
    if body is not None:
        content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body)}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation
