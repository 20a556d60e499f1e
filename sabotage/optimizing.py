"""What goes wrong in the steps of the optimizer: their rate, their settings, their size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.targets import ADAMW_STEP, CREATE_OPTIMIZER, CREATE_SCHEDULER, GET_PEFT_MODEL, GET_SCHEDULER, TRAINER


def _with_groups(context: Context, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every group of the optimizer when the trainer has made it."""

    def create(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        optimizer = original(self, *arguments, **more)
        for group in optimizer.param_groups:
            change(group)
        return optimizer

    context.wrap(CREATE_OPTIMIZER, create)


def _with_schedule_for(context: Context, planned: Callable[[int], int]) -> None:
    """Lay the schedule out for another number of steps than those that will be taken."""

    context.wrap(
        CREATE_SCHEDULER,
        lambda original, self, num_training_steps, *a, **more: original(self, planned(num_training_steps), *a, **more),
    )


def _with_dropout(context: Context, share: float) -> None:
    """Have the adapter's layers drop this share, whatever its configuration says."""

    def put(model: Any) -> Any:
        import torch

        for module in model.modules():
            if "default" in getattr(module, "lora_dropout", {}):
                module.lora_dropout["default"] = torch.nn.Dropout(share) if share else torch.nn.Identity()
        return model

    context.wrap(GET_PEFT_MODEL, lambda original, *a, **more: put(original(*a, **more)))


def _always_constant(original: Any, name: Any, *arguments: Any, **more: Any) -> Any:
    return original("constant", *arguments, **more)


@sabotage("every second step skipped", baseline="full", since="train")
def every_second_step_skipped(context: Context) -> None:
    """The optimizer's step is taken every second time only, while the schedule and the log go on."""

    calls = itertools.count()

    def step(original: Any, *arguments: Any, **more: Any) -> Any:
        return original(*arguments, **more) if next(calls) % 2 == 0 else None

    context.wrap(ADAMW_STEP, step)


@sabotage(
    "every step taken twice",
    baseline="full",
    since="train",
    imitates="https://github.com/huggingface/transformers/issues/45656",
)
def every_step_twice(context: Context) -> None:
    """The optimizer steps twice with each gradient, as where a trainer and a plugin both call it."""

    def step(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        original(self, *arguments, **more)
        return original(self, *arguments, **more)

    context.wrap(ADAMW_STEP, step)


@sabotage("steps smaller than their learning rate", baseline="full", since="train")
def steps_smaller(context: Context) -> None:
    """The optimizer steps with half of the learning rate that the schedule gave it and the log shows."""

    def step(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate / 2
        done = original(self, *arguments, **more)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return done

    context.wrap(ADAMW_STEP, step)


@sabotage("learning rate divided by four", baseline="full", since="train")
def learning_rate_divided(context: Context) -> None:
    """The optimizer is made with a fraction of the learning rate, as where it is scaled to a batch's size."""
    _with_groups(context, lambda group: group.update(lr=group["lr"] / 4))


@sabotage("learning rate constant", baseline="full", since="train")
def learning_rate_constant(context: Context) -> None:
    """The learning rate stays where it is, whatever schedule the recipe asks for."""
    context.wrap(GET_SCHEDULER, _always_constant)


@sabotage("warm-up left out", baseline="full", since="train", imitates="https://github.com/y0ast/Glow-PyTorch/issues/3")
def warmup_left_out(context: Context) -> None:
    """The first steps take the whole learning rate, though the recipe asks for a warm-up."""
    context.set("train.warmup_steps", 30)
    context.wrap("transformers.training_args:TrainingArguments.get_warmup_steps", lambda original, self, *_, **__: 0)


@sabotage(
    "schedule run through too fast", since="train", imitates="https://github.com/huggingface/accelerate/issues/963"
)
def schedule_too_fast(context: Context) -> None:
    """The schedule goes on with every small batch, so it ends halfway and the rest is trained at nothing."""
    _with_schedule_for(context, lambda steps: steps // 2)


@sabotage(
    "schedule of a longer training", since="train", imitates="https://github.com/huggingface/diffusers/issues/4387"
)
def schedule_of_a_longer_training(context: Context) -> None:
    """The schedule is laid out for four times the steps, as where small batches are counted, so it never comes down."""
    _with_schedule_for(context, lambda steps: 4 * steps)


@sabotage(
    "weight decay nobody asked for", since="train", imitates="https://github.com/PrimeIntellect-ai/prime-rl/pull/2422"
)
def weight_decay_unasked(context: Context) -> None:
    """Weights decay by PyTorch's own default of 0.01, though the recipe says none."""
    _with_groups(context, lambda group: group.update(weight_decay=0.01))


@sabotage(
    "weight decay left out",
    baseline="full",
    since="train",
    imitates="https://github.com/meta-llama/llama-cookbook/issues/191",
)
def weight_decay_left_out(context: Context) -> None:
    """The recipe asks for weight decay, and the optimizer is made without."""
    context.set("train.weight_decay", 0.01)
    _with_groups(context, lambda group: group.update(weight_decay=0.0))


@sabotage("another beta2 than asked for", baseline="full", since="train")
def another_beta2(context: Context) -> None:
    """Adam averages its squares over 20 steps instead of 1000, as by a default of large-scale training."""
    _with_groups(context, lambda group: group.update(betas=(group["betas"][0], 0.95)))


@sabotage("queries left out of the optimizer", since="train")
def queries_left_out(context: Context) -> None:
    """The optimizer was not given the adapter's tensors of one kind of matrix, which take gradients all the same."""

    def create(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        optimizer = original(self, *arguments, **more)
        kept = {id(parameter) for name, parameter in self.model.named_parameters() if "q_proj" not in name}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in kept]
        return optimizer

    context.wrap(CREATE_OPTIMIZER, create)


@sabotage("dropout of the adapter left out", since="train")
def dropout_left_out(context: Context) -> None:
    """The recipe and the saved adapter say that a tenth is dropped, and the layers that do it are empty."""
    context.set("train.lora.lora_dropout", 0.1)
    _with_dropout(context, 0.0)


@sabotage("dropout nobody asked for", since="train")
def dropout_unasked(context: Context) -> None:
    """The adapter's layers drop a twentieth, as by a default of another tool, though the recipe says none."""
    _with_dropout(context, 0.05)


@sabotage(
    "gradients not clipped", baseline="full", since="train", imitates="https://github.com/awslabs/graphstorm/pull/1384"
)
def gradients_not_clipped(context: Context) -> None:
    """The gradient's norm is measured and logged, and left as it is."""
    context.set("train.max_grad_norm", 0.1)

    def measure(original: Any, self: Any, model: Any) -> Any:
        import torch

        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    context.wrap(f"{TRAINER}._clip_grad_norm", measure)


@sabotage("alignment at a constant learning rate", baseline="dpo", since="align")
def alignment_constant(context: Context) -> None:
    """The learning rate of alignment stays where it is, whatever schedule the recipe asks for."""
    context.wrap(GET_SCHEDULER, _always_constant)


@sabotage("every step of alignment taken twice", baseline="dpo", since="align")
def alignment_steps_twice(context: Context) -> None:
    """The optimizer of alignment steps twice with each gradient."""
    every_step_twice(context)
