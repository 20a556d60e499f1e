"""GGUF files as Hugging Face directories."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from finetune.core.errors import MissingError, StageError, first_line
from finetune.core.install import missing_package


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF model, weights dequantized to float32, with its tokenizer and chat template, into `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    module: Any = modeling_gguf_pytorch_utils
    bar, verbosity, bars = module.tqdm, logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module.tqdm = partial(bar, disable=True)  # it is tqdm's own, which transformers' switch does not reach
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except ImportError as error:  # transformers says so, with a page of text, when torch or gguf is not there
        raise MissingError(missing_package(error.name or "gguf")) from error
    except Exception as error:  # a damaged file ends in any of a dozen kinds
        why = first_line(error)
        raise StageError(f"transformers cannot read {gguf}: {why}. The file may be damaged; get it again") from error
    finally:
        module.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
