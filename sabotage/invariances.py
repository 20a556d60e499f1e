"""What a trainer does otherwise when rows are accumulated, computed again, packed, padded, ordered or merged."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.targets import (
    GENERATE,
    ITEMS_IN_BATCH,
    LORA_DELTA,
    SFT_COLLATE,
    SFT_COLLATOR,
    SFT_LOSS,
    TRAINER,
    TRAINING_STEP,
)

TRL_2175 = "https://github.com/huggingface/trl/issues/2175"
TRL_3067 = "https://github.com/huggingface/trl/issues/3067"


def _invariance(name: str, imitates: str = "") -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    return sabotage(name, imitates=imitates, baseline="invariance", since="measure")


# -- accumulation ------------------------------------------------------------------------------------------------------


@_invariance("only the last small batch counts")
def last_micro_batch(context: Context) -> None:
    """Gradients are cleared before every small batch of a window, instead of before the window."""

    def training_step(original: Any, self: Any, model: Any, *arguments: Any, **more: Any) -> Any:
        model.zero_grad()
        return original(self, model, *arguments, **more)

    context.wrap(TRAINING_STEP, training_step)


@_invariance("loss averaged over small batches", TRL_2175)
def mean_of_means(context: Context) -> None:
    """The loss of a window is the mean of its small batches' means, so a short answer's tokens weigh more."""
    context.wrap(ITEMS_IN_BATCH, lambda original, self, *arguments: None)


@_invariance("accumulated loss not divided", "https://github.com/hiyouga/LlamaFactory/issues/7443")
def not_divided(context: Context) -> None:
    """The means of small batches are added up."""

    def compute_loss(original: Any, self: Any, model: Any, inputs: Any, *arguments: Any, **more: Any) -> Any:
        return original(self, model, inputs, *arguments, **{**more, "num_items_in_batch": None})

    context.wrap(SFT_LOSS, compute_loss)


@_invariance("short window divided as a whole one", "https://github.com/modelscope/ms-swift/pull/10084")
def short_window(context: Context) -> None:
    """The last window of an epoch has fewer small batches, and its loss is divided as if it had all of them."""

    def count(original: Any, self: Any, batches: Any, *arguments: Any) -> Any:
        found = original(self, batches, *arguments)
        return found * self.args.gradient_accumulation_steps / max(1, len(batches))

    context.wrap(ITEMS_IN_BATCH, count)


@_invariance("short last batch dropped")
def short_batch_dropped(context: Context) -> None:
    """The rows that do not fill a batch at the end of an epoch are never trained."""

    context.wrap(
        "finetune.backends.torch.training:arguments",
        lambda original, *arguments, **more: {**original(*arguments, **more), "dataloader_drop_last": True},
    )


@_invariance("gradients clipped batch by batch")
def clipped_by_batch(context: Context) -> None:
    """Each small batch clips what was added up so far, instead of the whole window once."""

    def training_step(original: Any, self: Any, model: Any, *arguments: Any, **more: Any) -> Any:
        loss = original(self, model, *arguments, **more)
        self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm / 8)
        return loss

    context.wrap(TRAINING_STEP, training_step)


@_invariance("dropout the recipe does not ask for")
def dropout_left_on(context: Context) -> None:
    """Adapters drop a tenth of their input, though the recipe says none."""
    context.wrap("peft:LoraConfig", lambda original, **more: original(**{**more, "lora_dropout": 0.1}))


# -- checkpointing -----------------------------------------------------------------------------------------------------


@_invariance("checkpointing cuts the gradient")
def checkpoint_detached(context: Context) -> None:
    """A checkpointed block starts anew from a copy of its input, so no gradient reaches the blocks before it."""

    def checkpoint(original: Any, function: Any, hidden: Any, *arguments: Any, **more: Any) -> Any:
        return original(function, hidden.detach().requires_grad_(), *arguments, **more)

    context.wrap("transformers.modeling_utils:checkpoint", checkpoint)


@_invariance("checkpointing in lower precision")
def checkpoint_in_lower_precision(context: Context) -> None:
    """What goes into a checkpointed block passes through bfloat16, though everything is float32."""

    def checkpoint(original: Any, function: Any, hidden: Any, *arguments: Any, **more: Any) -> Any:
        lower = hidden.bfloat16().to(hidden.dtype)
        return original(function, lower, *arguments, **more)

    context.wrap("transformers.modeling_utils:checkpoint", checkpoint)


# -- packing -----------------------------------------------------------------------------------------------------------


@_invariance("packed rows share their positions", TRL_3067)
def positions_lost(context: Context) -> None:
    """The positions of a pack run on over the ends of its rows, so that rows attend to those before them."""

    def positions(original: Any, lengths: list[list[int]]) -> Any:
        return original([[sum(each)] for each in lengths])

    context.wrap(f"{SFT_COLLATOR}.get_position_ids_from_packed_seq_lengths", positions)


@_invariance("packed rows attend to each other", "https://github.com/MeetKai/functionary/issues/265")
def pack_mask_lost(context: Context) -> None:
    """Each row in a pack has positions of its own, and attention passes them over."""
    context.wrap("transformers.masking_utils:find_packed_sequence_indices", lambda original, position_ids: None)


@_invariance("packed rows lose their ends")
def ends_lost(context: Context) -> None:
    """Packing drops the last token of each row, the one that ends the turn."""

    def pack(original: Any, examples: Any, **more: Any) -> Any:
        cut = {name: [row[:-1] for row in examples[name].to_pylist()] for name in examples.column_names}
        return original(type(examples).from_pydict(cut, schema=examples.schema), **more)

    context.wrap("trl.data_utils:_pack_bfd", pack)


# -- padding -----------------------------------------------------------------------------------------------------------


@_invariance("padding attended to")
def padding_attended(context: Context) -> None:
    """Prompts that are padded on the left are answered with a mask that says that nothing is padding."""

    def generate(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        mask = more["input_ids"].new_ones(more["input_ids"].shape)
        return original(self, *arguments, **{**more, "attention_mask": mask})

    context.wrap(GENERATE, generate)


@_invariance("loss divided by padding too")
def padding_counted(context: Context) -> None:
    """The loss is divided by all tokens of a batch, padding and prompts among them."""

    def count(original: Any, self: Any, batches: Any, device: Any) -> Any:
        return original(self, [{"labels": batch["input_ids"].clamp(min=0)} for batch in batches], device)

    context.wrap(ITEMS_IN_BATCH, count)


@_invariance("padding trained on")
def padding_trained(context: Context) -> None:
    """Labels beyond a row's end are the padding's own tokens instead of none."""

    def call(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        batch = original(self, *arguments, **more)
        if "attention_mask" in batch:
            beyond = batch["attention_mask"] == 0
            batch["labels"][beyond] = batch["input_ids"][beyond]
        return batch

    context.wrap(SFT_COLLATE, call)


# -- order -------------------------------------------------------------------------------------------------------------


@_invariance("row order by chance")
def order_by_chance(context: Context) -> None:
    """The order of the rows comes from the system's randomness, whatever the seed is."""

    def set_up(original: Any, self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **{**more, "data_seed": int.from_bytes(os.urandom(3))})

    context.wrap("accelerate.data_loader:SeedableRandomSampler.__init__", set_up)


