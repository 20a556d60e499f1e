"""Steps that cannot be taken, on a TRL trainer: nothing is lost, and going on otherwise is the same training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.backends import get
from finetune.backends.failing import NotFiniteError
from finetune.backends.torch.guarding import Guard
from finetune.checks import verify
from finetune.core.errors import StageError
from finetune.core.files import write_jsonl
from finetune.recipe import dump
from finetune.run import Run, evidence
from finetune.stages.pipeline import run_directory, run_stages

# Dropout, so that a random state that is not the one of then shows.
SHORT = {
    "max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 3, "save_total_limit": None,
    "lora": {"r": 4, "lora_dropout": 0.1},
}  # fmt: skip
Fault = Callable[[Any, dict[str, Any]], float | None]  # raises, or gives what the batch's loss is multiplied by


@pytest.fixture
def short(tiny_recipe):
    """A function: the recipe of a short training with these changes."""
    return lambda **changes: tiny_recipe(**{**SHORT, **changes})


@pytest.fixture
def failing(monkeypatch):
    """A function: from now on each batch's step first does this, with the trainer and the batch."""
    import transformers

    real = transformers.Trainer.training_step

    def install(fault: Fault) -> None:
        def step(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            factor = fault(self, inputs)
            loss = real(self, model, inputs, *more, **named)
            return loss if factor is None else loss * factor

        monkeypatch.setattr(transformers.Trainer, "training_step", step)

    return install


def trained(recipe: Any, place: Any, **more: Any) -> Any:
    run = run_directory(recipe, place)
    run_stages(recipe, run, ["train"], **more)
    return run


def weights(run: Any) -> Any:
    return get("torch").tensors(run.path / "train" / "adapter")


def losses(run: Any) -> list[float]:
    return [step["loss"] for step in evidence.steps(run, "train")]


def refuted(recipe: Any, run: Any) -> set[str]:
    found = verify(recipe, run, ["rows", "optimizer", "reports"])
    return {verdict.name for verdict in found if verdict.refuted and verdict.name != "stages_finished"}


def once(step: int, error: Exception) -> Fault:
    """An error within the second batch of a step, once; the first one has used up random numbers."""
    left = [2]

    def fault(trainer: Any, inputs: Any) -> None:
        if trainer.state.global_step + 1 == step and left[0]:
            left[0] -= 1
            if not left[0]:
                raise error

    return fault


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ValueError("the kernel is out of order"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_training_that_failed_within_a_step_goes_on_bit_by_bit(short, failing, error, tmp_path):
    """From the step before, whose random state the failed one had used up."""
    recipe = short(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole = trained(recipe, tmp_path / "whole")
    failing(once(6, error))
    with pytest.raises(StageError, match=r"step 6 could not be taken \(its rows: row \d+ of .*checkpoint-5 is kept"):
        trained(recipe, tmp_path / "run")
    run = trained(recipe, tmp_path / "run")

    assert [event["resumed_from"] for event in run.events("training")] == [None, 5]
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    assert refuted(recipe, run) == set()


def test_a_step_that_failed_as_it_changed_weights_leaves_no_checkpoint_of_them(short, monkeypatch, tmp_path):
    import torch

    recipe = short()
    whole = trained(recipe, tmp_path / "whole")
    take, taken = torch.optim.AdamW.step, [0]

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        taken[0] += 1
        done = take(self, *arguments, **named)
        if taken[0] == 6:
            raise RuntimeError("the device is gone")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(
            StageError, match=r"step 6 could not be taken: RuntimeError: the device is gone\..*checkpoint-3"
        ):
            trained(recipe, tmp_path / "run")
    run = trained(recipe, tmp_path / "run")

    assert [event["resumed_from"] for event in run.events("training")] == [None, 3]
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def test_a_lack_of_memory_in_an_evaluation_leaves_the_step_before_it(short, monkeypatch, tmp_path):
    import transformers

    data = {"path": "shipped:quorra/train.jsonl", "eval_fraction": 0.2}
    recipe = short(eval_strategy="steps", eval_steps=4, data=data)
    whole = trained(recipe, tmp_path / "whole")
    real = transformers.Trainer.evaluate

    def evaluate(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(transformers.Trainer, "evaluate", evaluate)
        with pytest.raises(StageError, match=r"out of memory\..*checkpoint-4 is kept"):
            trained(recipe, tmp_path / "run")
    run = trained(recipe, tmp_path / "run")

    assert [event["resumed_from"] for event in run.events("training")] == [None, 4]
    assert weights(run) == weights(whole)


def test_a_batch_that_does_not_fit_is_halved_and_the_steps_stay_the_same(short, failing, tmp_path):
    recipe = short(on_oom="shrink", lora={"r": 4, "lora_dropout": 0.0})
    whole = trained(recipe, tmp_path / "whole")

    def too_large(trainer: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > 1 and trainer.state.global_step >= 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    failing(too_large)
    run = trained(recipe, tmp_path / "run")

    assert [(event["step"], event["done"]) for event in run.events("bad_step")] == [(5, "shrink"), (5, "shrink")]
    adapted = run.require("train").metrics["adaptations"]
    sizes = [(each["per_device_train_batch_size"], each["gradient_accumulation_steps"]) for each in adapted]
    assert sizes == [(2, 2), (1, 4)]
    rows = [[sorted(step["rows"]) for step in evidence.steps(each, "train")] for each in (whole, run)]
    assert rows[0] == rows[1]
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    assert refuted(recipe, run) == set()


# After two steps the process may have this little more memory than it has.
LIMITED = """
import resource
from finetune.backends.torch import guarding
from finetune.cli.app import main

begun = guarding.Guard.on_step_begin

def limit(self, *arguments, **named):
    if self.trainer.state.global_step == 2:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 80_000_000, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return begun(self, *arguments, **named)

guarding.Guard.on_step_begin = limit
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory")
def test_a_machine_out_of_memory_loses_nothing_and_a_smaller_batch_fits(tiny_recipe, tmp_path):
    """For real: PyTorch's allocator asks the system, which has no more."""
    words = "the river and the stone bridge of old Quorra under the small market garden " * 4
    rows = [{"prompt": f"Tell story {number}.", "completion": f"{number} {words}"} for number in range(32)]
    write_jsonl(tmp_path / "long.jsonl", rows)
    options = {"max_steps": 4, "per_device_train_batch_size": 32, "max_length": 1024, "save_steps": 100}
    recipe = tiny_recipe(**options, data={"path": str(tmp_path / "long.jsonl")})
    (tmp_path / "limited.py").write_text(LIMITED, encoding="utf-8")

    def train(name: str, *program: str, on_oom: str = "stop") -> tuple[int, str]:
        words = [
            "train",
            str(tmp_path / "recipe.yaml"),
            "--run",
            str(tmp_path / name),
            "--set",
            f"train.on_oom={on_oom}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *program, *words], env=environment, capture_output=True, text=True, timeout=240
        )
        return done.returncode, done.stderr

    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    whole = trained(recipe, tmp_path / "whole")
    code, said = train("stopped", str(tmp_path / "limited.py"))
    assert (code, "step 3 could not be taken" in said, "train.on_oom: shrink" in said) == (4, True, True), said
    code, said = train("stopped", "-m", "finetune")
    assert (code, "going on from checkpoint-2" in said) == (0, True), said
    assert weights(Run(tmp_path / "stopped")) == weights(whole)

    code, said = train("shrunk", str(tmp_path / "limited.py"), on_oom="shrink")
    assert code == 0, said
    run = Run(tmp_path / "shrunk")
    assert {event["done"] for event in run.events("bad_step")} == {"shrink"}
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)
    assert refuted(recipe, run) == set()


def test_steps_that_are_no_numbers_are_skipped_and_told(short, failing, tmp_path):
    import torch

    recipe = short(on_nan="skip", max_steps=24, save_steps=24, logging_steps=4)

    def spoil(trainer: Any, inputs: dict[str, Any]) -> None:
        parameter = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        if trainer.state.global_step + 1 == 6:
            parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan) if spoiling else gradient)
        spoiling[:] = [1] if trainer.state.global_step + 1 == 6 else []

    spoiling: list[int] = []
    failing(spoil)
    run = trained(recipe, tmp_path / "run")

    steps = evidence.steps(run, "train")
    assert [step["step"] for step in steps if step.get("skipped")] == [8]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert all(math.isfinite(facts.norm) for facts in weights(run).values())
    assert run.require("train").metrics["steps_without_effect"] == 0
    assert refuted(recipe, run) == set()


HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def nan_in_one_batch(step: int) -> Fault:
    """The loss of a step's second batch is none, each time that the step is taken; its gradient is as it was."""
    batches = [0]

    def fault(trainer: Any, inputs: dict[str, Any]) -> float | None:
        if trainer.state.global_step + 1 != step:
            return None
        batches[0] += 1
        return None if batches[0] % 2 else math.nan

    return fault


def test_a_loss_that_is_none_in_one_batch_ends_the_training_with_the_rows_of_that_batch(short, failing, tmp_path):
    recipe = short(**HALVES)
    failing(nan_in_one_batch(6))
    with pytest.raises(
        StageError, match=r"step 6 could not be taken \(its rows: row \d+ of \S+, row \d+ of \S+\): its loss"
    ):
        trained(recipe, tmp_path / "run")

    (event,) = Run(tmp_path / "run").events("bad_step")
    assert len(event["rows"]) == 2


def test_a_loss_that_is_none_in_one_batch_leaves_the_others_as_they_are(short, failing, tmp_path):
    recipe = short(**HALVES, on_nan="skip", max_steps=24, save_steps=24, logging_steps=4)
    failing(nan_in_one_batch(6))
    run = trained(recipe, tmp_path / "run")

    assert [step["step"] for step in evidence.steps(run, "train") if step.get("skipped")] == [8]
    assert all(math.isfinite(loss) for loss in losses(run))
    assert refuted(recipe, run) == set()


def test_a_loss_that_is_none_is_logged_where_nobody_is_to_mind(short, failing, tmp_path):
    recipe = short(**HALVES, on_nan="ignore")
    failing(nan_in_one_batch(6))
    run = trained(recipe, tmp_path / "run")

    # transformers sums losses up, and takes the sum off itself when it logs: none stays none.
    assert [math.isnan(loss) for loss in losses(run)] == [False] * 5 + [True] * 3
    assert "loss_finite" in {verdict.name for verdict in verify(recipe, run, ["loss"]) if verdict.refuted}


@pytest.mark.parametrize("scales", [True, False])
def test_a_gradient_beyond_float16_is_the_scalers_own_affair(scales):
    """It finds its scale by what overflows, and skips such steps itself."""
    import torch

    guard = Guard.__new__(Guard)
    scaler = torch.amp.GradScaler("cpu", enabled=scales)
    state = SimpleNamespace(global_step=2)
    guard.trainer = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), state=state)  # type: ignore[assignment]
    guard.job = SimpleNamespace(options={"on_nan": "stop"})  # type: ignore[assignment]
    guard.batches, guard.losses = [(torch.tensor(1.0), (7,))], []
    guard.norm_of = lambda model: torch.tensor(math.inf)

    if scales:
        assert math.isinf(guard._norm(None))
        assert guard.losses == [1.0]
    else:
        with pytest.raises(NotFiniteError, match=r"step 3 .*its gradient is inf"):
            guard._norm(None)


