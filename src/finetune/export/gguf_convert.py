"""The work on GGUF files, in a process of its own: the converter is a library that logs, and llama.cpp may abort.

    python -m finetune.export.gguf_convert rehearse|convert|quantize JSON ANSWER

JSON holds the command's keyword arguments. Into the file ANSWER goes JSON too: `mended` and `notes`, or `error` (what to
say to the user) and `kind` (an error class of finetune.core.errors).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from finetune.backends.llamacpp.loading import INSTALL, library
from finetune.core import processes
from finetune.core.errors import FinetuneError, MissingError, StageError, UsageError, first_line
from finetune.export.gguf_check import MENDED, Original, check, same, shown

# llama.cpp's name of a pre-tokenizer, by what it splits with. The converter knows fingerprints of published vocabularies
# only, so the tokenizer that somebody trained on a known pre-tokenizer is found here.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("ByteLevel+regex",): "gpt-2",
    ("Digits", "ByteLevel+regex"): "smollm",
    (f"Split {LLAMA3}", "ByteLevel"): "llama-bpe",
    (f"Split {LLAMA3.replace('{1,3}', '')}", "ByteLevel"): "qwen2",
}
# Tokens at which llama.cpp stops because of their text (src/llama-vocab.cpp).
ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
}  # fmt: skip
PHI3 = re.compile("phi-?3", re.IGNORECASE)


class Conversion:
    """A model directory on its way into a file."""

    def __init__(self, original: Original, outtype: str, out: Path, *, name: str, license: str | None = None) -> None:
        import gguf

        self.original, self.out = original, out
        self.mended = list(original.plan.mended)
        kind = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[outtype]
        with complaints(original):
            self.converter: Any = converter_class(self)(
                original.directory, gguf.LlamaFileType[kind], out, model_name=name, hparams=dict(original.config)
            )
            self.writer: Any = self.converter.gguf_writer
            if original.plan.copy_output:
                tensors = self.converter.model_tensors
                tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
            self.converter.prepare_tensors()
            self.converter.prepare_metadata(vocab_only=False)
        self.put("general.name", self._harmless(name))
        if license:
            self.put("general.license", license)
        if self.mended:
            self.put(MENDED, "\n".join(self.mended))

    def save(self) -> None:
        self.writer.write_header_to_file(path=self.out)
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def save_hollow(self) -> None:
        """The file with a hole for its weights, which takes no room on the disk: llama.cpp loads it all the same."""
        pad, alignment = self.writer.ggml_pad, self.writer.data_alignment
        weights = sum(pad(tensor.nbytes, alignment) for tensor in self.writer.tensors[0].values())
        self.writer.write_header_to_file(path=self.out)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self.writer.close()
        with self.out.open("r+b") as stream:
            stream.truncate(pad(stream.seek(0, 2), alignment) + weights)

    def read(self, key: str) -> Any:
        stored = self.writer.kv_data[0].get(key)
        return None if stored is None else stored.value

    def put(self, key: str, value: Any) -> None:
        import gguf

        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
        self.writer.kv_data[0].pop(key, None)
        self.writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])

    def mend(self, key: str, value: Any, *, default: Any = None) -> None:
        """Have `key` hold `value`, and say so where it would have been something else; `default` is what llama.cpp takes
        for a key that is not there."""
        found = self.read(key)
        if same(found, value):
            return
        self.put(key, value)
        if found is not None:
            self.mended.append(f"{key} is {shown(value)}; the converter writes {shown(found)}")
        elif not same(default, value):
            self.mended.append(f"{key} is {shown(value)}; the converter leaves it out")

    # -- called by the converter ----------------------------------------------------------------------------------

    def after_parameters(self) -> None:
        architecture = self.writer.arch
        made = self.original.plan
        for key, value in made.metadata.items():
            if key in made.settled:
                self.put(f"{architecture}.{key}", value)
            else:
                default = made.metadata["attention.head_count"] if key == "attention.head_count_kv" else None
                self.mend(f"{architecture}.{key}", value, default=default)

    def after_vocabulary(self) -> None:
        tokenizer, hf = self.original.tokenizer, self.original.hf
        self._drop_guess()
        self.mend("tokenizer.ggml.eos_token_id", int(hf.eos_token_id))
        if hf.bos_token_id is not None:
            self.mend("tokenizer.ggml.bos_token_id", int(hf.bos_token_id))
        sentencepiece = self.read("tokenizer.ggml.model") == "llama"
        self.mend("tokenizer.ggml.add_bos_token", tokenizer.adds_bos, default=sentencepiece)
        self.mend("tokenizer.ggml.add_eos_token", self.original.adds_eos, default=False)
        if sentencepiece:
            first = hf.convert_ids_to_tokens(tokenizer.encode("a")[0])
            self.mend("tokenizer.ggml.add_space_prefix", first.startswith("▁"), default=True)
        free = [key for key in ("eot", "eom") if self.read(f"tokenizer.ggml.{key}_token_id") is None]
        known = {self.read(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
        for token in tokenizer.eos_ids:
            if free and token not in known and hf.convert_ids_to_tokens(token) not in ENDS:
                self.mend(f"tokenizer.ggml.{free.pop(0)}_token_id", token)
        if isinstance(tokenizer.chat_template, str):
            self.mend("tokenizer.chat_template", tokenizer.chat_template)

    def rank(self) -> None:
        """Give the tokens of tokenizer.json the order in which they are merged: llama.cpp puts together first what scores
        highest, and the converter gives all the same score."""
        model = json.loads(self.original.hf.backend_tokenizer.to_str())["model"]
        stored = self.writer.kv_data[0]["tokenizer.ggml.scores"].value
        for place, pair in reversed(list(enumerate(model["merges"]))):
            token = model["vocab"].get("".join(pair if isinstance(pair, list) else pair.split(" ")))
            if token is not None:
                stored[token] = -float(place)
        self.mended.append("tokenizer.ggml.scores are the ranks of the merges; the converter writes -1000 everywhere")

    def _harmless(self, name: str) -> str:
        """llama.cpp drops whitespace after special tokens where the name of the model holds "phi-3", and only there."""
        drops = any(token.rstrip for token in self.original.hf.added_tokens_decoder.values() if token.special)
        if drops == bool(PHI3.search(name)):
            return name
        why = "by which llama.cpp tells whether whitespace after special tokens counts"
        if drops:
            self.mended.append(f"general.name carries 'phi-3', {why}")
            return f"{name} phi-3"
        self.mended.append(f"general.name is written without 'phi-3', {why}")
        return PHI3.sub("phi 3", name)

    def _drop_guess(self) -> None:
        """The converter gives every Gemma the end of turn of CodeGemma, 107, whatever token that is."""
        key = "tokenizer.ggml.eot_token_id"
        token = self.read(key)
        guessed = self.writer.arch == "gemma" and token is not None
        if guessed and self.original.hf.convert_ids_to_tokens(token) != "<end_of_turn>":
            del self.writer.kv_data[0][key]

    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name for the tokenizer's pre-tokenizer, by its parts; None for one that is not in the table."""
        stored = json.loads(self.original.hf.backend_tokenizer.to_str())
        found = stored.get("pre_tokenizer") or {}
        parts = found.get("pretokenizers", [found])
        name = PRE_TOKENIZERS.get(tuple(_part(part) for part in parts))
        return name if stored.get("normalizer") is None or name == "qwen2" else None


