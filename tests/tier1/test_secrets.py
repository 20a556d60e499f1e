"""What is secret stays out of text, and what is not secret stays in it."""

from __future__ import annotations

import json
import time
from urllib.parse import quote

import pytest

from finetune.core import secrets
from finetune.core.secrets import shapes
from support import secret_kinds
from support.secret_kinds import SHAPED


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


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *secret_kinds.NAMED,
        *(
            "DB_PASS",
            "PGPASSFILE",
            "SMTP_PASS",
            "SSHPASS",
            "SSH_KEY",
            "SSH_KEY_2",
            "GPG_PRIVATE_KEY",
            "PRIVKEY",
            "dbPassword",
        ),
        *("AWS_ACCESS_KEY_ID", "AWS_SECURITY_TOKEN", "AWS_BEARER_TOKEN_BEDROCK", "GOOGLE_APPLICATION_CREDENTIALS"),
        *(
            "NPM_AUTH",
            "HTTP_AUTH",
            "DOCKER_AUTH_CONFIG",
            "PROXY_AUTHORIZATION",
            "VAULT_ADDR_TOKEN",
            "API_TOKENS",
            "apiKey",
        ),
        *(
            "SENTRY_DSN_EU",
            "DATABASE_DSN",
            "CONN",
            "MYDB_CONN_STR",
            "CREDS",
            "GCP_CREDS_JSON",
            "CI_JWT",
            "SLACK_WEBHOOK_URL",
        ),
        *(
            "ANSIBLE_VAULT_PASSPHRASE",
            "LUKS_PASSCODE",
            "WALLET_MNEMONIC",
            "AZURE_SAS",
            "OPENAI_KEY",
            "LICENSE_KEY",
            "MY-TOKEN",
        ),
    ],
)
def test_more_names_of_variables_that_hold_secrets(name):
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "PWD",
            "OLDPWD",
            "PATH",
            "SSH_AUTH_SOCK",
            "XAUTHORITY",
            "AUTHOR",
            "GIT_AUTHOR_NAME",
            "PASS_RATE",
            "BYPASS",
            "COMPASS",
        ),
        *(
            "MONKEY",
            "PUBLIC_KEY",
            "SORT_KEY",
            "KEYMAP",
            "CONNECT_TIMEOUT",
            "MAX_CONNECTIONS",
            "COOKIECUTTER_DIR",
            "PATTERN",
        ),
        *("DATABASE_URL", "MLFLOW_TRACKING_URI", "TOKENIZERS_PATH", "NUM_TOKENS"),
    ],
)
def test_more_names_of_variables_that_hold_none(name):
    assert not secrets.is_secret_name(name)


# -- values ------------------------------------------------------------------------------------------------------------

ORDINARY = (
    *(
        "",
        "a",
        "the",
        "capital",
        "Paris",
        "HELLO",
        "password",
        "conversations",
        "the capital",
        "It is Quell.",
        "1234",
        "2026-11-30",
    ),
    *("10.5", "********", "aaaaaaaaaaaa", "s3cret", "Zürich", "Straßenbahn", "true"),
)


@pytest.mark.parametrize("value", ORDINARY)
def test_a_value_like_other_text_cannot_be_told_from_it(value):
    assert not secrets.looks_secret(value)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "s3cret-9",
            "plain-secret",
            "hunter2hunter3",
            "qWertyuiop",
            "abcdefghijklmnopqrst",
            "correct horse battery staple",
        ),
        *("123456789012345", "p@ss/w0rd", "a b?c=d&e", "deadbeefcafe01", "pass_word_1", "ghp_" + "Q7" * 15),
    ],
)
def test_any_other_value_is_a_secret(value):
    assert secrets.looks_secret(value)


def test_an_ordinary_word_is_hidden_in_lines_where_it_stands_alone_and_in_no_document(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "capital")
    monkeypatch.setenv("X_PASSWORD", "a")
    assert secrets.redact("a 401 for capital, and capitals of a land") == "a 401 for ***, and capitals of a land"
    document = {"capital": ["capital", 1, None, {"a": "a capital"}]}
    assert secrets.redacted(document) == document
    assert secrets.detector()("What is the capital of a land?") is None


