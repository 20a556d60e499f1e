"""The bundle is complete, says what it is, and holds nothing of the machine that it was made on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.backends.fake.model import make_model
from finetune.checks import as_dict, judge
from finetune.core.errors import MissingError, ResourceError, StageError, UsageError
from finetune.core.files import digest
from finetune.export import Exported, Source, exporter, parse
from finetune.export import card as cards
from finetune.export.bundle import export, rehearse, set_card, verify_manifest
from finetune.models.licenses import front_matter
from finetune.recipe.yaml import parse as parse_yaml

TOKEN = "hf_" + "abcdefgh" * 3
WORDS = "Licence: do as you like.\n"
LEFT = (
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json"),
    *(
        ".lock",
        "x.lock",
        "train.log",
        "events.jsonl",
        "report.json",
        "manifest.json",
        ".env",
        "state.pkl",
        "random.bin",
    ),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine: a home with a space in it, a run in there, and the working directory."""
    place = tmp_path / "home of ada" / "work"
    place.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place.parent))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def source(home: Path) -> Source:
    """A merged model with an adapter, as a run leaves them, and all that must not be passed on."""
    model = make_model(home / "runs/town/merge/model", {"Hello?": "Hello."})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": str(home / "base model")}))
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"/usr/share/dict": 1}}}')
    (model / "chat_template.jinja").write_text("{# /usr/share/x #}{{ messages }}")
    (model / "modeling_own.py").write_text("x = 1\n")
    adapter = home / "runs/town/train/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"r": 8, "base_model_name_or_path": str(home / "base model"), "inference_mode": True})
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 10)
    (adapter / "README.md").write_text(f"base_model: {home}")
    for place in (model, adapter):
        for name in LEFT:
            (place / name).write_text(f"state at {home}")
        for folder in ("checkpoint-3", "ref", "runs", ".cache", "__pycache__"):
            (place / folder).mkdir()
            (place / folder / "config.json").write_text(f'"{home}"')
    recipe = {
        "name": "town",
        "model": {"path": str(home / "base model"), "token": "${HF_TOKEN}"},
        "data": {"path": [str(home / "my rows.jsonl"), "shipped:quorra/train.jsonl"]},
        "train": {"max_steps": 12, "lora": {"r": 8}, "output_dir": str(home / "out")},
        "align": {"data": {"path": "owner/pairs"}},
        "output_dir": str(home / "runs"),
    }
    facts = {
        "base_model": str(home / "base model"),
        "recipe": recipe,
        "verdicts": verdicts(home),
        "manifest": {
            "finetune": "0.1.0",
            "python": "3.11",
            "packages": {"torch": "2.13"},
            "command": f"finetune run {home}",
        },
        "metrics": {"train": {"steps": 12, "first_loss": 4.92791, "finished": True, "note": str(home)}},
    }
    return Source(name="town", model=model, adapter=adapter, license="MIT", license_text=WORDS, card=facts)


def verdicts(home: Path, passed: bool = True) -> list[dict[str, Any]]:
    why = f"read {home}/events.jsonl and ~/x | said '<|im_end|>'\nand stopped"
    found = [
        judge("loss_convergence", 0.51234, ">", 0.05, "relative fall", "events.jsonl", why),
        judge("learned_net", None, ">", 0.3, "share", "evaluate", "no evidence: not asked"),
    ]
    stored: list[dict[str, Any]] = as_dict(found[: 1 if passed else 2])["verdicts"]
    return stored


