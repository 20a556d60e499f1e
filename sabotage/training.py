"""What goes wrong in supervised fine-tuning."""

from __future__ import annotations

import math
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.targets import (
    ADAMW_STEP,
    CREATE_OPTIMIZER,
    CREATE_SCHEDULER,
    GET_PEFT_MODEL,
    LOAD_TRAINED_MODEL,
    SFT_LOSS,
    TRAINER,
)


@sabotage("learning rate 0", fast=True)
def learning_rate_0(context: Context) -> None:
    """The learning rate is 0: every step is taken, and changes nothing."""
    context.set("train.learning_rate", 0)


@sabotage("optimizer never steps")
def optimizer_never_steps(context: Context) -> None:
    """The optimizer's step does nothing, while losses are logged as ever."""
    context.wrap(ADAMW_STEP, lambda *_, **__: None)


@sabotage("sign flipped")
def sign_flipped(context: Context) -> None:
    """The gradient is climbed instead of descended."""

    def step(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.neg_()
        return original(self, *arguments, **more)

    context.wrap(ADAMW_STEP, step)


@sabotage("adapter attached but frozen", imitates="https://github.com/unslothai/unsloth/issues/2142")
def adapter_frozen(context: Context) -> None:
    """The adapter is there, and its B matrices take no gradient."""

    def freeze(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.requires_grad_(False)
        return model

    context.wrap(GET_PEFT_MODEL, lambda original, *a, **more: freeze(original(*a, **more)))


@sabotage("only one of the layers attached")
def one_of_the_layers(context: Context) -> None:
    """LoRA reaches the first layer only, though the recipe asks for all."""

    def attach(original: Any, model: Any, config: Any, *arguments: Any, **more: Any) -> Any:
        config.layers_to_transform = [0]
        return original(model, config, *arguments, **more)

    context.wrap(GET_PEFT_MODEL, attach)


@sabotage("lora_alpha ignored")
def lora_alpha_ignored(context: Context) -> None:
    """The adapter is trained with another scale than its configuration says."""

    def rescale(model: Any) -> Any:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = dict.fromkeys(module.scaling, 0.25)
        return model

    context.wrap(GET_PEFT_MODEL, lambda original, *a, **more: rescale(original(*a, **more)))


@sabotage("optimizer of a copied model")
def optimizer_of_a_copy(context: Context) -> None:
    """The optimizer was given the parameters of a copy, so that the model itself is never stepped."""

    def create(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        optimizer = original(self, *arguments, **more)
        for group in optimizer.param_groups:
            group["params"] = [parameter.detach().clone().requires_grad_() for parameter in group["params"]]
        return optimizer

    context.wrap(CREATE_OPTIMIZER, create)


@sabotage("adapter never attached", imitates="https://github.com/axolotl-ai-cloud/axolotl/pull/159")
def adapter_never_attached(context: Context) -> None:
    """LoRA is made and saved, but no layer uses it: what runs forward is the base."""

    def detach(model: Any) -> Any:
        model.enable_input_require_grads()
        for module in model.modules():
            if hasattr(module, "_disable_adapters"):
                module._disable_adapters = True
        return model

    context.wrap(GET_PEFT_MODEL, lambda original, *a, **more: detach(original(*a, **more)))


@sabotage("base trained along with the adapter", imitates="https://github.com/Blaizzy/mlx-vlm/issues/2178")
def base_trained_too(context: Context) -> None:
    """The base's weights take gradients too, and only the adapter is saved."""

    def thaw(model: Any) -> Any:
        model.requires_grad_(True)
        return model

    context.wrap(GET_PEFT_MODEL, lambda original, *a, **more: thaw(original(*a, **more)))


@sabotage("frozen layers in full fine-tuning", baseline="full")
def frozen_layers(context: Context) -> None:
    """Full fine-tuning leaves the last layer as it was."""

    def create(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        for parameter in self.model.model.layers[-1].parameters():
            parameter.requires_grad_(False)
        return original(self, *arguments, **more)

    context.wrap(CREATE_OPTIMIZER, create)


@sabotage("plain gradient descent instead of Adam")
def another_optimizer(context: Context) -> None:
    """The step is the gradient times the learning rate, whatever optimizer the recipe names."""

    def step(original: Any, self: Any, *_: Any, **__: Any) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])

    context.wrap(ADAMW_STEP, step)


@sabotage("warm-up never ends")
def warm_up_never_ends(context: Context) -> None:
    """The scheduler stays at a hundredth of the learning rate."""

    def create(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        scheduler = original(self, *arguments, **more)
        scheduler.lr_lambdas = [lambda step: 0.01 for _ in scheduler.lr_lambdas]
        return scheduler

    context.wrap(CREATE_SCHEDULER, create)


@sabotage("training ends after a third")
def ends_early(context: Context) -> None:
    """The trainer stops at a third of the steps, as where steps are counted in micro batches."""

    def ended(original: Any, self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        control = original(self, args, state, control, **more)
        control.should_training_stop = state.global_step >= state.max_steps // 3
        return control

    context.wrap("transformers.trainer_callback:DefaultFlowCallback.on_step_end", ended)


@sabotage("half precision instead of single")
def half_precision(context: Context) -> None:
    """The base is loaded in float16, whatever the recipe says."""
    context.wrap(LOAD_TRAINED_MODEL, lambda original, *a, **more: original(*a, **more).half())


@sabotage("NaN shown as the last good loss")
def nan_filtered(context: Context) -> None:
    """Losses become NaN in the middle of the training, and the log shows the last good ones."""

    def arguments(original: Any, *a: Any, **more: Any) -> dict[str, Any]:
        return {**original(*a, **more), "logging_nan_inf_filter": True}

    def compute(original: Any, self: Any, *a: Any, **more: Any) -> Any:
        loss = original(self, *a, **more)
        return loss * float("nan") if self.state.global_step >= self.state.max_steps // 2 else loss

    context.wrap("finetune.backends.torch.sft:arguments", arguments)
    context.wrap(SFT_LOSS, compute)
    context.wrap(ADAMW_STEP, _skipped_where_nan)


def _skipped_where_nan(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
    """A step that is left out where a gradient is NaN, as loss scaling does."""
    gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
    return None if any(bool(grad.isnan().any()) for grad in gradients) else original(self, *arguments, **more)


@sabotage("logged loss invented")
def loss_invented(context: Context) -> None:
    """The log shows a curve that falls as it should, from the true first loss on; nothing is trained."""
    context.wrap(ADAMW_STEP, lambda *_, **__: None)
    _with_an_invented_loss(context)


@sabotage("logged loss invented over a training that half works")
def loss_invented_over_some_training(context: Context) -> None:
    """The log shows a curve from the true first loss down to 0.01, while the learning rate is a twentieth."""
    context.set("train.learning_rate", 5e-5)
    _with_an_invented_loss(context)


def _with_an_invented_loss(context: Context) -> None:
    """Show losses that fall from the true first one down to 0.01."""
    first: list[float] = []

    def log(original: Any, self: Any, logs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        if "loss" in logs:
            first.append(float(logs["loss"]))
            done = self.state.global_step / self.state.max_steps
            logs["loss"] = first[0] * math.exp(done * math.log(0.01 / first[0]))
        return original(self, logs, *arguments, **more)

    context.wrap(f"{TRAINER}.log", log)


@sabotage("the same batch at every step")
def same_batch(context: Context) -> None:
    """The sampler begins anew at every step, so that only the first rows are ever seen."""

    def batches(original: Any, self: Any, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if not hasattr(self, "_kept"):
            self._kept = original(self, epoch_iterator, num_batches, device)
        return self._kept

    context.wrap(f"{TRAINER}.get_batch_samples", batches)
