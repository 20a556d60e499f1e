"""What is a secret by its shape alone, whatever variable or file it stands in: tokens of known services, private keys,
passwords in addresses.

Shapes are those that the services themselves document for scanners; their names are what an error tells.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote


@dataclass(frozen=True)
class Shape:
    """One kind of token. A text without any of `begins` holds none, which is known at once."""

    name: str
    begins: tuple[str, ...]
    pattern: str


SHAPES: tuple[Shape, ...] = (
    Shape("a private key", ("PRIVATE KEY",),
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?=(?:\s|\\+[nr])+(?:[A-Za-z-]+: |[A-Za-z0-9+/=]{10}))"
        r"(?:(?!-----)[\s\S])*(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----)?"),
    Shape("an age secret key", ("AGE-SECRET-KEY-1",), r"AGE-SECRET-KEY-1[A-Z0-9]{40,}"),
    Shape("a Hugging Face token", ("hf_", "api_org_"), r"(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{30,})"),
    Shape("an API key (sk-)", ("sk-",), r"sk-[A-Za-z0-9_-]{20,}"),
    Shape("a GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
    Shape("a GitLab token", ("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glft-", "glsoat-", "glagent-", "glimt-"),
        r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt)-[A-Za-z0-9_.-]{16,}"),
    Shape("a Bitbucket or Atlassian token", ("ATBB", "ATATT3", "ATCTT3"), r"(?:ATBB[A-Za-z0-9]{20,}|AT[AC]TT3[\w=-]{20,})"),
    Shape("an AWS access key", ("AKIA", "ASIA", "ABIA", "ACCA", "AGPA", "AIDA", "AROA", "AIPA", "ANPA", "ANVA"),
        r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AROA|AIPA|ANPA|ANVA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    Shape("a Google API key", ("AIza",), r"AIza[A-Za-z0-9_-]{30,}"),
    Shape("a Google OAuth secret", ("GOCSPX-", "ya29."), r"(?:GOCSPX-[A-Za-z0-9_-]{20,}|ya29\.[A-Za-z0-9_-]{20,})"),
    Shape("an Alibaba access key", ("LTAI",), r"LTAI[A-Za-z0-9]{16,24}(?![A-Za-z0-9])"),
    Shape("an Azure client secret", ("Q~",), r"[A-Za-z0-9_~.-]{3}\dQ~[A-Za-z0-9_~.-]{31,34}"),
    Shape("a JSON web token", ("eyJ",), r"eyJ[A-Za-z0-9_-]{8,1000}\.eyJ[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*"),
    Shape("a Slack token", ("xox", "xapp-", "xwfp-"),
        r"(?:xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9-]{10,}|x(?:app|wfp)-[A-Za-z0-9-]{10,})"),
    Shape("a Slack webhook", ("hooks.slack.com/",), r"hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9_/-]{20,}"),
    Shape("a Discord webhook", ("/api/webhooks/",), r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]{30,}"),
    Shape("a Telegram bot token", (":AA",), r"\d{7,12}:AA[A-Za-z0-9_-]{30,}"),
    Shape("an npm token", ("npm_",), r"npm_[A-Za-z0-9]{30,}"),
    Shape("a PyPI token", ("pypi-",), r"pypi-[A-Za-z0-9_-]{16,}"),
    Shape("a RubyGems key", ("rubygems_",), r"rubygems_[a-f0-9]{40,}"),
    Shape("a Docker token", ("dckr_",), r"dckr_[po]at_[A-Za-z0-9_-]{20,}"),
    Shape("a Stripe key", ("_live_", "_test_", "_prod_", "whsec_"),
        r"(?:[rsp]k_(?:live|test|prod)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/=]{20,})"),
    Shape("a Square token", ("sq0", "EAAA"), r"(?:sq0[a-z]{3}-[A-Za-z0-9_-]{20,}|EAAA[A-Za-z0-9_-]{56,})"),
    Shape("a Shopify token", ("shp",), r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32,}"),
    Shape("a SendGrid key", ("SG.",), r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    Shape("a Brevo key", ("xkeysib-",), r"xkeysib-[a-f0-9]{40,}-[A-Za-z0-9]{10,}"),
    Shape("a Mailgun key", ("key-",), r"key-[a-f0-9]{32}(?![A-Za-z0-9])"),
    Shape("a Mailchimp key", ("-us",), r"[a-f0-9]{32}-us\d{1,2}(?![A-Za-z0-9])"),
    Shape("a Twilio key", ("SK", "AC"), r"(?:SK|AC)[a-f0-9]{32}(?![A-Za-z0-9])"),
    Shape("a DigitalOcean token", ("_v1_",), r"do[opr]_v1_[a-f0-9]{40,}"),
    Shape("a Databricks token", ("dapi",), r"dapi[a-f0-9]{32}(?:-\d)?(?![A-Za-z0-9])"),
    Shape("a Vault token", ("hvs.", "hvb.", "hvr."), r"hv[sbr]\.[A-Za-z0-9_-]{20,}"),
    Shape("a Terraform token", (".atlasv1.",), r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{40,}"),
    Shape("a Pulumi token", ("pul-",), r"pul-[a-f0-9]{40}"),
    Shape("a Grafana token", ("glsa_", "glc_"), r"(?:glsa_[A-Za-z0-9]{20,}_[A-Fa-f0-9]{8}|glc_[A-Za-z0-9+/=]{30,})"),
    Shape("a New Relic key", ("NRAK-", "NRII-", "NRJS-", "NRIQ-"), r"NR(?:AK|II|JS|IQ)-[A-Za-z0-9_-]{16,}"),
    Shape("a Sentry token", ("sntrys_", "sntryu_"), r"sntry[su]_[A-Za-z0-9_=+/-]{30,}"),
    Shape("a Dynatrace token", ("dt0",), r"dt0[a-z]\d{2}\.[A-Z0-9]{20,}\.[A-Z0-9]{40,}"),
    Shape("a Doppler token", ("dp.",), r"dp\.(?:pt|st|ct|scim|audit)\.[A-Za-z0-9_.-]{30,}"),
    Shape("a 1Password token", ("ops_eyJ",), r"ops_eyJ[A-Za-z0-9+/_=-]{40,}"),
    Shape("a Tailscale key", ("tskey-",), r"tskey-[a-z]+-[A-Za-z0-9-]{12,}"),
    Shape("a PlanetScale token", ("pscale_",), r"pscale_(?:tkn|pw|oauth)_[A-Za-z0-9_.=-]{30,}"),
    Shape("a Supabase token", ("sbp_", "sb_secret_"), r"(?:sbp_[a-f0-9]{40}|sb_secret_[A-Za-z0-9_-]{20,})"),
    Shape("a Heroku key", ("HRKU-",), r"HRKU-[A-Za-z0-9_-]{36,}"),
    Shape("a Fly.io token", ("FlyV1 ", "fo1_"), r"(?:FlyV1 fm[12][a-z]?_[A-Za-z0-9+/=,_-]{40,}|fo1_[\w-]{43})"),
    Shape("a Netlify token", ("nfp_",), r"nfp_[A-Za-z0-9]{30,}"),
    Shape("a Postman key", ("PMAK-",), r"PMAK-[a-f0-9]{24}-[a-f0-9]{34}"),
    Shape("a Linear key", ("lin_",), r"lin_(?:api|oauth)_[A-Za-z0-9]{30,}"),
    Shape("a Notion token", ("ntn_",), r"ntn_[A-Za-z0-9]{40,}"),
    Shape("a Figma token", ("figd_",), r"figd_[A-Za-z0-9_-]{30,}"),
    Shape("an Airtable token", ("pat",), r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}"),
    Shape("an Artifactory token", ("AKCp", "cmVmd"), r"(?:AKCp[A-Za-z0-9]{60,}|cmVmd[A-Za-z0-9]{50,})"),
    Shape("a Buildkite or CircleCI token", ("bkua_", "CCIPAT_"), r"(?:bkua_[a-f0-9]{40}|CCIPAT_[A-Za-z0-9]{20,}_[a-f0-9]{40})"),
    Shape("a SonarQube token", ("sqa_", "sqp_", "squ_"), r"sq[apu]_[a-f0-9]{40}"),
    Shape("a Weights & Biases key", ("wandb_v1_",), r"wandb_v1_[A-Za-z0-9_]{40,}"),
    Shape("a LangSmith key", ("lsv2_",), r"lsv2_(?:pt|sk)_[a-f0-9]{32}(?:_[a-f0-9]{10})?"),
    Shape("a Replicate, Groq, xAI, Perplexity or Pinecone key", ("r8_", "gsk_", "xai-", "pplx-", "pcsk_"),
        r"(?:r8_[A-Za-z0-9]{30,}|gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{40,}|pplx-[A-Za-z0-9]{30,}|pcsk_[A-Za-z0-9_]{40,})"),
    Shape("a Kaggle token", ("KGAT_",), r"KGAT_[a-f0-9]{32}"),
)  # fmt: skip

# scheme://user:password@host (RFC 3986, 3.2.1). A password may hold what it should not (`/`, `@`, `#`), but `host:8080/@x`
# has none. A user alone is a name (git@host), unless it is as long as a key and has digits.
_NO = r"""\s"'<>\\"""
_ADDRESS = re.compile(
    rf"(?<=://)(?:[^:/\[\]{_NO}]*:(?P<password>[^/?#{_NO}]+(?=@)|(?!\d{{1,5}}(?:[/?#]|$))[^{_NO}]{{1,300}})"
    rf"|(?P<user>(?=[^@/]*\d)[^:/@\[\]{_NO}]{{20,}}))(?=@)"
)
_LENIENT = re.compile(rf"(?<=://)[^:/\[\]{_NO}]*:(?!\d{{1,5}}(?:[/?#]|$))([^{_NO}]+)@")  # the whole of `p@ss/word`
# ?token=... in an address; password=... in a connection string; Authorization: Bearer ... in a log.
_QUERY = re.compile(
    r"""[?&](?:[\w-]*(?:token|secret|passw(?:or)?d|api_?key|signature|credential)|sig|auth|key)=(?P<value>[^\s&#"'<>\\]{6,})""",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"""\b(?:\w*passw(?:or)?d|pwd|passphrase|client_secret|AccountKey|SharedAccessKey|SharedAccessSignature)"""
    r"""\s*=\s*["']?(?P<value>[^\s;,&"'<>\\]{4,})""",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"""\bAuthorization["']?\s*[:=]\s*["']?(?:Basic|Bearer|Token|ApiKey)\s+(?P<value>[^\s"',;]{6,})""", re.IGNORECASE
)
# Every token has so long a run, and most texts have none, which is seen several times as fast as that no token begins.
_RUN = re.compile(r"[A-Za-z0-9_.~+/=-]{15}")
_WORD_BEFORE, _ESCAPE_BEFORE = re.compile(r"[A-Za-z0-9]$"), re.compile(r"(?:\\[nrt]|%[0-9A-Fa-f]{2})$")
_ENCODED = re.compile(rf"[^/{_NO}]+")
# What manuals write instead: hf_xxxx, your_password, ${PASSWORD}, and words like `pass`; names: sk-learn-contrib-extras.
_MASKED = re.compile(r"([xX0*.])\1{9}$")
_NAME = re.compile(r"[a-z]{1,15}(?:[-_.][a-z]{1,15})+")
_STAND_IN = re.compile(r"your|example|change.?me|placeholder|password|\$\{|\{\{|[<{*]|^[^\W\d_]{1,15}$", re.IGNORECASE)


