"""A recipe means the same after every round trip, and a faulty one says everything that is wrong, with its line."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from finetune.core import secrets
from finetune.core.errors import MissingError, RecipeError, UsageError
from finetune.recipe import Recipe, dump, load, load_mapping
from finetune.recipe import yaml as our_yaml
from finetune.recipe.profiles import PROFILES
from finetune.recipe.sections import Align, Data, Evaluate, Expect, Model, Section, Template, Train

TRICKY = [
    "no", "yes", "on", "true", "null", "~", "", "3e-4", "1e5", "1:30", "0o17", "0x1F", "1_000", ".5", "-", "---", "...",
    "2024-01-01", "=", "<<", "- a", "a: b", "a #b", "# c", "'", '"', "%x", "@x", "`x`", "|", ">", "&a", "*a", "!t", "?",
    "{a}", "[a]", " lead", "trail ", "\ttab", "multi\nline", "ends\n\n", "\r\n", "\u2028", "\x85", "\ufeff", "\x1b", "\x7f",
    "${HOME}", "$${HOME}", "${NO_SUCH_THING:-x}", "$$$", "\\n", "é", "中文", "😀", "{{ jinja }} {% if x %}",
]  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.one_of(st.sampled_from(TRICKY), st.text(CHARACTERS, max_size=20))
INTEGERS = st.integers(-(2**63) + 1, 2**63 - 1)
MINIMAL = "data:\n  path: rows.jsonl\n"


def strategy(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a field of this type and these bounds accepts."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        flat = [bound for item in more for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return strategy(inner, [*metadata, *flat])
    if origin in (Union, types.UnionType):
        return st.one_of([strategy(option, metadata) for option in get_args(annotation)])
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is list:
        return st.lists(strategy(get_args(annotation)[0], []), min_size=1, max_size=3)
    if origin is dict:
        return st.dictionaries(TEXTS, strategy(get_args(annotation)[1], []), max_size=3)
    low = next(
        (bound.ge if isinstance(bound, Ge) else bound.gt for bound in metadata if isinstance(bound, Ge | Gt)), None
    )
    high = next(
        (bound.le if isinstance(bound, Le) else bound.lt for bound in metadata if isinstance(bound, Le | Lt)), None
    )
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        above = any(isinstance(bound, Gt) for bound in metadata)
        return st.integers(0 if low is None else low + above, 10**6)
    if annotation is float:
        return st.floats(
            low,
            high,
            exclude_min=any(isinstance(bound, Gt) for bound in metadata),
            exclude_max=any(isinstance(bound, Lt) for bound in metadata),
            allow_nan=False,
            allow_infinity=False,
        )
    if annotation is str:
        return TEXTS.filter(bool) if any(isinstance(bound, MinLen) for bound in metadata) else TEXTS
    if annotation in (type(None), SecretStr):
        return st.none()
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return section(annotation)
    raise TypeError(f"no strategy for {annotation}")


def section(kind: type[Section], **instead: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with any of a section's keys; required keys, and those in `instead`, always or as given there."""
    fields = {
        name: instead.get(name, strategy(field.annotation, list(field.metadata)))
        for name, field in kind.model_fields.items()
    }
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    return st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: found for name, found in fields.items() if name not in required},
    )


PATHS = TEXTS.filter(bool)
STEPS = {
    "max_steps": st.sampled_from([-1, 1, 60]),
    "fp16": st.just(False),
    "report_to": st.sampled_from(["none", "wandb", [], ["tensorboard", "mlflow"]]),
}
TEMPLATES = st.one_of(
    section(Template, name=st.sampled_from(["model", "alpaca", "llama3"]), path=st.none(), jinja=st.none()),
    st.fixed_dictionaries({"name": st.just("custom"), "jinja": TEXTS}),
)
EXPORTS = st.sampled_from(["gguf", "GGUF:q4_k_m", "gguf:f16", "mlx", "mlx:q8", "ollama", "bundle"])
KEYS = st.fixed_dictionaries(
    {
        "data": section(
            Data, path=st.one_of(PATHS, st.lists(PATHS, min_size=1)), format=st.sampled_from(["auto", "chat"])
        )
    },
    optional={
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,79}\Z"),
        "backend": TEXTS,
        "model": section(Model, quantization=st.none()),  # not every backend has one
        "template": TEMPLATES,
        "train": st.one_of(st.none(), section(Train, **STEPS)),
        "align": st.one_of(st.none(), section(Align, data=section(Data, path=PATHS), **STEPS)),
        "evaluate": section(Evaluate),
        "export": st.lists(EXPORTS, max_size=3),
        "expect": section(
            Expect,
            export_kl_mean_max=st.dictionaries(EXPORTS, st.floats(0.001, 9), max_size=2),
            export_greedy_min=st.dictionaries(EXPORTS, st.floats(0, 1), max_size=2),
        ),
        "output_dir": TEXTS,
    },
)


