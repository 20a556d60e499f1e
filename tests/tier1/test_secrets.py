"""What is secret stays out of text, and what is not secret stays in it."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from finetune import secrets


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "hf_token",
        "HUGGING_FACE_HUB_TOKEN",
        "TOKEN_2",
        "OPENAI_API_KEY",
        "APIKEY",
        "DB_PASSWORD",
        "MY_SECRET",
    ],
)
def test_variables_that_hold_secrets_are_known_by_name(name):
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["HOME", "TOKENIZERS_PARALLELISM", "TOKENIZER_DIR", "MAX_TOKENS", "DATA_DIR", "KEYBOARD"]
)
def test_variables_that_hold_none_can_be_used_anywhere(name):
    assert not secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "token", ["hf_" + "aB3" * 10, "sk-" + "x-_9" * 6, "ghp_" + "Q7" * 15], ids=["hub", "openai", "github"]
)
@pytest.mark.parametrize("around", ["{}", "Bearer {}", "token={}&x", '"{}"', "X_{}", "({})."])
def test_whatever_looks_like_a_token_is_hidden(token, around):
    shown = secrets.redact(around.format(token))
    assert token not in shown
    assert shown == around.format("***")


@pytest.mark.parametrize("text", ["hf_hub_download", "sk-learn", "ghp_", "the hf_transfer package", ""])
def test_words_that_only_begin_like_a_token_stay(text):
    assert secrets.redact(text) == text


@pytest.mark.parametrize("secret", ["plain-secret", 'with "quotes" in', "bäck\\slash", "a/b?c=d e"])
def test_a_remembered_secret_is_hidden_in_every_form(secret):
    secrets.remember(secret)
    for text in (secret, json.dumps([secret]), json.dumps([secret], ensure_ascii=False), quote(secret, safe="")):
        assert "***" in secrets.redact(f"x{text}y")
        assert secret not in secrets.redact(f"x{text}y")


def test_the_longer_of_two_secrets_is_hidden_whole():
    secrets.remember("secret")
    secrets.remember("secret-and-more")
    assert secrets.redact("a secret-and-more b") == "a *** b"


def test_short_values_would_hide_words_and_are_not_remembered():
    secrets.remember("the")
    secrets.remember("")
    assert secrets.redact("the cat") == "the cat"


def test_the_token_of_the_environment_is_hidden_without_being_remembered(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-form-of-token")
    assert secrets.redact("x unusual-form-of-token") == "x ***"