@pytest.fixture
def bundle(source: Source, home: Path) -> Path:
    return export(source, "", home / "bundle").path


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_the_bundle_holds_all_that_is_needed_and_nothing_else(source: Source, bundle: Path) -> None:
    assert names(bundle) == {
        *("config.json", "fake_model.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"),
        *("modeling_own.py", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        *("LICENSE", "README.md", "manifest.json"),
    }
    for name in ("fake_model.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (bundle / name).read_bytes() == (source.model / name).read_bytes()
    assert (bundle / "LICENSE").read_text() == WORDS


def test_the_table_leads_to_it_and_the_path_is_the_folder(source: Source, home: Path) -> None:
    found = exporter(parse("bundle")).export(source, "", home / "out")
    assert isinstance(found, Exported)
    assert found.path == home / "out"


def test_no_file_names_a_place_of_this_machine_or_a_secret(
    source: Source, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-ada")
    config = json.loads((source.model / "config.json").read_text())
    (source.model / "config.json").write_text(json.dumps({**config, "note": f"a-token-of-ada {TOKEN} {home}/x"}))
    out = export(source, "", home / "bundle").path

    swept = [path for path in out.rglob("*") if path.is_file()]
    assert len(swept) == 11
    for path in swept:
        text = path.read_text(encoding="utf-8")
        for secret in (str(home), str(home.parent), "home of ada", "a-token-of-ada", TOKEN, "~/x"):
            assert secret not in text, f"{secret} in {path.name}"
    assert json.loads((out / "config.json").read_text())["note"] == "*** *** x"


def test_an_adapter_names_its_base_as_others_know_it(source: Source, home: Path) -> None:
    for path, expected in (
        (str(home / "base model"), "base model"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("owner/base", "owner/base"),
    ):
        out = export(replace(source, card={**source.card, "base_model": path}), "", home / f"of {expected[:5]}").path
        config = json.loads((out / "adapter/adapter_config.json").read_text())
        assert config == {"r": 8, "base_model_name_or_path": expected, "inference_mode": True}
        assert json.loads((out / "config.json").read_text())["_name_or_path"] == expected
        assert front_matter(out / "README.md")["base_model"] == expected


def test_what_was_changed_is_said(source: Source, home: Path) -> None:
    notes = export(source, "", home / "bundle").notes
    assert [note for note in notes if "named a place" in note] == [
        "config.json: _name_or_path named a place on this machine, or a secret",
        "adapter/adapter_config.json: base_model_name_or_path named a place on this machine, or a secret",
    ]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "modeling_own.py"])
def test_a_secret_that_cannot_be_taken_out_stops_the_export(source: Source, home: Path, name: str) -> None:
    value = json.dumps({"chat_template": TOKEN}) if name.endswith(".json") else TOKEN
    (source.model / name).write_text(value)
    with pytest.raises(StageError, match="looks like a token") as caught:
        export(source, "", home / "bundle")
    assert TOKEN not in str(caught.value)
    assert not (home / "bundle" / "manifest.json").exists()


def test_a_token_of_the_vocabulary_is_left_as_it_is(source: Source, home: Path) -> None:
    (source.model / "tokenizer.json").write_text(json.dumps({"vocab": {TOKEN: 1, "/usr/bin/env": 2}}))
    out = export(source, "", home / "bundle").path
    assert (out / "tokenizer.json").read_bytes() == (source.model / "tokenizer.json").read_bytes()


def test_every_file_is_a_copy(source: Source, home: Path) -> None:
    (source.model / "model.safetensors").write_bytes(bytes(2_000_000))
    out = export(source, "", home / "bundle").path
    assert (out / "model.safetensors").read_bytes() == (source.model / "model.safetensors").read_bytes()
    assert {path.stat().st_nlink for path in out.rglob("*") if path.is_file()} == {1}


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "other.safetensors", "more/secret.txt"])
@pytest.mark.parametrize("part", ["model", "adapter"])
def test_a_file_of_elsewhere_is_not_shipped(source: Source, home: Path, part: str, name: str) -> None:
    outside = home / "elsewhere"
    outside.write_text("nobody's business")
    link = getattr(source, part) / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    with pytest.raises(StageError, match=f"{name} is a link to a file outside of"):
        export(source, "", home / "bundle")
    assert not (home / "bundle").exists()


