"""Verdicts on experiments, each in processes of its own: the checks memory, resume, serving and invariance."""

from __future__ import annotations

from finetune.checks.explained.entry import Explained, expect
from finetune.checks.invariance import GRADIENTS, MEAN, WORST
from finetune.checks.memory import ESTIMATE_TOLERANCE, STORED_TOLERANCE
from finetune.experiments import MEMORY_STEPS
from finetune.experiments.serving import SEEDS, TEMPERATURE

IN_MEMORY, IN_RESUME, IN_SERVING, IN_INVARIANCE = (
    (f"measure/{name}.json",) for name in ("memory", "resume", "serving", "invariance")
)
ALIKE = (
    f"at most {MEAN:g} nats on average, {WORST:g} at most, and {GRADIENTS:g} of the gradients' norms; fixed: "
    "TRL's own, and more"
)

MEMORY = {
    "memory_efficiency": Explained(
        measures="How much less LoRA's training state (weights, gradients, optimizer) takes than that of full "
        f"fine-tuning, as a share of it: {MEMORY_STEPS} steps each on the longest rows, with the recipe's batch and "
        "optimizer.",
        evidence=IN_MEMORY,
        bound=f"more than {expect('memory_reduction_min')}; measured where that is set",
        fails="The adapter is large beside the model (r, modules_to_save, a tiny model), so that little is saved.",
    ),
    "memory_same_work": Explained(
        measures="Tokens by which the two measured trainings differ, step by step, and from the longest rows of the "
        "recipe.",
        evidence=(*IN_MEMORY, "prepare/train.jsonl"),
        bound="0 tokens; fixed",
        fails="One training took other rows, a shorter batch, or broke off, so that the two cannot be compared.",
    ),
    "memory_as_stored": Explained(
        measures="Parts (weights and gradients of both, LoRA's optimizer state, the sums) whose bytes in memory are "
        "not those of the base, adapter and checkpoint on disk.",
        evidence=IN_MEMORY,
        bound=f"0 parts more than {STORED_TOLERANCE:.0%} apart; the optimizer's state to the byte; fixed",
        fails="The measured training was not that of the run: another type, another adapter, or frozen weights with "
        "gradients.",
    ),
    "memory_as_estimated": Explained(
        measures="The relative distance of the training state that finetune estimate tells for LoRA from the measured "
        "one.",
        evidence=IN_MEMORY,
        bound=f"at most {ESTIMATE_TOLERANCE:g}; fixed",
        fails="The architecture has weights that the estimate does not count, or the measurement was of another "
        "training.",
    ),
}

RESUME = {
    "resume_losses": Explained(
        measures="The largest difference, in nats, between the losses that the training logged after a checkpoint and "
        "those of the same steps, resumed from it in a new process.",
        evidence=(*IN_RESUME, "events.jsonl"),
        bound="0: bit by bit; fixed",
        fails="The order of rows, the random state, the optimizer or the schedule is not restored; or kernels are not "
        "deterministic.",
    ),
    "resume_weights": Explained(
        measures="Trained tensors of the resumed training that differ, bit by bit, from those of the uninterrupted "
        "one.",
        evidence=IN_RESUME,
        bound="0 tensors; fixed",
        fails="As for resume_losses; or the last step differs, whose effect no loss shows.",
    ),
    "resume_parameters": Explained(
        measures="By how many the parameters that were trained after resuming differ from those of the training.",
        evidence=(*IN_RESUME, "train/report.json"),
        bound="0 parameters; fixed",
        fails="The adapter was loaded frozen, or more than it was trainable.",
    ),
}

