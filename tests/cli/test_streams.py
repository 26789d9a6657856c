"""stdin, stdout and stderr that are closed, full, read no further, or of an encoding without most characters."""

import io
import os
import subprocess
import sys

import pytest
from tiny_model import OPTIONS

from fineserve_jax import RequestError
from fineserve_jax.entrypoints.cli.streams import mend_streams, read_stdin

FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def generate(tiny_model, redirections, prompt="abc", **environment):
    """`fineserve-jax generate`, its streams as a shell is told."""
    words = ["generate", prompt, "--model", str(tiny_model), *FLAGS, "--raw", "--max-tokens", "3"]
    command = f'exec "$0" -m fineserve_jax.entrypoints.cli "$@" {redirections}'
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", command, sys.executable, *words], capture_output=True, input=b"", env=environment, check=False
    )


@pytest.mark.parametrize(
    ("redirections", "status", "error"),
    [
        (">&-", 2, "error: stdout is closed, so that the answer would be lost; open it"),
        (">/dev/full", 2, "error: the output cannot be written: No space left on device; make room"),
    ],
)
def test_stdout_that_takes_nothing_is_an_error_of_one_line(tiny_model, redirections, status, error):
    done = generate(tiny_model, redirections)
    assert done.returncode == status
    assert done.stderr.decode().splitlines()[-1].startswith(error)
    assert b"Traceback" not in done.stderr


def test_a_closed_stderr_does_not_divert_what_is_told_there_to_stdout(tiny_model):
    done = generate(tiny_model, "2>&-")
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")
    assert b"output tokens" not in done.stdout


def test_a_closed_stdin_is_an_error_of_one_line(tiny_model):
    done = generate(tiny_model, "<&-", prompt="-")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: stdin is closed; give the text as an argument, or pipe it in\n"


def test_text_that_the_encoding_lacks_is_written_as_code_points(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    mend_streams()
    print("a😀é", flush=True)
    assert out.buffer.getvalue() == b"a\\U0001f600\\xe9\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_stdin_is_utf_8_whatever_the_terminals_encoding(monkeypatch, encoding):
    def stdin(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))

    stdin("\ufeffä😀".encode())
    assert read_stdin() == "ä😀"
    stdin("aä".encode("latin-1"))
    with pytest.raises(RequestError, match=r"stdin is not UTF-8: .* at byte 1; convert it"):
        read_stdin()


@pytest.mark.parametrize(("redirection", "status"), [(">/dev/full", 2), (">&-", 0)])
def test_a_command_that_only_prints_gives_no_traceback(redirection, status):
    command = f'exec "$0" -m fineserve_jax.entrypoints.cli --version {redirection}'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, check=False)
    assert done.returncode == status
    assert done.stderr.startswith(b"error: the output cannot be written: No space left") == bool(status)
    assert len(done.stderr.splitlines()) == bool(status)
