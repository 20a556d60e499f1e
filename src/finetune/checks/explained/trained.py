"""Verdicts on what was trained, and how the loss went: the checks labels, rows and loss."""

from __future__ import annotations

from finetune.checks.explained.entry import Explained, expect
from finetune.checks.loss import DROPOUT_FACTOR, FIRST_CEILING, LEAST, PACKED_TOLERANCE
from finetune.checks.rows import PACKED_TOLERANCE as PACKED_TOKENS
from finetune.checks.rows import WHOLE

DATA = "the files of data.path"

LABELS = {
    "trained_tokens": Explained(
        measures="The tokens that carry a label, in the prepared row that has the fewest.",
        evidence=("prepare/train.jsonl",),
        bound="at least 1 token; fixed",
        fails="A row has an empty answer, data.fields names a wrong column, or data.on_overlong: truncate cut off the "
        "answer behind a prompt as long as train.max_length.",
    ),
    "labels_aligned": Explained(
        measures="The share of prepared rows in which every label is the token at its own place, or -100 where it is "
        "masked.",
        evidence=("prepare/train.jsonl",),
        bound="a share of 1; fixed",
        fails="Labels are shifted by a token, or taken from another row; or the prepared rows were edited.",
    ),
    "end_of_turn_trained": Explained(
        measures="The share of prepared rows whose last label is an end-of-turn token of the base's tokenizer. Rows "
        "that data.on_overlong: truncate may have cut do not count.",
        evidence=("prepare/train.jsonl", "fetch/model.json"),
        bound="a share of 1; fixed",
        fails="The chat template writes no end-of-turn token behind an answer, or the mask ends before it; the model "
        "would never learn to stop.",
    ),
    "labels_are_answers": Explained(
        measures="The share of prepared rows whose trained tokens, decoded, spell the answers of their row in the "
        "data, which is read again; with train.completion_only_loss: false they must contain them.",
        evidence=("prepare/train.jsonl", DATA),
        bound="a share of 1; fixed",
        fails="The mask is off by some tokens, a column is the wrong one, a truncation or a template changes the "
        "answer, or the data has changed since it was prepared.",
    ),
    "prompts_as_served": Explained(
        measures="The share of prepared rows that begin with the very ids which the model is given when it is asked "
        "the same, rendered again with the run's template and template.system, and whose answer follows at once.",
        evidence=("prepare/train.jsonl", "prepare/chat_template.jinja", DATA),
        bound="a share of 1; fixed",
        fails="Training rendered another template, system message, begin token or white space than inference does.",
    ),
}

ROWS = {
    "rows_prepared": Explained(
        measures="Rows of the data, read again, that are neither prepared nor held out nor left out as the recipe "
        "says; with rows that are prepared twice or carry the file and line of another.",
        evidence=("prepare/train.jsonl", "prepare/eval.jsonl", DATA),
        bound="0 rows lost or repeated; fixed",
        fails="Rows were dropped in silence (too long, empty, a last batch), or the data has changed since.",
    ),
    "rows_trained": Explained(
        measures="The share of the rows taken in the first pass of the training that are prepared rows, each for the "
        "first time. Not owed with train.packing, where a step does not know its rows.",
        evidence=("events.jsonl", "prepare/train.jsonl", "train/report.json"),
        bound="a share of 1; fixed: an epoch takes every row once",
        fails="A sampler draws with replacement, a loader repeats or skips batches, or a resumed training began at the "
        "wrong row.",
    ),
    "tokens_as_prepared": Explained(
        measures="The share of logged steps that trained exactly as many tokens as the rows of their batch have "
        "labels; with train.packing, the relative distance of the tokens trained in an epoch from the labels of all "
        "rows.",
        evidence=("events.jsonl", "prepare/train.jsonl"),
        bound=f"a share of 1; with packing at most {PACKED_TOKENS:g}; fixed",
        fails="A collator masks, truncates or pads otherwise than prepare did: a prompt that is trained, an end that "
        "is cut off.",
    ),
    "trained_to_the_end": Explained(
        measures="The steps taken as a share of train.max_steps or, where that is not set, the epochs taken as a share "
        "of train.num_train_epochs. Not owed with early stopping.",
        evidence=("events.jsonl", "train/report.json", "prepare/train.jsonl"),
        bound=f"at least {WHOLE:g} of what the recipe asks for",
        fails="The training was stopped or killed and not gone on with, or a loader ended early.",
    ),
}

