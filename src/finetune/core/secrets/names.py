"""Which environment variables hold a secret, by their names.

The words are those that variables of the common services and tools go by, as scanners of repositories
(gitleaks, detect-secrets) look for them too.
"""

from __future__ import annotations

import functools
import re

# Anywhere in a name. TOKENIZERS_PATH and MAX_TOKENS are no secrets, and ACCESS_TOKENS is.
_INSIDE = re.compile(
    r"TOKEN(?!IZ|S(?:_|$))|(?:API|ACCESS|AUTH|BOT|REFRESH|USER)_?TOKENS|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|PASSKEY"
    r"|CREDENTIAL|API_?KEY|PRIV(?:ATE)?_?KEY|ACCESS_?KEY|AUTH_?KEY|ENCRYPTION_?KEY|SIGNING_?KEY|ACCOUNT_?KEY|LICENSE_?KEY"
    r"|AUTHORIZATION|CONNECTION_?STRING|CONN_?STR|MNEMONIC|SEED_?PHRASE|NETRC|PGPASS|SSHPASS"
)
# Words of their own: AIRFLOW_CONN_DB, SENTRY_DSN_2, GCP_CREDS.
_WORDS = re.compile(r"(?:^|_)(?:CONN|DSN|CREDS?|COOKIES?|JWT|BEARER)(?:_|$)")
# At the end, where they say what the value is: DB_PASS, MYSQL_PWD (the shell's own PWD stands alone), NPM_CONFIG__AUTH,
# GH_PAT, SSH_KEY, but SSH_AUTH_SOCK, PASS_RATE and KEYBOARD are none.
_LAST = re.compile(
    r"(?:^|_)(?:AUTH(?:_(?:CONFIG|HEADER|DATA|STRING))?|KEYS?(?:_(?:ID|PEM|JSON|DATA|B64|BASE64|CONTENTS?))?|P12|PEM)$"
    r"|(?:^|_)(?:DB|USER|MYSQL|SMTP|FTP|ROOT|ADMIN|REDIS|MONGO|LDAP)?PASS$"
    r"|_(?:PWD|PAT|SAS|OTP|PIN)$|(?:^|_)WEBHOOK(?:_URL)?$"
)
_PUBLIC = re.compile(
    r"(?:^|_)(?:PUBLIC|PRIMARY|FOREIGN|PARTITION|SORT|CACHE|HOT|GROUP|ROUTING)_KEYS?$|(?:^|_)OLD_?PWD$"
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@functools.lru_cache(4096)
def is_secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    name = re.sub(r"[^A-Z0-9]", "_", _HUMP.sub("_", variable).upper())
    if _INSIDE.search(name):
        return True
    name = re.sub(r"_*\d+$", "", name)
    return bool((_WORDS.search(name) or _LAST.search(name)) and not _PUBLIC.search(name))