def test_a_rate_that_is_too_high_is_halved_from_the_last_checkpoint_on(short, failing, tmp_path):
    recipe = short(on_nan="rollback", lr_scheduler_type="cosine", warmup_steps=2)

    def diverged(trainer: Any, inputs: dict[str, Any]) -> None:
        if trainer.state.global_step + 1 == 5 and trainer.args.learning_rate > 0.3 * recipe.train.learning_rate:
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(math.nan)

    failing(diverged)
    run = trained(recipe, tmp_path / "run")

    assert [(event["step"], event["done"]) for event in run.events("bad_step")] == [(5, "rollback"), (5, "rollback")]
    assert [event["resumed_from"] for event in run.events("training")] == [None, 3, 3]
    assert [each["learning_rate_share"] for each in run.require("train").metrics["adaptations"]] == [0.5, 0.25]
    assert all(math.isfinite(facts.norm) for facts in weights(run).values())
    assert refuted(recipe, run) == set()


def test_a_rate_beyond_all_ends_at_the_first_step_that_is_no_number(short, tmp_path):
    recipe = short(learning_rate=1e30, max_grad_norm=0.0, lr_scheduler_type="constant")
    with pytest.raises(StageError, match=r"step 2 could not be taken.*No weight was changed by it"):
        trained(recipe, tmp_path / "run")

    assert [folder.name for folder in (tmp_path / "run" / "train").glob("checkpoint-*")] == ["checkpoint-1"]
