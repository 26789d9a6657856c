"""Whatever is asked, described or not, is answered as the description says, and the engine goes on."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import check_nothing_is_left

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Threads of the server may use `random` while a request is drawn.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
OPERATIONS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "POST /tokenize",
    "GET /v1/models",
    "GET /live",
]
FEW = settings(
    max_examples=6,
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
    print_blob=False,
)
MANY = settings(FEW, max_examples=40, derandomize=False)


def requests_of(server, operation):
    """Requests for an operation of the description, most of which conform to it."""
    schema = schemathesis.openapi.from_dict(json.loads(server.ask("/openapi.json")[2]))
    schema.config.update(base_url=server.url)
    method, path = operation.split()
    return schema[path][method].as_strategy()


def whole_numbers(value):
    """A whole number that is written with a point is one to JSON Schema, and none to OpenAI's API."""
    if isinstance(value, dict):
        return {name: whole_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fuzz(server, operation, how):
    @how
    @given(case=requests_of(server, operation))
    def check(case):
        case.body = whole_numbers(case.body)
        answer = case.call(timeout=120)
        # What answers may be is asked for by regular expressions and grammars, too, which may come to a dead end.
        if answer.status_code == 500 and answer.json()["error"]["code"] == "dead_end":
            return
        case.validate_response(answer, checks=CHECKS)

    check()
    assert server.ask("/v1/completions", {"prompt": "ab", "max_tokens": 2})[0] == 200
    check_nothing_is_left(server.llm)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_requests_of_the_description_are_answered_as_it_says(server, operation):
    fuzz(server, operation, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_requests_of_the_description_are_answered_as_it_says(server, operation):
    fuzz(server, operation, MANY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(FEW, max_examples=40)
@given(data=st.data())
def test_values_of_no_kind_that_is_known_are_refused(server, data):
    """Fields that there are, with any value; never an error of the server's."""
    description = json.loads(server.ask("/openapi.json")[2])
    names = sorted(description["components"]["schemas"]["CompletionRequest"]["properties"])
    body = {"prompt": "a", "max_tokens": 2} | data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    status, _, answer = server.ask("/v1/completions", body)
    assert status < 500, answer


def test_the_description_names_every_path(server):
    paths = json.loads(server.ask("/openapi.json")[2])["paths"]
    for path, operations in paths.items():
        for method in operations:
            assert server.ask(path, b"{}" if method == "post" else None, method=method.upper())[0] in (200, 400)