def test_a_model_in_the_hubs_cache_is_made_of_links_and_shipped(source: Source, home: Path) -> None:
    snapshot = home / "models--owner--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = home / "models--owner--base" / "blobs"
    blobs.mkdir()
    for file in source.model.iterdir():
        if file.is_file():
            (blobs / file.name[::-1]).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name[::-1])
    out = export(replace(source, model=snapshot), "", home / "bundle").path
    assert (out / "fake_model.json").read_bytes() == (source.model / "fake_model.json").read_bytes()
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_the_same_source_gives_the_same_bundle(source: Source, home: Path) -> None:
    first, second = (export(source, "", home / name).path for name in ("one", "two"))
    assert digest(first) == digest(second)


def test_without_adapter_and_licence_there_is_neither(source: Source, home: Path) -> None:
    (source.model / "LICENSE").write_text("the model's own")
    found = export(replace(source, adapter=None, license=None, license_text=None), "", home / "bundle")
    assert not (found.path / "adapter").exists()
    assert (found.path / "LICENSE").read_text() == "the model's own"
    assert any("licence is not known" in note for note in found.notes)
    card = (found.path / "README.md").read_text()
    assert "The adapter alone" not in card
    assert "licence of the base model is not known" in card


# -- what cannot be bundled --------------------------------------------------------------------------------------------


def test_a_rehearsal_wants_a_config_and_no_weights(source: Source, tmp_path: Path) -> None:
    (source.model / "fake_model.json").unlink()
    rehearse(source.model, "")
    with pytest.raises(MissingError, match=r"holds no config\.json"):
        rehearse(tmp_path, "")


def test_a_model_without_weights_is_refused(source: Source, home: Path) -> None:
    (source.model / "fake_model.json").unlink()
    with pytest.raises(MissingError, match="holds no weights"):
        export(source, "", home / "bundle")
    assert not (home / "bundle").exists()


def test_a_folder_that_is_not_empty_is_left_alone(source: Source, home: Path) -> None:
    (home / "bundle").mkdir()
    (home / "bundle" / "mine").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        export(source, "", home / "bundle")
    assert names(home / "bundle") == {"mine"}


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    source: Source, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.model / "model.safetensors").write_bytes(bytes(2_000_000))
    monkeypatch.setattr("finetune.core.memory.disk_free", lambda path: 2_000_000)
    with pytest.raises(ResourceError, match="the bundle needs about 1.9 MiB on the disk of .*, which has 1.9 MiB left"):
        export(source, "", home / "bundle")
    monkeypatch.setattr("finetune.core.memory.disk_free", lambda path: 10)
    with pytest.raises(ResourceError, match="has 10 B left"):
        export(source, "", home / "bundle")
    assert names(home / "bundle") == set()


# -- the manifest ------------------------------------------------------------------------------------------------------


def test_the_manifest_lists_every_file_but_itself(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["files"] == {
        name: {"size": (bundle / name).stat().st_size, "sha256": digest(bundle / name)}
        for name in sorted(names(bundle) - {"manifest.json"})
    }
    assert (manifest["name"], manifest["base_model"], manifest["license"]) == ("town", "base model", "MIT")
    assert verify_manifest(bundle) == []


def test_missing_changed_and_unlisted_files_are_named(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "config.json").write_text("{}")
    weights = bundle / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    (bundle / "adapter" / "extra.json").write_text("{}")
    size = json.loads((bundle / "manifest.json").read_text())["files"]["config.json"]["size"]
    assert verify_manifest(bundle) == [
        "adapter/adapter_model.safetensors: changed (SHA-256 differs)",
        f"config.json: changed (2 bytes, not {size})",
        "tokenizer.json: missing",
        "adapter/extra.json: not in manifest.json",
    ]


def test_what_git_and_the_hub_add_is_no_fault(bundle: Path) -> None:
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for name in (".git/HEAD", ".cache/huggingface/x"):
        (bundle / name).parent.mkdir(parents=True)
        (bundle / name).write_text("x")
    assert verify_manifest(bundle) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "manifest.json: missing"),
        ("{", "manifest.json: not readable"),
        ("[]", "manifest.json: not readable"),
        ("{}", "manifest.json: lists no files"),
        ('{"files": {}}', "manifest.json: lists no files"),
        ('{"files": {"config.json": 3}}', "config.json: has no digest in manifest.json"),
        ('{"files": {"../x": {}}}', "../x: lies outside the bundle"),
        ('{"files": {"/etc/passwd": {}}}', "/etc/passwd: lies outside the bundle"),
    ],
)
def test_a_manifest_that_proves_nothing_is_a_fault(bundle: Path, text: str | None, fault: str) -> None:
    (bundle / "manifest.json").unlink()
    if text is not None:
        (bundle / "manifest.json").write_text(text)
    assert fault in verify_manifest(bundle)


