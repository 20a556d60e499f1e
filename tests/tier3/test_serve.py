"""`finetune serve` with the real servers, asked by the official OpenAI client: a tiny model that knows six facts."""

from __future__ import annotations

import asyncio
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

import pytest

from finetune.backends import get
from finetune.core.errors import MissingError
from finetune.core.files import read_jsonl
from finetune.recipe.sections import Template
from finetune.run import Run
from finetune.run.evidence import fetched
from finetune.run.plan import BY_NAME
from finetune.serving import bind, check_installed, serving
from finetune.serving.models import final, whole
from finetune.stages.pipeline import run_stages
from finetune.stages.runner import run_stage
from support.chain import FACTS, tiny_recipe

BACKENDS = {"torch": "torch", "gguf": "llamacpp", "mlx": "mlx"}
SYSTEM = "Answer in one sentence."
# Not the one that the tiny model comes with: an answer by heart needs the template of the training.
TEMPLATE = (
    "{% for m in messages %}{{ '# ' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant: ' }}{% endif %}"
)
CROWD = 8
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def run(recipe, tiny_model, tmp_path_factory) -> Run:
    """Trained with a template and a system message of its own, and exported to what is here."""
    exports = [name for name in recipe.export if name in ("gguf:f16", "mlx")]
    recipe = tiny_recipe(tiny_model("llama"), tmp_path_factory.mktemp("served"), exports)
    template = Template(name="custom", jinja=TEMPLATE, system=SYSTEM)
    recipe = recipe.model_copy(update={"template": template})
    run = Run(Path(recipe.output_dir) / recipe.name)
    run_stages(recipe, run, ["merge"])
    if exports:  # alone: what comes before it is for proof
        run_stage(BY_NAME["export"], recipe, run)
    return run


@pytest.fixture(scope="module")
def facts(run) -> list[SimpleNamespace]:
    """The questions, what the backend answers in this process, and how many tokens the training's prompt has."""
    probes = read_jsonl(run.path.parent.parent / "probes.jsonl")
    backend = get("torch")
    handle = backend.load(run.path / "merge" / "model", device="cpu")
    asked = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}] for row in probes]
    prompts = [
        handle.tokenizer.encode("".join(f"# {m['role']}: {m['content']}<|im_end|>" for m in messages) + "# assistant: ")
        for messages in asked
    ]
    answers = backend.generate(handle, prompts, max_new_tokens=40)
    assert [answer.text for answer in answers] == [row["answer"] for row in probes] and len(probes) == FACTS
    return [
        SimpleNamespace(prompt=row["prompt"], answer=row["answer"], tokens=len(ids), start=row["answer"][:12])
        for row, ids in zip(probes, prompts, strict=True)
    ]


@pytest.fixture(scope="module")
def need(family, skip_or_fail):
    """A function: a backend's name by its kind, or a skip."""

    def need(kind: str) -> str:
        if kind != "torch":
            family(kind)
        elif only := os.environ.get("FT_TIER3"):
            pytest.skip(f"this session is for {only}; run: nox -s tier3")
        try:
            check_installed(BACKENDS[kind])
        except MissingError as error:
            skip_or_fail("serve", str(error))
        return BACKENDS[kind]

    return need


@pytest.fixture(scope="module", params=BACKENDS)
def server(request, need, run):
    """A running server, and OpenAI's client of it."""
    backend = need(request.param)
    with serving(run, backend=backend, proof=True) as url:
        yield SimpleNamespace(url=url, backend=backend, client=client(url))


def client(url: str):
    import httpx2
    import openai

    direct = httpx2.Client(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=direct)


def ask(server, prompt: str, **more):
    options = {"temperature": 0, "max_tokens": 40, **more}
    return server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], **options
    )


def complete(server, prompt: str, **more):
    options = {"temperature": 0, "max_tokens": 12, **more}
    return server.client.completions.create(model="tiny", prompt=prompt, **options)


def text(answer) -> str:
    return answer.choices[0].message.content