def consistent(mapping: dict[str, Any]) -> dict[str, Any]:
    """What was drawn, key by key, without what contradicts itself across keys."""
    train, align = mapping.get("train"), mapping.get("align")
    if align:
        for place, key in (*((align, key) for key in ("eval_strategy", "eval_steps", "per_device_eval_batch_size")),
                           (align["data"], "eval_path"), (align["data"], "eval_fraction")):  # fmt: skip
            place.pop(key, None)
        if align.get("label_smoothing"):
            align["loss_type"] = "robust"
    if train:
        if train.get("early_stopping_patience"):
            train |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
        mapping["data"]["eval_fraction"] = 0.5
        lora = train.setdefault("lora", {})
        if isinstance(lora.get("target_modules"), str):
            lora["target_modules"] = ".*_proj" if lora.get("layers_to_transform") is None else "all-linear"
        if align:
            lora["bias"] = "none"
    return mapping


RECIPES = KEYS.map(consistent).map(Recipe.model_validate)


def write(directory: Path, text: str) -> Path:
    file = directory / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def faults(directory: Path, text: str, *overrides: str) -> list[str]:
    """The faults of a recipe, as `line: path: message`."""
    file = write(directory, text)
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    assert caught.value.exit_code == 2
    return [fault.removeprefix(f"{file}:") for fault in caught.value.faults]


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.delenv("HF_TOKEN", raising=False)


# -- round trip ------------------------------------------------------------------------------------------------------


def again(recipe: Recipe, **options: bool) -> Recipe:
    value, _ = our_yaml.parse(dump(recipe, **options), "dumped")
    return load_mapping(value)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(RECIPES, st.booleans())
def test_a_recipe_means_the_same_after_a_round_trip(recipe, defaults):
    assert again(recipe, defaults=defaults) == recipe


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        TEXTS,
        st.one_of(TEXTS, st.floats(allow_nan=False), st.integers(-(2**63) + 1, 2**63 - 1), st.booleans(), st.none()),
    )
)
def test_yaml_gives_back_every_value_and_its_type(value):
    back, _ = our_yaml.parse(our_yaml.write({"v": value}), "written")
    assert back == {"v": value}
    assert [type(item) for item in back["v"].values()] == [type(item) for item in value.values()]


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_tricky_strings_stay_strings(text, tmp_path):
    recipe = Recipe.model_validate({"data": {"path": "x", "fields": {text: text}}, "template": {"system": text}})
    assert again(recipe) == recipe


def test_the_dumped_file_lists_what_was_set_and_no_more():
    recipe = load_mapping({"data": {"path": "x"}, "train": {"max_steps": 3}})
    assert our_yaml.parse(dump(recipe), "")[0] == {"schema": 1, "data": {"path": "x"}, "train": {"max_steps": 3}}
    assert our_yaml.parse(dump(recipe, defaults=True), "")[0]["train"]["lora"]["r"] == 16


def test_yaml_is_version_1_2(tmp_path):
    recipe = load(write(tmp_path, MINIMAL + "train:\n  learning_rate: 3e-4\n  optim: no\n"))
    assert recipe.train is not None
    assert (recipe.train.learning_rate, recipe.train.optim) == (3e-4, "no")


def test_a_recipe_cannot_be_changed():
    recipe = load_mapping({"data": {"path": "x"}})
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