def _part(part: dict[str, Any]) -> str:
    kind = str(part.get("type"))
    if kind == "ByteLevel":
        return kind + ("+prefix" if part.get("add_prefix_space") else "") + ("+regex" if part.get("use_regex") else "")
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return f"Split {part['pattern'].get('Regex')}"
    return kind if kind == "Digits" and part.get("individual_digits") else f"{kind}?"


def converter_class(conversion: Conversion) -> Any:
    """llama.cpp's converter for the architecture, with our word after its own where it sets constants and tokens."""
    from conversion import ModelType, get_model_architecture, get_model_class

    config = conversion.original.config
    base: Any = get_model_class(get_model_architecture(config, ModelType.TEXT))

    class Converter(base):  # type: ignore[misc]
        model_arch = base.model_arch

        def set_gguf_parameters(self) -> None:
            conversion.writer = self.gguf_writer
            super().set_gguf_parameters()
            conversion.after_parameters()

        def set_vocab(self) -> None:
            try:
                super().set_vocab()
            except (FileNotFoundError, ValueError):  # some architectures insist on SentencePiece's own file
                if (self.dir_model / "tokenizer.model").is_file():
                    raise
                try:
                    self._set_vocab_llama_hf()
                except (FileNotFoundError, TypeError):
                    self._set_vocab_gpt2()
            conversion.after_vocabulary()

        def _set_vocab_llama_hf(self) -> None:
            super()._set_vocab_llama_hf()
            conversion.rank()

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                if (found := conversion.pre_tokenizer()) is None:
                    raise
                return found

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
            made = conversion.original.plan
            for new, data in super().modify_tensors(data_torch, name, bid):
                yield new, data * made.query_factor if made.query and new.endswith(made.query) else data

    return Converter


