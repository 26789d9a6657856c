"""`fineserve-jax serve`: what it refuses before a model is loaded, and a process that serves and ends."""

import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import openai
import pytest
from serving import PATIENCE_S, eventually
from tiny_model import OPTIONS, write_tiny_model

from fineserve_jax.entrypoints.cli import main

FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
    except urllib.error.URLError:
        pass  # it says where it will listen a moment before it does
    return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "99999"], "port=99999"),
        (["--max-wait-s", "0"], "max_wait_s=0"),
        (["--classes", "missing.yaml"], "cannot read the configuration missing.yaml"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--ray"], "--ray runs the engines of a plan; give --plan"),
        (["--ray-cpus", "2"], "ray_cpus says where on a Ray cluster, and there is no --ray"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_the_model_is_loaded(capsys, flags, message):
    assert main(["serve", "--model", "no-such-model", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--model", "no-such-model", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be listened at" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_serves_by_its_classes_and_answers_what_has_begun_before_it_ends(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    classes = tmp_path / "classes.yaml"
    classes.write_text("classes: {one: {keys: [k1], tenant: alice, kv_precisions: [int8], quota: {guaranteed: 0.5}}}")
    command = [sys.executable, "-m", "fineserve_jax.entrypoints.cli", "serve", "--model", str(model), *FLAGS]
    command += ["--port", "0", "--classes", str(classes), "--temperature", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            eventually(lambda: is_ready(url), PATIENCE_S)  # compiled, and not only listening
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{url}/v1", api_key="k2", max_retries=0).models.list()
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="k1", max_retries=0, timeout=PATIENCE_S)
            asked = {"prompt": "abc", "model": "tiny", "max_tokens": 100}
            texts = [client.completions.create(**asked).choices[0].text for _ in range(2)]
            assert texts[0] == texts[1], "the server's own default is greedy"
            with pytest.raises(openai.PermissionDeniedError):
                client.completions.create(**asked, extra_body={"kv_precision": "int4"})
            stream = client.completions.create(**asked, stream=True)
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream) == texts[0]
            assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
            with pytest.raises(OSError, match="refused"):
                urllib.request.urlopen(f"{url}/health", timeout=10)
        finally:
            process.kill()
