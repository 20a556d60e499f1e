"""Secrets of every kind, made up: put together here, so that no scanner of repositories takes this file for a leak."""

from __future__ import annotations

import html
import json
import random
import string
from pathlib import Path
from urllib.parse import quote, quote_plus

_LETTERS = string.ascii_letters + string.digits
_HEX = "0123456789abcdef"


def _body(seed: str, length: int, alphabet: str = _LETTERS) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def _pem(kind: str) -> str:
    lines = "\n".join(_body(f"{kind}{n}", 64) for n in range(3))
    return f"-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----"


def _jwt() -> str:
    return ".".join(("eyJhbGciOiJIUzI1NiJ9", "eyJ" + _body("claims", 30), _body("signature", 43)))


# By the shape alone, whatever variable they stand in.
SHAPED: dict[str, str] = {
    "hugging face": "hf_" + _body("hf", 34),
    "openai": "sk-" + _body("sk", 48),
    "openai project": "sk-proj-" + _body("proj", 60),
    "anthropic": "sk-ant-api03-" + _body("ant", 60),
    "github classic": "ghp_" + _body("ghp", 36),
    "github oauth": "gho_" + _body("gho", 36),
    "github user": "ghu_" + _body("ghu", 36),
    "github server": "ghs_" + _body("ghs", 36),
    "github refresh": "ghr_" + _body("ghr", 76),
    "github fine-grained": "github_pat_" + _body("pat", 22) + "_" + _body("pat2", 59),
    "gitlab": "glpat-" + _body("gl", 20),
    "aws key": "AKIA" + _body("aws", 16, string.ascii_uppercase + "234567"),
    "aws session key": "ASIA" + _body("asia", 16, string.ascii_uppercase + "234567"),
    "google": "AIza" + _body("google", 35),
    "google oauth": "GOCSPX-" + _body("oauth", 28),
    "slack bot": "xoxb-" + _body("slack", 12, string.digits) + "-" + _body("slack2", 24),
    "slack app": "xapp-1-" + _body("xapp", 11, string.digits) + "-" + _body("xapp2", 40),
    "slack webhook": "https://hooks.slack.com/services/T" + _body("hook", 10) + "/B/" + _body("hook3", 24),
    "jwt": _jwt(),
    "rsa key": _pem("RSA PRIVATE KEY"),
    "openssh key": _pem("OPENSSH PRIVATE KEY"),
    "pkcs8 key": _pem("PRIVATE KEY"),
    "npm": "npm_" + _body("npm", 36),
    "pypi": "pypi-" + _body("pypi", 100),
    "docker": "dckr_pat_" + _body("docker", 27),
    "stripe": "sk_live_" + _body("stripe", 24),
    "sendgrid": "SG." + _body("sg", 22) + "." + _body("sg2", 43),
    "digitalocean": "dop_v1_" + _body("do", 64, _HEX),
    "databricks": "dapi" + _body("dapi", 32, _HEX),
    "vault": "hvs." + _body("hvs", 90),
    "telegram": _body("bot", 10, "123456789") + ":AA" + _body("bot2", 33),
    "shopify": "shpat_" + _body("shop", 32, _HEX),
    "azure": _body("az", 3) + "8Q~" + _body("az2", 34),
    "grafana": "glsa_" + _body("gr", 32) + "_" + _body("gr2", 8, _HEX),
    "groq": "gsk_" + _body("groq", 52),
    "replicate": "r8_" + _body("r8", 37),
}  # fmt: skip

# By the name of the variable that they stand in.
NAMED: dict[str, str] = {
    "DB_PASSWORD": "s3cr3t-" + _body("db", 8),
    "PGPASSWORD": "pg&<" + _body("pg", 12) + "\"'>",
    "PGPASS": "pgp " + _body("pgpass", 12),
    "MYSQL_PWD": "my=" + _body("my", 10) + "%/?",
    "BASIC_AUTH": "ada:" + _body("basic", 16),
    "NPM_CONFIG__AUTH": _body("npmauth", 24) + "==",
    "SSH_PRIVATE_KEY": "ssh" + _body("ssh", 40),
    "AWS_SECRET_ACCESS_KEY": _body("secret", 20) + "/+" + _body("secret2", 18),
    "AWS_SESSION_TOKEN": _body("session", 120) + "//==",
    "KEY_PASSPHRASE": "correct horse battery staple",
    "GCP_CREDENTIALS": json.dumps({"client_email": "x", "private_key": "k" + _body("gcp", 30)}),
    "SENTRY_DSN": "https://" + _body("sentry", 32, _HEX) + "@sentry.example/4",
    "AIRFLOW_CONN_DB": "postgres://air:" + _body("conn", 14) + "@db.example/air",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=x;AccountKey=" + _body("azure", 44) + "==;Suffix=core",
    "NETRC": "machine x login y password " + _body("netrc", 12),
    "WANDB_API_KEY": _body("wandb", 40, _HEX),
    "MLFLOW_TRACKING_PASSWORD": "mlflow-" + _body("mlflow", 9),
    "GH_PAT": "pat:" + _body("ghpat", 20),
    "SESSION_COOKIE": "sid=" + _body("cookie", 20),
    "BACKUP_KEY": "bäck\\" + _body("backup", 12),
}  # fmt: skip

# Passwords in the address that a variable of an ordinary name holds: what is written, and what is meant.
ADDRESSES: dict[str, str] = {
    "DATABASE_URL": "hunter2-" + _body("address", 8),
    "MLFLOW_TRACKING_URI": "p@ss/w#rd" + _body("address2", 6),
    "REDIS_URL": "r3dis!" + _body("address3", 9),
    "HTTPS_PROXY": "pr0xy%" + _body("address4", 9),
}


def address(variable: str) -> str:
    """The value of a variable of ADDRESSES."""
    return f"https://ada:{quote(ADDRESSES[variable], safe='')}@host.example/{variable.lower()}"


def environment() -> dict[str, str]:
    """Every secret in a variable of its own."""
    shaped = {f"OTHER_{number}": value for number, value in enumerate(SHAPED.values())}
    return {**shaped, **NAMED, **{name: address(name) for name in ADDRESSES}}


def spellings(secret: str) -> set[bytes]:
    """A secret as it is, and as JSON, an address, a page and Python spell it."""
    percent = [quote(secret), quote(secret, safe=""), quote_plus(secret)]
    texts = [secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)]
    texts += [repr(secret)[1:-1], *percent, *(each.lower() for each in percent)]
    return {text.encode() for text in texts}


def places(secret: str, folder: Path) -> list[str]:
    """Where a secret stands below a folder, in a file's content or name, in any spelling."""
    wanted = spellings(secret)
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if any(form in os_name(file) for form in wanted)
        or (file.is_file() and any(form in file.read_bytes() for form in wanted))
    ]


def os_name(file: Path) -> bytes:
    return file.name.encode()
