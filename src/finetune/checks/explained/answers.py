"""Verdicts on what the model says: the checks questions, learning, retention and preference."""

from __future__ import annotations

from finetune.checks.explained.entry import Explained, expect
from finetune.checks.explained.files import DRIFTS
from finetune.checks.leaks import COVERED, WINDOW
from finetune.checks.questions import OTHERS
from finetune.checks.rereading import GAP
from finetune.checks.retention import KNOWN_MIN
from finetune.evaluation import REREAD
from finetune.experiments import FRESH_TEXTS

ASKED = "the files of evaluate.probes, controls and unseen"
HELD_OUT = "the file of evaluate.heldout"
DATA = "the files of data.path and align.data.path"
PAIRS = "the files of align.data.path"
GAPS = ", ".join(f"{gap:g} in {dtype}" for dtype, gap in GAP.items())

QUESTIONS = {
    "nothing_leaked": Explained(
        measures="Paraphrased probes, controls, untaught facts and held-out texts that stand in the rows or pairs "
        f"which are trained; of a held-out text {COVERED:.0%} of its runs of {WINDOW} words.",
        evidence=("prepare/train.jsonl", DATA, ASKED, HELD_OUT),
        bound="0 leaked; fixed",
        fails="A question file was made from the data, or the data hold the questions too; then an answer may be "
        "learned by heart.",
    ),
    "every_question_asked": Explained(
        measures="The share of questions in the files that have an answer in every phase of the run; answers to "
        "questions of no file count against it.",
        evidence=("evaluate/answers.jsonl", ASKED),
        bound="a share of 1; fixed",
        fails="Questions were left out or asked in one phase only, or the files have changed since.",
    ),
    "asked_as_trained": Explained(
        measures="The share of questions asked with the ids that a trained row of the same question begins with; of a "
        "question in no row, with those that the run's template gives.",
        evidence=(
            "evaluate/prompts.jsonl",
            "evaluate/answers.jsonl",
            "prepare/train.jsonl",
            "prepare/chat_template.jinja",
        ),
        bound="a share of 1; fixed",
        fails="The evaluation renders another template, system message or begin token than the training.",
    ),
    "answers_as_said": Explained(
        measures="Answers whose text is not what their tokens spell.",
        evidence=("evaluate/answers.jsonl", "fetch/model.json"),
        bound="0 answers; fixed",
        fails="The texts were edited, or made by another tokenizer than the base's.",
    ),
    "judged_again": Explained(
        measures="Answers that are marked right or wrong otherwise than the rule says: 'match' as whole words, or the "
        "same as 'answer' where there is none.",
        evidence=("evaluate/answers.jsonl",),
        bound="0 answers; fixed",
        fails="The marks were edited, or another rule judged.",
    ),
    "judged_strictly": Explained(
        measures=f"Wrong answers that pass for right: each question is tried with nothing and with up to {OTHERS} "
        "answers to other questions that do not hold its own.",
        evidence=("evaluate/answers.jsonl",),
        bound="0 taken; fixed",
        fails="'match' or 'answer' of a question is so short or empty that any text holds it.",
    ),
    "answers_are_greedy": Explained(
        measures=f"How many nats likelier another token was than one that was said, at worst, in up to {REREAD} "
        "answers a phase, read again in one pass; and whether answers without an end are as long as "
        "evaluate.max_new_tokens.",
        evidence=("evaluate/greedy.json", "evaluate/answers.jsonl"),
        bound=f"at most {GAPS}; by model.dtype, for rounding",
        fails="Answers were drawn, dropout was on, or the adapter or prompt was another than when they were read "
        "again.",
    ),
    "evaluated_as_reported": Explained(
        measures="Numbers of the report (right answers by set and phase, perplexities) that are not what the answers "
        "and the held-out texts come to.",
        evidence=("evaluate/report.json", "evaluate/answers.jsonl", "evaluate/heldout.json"),
        bound="0 numbers; fixed",
        fails="The report, the answers or the scores were edited.",
    ),
}

LEARNING = {
    "learned_as_trained": Explained(
        measures="Of the probes of kind trained that were wrong before, the share now right and with a likelier "
        "expected answer.",
        evidence=("evaluate/answers.jsonl",),
        bound=f"more than {expect('learned_min')}",
        fails="Too little training, facts that are not in the data, a prompt other than the trained one, or an adapter "
        "that is not loaded.",
    ),
    "learned_paraphrased": Explained(
        measures="The same share of the probes of any other kind: asked in words that were never trained.",
        evidence=("evaluate/answers.jsonl",),
        bound=f"more than {expect('learned_min')}",
        fails="The model learned one wording by heart: each fact stands in the data once, in one form.",
    ),
    "learned_net": Explained(
        measures="The share of trained probes that improved, less the share of facts nobody taught (evaluate.unseen) "
        "that 'improved' as well.",
        evidence=("evaluate/answers.jsonl",),
        bound=f"more than {expect('unseen_margin_min')}",
        fails="'match' is so loose that any answer of the kind passes, or all answers in the data are alike.",
    ),
    "stops_by_itself": Explained(
        measures="The share of trained probes whose last answer ended with an end-of-turn token.",
        evidence=("evaluate/answers.jsonl",),
        bound=f"at least {expect('stopped_min')}",
        fails="evaluate.max_new_tokens is below the answers' length, or the end-of-turn token was not trained.",
    ),
}

