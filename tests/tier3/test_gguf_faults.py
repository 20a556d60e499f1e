"""A sound GGUF export, broken by hand in one place: the verdict that guards the place fails and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.chain import copied, finished, tiny_recipe
from support.gguf_files import rewrite

HOP = "gguf:f32"


@pytest.fixture(scope="module")
def chain(family, tiny_model, tmp_path_factory):
    family("gguf")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("gguf-faults")
        yield finished(tiny_recipe(tiny_model("llama"), folder, [HOP]), patch)


@pytest.fixture
def gguf(chain):
    """The exported file, put back after the test."""
    folder = chain.run.path / "export" / "gguf-f32"
    back = copied(chain, folder)
    yield next(folder.glob("*.gguf"))
    back()


def change(gguf: Path, **metadata) -> None:
    rewrite(gguf, gguf.with_suffix(".new"), {name.replace("__", "."): value for name, value in metadata.items()})
    gguf.with_suffix(".new").replace(gguf)


def kinds(found: dict[str, str]) -> set[str]:
    assert all(name.endswith(f"[{HOP}]") for name in found), found
    return {name.partition("[")[0] for name in found}


def test_a_sound_export_passes_every_verdict(chain, gguf):
    assert chain.compared() == {}
    seen = json.loads((chain.run.path / "compare" / "gguf-f32.json").read_text())
    assert seen["learned"] == {"known": 6, "kept": 6, "lost": []}
    assert seen["served"]["compared"] == 6
    assert seen["distributions"]["mean"] < 1e-6


def test_a_swapped_template_fails(chain, gguf):
    template = (chain.run.path / "prepare" / "chat_template.jinja").read_text().replace("assistant\\n", "bot\\n")
    change(gguf, tokenizer__chat_template=template)
    found = chain.compared()
    assert kinds(found) == {"prompt_parity", "template_carried", "served_parity"}
    assert "the chat template in the export is not that of the training" in found[f"prompt_parity[{HOP}]"]


def test_a_removed_end_of_turn_token_fails(chain, gguf):
    """llama.cpp knows the usual marks by their text too, so the token is renamed as well."""
    from gguf import GGUFReader

    words = GGUFReader(gguf).fields["tokenizer.ggml.tokens"].contents()
    words[words.index("<|im_end|>")] = "<|nothing|>"
    change(gguf, tokenizer__ggml__eos_token_id=60, tokenizer__ggml__tokens=words)
    found = chain.compared()
    assert kinds(found) >= {"stop_parity", "constants_parity", "prompt_parity"}
    assert "eos_token_id is 2 in the model, 60 in the export" in found[f"stop_parity[{HOP}]"]


def test_another_base_of_the_position_encoding_fails_and_is_named(chain, gguf):
    change(gguf, llama__rope__freq_base=10000.0)
    found = chain.compared()
    assert kinds(found) >= {"distribution_parity", "distribution_worst", "constants_parity"}
    assert (
        "Likely cause: rope_theta is 321.0 in the model, 10000.0 in the export" in found[f"distribution_parity[{HOP}]"]
    )


def test_another_epsilon_of_the_norm_fails_and_is_named(chain, gguf):
    change(gguf, llama__attention__layer_norm_rms_epsilon=1e-6)
    assert "norm_eps is 0.003 in the model" in chain.compared()[f"distribution_parity[{HOP}]"]


def test_a_begin_token_that_the_runtime_adds_fails(chain, gguf):
    change(gguf, tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=60)
    found = chain.compared()
    assert "prompt_parity" in kinds(found)
    assert "puts a token before the prompt" in found[f"prompt_parity[{HOP}]"]


def test_a_lost_template_fails_though_the_runtime_makes_up_the_same(chain, gguf):
    """llama.cpp takes ChatML for a file without a template, which is what this model was trained with."""
    change(gguf, tokenizer__chat_template=None)
    assert kinds(chain.compared()) == {"template_carried"}


def test_two_tokens_exchanged_fail_though_no_prompt_has_them(chain, gguf):
    from gguf import GGUFReader

    words = GGUFReader(gguf).fields["tokenizer.ggml.tokens"].contents()
    words[-1], words[-2] = words[-2], words[-1]
    change(gguf, tokenizer__ggml__tokens=words)
    found = chain.compared()
    assert "vocabulary_parity" in kinds(found)
    assert "its tokens are others, or have other numbers" in found[f"vocabulary_parity[{HOP}]"]


def test_a_coarser_file_than_its_name_fails(chain, gguf, tmp_path):
    from finetune.export import Source
    from finetune.export.gguf import export

    export(Source(name="half", model=chain.run.path / "merge" / "model"), "f16", tmp_path).path.replace(gguf)
    assert "a weight takes 16." in chain.compared()[f"stored_bits[{HOP}]"]


def test_weights_of_an_older_run_fail(chain, gguf, tiny_model, tmp_path):
    """The untrained model under the export's name: same tokenizer, template and constants, other answers."""
    from finetune.export import Source
    from finetune.export.gguf import export

    export(Source(name="old", model=tiny_model("llama")), "f32", tmp_path).path.replace(gguf)
    found = chain.compared()
    assert kinds(found) >= {"distribution_parity", "greedy_parity", "learned_parity"}
    assert "export of an older run" in found[f"distribution_parity[{HOP}]"]
    assert "first divergence at token" in found[f"greedy_parity[{HOP}]"]
    assert "against [" in found[f"greedy_parity[{HOP}]"]