# -- paths -----------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_recipe_not_to_where_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "local-model").mkdir(parents=True)
    monkeypatch.chdir("/")
    text = (
        "model: {path: local-model}\ndata: {path: [rows.jsonl, /abs.jsonl, 'hub:owner/name']}\noutput_dir: out\n"
        "template: {name: custom, path: t.jinja}\nevaluate: {probes: ../probes.jsonl}\n"
    )
    recipe = load(write(tmp_path / "recipes", text))
    here = tmp_path / "recipes"
    assert recipe.model.path == str(here / "local-model")
    assert recipe.data is not None
    assert recipe.data.path == [str(here / "rows.jsonl"), "/abs.jsonl", "hub:owner/name"]
    assert recipe.output_dir == str(here / "out")
    assert recipe.template.path == str(here / "t.jinja")
    assert Path(str(recipe.evaluate.probes)).resolve() == tmp_path / "probes.jsonl"


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "owner/name"])
def test_a_models_name_is_no_path(tmp_path, name):
    assert load(write(tmp_path, MINIMAL + f"model: {name}\n")).model.path == name


# -- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_win_and_are_typed_as_in_yaml(tmp_path):
    recipe = load(
        write(tmp_path, MINIMAL + "train:\n  max_steps: 9\n  seed: 4\n"),
        [
            "train.max_steps=1",
            "train.lora.target_modules=[q_proj, v_proj]",
            "align=null",
            "name=other",
            "train.bf16=true",
        ],
    )
    assert recipe.train is not None
    assert (recipe.train.max_steps, recipe.train.seed, recipe.train.bf16) == (1, 4, True)
    assert recipe.train.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.name == "other"


def test_the_model_and_the_profile_can_be_overridden_whole(tmp_path):
    recipe = load(write(tmp_path, MINIMAL + "model: gpt2\n"), ["model=distilgpt2", "profile=code"])
    assert recipe.model.path == "distilgpt2"
    assert recipe.train is not None
    assert recipe.train.packing is True


@pytest.mark.parametrize("option", ["train.max_steps", "=1", "train..max_steps=1", "train.max_steps=[1", "a=\x00"])
def test_an_override_that_makes_no_sense_is_a_usage_error(tmp_path, option):
    with pytest.raises(UsageError, match="--set"):
        load(write(tmp_path, MINIMAL), [option])


def test_a_fault_in_an_override_points_at_the_option_not_at_the_file(tmp_path):
    (fault,) = faults(tmp_path, MINIMAL + "train:\n  max_steps: 9\n", "train.max_steps=0")
    assert fault.startswith("--set train.max_steps: train.max_steps: 0 steps train nothing")
    (fault,) = faults(tmp_path, MINIMAL, "train.max_step=1")
    assert "--set train.max_step" in fault
    assert "Did you mean 'max_steps'" in fault


# -- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROFILES))
def test_a_profile_gives_defaults_and_the_recipe_wins(name):
    recipe = load_mapping({"profile": name, "data": {"path": "x"}, "train": {"learning_rate": 1.0}})
    defaults = PROFILES[name]
    assert recipe.train is not None
    assert recipe.train.learning_rate == 1.0
    assert recipe.train.max_length == defaults["train"]["max_length"]
    assert recipe.template.name == defaults["template"]["name"]


def test_there_are_the_three_profiles():
    assert list(PROFILES) == ["chat", "instruction", "code"]


def test_a_section_set_to_null_stays_null_under_a_profile():
    assert load_mapping({"profile": "chat", "data": {"path": "x"}, "train": None}).train is None


# -- the environment -------------------------------------------------------------------------------------------------


def test_references_are_replaced_or_fall_back(monkeypatch):
    monkeypatch.setenv("MY_DATA", "/d")
    monkeypatch.delenv("MY_NAME", raising=False)
    recipe = load_mapping({"data": {"path": ["${MY_DATA}/a", "$${MY_DATA}"]}, "name": "${MY_NAME:-plain}"})
    assert recipe.data is not None
    assert recipe.data.path == ["/d/a", "${MY_DATA}"]
    assert recipe.name == "plain"


def test_a_reference_to_nothing_names_the_variable_and_the_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_NAME", raising=False)
    assert faults(tmp_path, "data:\n  path: x\n  split: ${MY_NAME}\n") == [
        "3: data.split: the environment variable MY_NAME is not set"
    ]


