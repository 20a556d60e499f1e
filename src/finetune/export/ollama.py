"""A Modelfile beside its GGUF file, for `ollama create NAME -f Modelfile`.

Commands: https://docs.ollama.com/modelfile. Sampling is left at Ollama's own defaults.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from finetune.backends.ollama import modelfile
from finetune.core.errors import UsageError
from finetune.core.files import read_object, write_text
from finetune.core.memory import need_disk
from finetune.data.templates import ChatTemplate
from finetune.export import Exported, Source, gotemplate
from finetune.models import gguf_header

# Ollama reserves memory for the whole context when it loads a model, and this much is its own default.
NUM_CTX = 4096
ADDS_BOS = "tokenizer.ggml.add_bos_token"


def rehearse(model: Path, variant: str, *, trust_remote_code: bool = False) -> None:
    """Raise what would go wrong: all that GGUF's rehearsal raises, and a chat template that Ollama cannot have."""
    from finetune.export import gguf

    gguf.rehearse(model, variant, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(model, trust_remote_code)
    if not tokenizer.chat_template:
        return  # the merged model gets the template that training used
    _translate(tokenizer, system=None, runner_bos=bool(getattr(tokenizer, "adds_bos", False)))
    modelfile.write(_parameters(model, tokenizer) + [("from", "./model.gguf")])


def export(source: Source, variant: str, out: Path) -> Exported:
    """Write `out/Modelfile` and the GGUF file that it names. Raises UsageError for a chat template that Ollama's
    language cannot say, or a text that a Modelfile cannot hold."""
    made = _weights(source, variant, out)
    tokenizer = _tokenizer(source.model, source.trust_remote_code)
    runner_bos, notes = _adds_bos(made.path)
    translated = _translate(tokenizer, system=source.system, runner_bos=runner_bos)
    commands = [("from", f"./{made.path.name}"), ("template", translated.text)]
    if translated.system:
        commands.append(("system", translated.system))
    parameters = _parameters(source.model, tokenizer)
    commands += parameters
    if licence := source.license_text or source.license:
        commands.append(("license", _licence(licence)))
    longest = _context(source.model)
    if longest and longest > NUM_CTX:
        notes += (
            f"num_ctx is {NUM_CTX} of the model's {longest}, as Ollama reserves memory for all of it; raise it in the "
            "Modelfile where there is enough",
        )
    write_text(out / "Modelfile", modelfile.write(commands))
    return Exported(
        path=out / "Modelfile",
        mended=(*made.mended, *translated.mended),
        notes=(*made.notes, *translated.notes, *notes),
    )


def _weights(source: Source, variant: str, out: Path) -> Exported:
    """The GGUF file in `out`: that of an export done before, or a new one."""
    from finetune.export import gguf

    done = source.done.get(f"gguf:{variant}")
    if done is None:
        return gguf.export(source, variant, out)
    name = re.sub(r"[^0-9A-Za-z._-]+", "-", done.name)
    need_disk(out, done.stat().st_size, f"the copy of {name}")
    shutil.copyfile(done, out / name)
    return Exported(path=out / name)


def _translate(tokenizer: Any, *, system: str | None, runner_bos: bool) -> gotemplate.GoTemplate:
    if not tokenizer.chat_template:
        raise UsageError("the model has no chat template, so Ollama could only continue texts; export 'gguf' instead")
    return gotemplate.translate(
        ChatTemplate("model", tokenizer.chat_template),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        system=system or None,
        trained_bos=bool(getattr(tokenizer, "adds_bos", False)),
        runner_bos=runner_bos,
    )


def _tokenizer(model: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that the model was trained with."""
    from finetune.backends import get

    return get("torch").tokenizer(model, trust_remote_code=trust_remote_code)


def _adds_bos(gguf: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether Ollama puts the begin token before every prompt by itself, and what is to be said about it."""
    keys = gguf_header.read(gguf)
    if ADDS_BOS in keys:
        return bool(keys[ADDS_BOS]), ()
    note = f"the GGUF file lacks {ADDS_BOS}: Ollama before 0.30 then adds a begin token for most architectures"
    return keys.get("tokenizer.ggml.model") == "llama", (note,)


def _parameters(model: Path, tokenizer: Any) -> list[modelfile.Command]:
    """`stop` for every text that ends a turn, and `num_ctx`."""
    ends = [tokenizer.eos_token, *(tokenizer.decode([token]) for token in tokenizer.eos_ids)]
    longest = _context(model)
    return [
        *(("stop", text) for text in dict.fromkeys(ends) if text),
        ("num_ctx", str(min(longest or NUM_CTX, NUM_CTX))),
    ]


def _context(model: Path) -> int | None:
    """The longest context that the model was made for, in tokens."""
    config = read_object(model / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    found = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _licence(text: str) -> str:
    """A licence's words as a Modelfile can hold them: no form feeds, no triple quotes."""
    return modelfile.printable(text.replace('"""', "'''")).strip()
