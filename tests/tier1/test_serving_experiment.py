"""What a run's server is asked, and how its answers are kept: with a client that answers as it is told."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.backends import Generation
from finetune.backends.fake.model import FakeTokenizer
from finetune.checks import results
from finetune.core.errors import UsageError
from finetune.core.files import write_json
from finetune.experiments import serving
from finetune.experiments.serving import Asked

TEXT = "It is Wadda."
ENDED, CUT = (
    {"text": TEXT, "ids": list(TEXT.encode()), "finish": "stop"},
    {"text": "x", "ids": [9] * 16, "finish": "length"},
)


def answer(which: str, name: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {"set": which, "prompt": name, "phases": {"base": before, "trained": after}}


def asked(text: str = TEXT) -> Asked:
    made = Generation(ids=tuple(text.encode()), text=text, finish="stop")
    messages = [{"role": "user", "content": "Who?"}]
    return Asked(
        name="Who?", kind="question", messages=messages, prompt_tokens=4, max_tokens=16, answer=made, again=made
    )


class Client:
    """Keeps what it is asked, and always says the same."""

    def __init__(self, text: str = TEXT) -> None:
        self.text = text
        self.requests: list[dict[str, Any]] = []

    def __call__(self, messages: Any, **options: Any) -> dict[str, Any]:
        self.requests.append(options)
        return {"text": self.text, "finish": "stop", "prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}


def test_questions_that_training_changed_and_that_end_are_asked_first():
    known = answer("controls", "known", ENDED, ENDED)
    rows = [
        answer("probes", "as before", ENDED, ENDED),
        answer("probes", "cut off", ENDED, CUT),
        *(answer("probes", f"learned {number}", CUT, ENDED) for number in range(2)),
        known,
    ]

    chosen = serving._chosen(rows, 16)

    assert [row["prompt"] for row in chosen] == ["learned 0", "learned 1", "as before", "known"]


def test_an_end_as_the_last_token_is_asked_last():
    """Servers call it 'length', and an evaluation does not."""
    last = {**ENDED, "ids": [9] * 15}
    rows = [answer("probes", "at the limit", CUT, last), answer("probes", "ended", ENDED, ENDED)]

    assert [row["prompt"] for row in serving._chosen(rows, 16)] == ["ended", "at the limit"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [(TEXT, "Wadda.", "It is "), ("Four.", "our.", "F"), ("a b a", "a", ""), ("x", "x", "")],
)
def test_the_last_word_is_the_stop_string(text, stop, expected):
    client = Client(expected)
    found = serving._stop(client, asked(text), text)

    assert (found["stop"], found["expected"]) == (stop, expected)
    assert client.requests == [{"max_tokens": 16, "temperature": 0, "stop": [stop]}]


def test_where_nothing_is_said_there_is_nothing_to_stop_at():
    assert serving._stop(Client(), asked(""), "")["found"] is None


def test_half_of_an_answer_is_asked_for():
    client = Client()
    found = serving._length(client, asked(), FakeTokenizer())

    assert (found["max_tokens"], found["expected"]) == (6, "It is ")
    assert client.requests == [{"max_tokens": 6, "temperature": 0}]


def test_sampling_is_asked_with_several_seeds_one_of_them_twice_and_with_nothing_to_draw_from():
    client = Client()
    found = serving._sampling(client, asked())

    seeds = [request.get("seed") for request in client.requests]
    assert seeds == [1, 2, 3, 4, 1, None, 1, 2]
    assert [request.get("top_p") for request in client.requests] == [None] * 6 + [serving.TOP_P] * 2
    assert [request["temperature"] for request in client.requests] == [2.0] * 5 + [0] + [2.0] * 2
    assert found["likeliest_only"] == [TEXT] * 2


def test_only_a_backend_whose_server_there_is_can_be_asked(copied, tmp_path):
    with pytest.raises(UsageError, match=r"expect\.serving asks the server of the backend 'torch', not of 'fake'"):
        serving.measure(copied.recipe, copied.run, tmp_path)


def test_an_answer_that_parts_at_a_tie_is_the_servers_own(copied):
    """Where the merged model, asked alone, says what the server says, the evaluation had rounded otherwise."""
    import json

    file = copied.run.path / "measure" / "serving.json"
    seen = json.loads(file.read_text(encoding="utf-8"))
    seen["asked"][0]["again"] = seen["asked"][0]["found"]["text"] = "It is Tamin."
    seen["stop"]["stop"] = "Tamin."
    seen["asked"][0]["found"]["finish"] = "length"
    seen["stream"]["found"].update(text="It is Tamin.", finish="length")
    write_json(file, seen)

    found = {verdict.name: verdict for verdict in results(copied.recipe, copied.run, ["serving"])}

    assert [name for name, verdict in found.items() if verdict.refuted] == []
    assert "1 of them part at a tie" in found["serving_answers"].why