def test_a_secret_belongs_to_the_token_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    (fault,) = faults(tmp_path, "data:\n  path: x\noutput_dir: runs/${HF_TOKEN}\n")
    assert fault.startswith("3: output_dir: '${HF_TOKEN}' holds a secret")
    recipe = load(write(tmp_path, MINIMAL + "model:\n  token: ${HF_TOKEN}\n"))
    assert recipe.model.token is not None
    assert recipe.model.token.get_secret_value() == "very-secret-value"


def test_an_unset_or_placeholder_token_is_none(tmp_path):
    for token in ("${HF_TOKEN}", '"<HF_TOKEN>"', '""', "null"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(write(tmp_path, MINIMAL + f"model:\n  token: {token}\n")).model.token is None


@pytest.mark.parametrize("token", ["hf_" + "a" * 34, 'odd "quoted" token'])
def test_a_literal_token_works_with_a_warning_and_is_never_shown(tmp_path, token):
    with pytest.warns(UserWarning, match=r"recipe\.yaml:4: model\.token: a literal token"):
        recipe = load(write(tmp_path, MINIMAL + f"model:\n  token: '{token}'\n"))
    assert recipe.model.token is not None
    assert recipe.model.token.get_secret_value() == token
    for text in (dump(recipe), dump(recipe, defaults=True), str(recipe), repr(recipe), recipe.model_dump_json()):
        assert token not in text
    assert "${HF_TOKEN}" in dump(recipe)
    assert token not in secrets.redact(f"Bearer {token}")


def test_no_error_shows_a_token(tmp_path):
    token = "tok-0123456789"
    shown = [
        *faults(tmp_path, MINIMAL + f"model:\n  token: [{token}]\n"),
        *faults(tmp_path, MINIMAL + f"model:\n  token: {token}\n  token: {token}\n"),
        *faults(tmp_path, MINIMAL + f"model:\n  tokn: {token}\n"),
        *faults(tmp_path, MINIMAL + "model:\n  dtype: x\n", f"model.token={token}"),
        *faults(tmp_path, MINIMAL + "model:\n  token: 123456789\n"),
    ]
    assert len(shown) == 5
    assert token not in "".join(shown)
    assert "123456789" not in "".join(shown)


# -- faults ----------------------------------------------------------------------------------------------------------


def test_every_fault_is_reported_at_once_with_its_line(tmp_path):
    text = (
        "data:\n"
        "  path: rows.jsonl\n"
        "  formt: chat\n"
        "train:\n"
        "  learning_rate: -1\n"
        "  lora:\n"
        "    rr: 8\n"
        "    init_lora_weights: gausian\n"
        "  lr_scheduler_type: cosinus\n"
        "tarin: 1\n"
    )
    found = faults(tmp_path, text)
    assert [fault.split(": ")[:2] for fault in sorted(found)] == [
        ["10", "tarin"],
        ["3", "data.formt"],
        ["5", "train.learning_rate"],
        ["7", "train.lora.rr"],
        ["8", "train.lora.init_lora_weights"],
        ["9", "train.lr_scheduler_type"],
    ]
    together = "\n".join(found)
    for hint in ("'format'", "'train'", "'cosine'", "'gaussian'"):
        assert f"Did you mean {hint}" in together
    assert "greater than or equal to 0, not -1" in together


def test_a_list_entry_is_named_by_its_place(tmp_path):
    (fault,) = faults(tmp_path, "data:\n  path:\n    - a.jsonl\n    - [b]\n")
    assert fault.startswith("4: data.path.1: ")


def test_a_key_of_the_users_own_is_named_as_it_is(tmp_path):
    (fault,) = faults(tmp_path, "data:\n  path: x\n  fields:\n    string: [1]\n")
    assert fault.startswith("4: data.fields.string: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:\n  path: [a\ntrain: {}\n", "3"),
        ("data:\n  path: a\n path: b\n", "3"),
        ("data: {path: a}\ndata: {path: b}\n", "2"),
        ("data:\n\tpath: a\n", "2"),
        ("a: &x 1\nb: *y\n", "2"),
        ("a: !!python/object:os.system x\n", "1"),
        ("- a\n- b\n", "1"),
        ("", "1"),
        ("just words\n", "1"),
    ],
)
def test_bad_yaml_is_one_fault_with_its_line(tmp_path, text, expected):
    (fault,) = faults(tmp_path, text)
    assert fault.partition(":")[0] == expected


