"""`finetune serve` with the real servers, asked by whoever means no good, and when the model's own server dies."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from finetune.core.errors import MissingError
from finetune.run import Run
from finetune.run.plan import BY_NAME
from finetune.serving import check_installed, keeper
from finetune.stages.pipeline import run_stages
from finetune.stages.runner import run_stage
from support.chain import tiny_recipe
from support.door import HELLO, JSON
from support.malformed import BODIES, MESSAGES, NESTED, PROMPTS, TYPES, WHOLE

BACKENDS = {"torch": "torch", "gguf": "llamacpp", "mlx": "mlx"}
LONG = {"prompt": "Hello", "max_tokens": 400, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def run(recipe, tiny_model, tmp_path_factory) -> Run:
    """A tiny model, merged and exported to what is here, not proved."""
    exports = [name for name in recipe.export if name in ("gguf:f16", "mlx")]
    recipe = tiny_recipe(tiny_model("llama"), tmp_path_factory.mktemp("guarded"), exports)
    run = Run(Path(recipe.output_dir) / recipe.name)
    run_stages(recipe, run, ["merge"])
    if exports:
        run_stage(BY_NAME["export"], recipe, run)
    return run


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, family, skip_or_fail) -> str:
    if request.param != "torch":
        family(request.param)
    elif only := os.environ.get("FT_TIER3"):
        pytest.skip(f"this session is for {only}; run: nox -s tier3")
    try:
        check_installed(BACKENDS[request.param])
    except MissingError as error:
        skip_or_fail("serve", str(error))
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def server(backend, run):
    """A server in a process of its own, which the last test brings down."""
    command = [sys.executable, "-m", "finetune", "serve", str(run.path), "--backend", backend, "--port", "0", "--proof"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()
        yield SimpleNamespace(url=url, backend=backend, process=process)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def ask(server, body, path="/v1/chat/completions") -> tuple[int, dict]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request("GET" if data is None else "POST", path, data, JSON)
    with connection.getresponse() as answer:
        return answer.status, json.loads(answer.read())


def test_no_malformed_request_is_an_error_of_the_server(server):
    honest = {"messages": HELLO, "max_tokens": 2, "temperature": 0}
    expected = ask(server, honest)[1]["choices"][0]["message"]
    bodies = [*BODIES, *MESSAGES, *({**honest, key: value} for key, value in (*TYPES, *NESTED))]
    asked = [(body, "/v1/chat/completions") for body in bodies]
    asked += [({"prompt": prompt}, "/v1/completions") for prompt in PROMPTS]
    asked += [({"prompt": "Hello", key: value}, "/v1/completions") for key, value in (*TYPES, *NESTED)]
    assert len(asked) > 700
    for body, path in asked:
        status, answer = ask(server, body, path)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), (body, answer)
    assert ask(server, honest)[1]["choices"][0]["message"] == expected


def test_an_odd_request_that_is_well_formed_is_answered_or_refused(server):
    """What is right by its type, and wrong or strange all the same to a template or an engine."""
    tool = WHOLE["messages"][2]
    asked = [{**WHOLE, "model": "tiny"}]
    asked += [
        {"messages": HELLO, "max_tokens": 2, key: value}
        for key, value in WHOLE.items()
        if key not in ("messages", "model")
    ]
    asked += [
        {"messages": messages, "max_tokens": 2}
        for messages in (
            [tool], [*HELLO, tool], [{"role": "tool", "content": "a"}], [{"role": "assistant", "content": ""}],
            [*HELLO, *HELLO],
            [{"role": "user", "content": ""}], [{"role": "user", "content": "\0"}], [{"role": "system", "content": "a"}],
        )
    ]  # fmt: skip
    asked += [
        {"messages": HELLO, "max_tokens": 2, **more}
        for more in (
            {"logit_bias": {"2147483647": 1}}, {"logit_bias": {"99999": -100}}, {"stop": "\0"}, {"max_tokens": 2**31 - 1},
            {"chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}}, {"chat_template_kwargs": {"tokenize": False}},
            {"chat_template_kwargs": {"messages": 1}}, {"chat_template_kwargs": {"return_dict": False}}, {"top_p": 1e-300},
            {"chat_template_kwargs": {"add_generation_prompt": 5}}, {"temperature": 1e-300}, {"tools": WHOLE["tools"] * 50},
            {"response_format": {"type": "json_schema", "json_schema": {}}}, {"top_logprobs": 3}, {"logprobs": True},
            {"response_format": {"type": "json_object"}}, {"grammar": "x"}, {"json_schema": {"type": "x"}}, {"n": 128},
            {"top_k": -1}, {"min_p": 1}, {"repeat_penalty": 0}, {"samplers": ["x"]}, {"reasoning_format": "none"}, {"lora": []},
            {"lora": [{"id": 5, "scale": 1}]}, {"id_slot": 99}, {"n_probs": 2**31 - 1}, {"dry_sequence_breakers": [""]},
            {"repetition_context_size": 0, "repetition_penalty": 1.5}, {"presence_penalty": 2, "presence_context_size": 0},
            {"functions": [{"name": "a"}]}, {"function_call": "auto"}, {"tool_choice": "required"}, {"num_draft_tokens": 5},
            {"stream_options": {"include_usage": True}}, {"xtc_probability": 1, "xtc_threshold": 0}, {"n_cmpl": 3},
        )
    ]  # fmt: skip
    for body in asked:
        status, answer = ask(server, {"temperature": 0, **body, "max_tokens": min(2, body.get("max_tokens", 2))})
        assert status in (200, 400), (status, body, answer)
        assert status == 200 or answer["error"]["message"]
    assert ask(server, {"messages": HELLO, "max_tokens": 2})[0] == 200


def test_nothing_listens_but_the_door(server):
    """Behind it there is a socket in a folder that nobody else may open."""
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = {each.laddr.port for one in family for each in one.net_connections("inet") if each.status == "LISTEN"}
    assert listening == {int(server.url.rpartition(":")[2])}
    sockets = [
        Path(each.laddr) for one in family for each in one.net_connections("unix") if str(each.laddr).endswith("s.sock")
    ]
    assert bool(sockets) == (server.backend != "torch")
    for socket in sockets:
        assert socket.parent.stat().st_mode & 0o077 == 0
    for path in ("/props", "/slots", "/metrics", "/v1/props", "/tokenize", "/apply-template"):
        assert ask(server, None, path)[0] == 404


def eventually(server, status: int, seconds: float = 60) -> dict:
    end = time.monotonic() + seconds
    while True:
        found, answer = ask(server, None, "/health")
        assert found in (200, 502, 503)
        if found == status:
            return answer
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["gguf", "mlx"], indirect=True)
def test_a_server_that_dies_is_started_again_and_not_for_ever(server):
    honest = {"messages": HELLO, "max_tokens": 2, "temperature": 0}
    expected = ask(server, honest)[1]["choices"][0]["message"]
    for _ in range(keeper.RESTARTS):
        (behind,) = psutil.Process(server.process.pid).children()
        with ThreadPoolExecutor(1) as other:
            streamed = other.submit(stream, server)
            time.sleep(0.2)
            behind.send_signal(signal.SIGKILL)
            text = streamed.result(timeout=60)
        assert b"does not answer" in text or b"[DONE]" in text or b"SIGKILL" in text
        eventually(server, 200)
        assert ask(server, honest)[1]["choices"][0]["message"] == expected
    (behind,) = psutil.Process(server.process.pid).children()
    behind.send_signal(signal.SIGKILL)
    _, said = server.process.communicate(timeout=60)
    assert server.process.returncode == 4, said
    assert "was ended by SIGKILL" in said and "It is started again (3 of 3 times)" in said
    assert "the model's own cannot be kept" in said and "Traceback" not in said


def stream(server) -> bytes:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(LONG), JSON)
    return connection.getresponse().read()