RETENTION = {
    "controls_kept": Explained(
        measures="Of the controls (general questions) that the base answers, the share that the final model answers "
        f"too; the base must know {KNOWN_MIN}.",
        evidence=("evaluate/answers.jsonl",),
        bound=f"at least {expect('controls_kept_min')}",
        fails="The model forgot: too high a learning rate, too many epochs, or data of one kind alone.",
    ),
    "heldout_perplexity": Explained(
        measures="The perplexity of text that is never trained (evaluate.heldout), after everything, divided by "
        "before.",
        evidence=("evaluate/heldout.json",),
        bound=f"at most {expect('heldout_ratio_max')}",
        fails="The model was wrecked as it learned: too high a learning rate, too many epochs, too large a "
        "train.lora.r.",
    ),
    "heldout_whole": Explained(
        measures="The share of phases that scored every token of every held-out text but each text's first, counted "
        "again.",
        evidence=("evaluate/heldout.json", HELD_OUT),
        bound="a share of 1; fixed",
        fails="Texts were cut or left out, or the file has changed since.",
    ),
    "heldout_confirmed": Explained(
        measures="The worst distance, in nats a token, of the stored perplexities from those of their texts, and of "
        f"the first {FRESH_TEXTS} texts from what a fresh process found with the merged model.",
        evidence=("evaluate/heldout.json", "measure/fresh.json"),
        bound=f"at most {DRIFTS}; by model.dtype, for rounding",
        fails="The scores were edited, or the merged model is not the one that was evaluated.",
    ),
}

PREFERENCE = {
    "pairs_are_data": Explained(
        measures="The share of prepared pairs that are the data's, read and rendered again.",
        evidence=("prepare/preferences.jsonl", "prepare/chat_template.jinja", PAIRS),
        bound="a share of 1; fixed",
        fails="Chosen and rejected are swapped, pairs were lost or edited, or the data has changed since.",
    ),
    "pairs_differ": Explained(
        measures="The share of prepared pairs whose chosen and rejected answers have different ids.",
        evidence=("prepare/preferences.jsonl",),
        bound="a share of 1; fixed",
        fails="The data has pairs with one answer twice, or a truncation cut off where they differ.",
    ),
    "pairs_trained": Explained(
        measures="The share of the pairs taken in the first pass of the alignment that are prepared pairs, each for "
        "the first time.",
        evidence=("events.jsonl", "prepare/preferences.jsonl", "align/report.json"),
        bound="a share of 1; fixed: an epoch takes every pair once",
        fails="A sampler draws with replacement, or a loader repeats or skips batches.",
    ),
    "pair_tokens": Explained(
        measures="The share of logged steps that trained exactly the tokens which the chosen and rejected answers of "
        "their pairs have.",
        evidence=("events.jsonl", "prepare/preferences.jsonl"),
        bound="a share of 1; fixed",
        fails="A collator cuts answers, drops the end-of-turn token, or counts the prompt in.",
    ),
    "every_pair_scored": Explained(
        measures="The share of prepared pairs that were scored, each once and in order.",
        evidence=("evaluate/preferences.jsonl", "prepare/preferences.jsonl"),
        bound="a share of 1; fixed",
        fails="Pairs were left out of the evaluation, or scores were taken out or put in.",
    ),
    "dpo_start": Explained(
        measures="The distance, in nats, of the first logged loss from the one that align.loss_type has where model "
        "and reference are the same (sigmoid: ln 2).",
        evidence=("events.jsonl",),
        bound="at most 0.001 nats; fixed",
        fails="The reference is another model, dropout is on, or the first step was taken before its loss.",
    ),
    "dpo_margin_grows": Explained(
        measures="The mean logged reward margin of the last window of steps, less that of the first step.",
        evidence=("events.jsonl",),
        bound="more than 0; fixed",
        fails="Too few steps, too low a learning rate, or pairs that contradict each other.",
    ),
    "dpo_prefers_chosen": Explained(
        measures="The share of pairs whose chosen answer gained on the rejected one in alignment, scored afresh from "
        "disk.",
        evidence=("evaluate/preferences.jsonl",),
        bound=f"at least {expect('preference_accuracy_min')}",
        fails="Too little alignment, chosen and rejected swapped, or an adapter on disk that is not the aligned one.",
    ),
    "dpo_margin": Explained(
        measures="The mean over the pairs of align.beta times what the chosen answer gained less what the rejected one "
        "did, scored afresh from disk.",
        evidence=("evaluate/preferences.jsonl",),
        bound="more than 0; fixed",
        fails="As for dpo_prefers_chosen; or few pairs moved far the wrong way.",
    ),
    "dpo_rewards_confirmed": Explained(
        measures="The distance, in nats a token, of the rewards that the trainer tells of the aligned model from "
        "align.beta times the gains of the same pairs, scored afresh. Not owed with align.save_strategy: no.",
        evidence=("align/rewards.json", "evaluate/preferences.jsonl", "prepare/preferences.jsonl", "events.jsonl"),
        bound=f"at most {DRIFTS}; by model.dtype, for rounding",
        fails="The trainer scores other tokens, another reference or with another beta; or the model on disk is "
        "another.",
    ),
    "dpo_loss_confirmed": Explained(
        measures="The distance, in nats a token, of the loss that the trainer tells of the aligned model from the loss "
        "of align.loss_type over the same pairs, scored afresh. Not owed with align.save_strategy: no.",
        evidence=("align/rewards.json", "evaluate/preferences.jsonl", "prepare/preferences.jsonl", "events.jsonl"),
        bound=f"at most {DRIFTS}; by model.dtype, for rounding",
        fails="The trainer computes another loss than align.loss_type, or averages it otherwise.",
    ),
}
