"""What no server could answer, sent to the door: hundreds of malformed requests, and thousands that are drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.serving import SERVERS
from finetune.serving.fields import EXTRAS, FIELDS
from support.door import HELLO, Door, listening
from support.malformed import BODIES, MESSAGES, NESTED, PROMPTS, TYPES, WHOLE


@pytest.fixture(scope="module")
def open_door() -> Iterator[Door]:
    with listening() as found:
        yield found


def is_refused(found: Door, body: Any, path: str = "/v1/chat/completions") -> str:
    """Why a request was refused."""
    status, answer, _ = found.request(body, path)
    error = answer["error"] if status != 200 else None
    assert status == 400 and error is not None, (status, body if len(str(body)) < 2000 else str(body)[:2000], answer)
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert isinstance(error["message"], str) and 5 < len(error["message"]) < 4000
    return error["message"]


def test_a_request_with_every_field_is_answered(open_door: Door) -> None:
    assert open_door.request(WHOLE)[0] == 200
    assert open_door.request({"prompt": "Hello", "stop": "x", "stream": None}, "/v1/completions")[0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_field_of_a_wrong_type_is_told(open_door: Door, path: str) -> None:
    honest = {"messages": HELLO, "prompt": "Hello"}
    rows = [*TYPES, *NESTED]
    assert len(rows) > 300
    for key, value in rows:
        why = is_refused(open_door, {**honest, key: value}, path)
        assert not key.isascii() or key[:40] in why, (key, why)
    assert open_door.is_honest()


def test_a_message_that_no_template_can_render_is_told(open_door: Door) -> None:
    assert len(MESSAGES) > 70
    for body in MESSAGES:
        assert "messages" in is_refused(open_door, body)
    assert open_door.is_honest()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_that_is_no_text_is_told(open_door: Door, prompt: Any) -> None:
    is_refused(open_door, {"prompt": prompt}, "/v1/completions")
    is_refused(open_door, {}, "/v1/completions")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_request_is_told(open_door: Door, path: str) -> None:
    for body in BODIES:
        is_refused(open_door, body, path)
    assert open_door.is_honest()


def test_a_model_with_an_endless_name_is_not_told_of_at_length(open_door: Door) -> None:
    status, answer, _ = open_door.request({"messages": HELLO, "model": "x" * 100_000})
    assert (status, len(answer["error"]["message"]) < 300) == (404, True)


@pytest.mark.parametrize(
    "path", ["/v1/models/" + "x" * 5000, "/v1/models/%ED%A0%80", "/%00", "/v1/../health", "//", "/v1/models/%ff"]
)
def test_an_odd_path_is_not_found(open_door: Door, path: str) -> None:
    status, answer, _ = open_door.request(None, path)
    assert status == 404 and answer["error"]["message"]


# -- requests that are drawn -------------------------------------------------------------------------------------------

TEXT = st.text(max_size=8)
ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from([10**30, 1e308, "\ud800", -0.0, 2**63]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a request."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


PLACES = [path for path in places(WHOLE) if path]


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A whole request in which up to four values are replaced, left out, or new."""
    body = copy.deepcopy(WHOLE)
    for path in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=4)):
        holder: Any = body
        try:
            for key in path[:-1]:
                holder = holder[key]
            if draw(st.booleans()):
                holder[path[-1]] = draw(ANYTHING)
            else:
                del holder[path[-1]]
        except (KeyError, IndexError, TypeError):  # it went with another
            continue
    if draw(st.booleans()):
        body[draw(st.sampled_from(sorted(FIELDS)))] = draw(ANYTHING)
    return body


def is_sane(found: Door, body: Any, path: str) -> None:
    status, answer, _ = found.request(body, path)
    assert status in (200, 400, 404), (status, body, answer)
    assert status == 200 or (answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error")


quick = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@quick
@given(body=damaged())
def test_no_damage_to_a_request_is_an_error_of_the_server(open_door: Door, body: dict[str, Any]) -> None:
    is_sane(open_door, body, "/v1/chat/completions")


@quick
@given(body=st.dictionaries(st.sampled_from(sorted(FIELDS)), ANYTHING, max_size=4), prompt=st.one_of(ANYTHING, TEXT))
def test_no_value_of_a_field_is_an_error_of_the_server(open_door: Door, body: dict[str, Any], prompt: Any) -> None:
    is_sane(open_door, {**body, "prompt": prompt}, "/v1/completions")


@quick
@given(body=st.binary(max_size=60))
def test_no_bytes_are_an_error_of_the_server(open_door: Door, body: bytes) -> None:
    is_sane(open_door, body, "/v1/chat/completions")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200))
def test_no_bytes_on_a_connection_are_an_error_of_the_server(open_door: Door, data: bytes) -> None:
    with open_door.raw(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + data + b"\r\n\r\n") as connection:
        connection.shutdown(1)
        assert not connection.recv(1000).startswith(b"HTTP/1.1 5")


def test_the_server_answers_an_honest_request_after_all_of_them(open_door: Door) -> None:
    assert open_door.is_honest()


def test_every_server_says_which_fields_of_others_it_would_pass_over() -> None:
    """A field that only another server has is refused, not ignored."""
    own = {name: EXTRAS.keys() - set(row.ignored) for name, row in SERVERS.items()}
    assert own["torch"] == {"chat_template_kwargs"}
    assert {"grammar", "n_predict", "top_k"} <= own["llamacpp"] and "repetition_penalty" not in own["llamacpp"]
    assert {"repetition_penalty", "top_k"} <= own["mlx"] and "grammar" not in own["mlx"]
    assert all(set(row.ignored) <= FIELDS.keys() for row in SERVERS.values())
