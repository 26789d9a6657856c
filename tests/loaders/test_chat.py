"""Chat templates: rendered as transformers renders them, in a sandbox, with clear refusals."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from fineserve_jax import SamplingParams
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions, Tokenizer, render_chat
from fineserve_jax.loaders.chat_templates import WORKER, TemplateRenderer

PLAIN = Tokenizer(Backend(BPE()), (0,), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
HELLO = [{"role": "user", "content": "Hello <b> é"}]


def render(template, messages=HELLO, **options):
    return render_chat(dataclasses.replace(PLAIN, chat_template=template), messages, ChatOptions(**options))


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


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "é"}]


@pytest.mark.parametrize(
    ("template", "messages", "right"),
    [
        (GENERATION, TURNS, "[hi]yo[é]"),
        ("{% if tools is none %}no tools{% else %}TOOLS{% endif %}", HELLO, "no tools"),
        ("{% if tools is not none %}TOOLS {{ tools | tojson }}{% endif %}{{ messages[0].role }}", HELLO, "user"),
        ("{% if documents is none %}nodoc{% else %}DOCS{% endif %}", HELLO, "nodoc"),
        ("{{ {'b': 1, 'a': 'é'} | tojson(separators=(',', ':')) }}", HELLO, '{"b":1,"a":"é"}'),
        ("{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true) }}", HELLO, '{"a": "<", "b": 1}'),
        ("{{ {'b': 'é'} | tojson(ensure_ascii=true, indent=1) }}", HELLO, '{\n "b": "\\u00e9"\n}'),
        ("{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x is defined }}", HELLO, "2False"),
    ],
)
def test_templates_render_as_in_transformers(template, messages, right):
    assert render(template, messages) == right


def test_tools_documents_and_further_values_reach_the_template():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    template = "{{ tools[0].function.name }} {{ documents[0].title }} {{ enable_thinking }} {{ date_string }}"
    further = {"enable_thinking": False, "date_string": "1 May"}
    options = {"tools": tools, "documents": [{"title": "T"}], "chat_template_kwargs": further}
    assert render(template, **options) == "weather T False 1 May"
    with pytest.raises(RequestError, match=r"'tools' is set by other options"):
        ChatOptions(chat_template_kwargs={"tools": []})


def several(default=None, **others):
    return dataclasses.replace(PLAIN, chat_template=default, chat_templates=others)


def test_one_of_several_templates_is_chosen_by_name_or_by_the_tools():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    tokenizer = several("plain", tool_use="tools", rag="documents")
    assert render_chat(tokenizer, HELLO) == "plain"
    assert render_chat(tokenizer, HELLO, ChatOptions(tools=tools)) == "tools"
    assert render_chat(tokenizer, HELLO, ChatOptions(tools=tools, chat_template="rag")) == "documents"
    assert render_chat(tokenizer, HELLO, ChatOptions(chat_template="own {{ bos_token }}")) == "own <s>"
    with pytest.raises(
        RequestError, match=r"chat_template='rga' is no template of this model; give one of rag, tool_use"
    ):
        render_chat(tokenizer, HELLO, ChatOptions(chat_template="rga"))
    with pytest.raises(RequestError, match=r"several chat templates, none is the default; they are rag, tool_use"):
        render_chat(several(None, tool_use="a", rag="b"), HELLO)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for p in messages[0].content if messages[0].content is not string %}{{ p.text }}\n{% endfor %}"
        "{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}",
    ],
    ids=["knows text", "knows parts"],
)
def test_content_may_be_parts_of_text_whatever_the_template_knows(template):
    assert render(template, PARTS).strip() == "A\nB"
    assert render(template, [{"role": "user", "content": "AB"}]) == "AB"


def test_parts_that_are_no_text_are_refused():
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(RequestError, match=r"message 0 .*image_url.*cannot be read by this model"):
        render("{{ messages }}", image)


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
CALLING = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "12"}]


@pytest.mark.parametrize(
    ("template", "right"),
    [
        ("{{ messages[1].tool_calls[0].function.arguments.city }}", "Bonn"),
        ("{{ messages[1].tool_calls[0].function.arguments | tojson }}", '{"city": "Bonn"}'),
        ("{{ 'args ' + messages[1].tool_calls[0].function.arguments }}", 'args {"city": "Bonn"}'),
        ("{{ messages[1].content is none }}{{ messages[2].content }}", "True12"),
    ],
    ids=["object", "JSON", "text", "null content"],
)
def test_tool_calls_and_their_results_are_rendered(template, right):
    assert render(template, CALLING) == right


@pytest.mark.parametrize("calls", ["weather", [1], [{"function": {}}], [{"function": "weather"}]])
def test_malformed_tool_calls_are_named(calls):
    with pytest.raises(RequestError, match=r"message 0 has (tool_calls of type|the tool call)"):
        render("x", [{"role": "assistant", "content": None, "tool_calls": calls}])


@pytest.mark.parametrize(
    ("template", "right"),
    [
        ("<{{ messages[1].role }}>{{ messages[1].content }}<end>", "<assistant> The sky is "),
        ("<{{ messages[1].role }}>{{ messages[1].content | trim }}<end>", "<assistant>The sky is"),
    ],
    ids=["kept", "trimmed"],
)
def test_the_final_message_can_be_continued(template, right):
    messages = [HELLO[0], {"role": "assistant", "content": " The sky is "}]
    assert render(template, messages, continue_final_message=True) == right
    with pytest.raises(RequestError, match="cannot be continued"):
        render("nothing", messages, continue_final_message=True)
    with pytest.raises(RequestError, match="give one"):
        ChatOptions(continue_final_message=True, add_generation_prompt=True)


DOUBLING = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 10**10 }}", DOUBLING, "{{ 'a'.ljust(10**10) }}", "{{ '%9999999999d' % 1 }}", "{{ 'a' * 2**25 }}"],
)
def test_a_template_that_makes_endless_text_is_refused(template):
    with pytest.raises(RequestError, match=r"chat template .*(MemoryError|want of memory|more than \d+ characters)"):
        render(template)
    assert render("{{ messages[0].role }}") == "user"


def test_a_template_that_takes_for_ever_is_refused():
    renderer = TemplateRenderer(max_seconds=0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match=r"fails on these messages: it takes more than 0\.5 s"):
        renderer.render(endless, {})
    assert renderer.render("{{ a }}", {"a": "é"}) == "é"
    renderer.close()


def test_nesting_without_end_is_an_error_of_the_request():
    deep = "[" * 100_000
    call = {"type": "function", "function": {"name": "f", "arguments": deep}}
    messages = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render("{{ messages[1].tool_calls[0].function.arguments | length }}", messages) == "100000"
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(RequestError, match="must be JSON values"):
        render("x", chat_template_kwargs={"a": value})


def test_the_process_that_renders_ends_by_itself_when_nobody_waits_for_it():
    """Whoever asked may have been killed."""
    script = f"import runpy; main = runpy.run_path({str(WORKER)!r})['main']; "
    script += "main.__globals__['MAX_SECONDS'] = 0.3; main()"
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    asked = json.dumps({"template": endless, "values": {}}) + "\n"
    done = subprocess.run([sys.executable, "-c", script], input=asked, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, "")


def test_values_that_json_does_not_have_are_refused():
    with pytest.raises(RequestError, match="must be JSON values"):
        render("x", chat_template_kwargs={"a": object()})


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": True}}
WITH_CALLS = "{{ messages[0].content }} {{ tools | length if tools else 0 }} <tool_call>"


@pytest.mark.parametrize(
    ("options", "num_shown", "is_constrained"),
    [
        ({"tools": [TOOL]}, 1, False),
        ({"tools": [TOOL, {"a": 1}]}, 2, False),
        ({"tools": [STRICT]}, 1, True),
        ({"tools": [TOOL], "tool_choice": "required"}, 1, True),
        ({"tools": [TOOL], "parallel_tool_calls": False}, 1, True),
        ({"tools": [STRICT], "tool_choice": "none"}, 0, False),
        ({"parallel_tool_calls": False}, 0, False),
    ],
)
def test_tools_are_shown_and_their_calls_constrained_where_that_is_asked_for(options, num_shown, is_constrained):
    chat = ChatOptions(**options)
    assert render(WITH_CALLS, **options) == f"Hello <b> é {num_shown} <tool_call>"
    assert len(chat.callable_names) == min(num_shown, 1)
    plain, formed = SamplingParams(max_tokens=3), SamplingParams(structured_outputs={"regex": "a"})
    assert (chat.constrained(plain).structured_outputs is not None) == is_constrained
    if not is_constrained:
        assert render("{{ 1 }}", **options) == "1"
        assert chat.constrained(formed) is formed
        return
    with pytest.raises(RequestError, match=r"structured_outputs, or response_format, and tools .* give one of them"):
        chat.constrained(formed)
    with pytest.raises(RequestError, match=r"chat template has no <tool_call>, .*; leave out strict"):
        render("{{ 1 }}", **options)


def test_calls_that_cannot_be_kept_to_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^tool_choice='required' without tools cannot be kept to; give tools"):
        ChatOptions(tool_choice="required")
    with pytest.raises(RequestError, match=r"^tool_choice='any' is not served"):
        ChatOptions(tools=[TOOL], tool_choice="any")
    with pytest.raises(RequestError, match="<tool_call> is a special token of this model, which no text holds"):
        ChatOptions(tools=[STRICT]).check_form_of_calls(WITH_CALLS, {"<tool_call>": 1})