@_invariance("first weights by chance")
def weights_by_chance(context: Context) -> None:
    """Adapters begin with weights that no seed fixed."""

    def seed(original: Any, *arguments: Any, **more: Any) -> None:
        import torch

        original(*arguments, **more)
        torch.seed()

    context.wrap("finetune.backends.torch.training:set_seed", seed)


@_invariance("rows never shuffled")
def never_shuffled(context: Context) -> None:
    """Rows come in the order of the file in every epoch, under every seed."""

    def sampler(original: Any, self: Any, *arguments: Any) -> Any:
        from torch.utils.data import SequentialSampler

        return SequentialSampler(self.train_dataset)

    context.wrap(f"{TRAINER}._get_train_sampler", sampler)


@_invariance("one order for every seed")
def one_order(context: Context) -> None:
    """Rows are shuffled, and always with the same seed."""

    def set_up(original: Any, self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **{**more, "data_seed": 42})

    context.wrap("accelerate.data_loader:SeedableRandomSampler.__init__", set_up)


# -- merging -----------------------------------------------------------------------------------------------------------


@_invariance("merged with half of the scale")
def merged_with_half(context: Context) -> None:
    """What an adapter adds is halved when it is merged."""
    context.wrap(LORA_DELTA, lambda original, *a: 0.5 * original(*a))


@_invariance("merged in low precision", "https://github.com/huggingface/peft/issues/1388")
def merged_coarsely(context: Context) -> None:
    """What an adapter adds passes through bfloat16 when it is merged, though everything is float32."""
    context.wrap(
        LORA_DELTA,
        lambda original, *a: (delta := original(*a)).bfloat16().to(delta.dtype),
    )
