"""A process that renders chat templates, and nothing else: it is run as a script and imports only Jinja.

A template comes with a model and is a program that nobody has read. Jinja's sandbox keeps it away from Python's
internals, but lets it loop for hours or build gigabytes of text. In a process of its own its memory is limited by the
operating system and its time by whoever waits for the answer (see `chat_templates`).

    stdin    one JSON object a line: {"template": source, "values": {name: value, ...}}
    stdout   one JSON object a line: {"text": ...}, {"refused": ...} by the template itself, or {"failed": ...}
"""

import datetime
import functools
import json
import signal
import sys
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 2**30
"""Memory of the process, where the operating system can limit it."""

MAX_SECONDS = 30.0
"""Longest time that the process works on one template."""

MAX_CHARACTERS = 2**24
"""Longest text that a template may make."""


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training; renders it."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def answer(line: str) -> dict[str, str]:
    """The answer to one line of the input; never raises for what a template does."""
    try:
        asked = json.loads(line)
        return {"text": _render(_compile(asked["template"]), asked["values"])}
    except jinja2.TemplateError as error:
        return {"refused": str(error)}
    except Exception as error:  # the template is a program: it may divide by zero, recurse without end, ...
        return {"failed": repr(error)[:1000]}


def _render(template: jinja2.Template, values: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(**values):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"it makes more than {MAX_CHARACTERS} characters of text")
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML and sorts keys, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MAX_BYTES if hard == resource.RLIM_INFINITY else min(MAX_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main() -> None:
    _limit_memory()
    for line in sys.stdin:
        _limit_time(MAX_SECONDS)
        print(json.dumps(answer(line)), flush=True)
        _limit_time(0)


def _limit_time(seconds: float) -> None:
    """End the process after so long, if nobody else does: whoever asked may be gone. 0: never."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