SERVING = {
    "serving_prompts": Explained(
        measures="The share of requests whose usage.prompt_tokens are as many as the training's template gives the "
        "messages.",
        evidence=IN_SERVING,
        bound="a share of 1; fixed",
        fails="The server renders another template, adds a begin token or system message, or leaves turns out.",
    ),
    "serving_answers": Explained(
        measures="The share of questions to which a client gets text and end that evaluate has (at a tie, what the "
        "merged model answers to it alone), at temperature 0.",
        evidence=(*IN_SERVING, "evaluate/answers.jsonl"),
        bound="a share of 1; fixed",
        fails="The server has another model, draws, cuts answers off, or does not know the end-of-turn token.",
    ),
    "serving_conversations": Explained(
        measures="The share of conversations and other texts answered as the merged model does itself.",
        evidence=IN_SERVING,
        bound="a share of 1; fixed",
        fails="Turns or system messages are dropped or put in another order, or it serves another model.",
    ),
    "serving_stops": Explained(
        measures="Whether a request with 'stop' gets the text before it, and finish 'stop'.",
        evidence=IN_SERVING,
        bound="honoured (1); fixed",
        fails="The server ignores 'stop', or leaves the stop string in the text.",
    ),
    "serving_max_tokens": Explained(
        measures="Whether a request with few 'max_tokens' gets the beginning of the answer, so many tokens counted, "
        "and finish 'length'.",
        evidence=IN_SERVING,
        bound="honoured (1); fixed",
        fails="The server ignores the limit, counts the prompt in, or names another end.",
    ),
    "serving_temperature": Explained(
        measures=f"Different answers among {len(SEEDS)} drawn at temperature {TEMPERATURE:g}, each with a seed of its "
        "own.",
        evidence=IN_SERVING,
        bound="more than 1; fixed",
        fails="The server ignores 'temperature' or 'seed', or refuses to draw.",
    ),
    "serving_seed": Explained(
        measures="Whether the same seed, drawn with twice, gives the same answer.",
        evidence=IN_SERVING,
        bound="the same (1); fixed",
        fails="The server ignores 'seed', or shares its random state between requests.",
    ),
    "serving_top_p": Explained(
        measures="Answers drawn with a top_p that leaves one token to draw from which are the likeliest answer.",
        evidence=IN_SERVING,
        bound="all that were drawn; fixed",
        fails="The server ignores 'top_p', or applies it to other probabilities.",
    ),
    "serving_streaming": Explained(
        measures="What differs between an answer as a stream and in one piece: text, end, counts of tokens.",
        evidence=IN_SERVING,
        bound="0 different; fixed",
        fails="Pieces of a stream are lost or doubled (half a character, the last one), or it tells no end or counts.",
    ),
    "serving_usage": Explained(
        measures="The share of answers whose usage.completion_tokens are as many as they have, with or without the one "
        "that ends them, and whose counts add up.",
        evidence=IN_SERVING,
        bound="a share of 1; fixed",
        fails="The server counts words, pieces of a stream, or the prompt twice.",
    ),
    "serving_special_tokens": Explained(
        measures="Answers of the server in whose text a mark of a turn stands.",
        evidence=(*IN_SERVING, "prepare/chat_template.jinja"),
        bound="0 answers; fixed",
        fails="The tokenizer does not list the mark as a special token, or the server decodes with them.",
    ),
}

INVARIANCE = {
    "invariant_accumulation": Explained(
        measures="Losses and gradients of a tiny copy trained in one large batch, and with small batches accumulated "
        "to it.",
        evidence=IN_INVARIANCE,
        bound=ALIKE,
        fails="Means of small batches are averaged, whatever the tokens in each; or gradients are scaled or cleared "
        "wrongly.",
    ),
    "invariant_checkpointing": Explained(
        measures="Losses and gradients of a tiny copy trained with train.gradient_checkpointing, and without.",
        evidence=IN_INVARIANCE,
        bound=ALIKE,
        fails="What is computed again is not what was (dropout, a cache), or gradients do not reach the adapter.",
    ),
    "invariant_packing": Explained(
        measures="Losses and gradients of a tiny copy trained on rows packed into one sequence, and on the same rows "
        "alone.",
        evidence=IN_INVARIANCE,
        bound=ALIKE,
        fails="Packed rows attend to each other, go on with each other's positions, or train the first token of the "
        "next.",
    ),
    "invariant_padding": Explained(
        measures="Losses, gradients, scores and answers of a tiny copy with rows padded in one batch, and each alone.",
        evidence=IN_INVARIANCE,
        bound=ALIKE,
        fails="Padding is trained, attended to, or shifts positions (on the left, in batches of prompts).",
    ),
    "invariant_order": Explained(
        measures="Steps whose rows or losses differ between two processes with the same seed, bit by bit; another seed "
        "must give another order.",
        evidence=IN_INVARIANCE,
        bound="0 steps; fixed",
        fails="The order or the first weights come from the clock, from an unordered set, or from several workers; or "
        "the seed is ignored.",
    ),
    "invariant_merge": Explained(
        measures="The loss of every row under a tiny copy with its adapter on, and merged; the adapter must move the "
        "losses.",
        evidence=IN_INVARIANCE,
        bound=ALIKE,
        fails="The merge is rounded, scaled, doubled or left out, or what was trained cannot be folded in.",
    ),
}