@functools.cache
def _compiled(shape: Shape) -> re.Pattern[str]:
    return re.compile(shape.pattern)


def find(text: str) -> str | None:
    """What a text holds that is a secret by its shape ("what looks like a GitHub token"), or None.

    What manuals write in the place of one (`hf_xxxx...`, `user:password@host`) is none.
    """
    for spelled in (text, unquote(text)) if "%" in text else (text,):
        for shape, token in _tokens(spelled):
            if not _MASKED.search(token) and not _NAME.fullmatch(token):
                return f"what looks like {shape.name}"
        if any(not _STAND_IN.search(each) for each in _in_addresses(spelled)):
            return "an address with a password"
    return None


def has_password(text: str) -> bool:
    """Whether a text holds an address with a password, whatever that is."""
    return any(True for _ in _in_addresses(text))


def hide(text: str, by: str) -> str:
    """`text` with every secret that is one by its shape replaced, and what stands where secrets stand."""
    for shape in SHAPES if _RUN.search(text) else ():
        if _may_hold(text, shape):
            text = _compiled(shape).sub(lambda match: by if _is_whole(match) else match.group(), text)
    if "://" in text:
        text = _ADDRESS.sub(by, text)
    if "=" in text or ":" in text:
        for pattern in (_QUERY, _ASSIGNED, _HEADER):
            text = pattern.sub(lambda found: found.group().replace(found["value"], by), text)
    if "%" in text:
        text = _ENCODED.sub(lambda found: by if "%" in found[0] and find(unquote(found[0])) else found[0], text)
    return text