def test_it_says_which_model_it_has(server):
    import openai

    (model,) = server.client.models.list().data
    assert (model.id, server.client.models.retrieve("tiny").id) == ("tiny", "tiny")
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'".capitalize()):
        server.client.models.retrieve("gpt-5")
    assert get_json(server.url, "/health") == (200, {"status": "ok"})


def test_answers_are_those_of_the_training_and_its_template(server, facts):
    """With a prompt of as many tokens, the system message of the recipe among them."""
    for fact in facts:
        answer = ask(server, fact.prompt)
        assert (text(answer), answer.usage.prompt_tokens) == (fact.answer, fact.tokens)
        assert answer.choices[0].finish_reason == "stop" and answer.model == "tiny"


def test_a_system_message_of_the_client_takes_the_place_of_the_recipes(server, facts):
    messages = [{"role": "system", "content": "No."}, {"role": "user", "content": facts[0].prompt}]
    answer = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, temperature=0)
    assert answer.usage.prompt_tokens < facts[0].tokens


def test_the_model_may_be_left_out(server, facts):
    body = {"messages": [{"role": "user", "content": facts[0].prompt}], "temperature": 0}
    status, answer = post(server.url, "/v1/chat/completions", body)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, facts[0].answer)


def test_a_text_is_continued(server, facts):
    """mlx-lm drops the space that the continuation begins with."""
    answer = complete(server, facts[0].start, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].text.strip()


@pytest.mark.parametrize("stop", [None, ["capital of"]])
def test_a_stream_says_the_same_as_an_answer_at_once(server, facts, stop):
    more = {} if stop is None else {"stop": stop}
    for fact in facts[:3]:
        pieces = [chunk.choices[0] for chunk in ask(server, fact.prompt, stream=True, **more) if chunk.choices]
        whole = ask(server, fact.prompt, **more).choices[0]
        assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
        assert pieces[-1].finish_reason == whole.finish_reason == "stop"
        assert stop or len(pieces) > 3
    pieces = [chunk.choices[0].text for chunk in complete(server, facts[0].start, stream=True) if chunk.choices]
    assert "".join(pieces) == complete(server, facts[0].start).choices[0].text


def test_a_stream_ends_as_the_protocol_has_it(server, facts):
    body = {"messages": [{"role": "user", "content": facts[0].prompt}], "stream": True}
    with urlopen(server.url, "/v1/chat/completions", body) as answer:
        assert answer.getheader("Content-Type").startswith("text/event-stream")
        assert answer.read().rstrip().endswith(b"data: [DONE]")


def test_an_answer_ends_before_a_stop_string(server, facts):
    for stop in ("capital", ["nowhere", "capital"]):
        answer = ask(server, facts[0].prompt, stop=stop)
        assert text(answer) == facts[0].answer.partition("capital")[0]
        assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_ends_an_answer(server, facts):
    answer = ask(server, facts[0].prompt, max_tokens=2)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)
    assert facts[0].answer.startswith(text(answer))


def test_a_temperature_samples_and_a_seed_repeats_it(server, facts):
    def sampled(seed):
        return complete(server, facts[0].start, temperature=2, top_p=1, max_tokens=16, seed=seed).choices[0].text

    first = [sampled(seed) for seed in range(6)]
    with ThreadPoolExecutor(CROWD) as crowd:  # and so it does among others
        again = list(crowd.map(sampled, range(6)))
    assert again == first
    assert len(set(first)) > 3
    assert len({sampled(None) for _ in range(6)}) > 1


def test_eight_clients_get_what_one_gets(server, facts):
    asked = [fact for fact in facts for _ in range(3)]
    with ThreadPoolExecutor(CROWD) as crowd:
        answers = list(crowd.map(lambda fact: text(ask(server, fact.prompt)), asked))
    assert answers == [fact.answer for fact in asked]


# -- what cannot be answered -------------------------------------------------------------------------------------------


def urlopen(url: str, path: str, body: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, JSON)
    return connection.getresponse()


def post(url: str, path: str, body: object) -> tuple[int, dict]:
    with urlopen(url, path, body) as answer:
        return answer.status, json.load(answer)


