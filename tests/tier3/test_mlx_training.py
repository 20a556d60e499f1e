"""The backend contract on MLX, with a tiny random Llama; and that its adapters are PEFT's."""

from __future__ import annotations

import importlib.util
import json

import pytest

from contract import TrainingContract, read, run, split, write_rows
from finetune.backends import Job, get
from finetune.checks import verify
from finetune.core.errors import UsageError
from finetune.data.sources import resolve
from finetune.models import tiny
from finetune.recipe import load_mapping
from finetune.stages.pipeline import run_directory, run_stages

SETTINGS = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def mlx(skip_or_fail):
    if importlib.util.find_spec("mlx_lm") is None:
        skip_or_fail("mlx", "MLX is not installed; pip install 'finetune-proof[mlx]'")
    return get("mlx")


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """A function: the directory of a tiny random model of an architecture, made once."""
    made = {}

    def make(architecture="llama"):
        if architecture not in made:
            texts = resolve("shipped:quorra/train.jsonl").read_text("utf-8").splitlines()
            made[architecture] = tiny.make(tmp_path_factory.mktemp(architecture), architecture, texts=texts)
        return made[architecture]

    return make


class TestMlxBackend(TrainingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, mlx):
        return mlx

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls, make_model):
        return make_model("llama")

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls):
        return SETTINGS

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, backend, model_dir, tmp_path_factory):
        return write_rows(backend.tokenizer(model_dir), tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def job(mlx, make_model, tmp_path):
    """A function: a job on a tiny model that writes into a folder of its own, with `changes` to its options."""

    def make(name, architecture="llama", *, method="lora", lora=None, **changes):
        model = make_model(architecture)
        fields = {key: changes.pop(key) for key in list(changes) if key in Job.__dataclass_fields__}
        options = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, **changes}
        chosen = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **(lora or {})}
        values = {
            "objective": "sft", "method": method, "model": model, "out": tmp_path / name,
            "rows": write_rows(mlx.tokenizer(model), tmp_path / f"{architecture}.jsonl"), "options": options,
            "lora": chosen if method == "lora" else None, "settings": SETTINGS, **fields,
        }  # fmt: skip
        return Job(**values)

    return make


def scores(backend, job, adapter=None, model=None):
    """The log-probabilities of every answer token of the job's rows."""
    handle = backend.load(model or job.model, adapter, **SETTINGS)
    return [value for score in backend.score(handle, [split(row) for row in read(job.rows)]) for value in score]


# -- the same as torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_means_the_same_in_torch_and_merges_to_the_same_weights(mlx, job, architecture, tmp_path):
    torch = get("torch")
    wanted = job("run", architecture, learning_rate=1e-2)
    run(mlx, wanted)
    adapter = wanted.out / "adapter"
    mine, theirs = scores(mlx, wanted, adapter), scores(torch, wanted, adapter)
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert mine != pytest.approx(scores(torch, wanted), abs=1e-2)
    ours = mlx.merge(wanted.model, adapter, tmp_path / "mlx", **SETTINGS)
    other = torch.merge(wanted.model, adapter, tmp_path / "torch", **SETTINGS)
    assert scores(torch, wanted, model=ours) == pytest.approx(theirs, abs=1e-4)
    mine, theirs = mlx.tensors(ours), mlx.tensors(other)
    assert mine.keys() == theirs.keys()
    assert [mine[name].norm for name in mine] == pytest.approx([theirs[name].norm for name in mine], rel=1e-6)
    assert torch.tokenizer(ours).chat_template == torch.tokenizer(other).chat_template


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_from_torch_means_the_same_here(mlx, job, architecture):
    torch = get("torch")
    wanted = job("run", architecture, lora={"use_rslora": True, "rank_pattern": {"c_attn|q_proj": 2}})
    run(torch, wanted)
    assert scores(mlx, wanted, wanted.out / "adapter") == pytest.approx(
        scores(torch, wanted, wanted.out / "adapter"), abs=1e-4
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_full_training_takes_the_steps_that_torch_takes(mlx, job, schedule):
    options = {
        "method": "full", "per_device_train_batch_size": 4, "max_steps": 6, "weight_decay": 0.1, "warmup_steps": 2,
        "lr_scheduler_type": schedule, "max_grad_norm": 0.5, "save_strategy": "no", "learning_rate": 3e-3,
    }  # fmt: skip
    mine = run(mlx, job("mlx", **options))
    theirs = run(get("torch"), job("torch", **options))
    assert [step.learning_rate for step in mine.steps] == pytest.approx([step.learning_rate for step in theirs.steps])
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert [step.grad_norm for step in mine.steps] == pytest.approx([step.grad_norm for step in theirs.steps], rel=1e-3)
    assert [s.trained_tokens for s in mine.steps] == [s.trained_tokens for s in theirs.steps]
    for name in ("trainable_parameters", "frozen_parameters", "weight_bytes", "gradient_bytes"):
        assert mine.facts[name] == theirs.facts[name], name


def test_accumulated_gradients_are_those_of_one_batch_in_a_short_window_too(mlx, job):
    """Rows of unlike lengths, 3 + 1 of them: a mean of means would weigh the last one thrice."""
    size = {"max_steps": 1, "save_strategy": "no"}
    large = run(mlx, job("large", per_device_train_batch_size=4, **size))
    small = run(mlx, job("small", per_device_train_batch_size=3, gradient_accumulation_steps=2, **size))
    assert small.losses == pytest.approx(large.losses, rel=1e-6)
    assert small.steps[0].grad_norm == pytest.approx(large.steps[0].grad_norm, rel=1e-4)


def test_training_goes_on_from_an_adapter(mlx, job):
    first = run(mlx, job("first", per_device_train_batch_size=4, learning_rate=1e-2))
    again = run(mlx, job("again", per_device_train_batch_size=4, adapter=first.out / "adapter", lora={"r": 99}))
    assert again.losses[0] < first.losses[-1]
    assert mlx.tensors(again.out / "initial") == mlx.tensors(first.out / "adapter")


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "phi3"])
def test_resume_is_bit_identical_with_dropout_and_in_full(mlx, job, architecture, method):
    changes = {"method": method, "lora": {"lora_dropout": 0.2}, "weight_decay": 0.1, "max_steps": 5}
    whole = run(mlx, job("whole", architecture, save_total_limit=None, **changes))
    rest = run(mlx, job("rest", architecture, resume=whole.out / "checkpoint-2", **changes))
    assert rest.losses == whole.losses[2:]
    result = "adapter" if method == "lora" else "model"
    assert mlx.tensors(rest.out / result) == mlx.tensors(whole.out / result)