def parts(value: str) -> Iterator[str]:
    """The secrets in the value of a variable, whatever its name: tokens, and the passwords in its addresses as they are
    written and as they are meant."""
    yield from (token for _, token in _tokens(value))
    for password in (*_in_addresses(value), *_LENIENT.findall(value)):
        yield password
        if (meant := unquote(password)) != password:
            yield meant


def assigned(value: str) -> Iterator[str]:
    """The passwords in a connection string (`Server=...;Password=...`) and in the query of an address."""
    for pattern in (_QUERY, _ASSIGNED):
        yield from (match["value"] for match in pattern.finditer(value))


def _tokens(text: str) -> Iterator[tuple[Shape, str]]:
    for shape in SHAPES if _RUN.search(text) else ():
        if _may_hold(text, shape):
            yield from ((shape, match.group()) for match in _compiled(shape).finditer(text) if _is_whole(match))


def _may_hold(text: str, shape: Shape) -> bool:
    return any(begin in text for begin in shape.begins)


def _is_whole(match: re.Match[str]) -> bool:
    """Whether a token begins where no word goes on (`task-...` holds no `sk-...`), or after an escaped line end or `%3D`."""
    before = match.string[max(0, match.start() - 3) : match.start()]
    return match[0][0] == "-" or not _WORD_BEFORE.search(before) or bool(_ESCAPE_BEFORE.search(before))


def _in_addresses(text: str) -> Iterator[str]:
    if "://" in text:
        yield from (match["password"] or match["user"] for match in _ADDRESS.finditer(text))