def test_a_value_that_contains_itself_is_refused(tmp_path):
    (fault,) = faults(tmp_path, "a: &a [*a]\n")
    assert "contains itself" in fault


def test_a_file_in_another_encoding_is_refused_with_its_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(MINIMAL.encode() + "name: fôo\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: not UTF-8"):
        load(file)


def test_a_missing_recipe_says_how_to_write_one(tmp_path):
    with pytest.raises(MissingError, match=r"finetune init recipe\.yaml"):
        load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "'train' needs a 'data' section"),
        ({"data": {"path": "x", "format": "preference"}}, "belongs under 'align.data'"),
        ({"data": {}}, "data.path: required, but missing"),
        ({"data": {"path": []}}, "name at least one file"),
        ({"data": {"path": "x"}, "template": {"name": "custom"}}, "exactly one of 'path' and 'jinja'"),
        ({"data": {"path": "x"}, "template": {"jinja": "x"}}, "belong to the template 'custom'"),
        ({"data": {"path": "x"}, "train": {"bf16": True, "fp16": True}}, "exclude each other"),
        ({"data": {"path": "x"}, "name": "../x"}, "name: "),
    ],
)
def test_what_contradicts_itself_is_refused(mapping, message):
    with pytest.raises(RecipeError, match=message):
        load_mapping(mapping)


# -- keys that contradict each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["model.dtype=bfloat16", "model=other"])
def test_an_override_beside_the_short_form_of_model_keeps_the_rest(tmp_path, override):
    short = load(write(tmp_path, "model: own\ndata: {path: x}\n"), [override])
    assert short.model.path == ("other" if override == "model=other" else "own")
    whole = load(write(tmp_path, "model: {path: own, dtype: bfloat16}\ndata: {path: x}\n"), [override])
    assert (whole.model.path, whole.model.dtype) == (short.model.path, "bfloat16")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("train: {early_stopping_patience: 1}", "the same, 'steps' or 'epoch', not 'no' and 'steps'"),
        (
            "train: {early_stopping_patience: 1, eval_strategy: steps, eval_steps: 3, save_steps: 4}",
            "'save_steps' to be a multiple of 'eval_steps', not 4 and 3",
        ),
        ("train: {eval_strategy: epoch}", "'train.eval_strategy' needs held-out rows"),
        ("train: {lora: {target_modules: '.*q', layers_to_transform: [1]}}", "not the regular expression '.*q'"),
        ("train: {lora: {target_modules: '('}}", "is no regular expression"),
        ("train: {lora: {rank_pattern: {q_proj: 0}}}", "greater than 0"),
        ("train: {lora: {bias: all}}\nalign: {data: {path: y}}", "'train.lora.bias' must be 'none' with 'align'"),
        ("align: {data: {path: y}, label_smoothing: 0.1}", "'label_smoothing' needs 'loss_type: robust'"),
        *(
            (f"align: {{data: {{path: y{inner}}}{key}}}", "alignment holds no pairs out")
            for inner, key in (
                ("", ", eval_strategy: steps"),
                ("", ", eval_steps: 5"),
                ("", ", per_device_eval_batch_size: 2"),
                (", eval_path: z", ""),
                (", eval_fraction: 0.5", ""),
            )
        ),
    ],
)
def test_keys_that_cannot_go_together_are_told_when_the_recipe_is_read(tmp_path, keys, said):
    (fault,) = faults(tmp_path, f"data: {{path: x}}\n{keys}\n")
    assert said in fault


def test_keys_that_go_together_are_taken(tmp_path):
    text = "data: {path: x, eval_fraction: 0.1}\ntrain: {early_stopping_patience: 1, eval_strategy: epoch, "
    recipe = load(write(tmp_path, text + "save_strategy: epoch, lora: {layers_to_transform: [1]}}\n"))
    assert recipe.train is not None and recipe.train.lora.layers_to_transform == [1]