def get_json(url: str, path: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", path)
    with connection.getresponse() as answer:
        return answer.status, json.load(answer)


HELLO = [{"role": "user", "content": "Hello"}]
BAD = [
    (b'{"messages": [', 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    ([1], 400, "must be a JSON object"),
    ({}, 400, "'messages'"),
    ({"messages": "Hello"}, 400, "'messages'"),
    ({"messages": [{"role": "wizard", "content": "Hello"}]}, 400, "messages[0].role"),
    ({"messages": HELLO, "max_tokens": -1}, 400, "'max_tokens' must be a whole number of 1 or more, not -1"),
    ({"messages": HELLO, "temperature": "hot"}, 400, "'temperature'"),
    ({"messages": HELLO, "model": "gpt-5"}, 404, "there is no model 'gpt-5' here. This server has 'tiny'"),
    ({"messages": HELLO, "adapters": "/etc"}, 400, "'adapters'"),
    ({"messages": [{"role": "user", "content": "Hello " * 2000}]}, 400, "context size"),
]


def test_a_request_that_cannot_be_answered_gets_a_clear_error(server):
    for body, status, words in BAD:
        got, answer = post(server.url, "/v1/chat/completions", body)
        assert (got, words in answer["error"]["message"]) == (status, True), (body, answer)
        assert answer["error"]["type"] == "invalid_request_error"
    for method, path, status in (("POST", "/v1/embeddings", 404), ("GET", "/v1/chat/completions", 405)):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        connection.request(method, path, b"{}" if method == "POST" else None, JSON)
        with connection.getresponse() as answer:
            assert (answer.status, "There are GET /health" in json.load(answer)["error"]["message"]) == (status, True)
    assert get_json(server.url, "/health")[0] == 200


def test_a_prompt_beyond_the_context_is_openais_own_error(server):
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, "Hello " * 2000)
    assert caught.value.code == "context_length_exceeded"
    assert complete(server, "Hello " * 20, max_tokens=100_000).usage.total_tokens <= 512


def test_what_a_server_would_pass_over_in_silence_is_refused(server):
    ignored = {"echo": True} if server.backend == "llamacpp" else {"n": 2}
    status, answer = post(server.url, "/v1/completions", {"prompt": "Hello", **ignored})
    assert (status, answer["error"]["code"]) == (400, "unsupported")


# -- PyTorch: checkpoints, and clients that leave ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory, need):
    """A recipe and its run, which only trained: checkpoints after 3 and 6 of 6 steps."""
    need("torch")
    recipe = tiny_recipe(
        tiny_model("llama"), tmp_path_factory.mktemp("lora"), [], method="lora", max_steps=6, learning_rate=5e-2,
        warmup_steps=0, save_strategy="steps", save_steps=3, save_total_limit=None,
    ).model_copy(update={"template": Template(name="custom", jinja=TEMPLATE)})  # fmt: skip
    run = Run(Path(recipe.output_dir) / recipe.name)
    run_stages(recipe, run, ["train"])
    return recipe, run


def greedy(model: Path, adapter: Path | None = None) -> str:
    backend = get("torch")
    handle = backend.load(model, adapter, device="cpu")
    (answer,) = backend.generate(handle, [handle.tokenizer.encode("What is")], max_new_tokens=12)
    return answer.text


def test_torch_serves_the_checkpoint_that_is_asked_for(lora):
    """With the template of the training, even where the checkpoint has none."""
    _, run = lora
    base = Path(fetched(run)["base"])
    expected = {step: greedy(base, run.path / "train" / f"checkpoint-{step}") for step in (3, 6)}
    assert len({*expected.values(), greedy(base)}) == 3
    for file in (run.path / "train" / "checkpoint-3").glob("*token*"):
        file.unlink()
    (run.path / "train" / "checkpoint-3" / "chat_template.jinja").unlink()
    with serving(run, checkpoint="checkpoint-3", anyway=True) as url:
        _, answer = post(url, "/v1/completions", {"prompt": "What is", "max_tokens": 12, "temperature": 0})
        assert answer["choices"][0]["text"] == expected[3]
        _, answer = post(url, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
        prompt = get("torch").tokenizer(base).encode("# user: Hello<|im_end|># assistant: ")
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert [path.name[:-34] for path in (run.path / "serve").glob("[!.]*")] == ["train-checkpoint-3"]


def test_torch_gets_adapter_and_base_as_one_model_made_once(lora):
    recipe, run = lora
    found = final(run, recipe)
    model = whole(found, run, recipe)
    assert (found.adapter, model.parent) == (run.path / "train" / "adapter", run.path / "serve")
    assert greedy(model) == greedy(found.path, found.adapter)
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert whole(found, run, recipe) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == written
    assert (model / "chat_template.jinja").read_text() == (run.path / "prepare" / "chat_template.jinja").read_text()


@pytest.mark.parametrize("server", ["torch"], indirect=True)
def test_torch_stops_computing_for_a_client_that_has_left(server, run):
    end = get("torch").tokenizer(run.path / "merge" / "model").eos_ids[0]
    body = {"messages": HELLO, "max_tokens": 450, "logit_bias": {str(end): -100}, "temperature": 0}

    def seconds(path: str, asked: dict) -> float:
        begin = time.monotonic()
        assert post(server.url, path, asked)[1]["usage"]["completion_tokens"] == asked["max_tokens"]
        return time.monotonic() - begin

    long = min(seconds("/v1/chat/completions", body) for _ in range(3))
    for stream in (False, True):
        left = http.client.HTTPConnection(server.url.removeprefix("http://"))
        left.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": stream}), JSON)
        time.sleep(long / 10)
        left.close()
        assert seconds("/v1/completions", {"prompt": "Hello", "max_tokens": 1}) < long / 2, stream


# -- coming and going --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "number"), [("torch", "SIGTERM"), ("gguf", "SIGINT"), ("mlx", "SIGTERM")])
def test_a_signal_ends_it_and_leaves_nothing(kind, number, run, need):
    """In the midst of an answer."""
    import psutil

    backend = need(kind)
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "serve", os.fspath(run), "--backend", backend, "--port", "0", "--proof"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert get_json(url, "/health")[0] == 200
        family = psutil.Process(process.pid).children(recursive=True)
        asking = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        asked = {"prompt": "Hello", "max_tokens": 450, "stream": True}
        asking.request("POST", "/v1/completions", json.dumps(asked), JSON)
        asking.getresponse().read(20)
        process.send_signal(getattr(signal, number))
        out, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, ""), said
    assert f"serving {'the final model' if kind == 'torch' else 'the export'}" in said and "Traceback" not in said
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert (alive, bool(family)) == ([], kind != "torch")
    bind("127.0.0.1", int(url.rpartition(":")[2])).close()


# -- the door, before a server that fails ------------------------------------------------------------------------------


def answered(app, body: bytes, path: str = "/v1/completions") -> tuple[int, dict]:
    """What a client gets from the door before an application, without any network."""
    from finetune.serving import app as door

    sent: list[dict] = []

    async def ask() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            return await asyncio.Event().wait()

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
        await door.application(app, name="tiny")(scope, receive, send)

    asyncio.run(ask())
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


PROMPT = b'{"prompt": "Hello"}'


def test_a_server_that_fails_is_an_error_without_its_traceback(caplog):
    async def fail(scope, receive, send):
        raise ZeroDivisionError("secret innards")

    status, answer = answered(fail, PROMPT)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "innards" not in str(answer) and "innards" in caplog.text


@pytest.mark.parametrize(
    "said", [b'{"detail": "no room"}', b'{"error": "no room"}', b'{"error": {"message": "no room"}}']
)
def test_an_error_of_any_server_reads_as_openais(said):
    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 422, "headers": []})
        await send({"type": "http.response.body", "body": said})

    error = {"message": "no room", "type": "invalid_request_error", "param": None, "code": None}
    assert answered(refuse, PROMPT) == (422, {"error": error})


def test_a_request_of_many_megabytes_is_not_read_to_its_end():
    status, answer = answered(None, b'{"prompt": "' + b"a" * 2**24)
    assert (status, answer["error"]["message"]) == (413, "the request is longer than 8 MiB")
