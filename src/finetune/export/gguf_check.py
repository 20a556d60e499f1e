"""Does llama.cpp take a GGUF file for the model that it was made from?"""

from __future__ import annotations

import math
from os.path import commonprefix
from pathlib import Path
from typing import Any

from finetune.backends.llamacpp.loading import GGUFTokenizer, library, load_model
from finetune.core.errors import StageError, UsageError
from finetune.export.gguf_metadata import Plan, plan

TEXTS = (
    "", "plain words, and more.", " leading and trailing ", "tabs\tnewlines\n\n\r\n", "naïve Straße Ελλάδα Русский",
    "中文字 日本語 한국어 עברית العربية", "emoji 👩‍👩‍👧‍👦 🇪🇺 👍🏽", "12345 3.14 1,000,000 2nd",
    "I've you'll it's WE'RE don't", "x = {'a': [1, 2]}; // -> !=\n    return x[0]", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \u200b \u2028",
)  # fmt: skip
LEADING_SPACE = (
    "llama.cpp puts a space before text that begins with one, or follows a special token, and this model's tokenizer "
    "does not; the prompts that matter are compared by the parity checks"
)
MENDED = "finetune.mended"  # kept in the file, so that what is quantized from it tells it too


class Original:
    """What the model directory says: `config` with the library's defaults, `tokenizer`, and the plan made from them."""

    def __init__(self, model: Path, *, trust_remote_code: bool = False) -> None:
        from finetune.backends.torch.tokenizer import HFTokenizer, read_config

        self.directory = model
        try:
            config = read_config(model, trust_remote_code=trust_remote_code).to_dict()
        except StageError as error:
            raise UsageError(str(error)) from None
        config.update(config.get("text_config") or {})
        config.setdefault("n_ctx", config.get("n_positions"))  # read by the converter, dropped by transformers
        self.config: dict[str, Any] = config
        self.tokenizer = HFTokenizer(model, trust_remote_code=trust_remote_code)
        self.hf: Any = self.tokenizer.hf
        self.adds_eos = self.hf.encode("a")[-1] in self.tokenizer.eos_ids
        self.plan: Plan = plan(config)


def same(found: Any, value: Any) -> bool:
    """Equal as GGUF stores it: numbers in 32 bits."""
    if isinstance(found, bool) or isinstance(value, bool) or not isinstance(found, int | float):
        return bool(found == value) and type(found) is type(value)
    return isinstance(value, int | float) and math.isclose(found, value, rel_tol=1e-6)


def shown(value: Any) -> str:
    text = f"{value:.7g}" if isinstance(value, float) else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def check(original: Original, gguf: Path) -> tuple[list[str], list[str]]:
    """Does llama.cpp, having loaded the file, take the tokens, the template and the constants as the model has them?
    Returns what was mended in it, and notes. Raises StageError with everything that is not so."""
    model = load_model(gguf)
    theirs, ours = GGUFTokenizer(model), original.tokenizer
    faults, notes = [], list(original.plan.notes)
    for text in (*TEXTS, longest_words(original.hf), f"a{ours.eos_token} b\n{ours.eos_token}\n\nc"):
        found, wanted = theirs.encode(text), ours.encode(text)
        if found == wanted:
            continue
        if theirs.leading_space and (text.startswith(" ") or ours.eos_token in text):
            notes.append(LEADING_SPACE)
        else:
            at = len(commonprefix([found, wanted]))
            where = f"after {ours.decode(wanted[:at])[-20:]!r}"
            faults.append(f"it splits text differently: {where} come {found[at:][:5]}, not {wanted[at:][:5]}")
    if theirs.eos_ids[:1] != ours.eos_ids[:1] or not set(ours.eos_ids) <= set(theirs.eos_ids):
        faults.append(f"it ends turns at {list(theirs.eos_ids)} instead of {list(ours.eos_ids)} (eos_token_id)")
    if ours.bos_token is not None and theirs.bos_token != ours.bos_token:
        faults.append(f"its begin token is {theirs.bos_token!r} instead of {ours.bos_token!r}")
    if theirs.adds_bos != ours.adds_bos:
        faults.append(f"add_bos_token is {theirs.adds_bos} instead of {ours.adds_bos}")
    if theirs.chat_template != (ours.chat_template or None):
        faults.append("its chat template is not the model's")
    file = library().GGUFContext.from_file(str(gguf))
    architecture = file.get_value("general.architecture")
    for name, value in original.plan.metadata.items():
        key = f"{architecture}.{name}"
        held = file.get_value(key) if file.find_key(key) >= 0 else None
        if not same(held, value) and not (held is None and name == "attention.head_count_kv"):
            faults.append(f"{key} is {shown(held)} instead of {shown(value)}")
    if original.plan.metadata:
        tied = bool(original.config.get("tie_word_embeddings", True)) and not original.plan.copy_output
        if (file.find_tensor("output.weight") < 0) != tied:
            faults.append(f"its output matrix is {'its own' if tied else 'the embedding'} (tie_word_embeddings)")
    if faults:
        raise StageError("the GGUF file is not the model it was made from: " + "; ".join(faults))
    mended = str(file.get_value(MENDED)).split("\n") if file.find_key(MENDED) >= 0 else []
    return mended, list(dict.fromkeys(notes))


def longest_words(hf: Any) -> str:
    """A text that shows where text is split, whatever the vocabulary: its longest tokens of plain ASCII."""
    ordinary = set(range(len(hf))) - set(hf.added_tokens_decoder)
    words = {hf.decode([token]).strip() for token in ordinary}
    plain = (word for word in words if word.isascii() and word.isprintable() and word)
    return " ".join(sorted(plain, key=lambda word: (-len(word), word))[:300])
