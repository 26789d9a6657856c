"""Chat templates: rendered as transformers renders them, in a sandbox, with clear refusals."""

import dataclasses
import re

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer, render_chat

PLAIN = Tokenizer(Backend(BPE()), (0,), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
HELLO = [{"role": "user", "content": "Hello <b> é"}]


def render(template, messages=HELLO, **kwargs):
    return render_chat(dataclasses.replace(PLAIN, chat_template=template), messages, **kwargs)


def test_blocks_leave_no_whitespace_behind():
    line = "    {% if true %}\n{{ m.role }}: {{ m['content'] }}\n    {% endif %}\n"
    template = "{% for m in messages %}\n" + line + "{% endfor %}\n"
    assert render(template) == "user: Hello <b> é\n"


def test_special_tokens_and_the_generation_prompt_are_available():
    template = "{{ bos_token }}{% if add_generation_prompt %}A{% else %}B{% endif %}{{ eos_token }}"
    assert render(template) == "<s>A</s>"
    assert render(template, add_generation_prompt=False) == "<s>B</s>"


def test_loop_controls_and_unescaped_json_work():
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hello <b> é"}'


def test_the_date_can_be_asked_for():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_a_template_can_refuse_with_its_own_words():
    with pytest.raises(RequestError, match=r"refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_hostile_template_gets_nowhere(template):
    with pytest.raises(RequestError):
        render(template)


def test_a_broken_template_is_an_error_of_the_request():
    with pytest.raises(RequestError, match=r"chat template"):
        render("{% for %}")
    with pytest.raises(RequestError, match=r"fails on these messages"):
        render("{{ messages[0].content + 1 }}")


def test_a_model_without_a_template_is_named_as_such():
    with pytest.raises(RequestError, match=r"no chat template"):
        render_chat(PLAIN, HELLO)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("Hello", r"must be a list .* got str"),
        ({"role": "user", "content": "x"}, r"must be a list .* got dict"),
        ([], r"is empty"),
        (["Hello"], r"message 0 is a str"),
        ([HELLO[0], {"content": "x"}], r"message 1 has the role None"),
        ([{"role": "", "content": "x"}], r"message 0 has the role ''"),
        ([{"role": "user"}], r"message 0 has content of type NoneType"),
        ([{"role": "user", "content": ["x"]}], r"message 0 has content of type list"),
    ],
)
def test_malformed_messages_are_named(messages, complaint):
    with pytest.raises(RequestError, match=complaint):
        render("{{ messages[0].content }}", messages)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ strftime_now(1) }}"],
)
def test_whatever_goes_wrong_in_a_template_is_an_error_of_the_request(template):
    with pytest.raises(RequestError, match=r"chat template"):
        render(template)