LOSS = {
    "loss_finite": Explained(
        measures="Logged steps whose loss is NaN or infinite; those that train.on_nan: skip left out do not count.",
        evidence=("events.jsonl",),
        bound="0 steps; fixed",
        fails="The learning rate is too high, float16 overflows, or the base holds NaN.",
    ),
    "gradients_finite": Explained(
        measures="Logged steps whose gradient has a norm that is NaN; a step that tells no norm is no evidence.",
        evidence=("events.jsonl",),
        bound="0 steps; fixed",
        fails="The learning rate is too high, float16 overflows, or an operation has no gradient at some value; a "
        "finite loss does not show it.",
    ),
    "loss_convergence": Explained(
        measures="The relative fall of the mean logged loss from the first to the last window of steps (a quarter of "
        f"all, 2 to 20), from at least {LEAST} logged steps. Not owed with train.loss_type: dft.",
        evidence=("events.jsonl",),
        bound=f"more than {expect('loss_reduction_min')}, as a share of the first window",
        fails="Too few steps, a learning rate that is too low or so high that the loss rises, or a warm-up as long as "
        "the training.",
    ),
    "loss_beyond_noise": Explained(
        measures="The same fall in standard errors of the two window means: whether it is more than the scatter "
        "between steps.",
        evidence=("events.jsonl",),
        bound="more than 2 standard errors; fixed",
        fails="Few steps with small batches, so that the loss swings as far as it falls.",
    ),
    "loss_start": Explained(
        measures="The first logged loss, in units of ln(vocabulary): what a guess over all tokens costs.",
        evidence=("events.jsonl", "prepare/report.json"),
        bound=f"at most {FIRST_CEILING:g} of ln(vocabulary); fixed: a guess costs 1",
        fails="The model is not the trained one it should be, its template or tokenizer does not fit, or labels are "
        "shifted.",
    ),
    "loss_end": Explained(
        measures="The mean of the last window of logged losses against the entropy of the answers' tokens, in nats. "
        "Where what is logged is no plain likelihood (dft, label smoothing, NEFTune), the rows scored again after "
        "training.",
        evidence=("events.jsonl", "prepare/report.json", "evaluate/rows.json"),
        bound="less than the entropy that prepare measured (unigram_entropy); expect.loss_below_unigram: false leaves "
        "it out",
        fails="Too little training: the model says no more than how often each token occurs.",
    ),
    "loss_is_of_answers": Explained(
        measures="The relative distance of the first logged loss from the loss of the same rows' answers, scored again "
        "by the base loaded from disk. Owed where the logged loss is the plain likelihood.",
        evidence=("events.jsonl", "evaluate/rows.json", "fetch/model.json"),
        bound=f"at most {expect('loss_first_tolerance')}; {DROPOUT_FACTOR:g} times that for a base with dropout, "
        f"{PACKED_TOLERANCE:g} or more where a step does not tell its rows",
        fails="The trainer counts other tokens than the answers (prompts, padding), averages otherwise, or trains "
        "another model.",
    ),
    "loss_confirmed": Explained(
        measures="The relative fall of the loss on the answers of training rows, scored afresh from disk before and "
        "after training.",
        evidence=("evaluate/rows.json",),
        bound=f"more than {expect('loss_reduction_min')}, as a share of the loss before",
        fails="Nothing was learned; or the logged loss fell, and the model on disk is not the one that was trained.",
    ),
}