# -- the model card ----------------------------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_reads(bundle: Path) -> None:
    assert front_matter(bundle / "README.md") == {
        "license": "mit",
        "base_model": "base model",
        "base_model_relation": "finetune",
        "tags": ["finetune", "lora", "sft", "dpo"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize(
    ("spdx", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("llama3.2", {"license": "llama3.2"}),
        ("tuesdays", {"license": "other", "license_name": "tuesdays", "license_link": "LICENSE"}),
        (
            "Apache-2.0 AND MIT",
            {"license": "other", "license_name": "Apache-2.0 AND MIT", "license_link": "LICENSE"},
        ),
        (None, {"license": "unknown"}),
    ],
)
def test_a_licence_is_named_as_the_hub_names_it(
    source: Source, home: Path, spdx: str | None, expected: dict[str, str]
) -> None:
    front = front_matter(export(replace(source, license=spdx), "", home / "bundle").path / "README.md")
    assert {key: front[key] for key in front if key.startswith("license")} == expected


def test_the_card_tells_recipe_data_numbers_and_versions(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    block = card.partition("```yaml\n")[2].partition("\n```")[0]
    assert parse_yaml(block, "card")[0] == {
        "name": "town",
        "model": {"path": "base model"},
        "data": {"path": ["my rows.jsonl", "shipped:quorra/train.jsonl"]},
        "train": {"max_steps": 12, "lora": {"r": 8}},
        "align": {"data": {"path": "owner/pairs"}},
    }
    assert "- data: my rows.jsonl, shipped:quorra/train.jsonl\n" in card
    assert "- preference pairs: owner/pairs\n" in card
    assert "- train: steps 12, first_loss 4.928\n" in card
    assert "- versions: finetune 0.1.0, python 3.11, torch 2.13\n" in card


def test_the_verdicts_are_a_table_with_measured_value_and_bound(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    assert "All 1 check proved." in card
    row = next(line for line in card.splitlines() if line.startswith("| loss_convergence"))
    assert row == (
        "| loss_convergence | 0.5123 | > 0.05 relative fall | proved "
        "| read events.jsonl and x \\| said '&lt;\\|im_end\\|>' and stopped |"
    )


def test_later_verdicts_take_the_place_of_the_first_and_the_manifest_follows(bundle: Path, home: Path) -> None:
    before = (bundle / "README.md").read_text()
    set_card(bundle, verdicts(home, passed=False))
    card = (bundle / "README.md").read_text()

    assert "1 of 2 checks refuted: " in card
    assert "| learned_net | nothing | > 0.3 share | **refuted** | no evidence: not asked |" in card
    assert card.count("## What was proved") == card.count("loss_convergence") == 1
    assert str(home) not in card
    assert verify_manifest(bundle) == []
    set_card(bundle, verdicts(home))
    assert (bundle / "README.md").read_text() == before


def test_the_card_alone_is_told_anew(bundle: Path, home: Path) -> None:
    before = json.loads((bundle / "manifest.json").read_text())["files"]
    weights = bundle / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    set_card(bundle, verdicts(home))
    after = json.loads((bundle / "manifest.json").read_text())["files"]
    assert {name for name in before if before[name] != after[name]} <= {"README.md"}
    assert verify_manifest(bundle) == ["adapter/adapter_model.safetensors: changed (SHA-256 differs)"]


def test_what_it_was_exported_in_spite_of_is_said_under_the_title(bundle: Path, home: Path) -> None:
    set_card(bundle, None, (), ["refuted: learned_net", "a | <b>"])
    card = (bundle / "README.md").read_text()
    assert (
        "\n# town\n\n> **Exported although:**\n>\n> - refuted: learned_net\n> - a \\| &lt;b>\n\nbase model, fine"
        in card
    )
    assert front_matter(bundle / "README.md")["license"] == "mit"
    assert "| loss_convergence |" in card
    assert json.loads((bundle / "manifest.json").read_text())["exported_although"] == [
        "refuted: learned_net",
        "a | <b>",
    ]
    assert verify_manifest(bundle) == []


@pytest.mark.parametrize("name", ["README.md", "manifest.json"])
def test_a_card_or_a_manifest_that_is_gone_is_told(bundle: Path, home: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(StageError, match="is damaged; export the bundle again"):
        set_card(bundle, verdicts(home))


def test_a_card_without_a_place_for_verdicts_is_refused(bundle: Path, home: Path) -> None:
    (bundle / "README.md").write_text("# mine\n")
    with pytest.raises(StageError, match="is damaged; export the bundle again"):
        set_card(bundle, verdicts(home))
    assert (bundle / "README.md").read_text() == "# mine\n"


def test_no_verdicts_are_no_passed_ones() -> None:
    assert cards.verdict_table([]) == cards.verdict_table(None) == "Nothing was verified when this card was written."
    assert "1 of 1 check refuted: x." in cards.verdict_table([{"name": "x"}])


def test_code_in_the_card_is_code_of_this_model(source: Source, home: Path) -> None:
    (source.model / "config.json").write_text('{"model_type": "llama"}')
    told = {**source.card, "base_model": "owner/base"}
    known = replace(source, card=told, system="Say ```no```.", trust_remote_code=True)
    card = (export(known, "", home / "bundle").path / "README.md").read_text()
    blocks = re.findall(r"^(`{3,})python\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)

    # The first holds a fence itself, and so has a longer one.
    assert [fence for fence, _ in blocks] == ["````", "```"]
    (_, first), (_, second) = blocks
    for code in (first, second):
        compile(code, "card", "exec")
    assert "{'role': 'system', 'content': 'Say ```no```.'}" in first
    assert first.count("trust_remote_code=True") == 2
    assert 'PeftModel.from_pretrained(base, path, subfolder="adapter")' in second
    assert "from_pretrained('owner/base', trust_remote_code=True)" in second


def test_a_card_without_facts_is_still_a_card(source: Source, home: Path) -> None:
    out = export(replace(source, card={}), "", home / "bundle").path
    assert front_matter(out / "README.md")["tags"] == ["finetune"]
    assert "base_model" not in front_matter(out / "README.md")
    assert "## Recipe" not in (out / "README.md").read_text()


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wrote /srv/a/b.txt, then stopped", "wrote b.txt, then stopped"),
        ("~/x and C:\\Users\\ada\\y.gguf", "x and y.gguf"),
        ("'/srv/a/b'", "'b'"),
        ("file:///srv/a/b", "b"),
        ("1/2 and/or owner/name </s> 5/6/7", "1/2 and/or owner/name </s> 5/6/7"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("shipped:quorra/train.jsonl", "shipped:quorra/train.jsonl"),
    ],
)
def test_paths_become_names_and_other_slashes_stay(text: str, expected: str) -> None:
    assert cards.without_places(text) == expected


def test_known_places_may_hold_spaces_and_end_where_they_end() -> None:
    place = Path("/srv/of ada")
    assert cards.without_known("/srv/of ada/x, /srv/of ada, /srv/of adam", [place]) == "x, of ada, /srv/of adam"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gpt2", "gpt2"),
        ("owner/name", "owner/name"),
        ("/srv/models/mine/", "mine"),
        ("./models/mine", "mine"),
        ("a/b/mine", "mine"),
        ("~/mine.gguf", "mine"),
        ("C:\\models\\mine", "mine"),
        ("", None),
        (None, None),
    ],
)
def test_a_base_model_is_known_by_its_name(path: str | None, expected: str | None) -> None:
    assert cards.base_name(path) == expected
