"""Models loaded and unloaded over HTTP, by who has an admin key; and a server that says when it has started."""

import json
import threading

import pytest
from serving import Running, check_nothing_is_left, eventually, serving
from tiny_model import OPTIONS, write_tiny_model

from fineserve_jax.async_llm import AsyncLLM
from fineserve_jax.entrypoints.server.classes import ServiceClass, ServiceClasses, read_classes
from fineserve_jax.entrypoints.server.errors import ApiError
from fineserve_jax.errors import ConfigError, EngineError

KEY = {"Authorization": "Bearer boss"}
SETTINGS = OPTIONS | {"kv_formats": ("int4", "int8")}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def own_llm(directory) -> AsyncLLM:
    """An engine of its own, since its models change."""
    return AsyncLLM(str(directory), **SETTINGS)


@pytest.fixture(scope="module")
def admin(own_llm):
    with serving(own_llm, admin_keys=["boss"]) as running:
        yield running
    check_nothing_is_left(own_llm)


def error_of(found) -> tuple[int, str, str]:
    status, _, body = found
    error = json.loads(body)["error"]
    return status, error["code"], error["message"]


def load(server: Running, **body):
    return server.ask("/admin/models", body, KEY)


def test_a_model_is_loaded_answers_and_is_unloaded(admin, directory):
    asked = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
    own = admin.client.completions.create(model="tiny", **asked).choices[0].text
    status, _, body = load(admin, name="second/x", model=str(directory), weights="fp32", kv_precision="int4")
    assert status == 200
    told = json.loads(body)
    assert (told["id"], told["kv_precision"], told["weights"]) == ("second/x", "int4", "fp32")
    assert [one.id for one in admin.client.models.list()] == ["tiny", "second/x"]
    assert admin.client.models.retrieve("second/x").id == "second/x"
    described = json.loads(admin.ask("/openapi.json")[2])["components"]["schemas"]
    assert described["CompletionRequest"]["properties"]["model"]["anyOf"][0]["enum"] == ["tiny", "second/x"]
    second = admin.client.completions.create(model="second/x", **asked)
    assert second.model_extra["kv_precision"] == "int4"
    assert error_of(load(admin, name="second/x", model=str(directory)))[:2] == (400, "model_not_loadable")
    stream = admin.client.completions.create(model="second/x", prompt="a", max_tokens=60, stream=True)
    next(stream)
    status, _, body = admin.ask("/admin/models/second/x?abort=false", None, KEY, "DELETE")
    assert (status, json.loads(body)) == (200, {"id": "second/x", "object": "model", "deleted": True})
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] is not None
    assert error_of(admin.ask("/v1/completions", asked | {"model": "second/x"}))[:2] == (404, "model_not_found")
    assert admin.client.completions.create(model="tiny", **asked).choices[0].text == own


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"name": "x", "model": "no-such-model"}, "'no-such-model' is neither a path that exists nor a known alias"),
        ({"name": "tiny", "model": "smollm2-135m"}, "a model called 'tiny' is served already"),
        ({"name": "", "model": "x"}, "name=''"),
        ({"name": "x"}, "model="),
        ({"name": "x", "model": "y", "kv_memory": 3}, "unknown setting 'kv_memory'"),
    ],
)
def test_what_cannot_be_loaded_is_refused(admin, body, message):
    status, code, found = error_of(load(admin, **body))
    assert (status, code) == (400, "model_not_loadable")
    assert message in found


def test_a_model_that_is_not_there_cannot_be_unloaded(admin):
    assert error_of(admin.ask("/admin/models/x", None, KEY, "DELETE"))[:2] == (404, "model_not_found")
    assert error_of(admin.ask("/admin/models/tiny?abort=1", None, KEY, "DELETE"))[:2] == (400, "invalid_request")


@pytest.mark.parametrize("key", [{}, {"Authorization": "Bearer other"}, {"Authorization": "Basic boss"}])
def test_only_an_admin_key_loads_and_unloads(admin, key):
    for found in (
        admin.ask("/admin/models", {"name": "x", "model": "y"}, key),
        admin.ask("/admin/models/tiny", None, key, "DELETE"),
    ):
        assert error_of(found)[:2] == (401, "invalid_api_key")


def test_without_an_admin_key_nobody_loads_and_unloads(server):
    status, code, message = error_of(load(server, name="x", model="y"))
    assert (status, code) == (404, "not_found")
    assert "--classes and admin_keys" in message
    assert not [path for path in json.loads(server.ask("/openapi.json")[2])["paths"] if "admin" in path]


def test_admin_keys_are_read_and_are_no_keys_of_classes(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("admin_keys: [boss]\nclasses: {one: {keys: [k1]}}")
    classes = read_classes(path)
    classes.check_admin("Bearer boss")
    for call in (lambda: classes.of("Bearer boss"), lambda: classes.check_admin("Bearer k1")):
        with pytest.raises(ApiError, match="missing or unknown"):
            call()
    path.write_text("admin_keys: [boss]")
    assert read_classes(path).of(None) == ("", None)
    path.write_text("admin_keys: boss")
    with pytest.raises(ConfigError, match=r"admin_keys in .* must be a list of keys"):
        read_classes(path)
    with pytest.raises(ConfigError, match="class 'one' has a key of admin_keys"):
        ServiceClasses({"one": ServiceClass(keys=("boss",))}, ["boss"])
    with pytest.raises(ConfigError, match="empty key"):
        ServiceClasses({}, [" "])


# -- the beginning -------------------------------------------------------------------------------------------------


def test_nobody_is_let_in_before_the_programs_are_ready(own_llm, monkeypatch):
    may_go_on, warm_up, named = threading.Event(), own_llm.engine.warm_up, []

    def waiting(*args, **kwargs):
        named.append(args[0])
        may_go_on.wait()
        return warm_up(*args, **kwargs)

    monkeypatch.setattr(own_llm.engine, "warm_up", waiting)
    classes = {"one": ServiceClass(keys=("k",), kv_precisions=("int8", "auto"))}
    with serving(own_llm, classes, warm_up=True) as running:
        for path, body in (("/health", None), ("/v1/completions", {"prompt": "a"})):
            status, headers, answer = running.ask(path, body, {"Authorization": "Bearer k"})
            assert (status, json.loads(answer)["error"]["code"]) == (503, "starting")
            assert headers["retry-after"] == "5"
        may_go_on.set()
        eventually(lambda: running.ask("/health")[0] == 200)
        compiled = own_llm.engine.stats().num_compilations
        running.client_with("k").completions.create(model="tiny", prompt="a", max_tokens=3)
    assert own_llm.engine.stats().num_compilations == compiled > 0
    assert named == [("int8", "auto")]


def test_a_server_whose_programs_cannot_be_made_ends_and_says_why(own_llm, monkeypatch):
    def fail(*args, **kwargs):
        raise EngineError("no such luck")

    monkeypatch.setattr(own_llm.engine, "warm_up", fail)
    with serving(own_llm, warm_up=True) as running:
        eventually(lambda: running.server.error is not None)
        assert str(running.server.error) == "no such luck"
        assert running.server.should_exit