# -- options ----------------------------------------------------------------------------------------------------------


REFUSED = {
    "bf16": True, "fp16": True, "tf32": True, "torch_compile": True, "packing": True, "loss_type": "dft",
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "early_stopping_patience": 2,
    "dataloader_num_workers": 2, "report_to": "tensorboard", "optim": "sgd",
}  # fmt: skip


def test_options_that_are_not_carried_out_are_refused_all_at_once(mlx, job):
    with pytest.raises(UsageError) as caught:
        run(mlx, job("out", **REFUSED))
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [f"train.{name}" for name in REFUSED]


def test_dpo_is_refused(mlx, job):
    with pytest.raises(UsageError, match="the mlx backend has no DPO"):
        run(mlx, job("out", objective="dpo"))


def test_adapters_that_cannot_be_made_are_refused_all_at_once(mlx, job):
    wrong = {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "init_lora_weights": "pissa",
             "target_modules": ["q_prj"], "layers_to_transform": [7], "rank_pattern": {"nowhere": 2}}  # fmt: skip
    with pytest.raises(UsageError) as caught:
        run(mlx, job("out", lora=wrong))
    said = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == len(wrong)
    assert all(f"train.lora.{name}" in said for name in wrong) and "Did you mean 'q_proj'?" in said


def test_chosen_modules_and_layers_alone_carry_an_adapter(mlx, job):
    wanted = job("out", lora={"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]})
    run(mlx, wanted)
    names = {name.partition(".lora_")[0] for name in mlx.tensors(wanted.out / "adapter")}
    assert names == {f"base_model.model.model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")}


def test_gradient_checkpointing_changes_nothing_and_is_undone(mlx, job):
    from mlx_lm.models.llama import TransformerBlock

    call = TransformerBlock.__call__
    plain, saving = run(mlx, job("plain")), run(mlx, job("saving", gradient_checkpointing=True))
    assert saving.losses == pytest.approx(plain.losses, rel=1e-5)
    assert TransformerBlock.__call__ is call


def test_steps_logged_together_hold_the_rows_of_all(mlx, job):
    every, some = run(mlx, job("every")), run(mlx, job("some", logging_steps=3, save_steps=3))
    assert [step.step for step in some.steps] == [1, 3, 4]
    assert some.losses[1] == pytest.approx(sum(every.losses[1:3]) / 2)
    assert [row for step in some.steps for row in step.rows] == [row for step in every.steps for row in step.rows]


# -- the whole line ---------------------------------------------------------------------------------------------------


def test_a_recipe_trains_evaluates_and_merges_and_its_checks_pass(make_model, tmp_path):
    mapping = {
        "name": "tiny", "backend": "mlx", "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(make_model("llama")), "device": "cpu"},
        "data": {"path": "shipped:quorra/train.jsonl"},
        "train": {"max_steps": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "save_steps": 10},
        "expect": {"loss_below_unigram": False},
    }  # fmt: skip
    recipe = load_mapping(mapping)
    run = run_directory(recipe)
    run_stages(recipe, run, ["evaluate"])
    verdicts = verify(recipe, run, ["labels", "loss", "parameters"])
    assert [f"{v.name}: {v.measured} {v.compare} {v.bound}: {v.why}" for v in verdicts if v.refuted] == []
    assert {"loss_confirmed", "loss_is_of_answers", "lora_b_nonzero", "base_intact"} <= {v.name for v in verdicts}
    run_stages(recipe, run, ["merge"])
    merged = run.path / "merge" / "model"
    assert json.loads((merged / "config.json").read_text())["model_type"] == "llama"
    assert get("torch").load(merged, device="cpu")
