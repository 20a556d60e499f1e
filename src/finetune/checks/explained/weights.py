"""Verdicts on the weights and on what moved them: the checks parameters and optimizer."""

from __future__ import annotations

from finetune.checks.explained.entry import Explained, expect, of_trainings
from finetune.checks.optimizer import CLIPPED, RATE, SKIPPED, STEP
from finetune.checks.parameters import EFFECT, QUANTIZED_BITS

RESULT = ("train/adapter", "train/model")

PARAMETERS = {
    "parameters_changed": Explained(
        measures="The share of trained tensors on disk that differ from those before the first step: of the adapter, "
        "or with train.method: full of the base.",
        evidence=(*RESULT, "train/initial"),
        bound=f"more than {expect('lora_changed_min')}",
        fails="The learning rate is 0 or rounds to nothing, the warm-up never ends, or the optimizer does not hold the "
        "weights.",
    ),
    "lora_b_nonzero": Explained(
        measures="The share of LoRA B matrices whose norm is positive and finite. B starts at zero, so a zero B is an "
        "adapter that does nothing.",
        evidence=("train/adapter",),
        bound="a share of 1; fixed",
        fails="The learning rate is 0, or the adapter sits on modules that the model does not use.",
    ),
    "lora_coverage": Explained(
        measures="The share of layers with an adapter: of all layers of the base, or of those that "
        "train.lora.layers_to_transform or a regular expression in train.lora.target_modules chooses.",
        evidence=("train/adapter", "fetch/model.json"),
        bound="a share of 1; fixed",
        fails="train.lora.target_modules names modules that some layers do not have, or tensors were lost in saving.",
    ),
    "kinds_changed": Explained(
        measures="The share of kinds of matrices (embedding, q_proj, ...) that differ from the base in some layer, "
        "after full training.",
        evidence=("train/model", "fetch/model.json"),
        bound="a share of 1; fixed",
        fails="A kind of matrix was frozen, left out of the optimizer, or saved from the base.",
    ),
    **of_trainings(
        "frozen_identical",
        Explained(
            measures="Whether the SHA-256 over all frozen weights in memory is the same before and after the stage "
            "{stage}.",
            evidence=("{stage}/report.json",),
            bound="the same (1); fixed",
            fails="Code wrote into weights that LoRA leaves alone: a merge into the base, an unfrozen module, tied "
            "weights.",
        ),
    ),
    "base_intact": Explained(
        measures="The share of the base model's files (and those of an adapter it goes on from) that have the digests "
        "which fetch wrote down; files that came in count against it.",
        evidence=("fetch/model.json", "the files of the base"),
        bound="a share of 1; fixed",
        fails="Something was written into the directory of model.path, or the hub's cache was changed or cleared.",
    ),
    "weights_precision": Explained(
        measures="Bytes that a weight took in memory while it was trained: a frozen one, or a trained one where none "
        "is frozen.",
        evidence=("train/report.json",),
        bound="at least the bytes of model.dtype (float32: 4, bfloat16 and float16: 2)",
        fails="A library loaded the model in a coarser type than the recipe says, or quantized it.",
    ),
    "quantized_as_asked": Explained(
        measures="How many bits a quantized weight of the base took in memory, its share of the scales included, against what "
        "the quantizer takes. Owed where the recipe has model.quantization.",
        evidence=("train/report.json",),
        bound=f"within {QUANTIZED_BITS:g} bits of the quantizer's; fixed",
        fails="The library passed over the quantizer, or another one held the weights.",
    ),
    "adapter_effect": Explained(
        measures="The mean change of the answers' log-probability over the scored training rows, the trained model "
        "loaded from disk against the base, in nats a token.",
        evidence=("evaluate/rows.json",),
        bound=f"more than {EFFECT:g} nats a token; fixed, far above rounding",
        fails="Nothing was trained, or the adapter was saved empty, is not loaded, or is scaled to nothing.",
    ),
}

OPTIMIZER = {
    **of_trainings(
        "one_training",
        Explained(
            measures="What changed between the parts of a training that was resumed: data, base, settings, as each "
            "checkpoint holds them. Not examined where a checkpoint does not say what it is of.",
            evidence=("{stage}/report.json",),
            bound="0 changes on the way; fixed",
            fails="The recipe, the {rows} or the base were changed after an interruption, and --changed went on all "
            "the same.",
        ),
    ),
    **of_trainings(
        "learning_rate_as_asked",
        Explained(
            measures="The largest distance of a logged step's learning rate from {stage}.lr_scheduler_type, "
            "{stage}.learning_rate and {stage}.warmup_steps computed again. Not owed with {stage}.fp16.",
            evidence=("events.jsonl", "{stage}/report.json"),
            bound=f"at most {RATE:g} of {{stage}}.learning_rate; fixed",
            fails="A callback or another schedule sets the rate, the warm-up is left out, or the steps are counted "
            "otherwise.",
        ),
    ),
    **of_trainings(
        "settings_as_asked",
        Explained(
            measures="How many settings of the optimizer at the end (weight decay, Adam's betas and epsilon, the "
            "number of its parameters), and the adapter's dropout, are not those of the recipe; untold ones count.",
            evidence=("{stage}/report.json",),
            bound="0 settings off; fixed",
            fails="Code built the optimizer by itself, excludes weights from it, or a library's default won over the "
            "recipe.",
        ),
    ),
    **of_trainings(
        "steps_move_weights",
        Explained(
            measures="Steps after which a sample of every trained tensor was the same as before.",
            evidence=("{stage}/report.json",),
            bound="0 steps without effect; fixed",
            fails="A learning rate of 0, skipped steps, or bfloat16 weights in which so small a step rounds to "
            "nothing.",
        ),
    ),
    **of_trainings(
        "steps_skipped",
        Explained(
            measures="The share of steps that were left out because their loss or gradient was NaN or infinite. Owed "
            "with {stage}.on_nan: skip.",
            evidence=("events.jsonl",),
            bound=f"at most {SKIPPED:g} of the steps; fixed",
            fails="Some {rows} overflow again and again, the learning rate is too high, or float16 is too narrow.",
        ),
    ),
    **of_trainings(
        "step_size",
        Explained(
            measures="The largest move of a weight in the first step, in learning rates: Adam's is 1 whatever the "
            "gradient (arXiv:1412.6980). Owed for plain Adam in single precision.",
            evidence=("{stage}/report.json", "events.jsonl"),
            bound=f"within {STEP:g} of 1; fixed",
            fails="The step was scaled, taken twice, or is another optimizer's than {stage}.optim.",
        ),
    ),
    **of_trainings(
        "gradients_clipped",
        Explained(
            measures="How far the largest gradient norm that reached the optimizer in its first steps is beyond "
            "{stage}.max_grad_norm, as a share of it. Owed where that is above 0.",
            evidence=("{stage}/report.json",),
            bound=f"at most {CLIPPED:g} beyond it; fixed, for rounding",
            fails="Clipping is left out, done after the step, or done before a gradient is unscaled.",
        ),
    ),
}
