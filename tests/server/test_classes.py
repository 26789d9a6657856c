"""Classes of service: who is let in, what they get, and what they may not ask for."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax import ConfigError, Quota, RequestOptions
from fineserve_jax.entrypoints.server.classes import ServiceClass, ServiceClasses, read_classes
from fineserve_jax.entrypoints.server.errors import ApiError

GOLD = ServiceClass(
    keys=("gold-1", "gold-2"),
    tenant="alice",
    kv_precisions=("bf16", "int8"),
    ttft_slo_s=0.5,
    tpot_slo_s=0.05,
    priority=-1,
    quota=Quota(guaranteed=0.5),
)
PLAIN = ServiceClass(keys=("sha256:" + hashlib.sha256(b"plain").hexdigest(),), max_requests=2)
CLASSES = ServiceClasses({"gold": GOLD, "plain": PLAIN})


def test_without_classes_everybody_is_served():
    assert ServiceClasses({}).of(None) == ("", None)


def test_a_key_names_its_class_as_text_or_by_its_digest():
    assert CLASSES.of("Bearer gold-2") == ("gold", GOLD)
    assert CLASSES.of("bearer plain") == ("plain", PLAIN)


@given(st.none() | st.text() | st.sampled_from(["gold-1", "Basic gold-1", "Bearer", "Bearer gold-", "Bearer gold-11"]))
def test_any_other_key_is_refused(header):
    with pytest.raises(ApiError) as refused:
        CLASSES.of(header)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert refused.value.headers == {"WWW-Authenticate": "Bearer"}


def test_a_request_that_says_nothing_gets_what_its_class_has():
    assert GOLD.apply(RequestOptions()) == RequestOptions(
        tenant="alice", kv_precision="bf16", ttft_slo_s=0.5, tpot_slo_s=0.05, priority=-1
    )
    assert PLAIN.apply(RequestOptions(kv_precision="int4")) == RequestOptions(kv_precision="int4")


def test_a_request_may_ask_for_less_than_its_class_has():
    asked = RequestOptions(kv_precision="int8", ttft_slo_s=9.0, priority=4, tenant="alice", drop_when_late=True)
    found = GOLD.apply(asked)
    assert (found.kv_precision, found.ttft_slo_s, found.tpot_slo_s, found.priority) == ("int8", 9.0, 0.05, 4)
    assert (found.tenant, found.drop_when_late) == ("alice", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tenant": "bob"}, "tenant='bob' is not this key's"),
        ({"priority": -2}, "priority=-2 is more urgent than this key's -1"),
        ({"ttft_slo_s": 0.4}, "ttft_slo_s=0.4 is less than this key's 0.5"),
        ({"tpot_slo_s": 0.01}, "tpot_slo_s=0.01 is less than this key's 0.05"),
        ({"kv_precision": "fp32"}, "kv_precision='fp32' is not this key's; choose among bf16, int8"),
        ({"min_kv_precision": "int4"}, "min_kv_precision='int4' is not this key's"),
    ],
)
def test_a_request_may_not_ask_for_more(options, message):
    with pytest.raises(ApiError, match=message) as refused:
        GOLD.apply(RequestOptions(**options))
    assert (refused.value.status, refused.value.code) == (403, "not_in_class")


def test_a_quota_is_the_engines():
    assert CLASSES.quotas == {"tenant:alice": Quota(guaranteed=0.5)}
    second = ServiceClass(keys=("x",), tenant="alice", quota=Quota(max=0.5))
    with pytest.raises(ConfigError, match="gives the tenant 'alice' a second quota"):
        _ = ServiceClasses({"gold": GOLD, "silver": second}).quotas


def test_a_file_of_classes(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("classes:\n  gold: {keys: [k], tenant: alice, quota: {guaranteed: 0.5}, kv_precisions: [int8]}\n")
    (gold,) = read_classes(path).classes.values()
    assert gold == ServiceClass(keys=("k",), tenant="alice", quota=Quota(guaranteed=0.5), kv_precisions=("int8",))
    read_classes(path).check_formats(["int8"])
    with pytest.raises(ConfigError, match="class 'gold' allows 'int8', which is not served; choose among bf16"):
        read_classes(path).check_formats(["bf16"])
    assert read_classes(None).classes == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: 1", "must hold `classes`"),
        ("classes: {}", "must hold `classes`"),
        ("classes: {a: 1}", "class 'a' in .* is no table"),
        ("classes: {a: {tenant: x}}", "keys"),
        ("classes: {a: {keys: [x], colour: red}}", "unknown setting 'colour'"),
        ("classes: {a: {keys: [' ']}}", "a key must not be empty"),
        ("classes: {a: {keys: [x]}, b: {keys: [x]}}", "'a' and 'b' have a key in common"),
        ("classes: {a: {keys: [x], quota: {max: 0.5}}}", "a quota is a tenant's; give tenant, too"),
        ("classes: {a: {keys: [x], drop_when_late: true}}", "give ttft_slo_s"),
    ],
)
def test_a_file_that_holds_anything_else_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_classes(path)