@contextmanager
def complaints(original: Original) -> Iterator[None]:
    """The converter's exceptions in a user's words."""
    try:
        yield
    except FinetuneError:
        raise
    except ImportError as error:
        raise MissingError(f"the GGUF converter needs the Python package '{error.name}'. {INSTALL}") from error
    except Exception as error:  # it raises a dozen kinds
        said = first_line(error)
        if isinstance(error, NotImplementedError) and "pre-tokenizer" in said:
            raise UsageError(
                "the GGUF converter does not recognise the pre-tokenizer of this tokenizer: llama.cpp would split text "
                "differently than the model was trained with. Use a published model's tokenizer, or export to other "
                "formats than gguf and ollama"
            ) from error
        if isinstance(error, NotImplementedError):
            names = ", ".join(original.config.get("architectures") or [str(original.config.get("model_type"))])
            raise UsageError(
                f"the GGUF converter does not know the architecture '{names}'; export to other formats than gguf and ollama"
            ) from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"the GGUF converter cannot take the model in {original.directory}: {kind}{said}") from error


def _original(model: str, trust_remote_code: bool) -> Original:
    """What is to be converted. From here on the converter's loaders trust the model's own code as its recipe does: by
    themselves they run whatever code a tokenizer brings."""
    from transformers import AutoConfig, AutoTokenizer

    for auto in (AutoConfig, AutoTokenizer):
        auto.from_pretrained = partial(auto.from_pretrained, trust_remote_code=trust_remote_code)
    return Original(Path(model), trust_remote_code=trust_remote_code)


def rehearse(*, model: str, quantized: bool, trust_remote_code: bool) -> dict[str, Any]:
    """Convert everything but the weights, and have llama.cpp load it."""
    if quantized and not hasattr(library(), "model_quantize"):
        raise MissingError(f"the installed cyllama has no quantizer. {INSTALL}")
    original = _original(model, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        conversion = Conversion(original, "f16", Path(folder) / "rehearsal.gguf", name="rehearsal")
        conversion.save_hollow()
        try:
            mended, notes = check(original, conversion.out)
        except StageError as error:
            said = str(error).replace(str(conversion.out), "what the converter makes of this model")
            raise UsageError(said) from None
    return {"mended": mended, "notes": notes}


def convert(
    *, model: str, outtype: str, out: str, name: str, license: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    original = _original(model, trust_remote_code)
    Conversion(original, outtype, Path(out), name=name, license=license).save()
    mended, notes = check(original, Path(out))
    return {"mended": mended, "notes": notes}


def quantize(
    *, model: str, source: str, variant: str, out: str, threads: int, trust_remote_code: bool
) -> dict[str, Any]:
    """llama.cpp's own quantizer."""
    import gguf

    llama, said = library(), []
    llama.set_log_callback(lambda level, text: said.append(str(text)))
    parameters = llama.LlamaModelQuantizeParams()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{variant.upper()}"])
    parameters.nthread = threads
    try:
        llama.model_quantize(source, out, parameters)
    except RuntimeError:
        why = next((line.strip() for line in reversed(said) if "failed" in line or "error" in line), "it says not why")
        raise StageError(f"llama.cpp's quantizer failed on {source}: {why}") from None
    finally:
        llama.disable_logging()
    original = _original(model, trust_remote_code)
    kept = re.search(r"(\d+) of (\d+) tensor\(s\) required fallback", "".join(said))
    mended, notes = check(original, Path(out))
    if kept:
        notes.append(
            f"{kept[1]} of {kept[2]} tensors are in another type than {variant}'s, whose blocks do not fit their rows"
        )
    return {"mended": mended, "notes": notes}


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.ERROR)
    processes.end_with_parent()
    command, options = arguments[0], json.loads(arguments[1])
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "rehearse": rehearse, "convert": convert, "quantize": quantize,
    }  # fmt: skip
    try:
        result = commands[command](**options)
    except FinetuneError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    except MemoryError:
        result = {"error": "there is not enough memory to convert this model", "kind": "ResourceError"}
    except OSError as error:
        result = {"error": f"cannot write the GGUF file: {error.strerror or error}", "kind": "StageError"}
    processes.answer(arguments[2], result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