def test_a_document_keeps_its_keys_and_numbers_and_loses_secrets(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cret-of-mine")
    document = {"s3cret-of-mine": 1, "said": ["of s3cret-of-mine!", 2.5, None, True, {"x": "s3cret-of-mine"}]}
    assert secrets.redacted(document) == {"s3cret-of-mine": 1, "said": ["of ***!", 2.5, None, True, {"x": "***"}]}


def test_a_detector_names_the_variable(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cret-of-mine")
    monkeypatch.setenv("DATABASE_URL", "postgres://ada:l0velace!@db.example/x")
    monkeypatch.setenv("THING", SHAPED["gitlab"])
    secrets.remember("t0ken-of-the-recipe")
    found = secrets.detector()
    assert found("x s3cret-of-mine y") == "the value of MY_API_KEY"
    assert found("x%2Fs3cret-of-mine%2Fy") == "the value of MY_API_KEY"
    assert found("ada and l0velace!") == "a secret in DATABASE_URL"
    assert found(f"x {SHAPED['gitlab']}") == "the value of THING"
    assert found("x t0ken-of-the-recipe") == "the value of model.token"
    assert found(f"x {SHAPED['npm']}") == "what looks like an npm token"
    assert found("What is s3cret?") is None


def test_the_path_of_a_file_that_is_there_is_no_secret(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert secrets.redact(f"read {tmp_path}/netrc") == f"read {tmp_path}/netrc"
    monkeypatch.setenv("NETRC", str(tmp_path / "gone-1"))
    assert secrets.redact(f"read {tmp_path}/gone-1") == "read ***"


def test_the_secrets_inside_a_variable_are_hidden_alone(monkeypatch):
    monkeypatch.setenv("GCP_CREDENTIALS", secret_kinds.NAMED["GCP_CREDENTIALS"])
    monkeypatch.setenv("SSH_PRIVATE_KEY", SHAPED["openssh key"])
    monkeypatch.setenv("MY_DSN", "host=db user=ada password=l0velace! dbname=x")
    key = json.loads(secret_kinds.NAMED["GCP_CREDENTIALS"])["private_key"]
    line = SHAPED["openssh key"].splitlines()[2]
    assert secrets.redact(f"{key} | {line} | l0velace!") == "*** | *** | ***"


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPED)
@pytest.mark.parametrize(
    "around", ["{}", "x {} y", "key={}", '{{"a": "{}"}}', "({}).", "a\\n{}", "key%3D{}", "X_{}", "'{}'", "Bearer {}"]
)
def test_a_known_shape_is_found_and_hidden_wherever_it_stands(kind, around):
    text = around.format(SHAPED[kind])
    assert shapes.find(text), text
    assert SHAPED[kind] not in secrets.redact(text)
    escaped = around.format(json.dumps(SHAPED[kind])[1:-1])
    assert json.dumps(SHAPED[kind])[1:-1] not in secrets.redact(escaped)
    assert quote(SHAPED[kind], safe="") not in secrets.redact(quote(text, safe=""))


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "x" * 34,
        "sk-" + "X" * 48,
        "export GITHUB_TOKEN=ghp_" + "*" * 36,
        "postgres://user:password@localhost/db",
        "https://user:pass@example.com",
        "https://${USER}:${PASSWORD}@host",
        "git clone ssh://git@host.example/x.git",
        "http://localhost:8080/@vite/client",
        "http://[::1]:8080/@x",
        "see https://host.example/a:b/c and mail ada@host.example",
        "the -----BEGIN PRIVATE KEY----- line",
        "an eyJ is no token, and AKIA is none",
        "task-" + "a1" * 20,
        "100% of %20 and %zz",
        "disk-usage-of-the-whole-machine-1",
        "smollm2-135m-instruct-v0.1-2026-11-30",
        "sk-learn-contrib-package-extras",
        "see pypi-mirror-of-the-company",
        "c29tZSBiYXNlNjQgdGV4dCB0aGF0IGlzIG5vIHNlY3JldA==",
    ],
)
def test_what_manuals_and_texts_hold_is_no_secret(text):
    assert shapes.find(text) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://ada:l0velace@db.example/x", "postgres://***@db.example/x"),
        ("redis://:l0velace@db.example", "redis://***@db.example"),
        ("https://ada@corp.example:l0velace@host/x", "https://***@host/x"),
        ("https://ada:l0ve/l@ce#1@host/x", "https://***@host/x"),
        ("https://0123456789abcdef0123@sentry.example/4", "https://***@sentry.example/4"),
        ("https://host/x?a=1&access_token=abcdef1&b=2", "https://host/x?a=1&access_token=***&b=2"),
        ("https://x.blob.example/y?sv=1&sig=abc%2Fdef", "https://x.blob.example/y?sv=1&sig=***"),
        ("Server=x;Password=l0velace;Port=1", "Server=x;Password=***;Port=1"),
        ("Authorization: Basic YWRhOmxvdmU=", "Authorization: Basic ***"),
        ('{"Authorization": "Bearer abcdefgh"}', '{"Authorization": "Bearer ***"}'),
        ("pad_token=0 eos_token=<|im_end|> max_tokens=5", "pad_token=0 eos_token=<|im_end|> max_tokens=5"),
    ],
)
def test_passwords_in_addresses_and_connection_strings_are_hidden(text, shown):
    assert secrets.redact(text) == shown


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "eyJ",
        "://a:b",
        "%25",
        "?token",
        "passw",
        "password ",
        "Authorization: ",
        "-----BEGIN ",
        "-----BEGIN PRIVATE KEY-----\n",
        "a1",
    ],
)
def test_a_long_text_of_beginnings_is_looked_through_in_time(text):
    long = f"PRIVATE KEY {text * 60_000} %41"
    began = time.process_time()
    shapes.find(long)
    shapes.hide(long, "***")
    assert time.process_time() - began < 5
