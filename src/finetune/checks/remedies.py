"""What to do about a verdict that is refuted, by its name; of an export's verdict (`prompt_parity[mlx]`) by what stands
before the bracket. One or two sentences each, with the recipe's keys and values to try."""

from __future__ import annotations

from dataclasses import replace

from finetune.checks import Verdict

_AGAIN = "do the run anew: finetune run RECIPE --force"
_CLEAN = "take patches and callbacks of the trainer away and do the run anew (finetune run RECIPE --force)"
_CODE = f"Code did this and no setting: {_CLEAN}"
_HALVED = "halve train.learning_rate (1e-4 instead of 2e-4)"
_DPO = "Train longer (align.num_train_epochs: 3) or with a higher align.learning_rate (1e-4)"
_ASK = "ask again with: finetune evaluate RECIPE --force"
_MERGE = "merge again with: finetune merge RECIPE --force"
_MEASURE = "measure again with: finetune measure RECIPE --force"
_SERVER = f"Serve with another version of the server's library, and {_MEASURE}"
_COMPARE = "compare again with: finetune compare RECIPE --force"
_EXPORT = "export again with: finetune export RUN --force"

REMEDIES: dict[str, str] = {
    # -- the rows that were trained
    "trained_tokens": (
        "Look at prepare/preview.txt and at the row that trains nothing: give it an answer, or raise "
        "train.max_length (2048), which cut its answer off."
    ),
    "labels_aligned": f"The prepared rows are damaged, or were made by changed code: {_AGAIN}.",
    "end_of_turn_trained": (
        "Use a chat template that ends every answer with an end-of-turn token (template.name: model, or chatml), "
        f"and {_AGAIN}."
    ),
    "labels_are_answers": (
        "See that data.fields names the right columns, that train.completion_only_loss is what you want, and that "
        f"the data is the same as when it was trained; then {_AGAIN}."
    ),
    "prompts_as_served": (
        "Ask with the template and the system message that were trained: leave template.name (model is the "
        f"model's own) and template.system as they were, and {_AGAIN}."
    ),
    "rows_prepared": (
        "Look at the row that is named. To leave rows out on purpose say so (data.on_overlong: drop, "
        f"data.on_duplicate: drop, data.limit: 500); where the data has changed since, {_AGAIN}."
    ),
    "rows_trained": f"The training took some rows twice in its first pass and others not at all. {_CODE}.",
    "tokens_as_prepared": f"The training's batches did not hold the answers of the prepared rows. {_CODE}.",
    "trained_to_the_end": (
        "The training ended early; go on with: finetune run RECIPE. To have it shorter on purpose, set "
        "train.max_steps (100) or train.num_train_epochs (1)."
    ),
    # -- the loss
    "loss_finite": (
        "Halve train.learning_rate (1e-4 instead of 2e-4), keep train.max_grad_norm: 1.0, and use train.bf16: true or "
        "model.dtype: float32 instead of float16."
    ),
    "gradients_finite": (
        "Halve train.learning_rate (1e-4 instead of 2e-4), keep train.max_grad_norm: 1.0, and use train.bf16: true or "
        "model.dtype: float32 instead of float16."
    ),
    "steps_skipped": (
        "Look at the rows of the skipped steps (the events bad_step name them); halve train.learning_rate, and use "
        "model.dtype: float32 instead of float16."
    ),
    "dpo_steps_skipped": (
        "Look at the pairs of the skipped steps (the events bad_step name them); halve align.learning_rate, and use "
        "model.dtype: float32 instead of float16."
    ),
    "loss_convergence": (
        "Train longer (train.num_train_epochs: 10) or with a higher train.learning_rate (5e-4 for LoRA, 5e-5 for "
        "full training); where the loss rises, with a lower one."
    ),
    "loss_beyond_noise": (
        "The loss swings more than it falls: train longer (train.num_train_epochs: 10), or smooth its steps "
        "(train.gradient_accumulation_steps: 4)."
    ),
    "loss_start": (
        "See that model.path is a trained model and that its template fits it (template.name: model). A first "
        "loss so high means text or labels that it has never seen the like of."
    ),
    "loss_end": (
        "Train longer (train.num_train_epochs: 10) or with a higher train.learning_rate (5e-4 for LoRA): so far "
        "the model says no more than how often each word occurs."
    ),
    "loss_is_of_answers": (
        "Look at prepare/preview.txt: what is marked there must be the answers. If it is, the trainer counts "
        f"other tokens: {_CLEAN}. For a model with much dropout raise expect.loss_first_tolerance (0.1)."
    ),
    "loss_confirmed": (
        "Where loss_convergence is refuted too, do what is said there. Where the logged loss fell, the model on "
        f"disk is not the one that was trained: {_AGAIN}."
    ),
    # -- the weights
    "parameters_changed": (
        "Set train.learning_rate above 0 (2e-4 for LoRA, 2e-5 for full training), and let the warm-up be shorter "
        "than the training (train.warmup_steps: 0.1)."
    ),
    "lora_b_nonzero": (
        "Set train.learning_rate above 0 (2e-4), and take modules out of train.lora.target_modules that the model "
        "does not use (all-linear is safe)."
    ),
    "kinds_changed": (
        "Set train.learning_rate above 0 (2e-5), and see that nothing freezes the kind of matrix that is named."
    ),
    "lora_coverage": (
        "Set train.lora.target_modules: all-linear, or list the layers that you mean in "
        "train.lora.layers_to_transform ([0, 1, 2])."
    ),
    "frozen_identical": f"Weights that must stay as they are were changed while LoRA trained. {_CODE}.",
    "dpo_frozen_identical": f"Weights that must stay as they are were changed while alignment trained. {_CODE}.",
    "base_intact": (
        "Get the base model again with: finetune fetch RECIPE --force. Where model.path is a directory of yours, "
        "write nothing into it between training and checks."
    ),
    "quantized_as_asked": (
        f"The base was not held as model.quantization asks. See that the package of the quantizer and transformers fit each "
        f"other (finetune doctor); {_AGAIN}. Or leave model.quantization out."
    ),
    "weights_precision": (
        f"Set model.dtype to what the weights shall be in memory (float32 is the most exact), and {_AGAIN}."
    ),
    "adapter_effect": (
        "Set train.learning_rate above 0 (2e-4) and train longer (train.num_train_epochs: 10). Where the loss did "
        f"fall, the model on disk is not the one that was trained: {_AGAIN}."
    ),
    # -- the optimizer
    "one_training": "The training became another on the way. Train it in one go: finetune train RECIPE --force.",
    "dpo_one_training": "The alignment became another on the way. Do it in one go: finetune align RECIPE --force.",
    "learning_rate_as_asked": f"The steps did not follow train.lr_scheduler_type and train.warmup_steps. {_CODE}.",
    "settings_as_asked": (
        "The optimizer was not set as the recipe says (train.weight_decay, train.adam_beta1, "
        f"train.lora.lora_dropout ...). {_CODE}."
    ),
    "steps_move_weights": (
        "Set train.learning_rate above 0 (2e-4 for LoRA). In bfloat16 a small step rounds to nothing: set "
        "model.dtype: float32 with train.bf16: true."
    ),
    "step_size": (
        f"The first step was not the one of train.optim: it was scaled, doubled, or another optimizer's. {_CODE}."
    ),
    "gradients_clipped": f"Gradients reached the optimizer unclipped, though train.max_grad_norm is set. {_CODE}.",
    "dpo_learning_rate_as_asked": f"The steps did not follow align.lr_scheduler_type and align.warmup_steps. {_CODE}.",
    "dpo_settings_as_asked": (
        f"The optimizer was not set as the recipe says (align.weight_decay, align.adam_beta1 ...). {_CODE}."
    ),
    "dpo_steps_move_weights": (
        "Set align.learning_rate above 0 (5e-5 for LoRA). In bfloat16 a small step rounds to nothing: set "
        "model.dtype: float32 with align.bf16: true."
    ),
    "dpo_step_size": (
        f"The first step was not the one of align.optim: it was scaled, doubled, or another optimizer's. {_CODE}."
    ),
    "dpo_gradients_clipped": f"Gradients reached the optimizer unclipped, though align.max_grad_norm is set. {_CODE}.",
    # -- the questions
    "nothing_leaked": (
        "Take what is named out of the training data, or out of the file that asks it: what was trained cannot "
        "show what was learned."
    ),
    "every_question_asked": f"The question files have changed since, or questions were left out: {_ASK}.",
    "asked_as_trained": (
        f"Ask as was trained: leave template.name and template.system as they were in training, and {_ASK}."
    ),
    "answers_as_said": f"The text of an answer is not what its tokens spell: {_ASK}.",
    "judged_again": f"Answers were marked otherwise than they are judged: {_ASK}.",
    "judged_strictly": (
        "Make 'match' of the question that is named longer, so that no other question's answer holds it; or leave "
        "'match' out, and the whole answer must be the same."
    ),
    "answers_are_greedy": (
        f"Answers must be the likeliest token every time, with dropout off and the whole adapter on: {_ASK}. Where "
        f"it stays, {_CLEAN}."
    ),
    "learned_as_trained": (
        "Train longer (train.num_train_epochs: 10) or with a higher train.learning_rate (5e-4 for LoRA), and see "
        "that the fact of every probe is in the training data."
    ),
    "learned_paraphrased": (
        "Put each fact into the training data in three to five wordings: that teaches a model to answer in words "
        "it never saw, and more epochs on one wording do not."
    ),
    "learned_net": (
        "Facts that nobody taught 'improved' as well, so the gain is no knowledge: make 'match' stricter in "
        "evaluate.probes and evaluate.unseen, and train answers that differ more from each other."
    ),
    "stops_by_itself": (
        "Set evaluate.max_new_tokens above the longest answer (64), train longer (train.num_train_epochs: 10), "
        "and use a template that ends answers (template.name: model)."
    ),
    "controls_kept": (
        f"The model forgot: {_HALVED}, train fewer epochs (train.num_train_epochs: 1), or mix general questions "
        "with their answers into the data."
    ),
    "heldout_perplexity": (
        f"The model reads other text worse than before: {_HALVED}, train fewer epochs (train.num_train_epochs: 1), "
        "or use a smaller train.lora.r (8). To allow more, raise expect.heldout_ratio_max (2.0)."
    ),
    "heldout_whole": f"The held-out text has changed since, or was not scored whole: {_ASK}.",
    "heldout_confirmed": f"Another process finds other probabilities for the held-out text: {_ASK}, then {_MEASURE}.",
    # -- the alignment
    "pairs_are_data": f"The pairs have changed since, or were prepared otherwise: {_AGAIN}.",
    "pairs_differ": (
        "Take out the pairs whose chosen and rejected answers are the same, or give them another rejected answer."
    ),
    "pairs_trained": f"The alignment took some pairs twice in its first pass and others not at all. {_CODE}.",
    "pair_tokens": f"The alignment's batches did not hold the answers of the prepared pairs. {_CODE}.",
    "every_pair_scored": f"Pairs were left out when the model was scored: {_ASK}.",
    "dpo_start": f"The model and its reference must be the same model at the first step, with dropout off. {_CODE}.",
    "dpo_margin_grows": f"{_DPO}.",
    "dpo_prefers_chosen": (
        f"{_DPO}, or lower align.beta (0.05). See that chosen and rejected are not swapped in the data."
    ),
    "dpo_margin": f"{_DPO}. See that chosen and rejected are not swapped in the data.",
    "dpo_rewards_confirmed": f"The trainer's rewards are not those of the model on disk. {_CODE}.",
    "dpo_loss_confirmed": f"The trainer's loss is not that of align.loss_type for the model on disk. {_CODE}.",
    # -- the files
    "sealed": f"Bring the file that is named back from a copy, or {_AGAIN}.",
    "rows_scored": "Have the rows scored again with: finetune evaluate RECIPE --force.",
    "counts_as_reported": f"Bring the file that is named back from a copy, or {_AGAIN}.",
    "records_whole": "Have the file that is named made again with: finetune run RECIPE.",
    "told_of": f"Bring the file that is named back from a copy, or {_AGAIN}.",
    "stages_finished": "Mend what stopped the run, and go on where it stopped with: finetune run RECIPE.",
    "artifacts_intact": (
        "Bring the file that is named back from a copy, or have it made again with: finetune run RECIPE."
    ),
    "sizes_as_reported": "The sizes that the report of fetch tells are not those of the files: finetune fetch RECIPE --force.",
    "prepared_as_reported": f"The report of prepare tells other numbers than its files have: {_AGAIN}.",
    "log_as_trained": f"The run's log is not the trainer's own; one of the two was changed: {_AGAIN}.",
    "report_as_logged": f"The training's report tells other numbers than its log has; one of the two was changed: {_AGAIN}.",
    "dpo_log_as_trained": f"The run's log is not the trainer's own; one of the two was changed: {_AGAIN}.",
    "dpo_report_as_logged": f"The alignment's report tells other numbers than its log has; one was changed: {_AGAIN}.",
    "evaluated_as_reported": f"The report of evaluate tells other numbers than its files have: {_ASK}.",
    "exports_listed": f"export/exports.json does not list the exports that are there: {_EXPORT}.",
    "saved_whole": (
        f"Tensors are missing from what was saved. See that the disk has room (finetune doctor), and {_AGAIN}."
    ),
    "saved_precision": f"The result was saved in a coarser type than it was trained in. {_CODE}.",
    "saved_last": f"The result is not that of the last step. Copy no checkpoint over it, and {_AGAIN}.",
    "adapter_config": (
        f"adapter_config.json is not that of the adapter beside it: bring it back from a copy, or {_AGAIN}."
    ),
    "weights_finite": (
        "A base that holds NaN or infinity cannot be trained: name another (model.path). Where they begin later, halve "
        "train.learning_rate (1e-4 instead of 2e-4; align.learning_rate for align/), and use train.bf16: true or "
        "model.dtype: float32 instead of float16."
    ),
    "saved_tokenizer": f"The merged model's tokenizer is not the base's: {_MERGE}.",
    "fresh_process": f"Loaded anew, the merged model answers otherwise: {_MERGE}, then {_MEASURE}.",
    # -- experiments
    "memory_efficiency": (
        "Train fewer weights: train.lora.r: 8, or train.lora.target_modules: [q_proj, v_proj]. A tiny model gains "
        "little from LoRA: lower expect.memory_reduction_min (0.1) or leave it out."
    ),
    "memory_same_work": f"The two trainings that were measured did not do the same work: {_MEASURE}.",
    "memory_as_stored": f"The bytes measured in memory are not those of the run's files: {_MEASURE}.",
    "memory_as_estimated": (
        f"The estimate is off by more than a tenth: {_MEASURE} with the machine otherwise idle, and trust the "
        "measured number."
    ),
    "resume_losses": f"Set train.full_determinism: true and train.dataloader_num_workers: 0; then {_MEASURE}.",
    "resume_weights": f"Set train.full_determinism: true and train.dataloader_num_workers: 0; then {_MEASURE}.",
    "resume_parameters": f"What went on from the checkpoint trained more or fewer weights than before it. {_CODE}.",
    "serving_prompts": (
        "The server must render with the run's own template (prepare/chat_template.jinja) and add no system "
        f"message or begin token of its own. {_SERVER}."
    ),
    "serving_answers": (
        f"The server must serve this run's model and take the likeliest token at temperature 0. {_SERVER}."
    ),
    "serving_conversations": f"The server must keep all turns of a conversation, in their order. {_SERVER}.",
    "serving_stops": f"The server does not do what 'stop' in a request says. {_SERVER}.",
    "serving_max_tokens": f"The server does not do what 'max_tokens' in a request says. {_SERVER}.",
    "serving_temperature": f"The server does not do what 'temperature' in a request says. {_SERVER}.",
    "serving_seed": f"The server does not do what 'seed' in a request says. {_SERVER}.",
    "serving_top_p": f"The server does not do what 'top_p' in a request says. {_SERVER}.",
    "serving_streaming": f"A stream is not what the server answers in one piece. {_SERVER}.",
    "serving_usage": f"The server counts tokens wrongly. {_SERVER}.",
    "serving_special_tokens": (
        "Marks of turns stand in the server's answers: see that tokenizer_config.json of the model lists them as "
        f"special tokens. {_SERVER}."
    ),
    "invariant_accumulation": (
        f"Set train.gradient_accumulation_steps: 1 and a larger train.per_device_train_batch_size (8). {_CODE}."
    ),
    "invariant_checkpointing": f"Set train.gradient_checkpointing: false. {_CODE}.",
    "invariant_packing": (
        "Set train.packing: false, or use attention that keeps packed rows apart (model.attn_implementation: "
        "flash_attention_2, on a GPU)."
    ),
    "invariant_padding": (
        "Set train.per_device_train_batch_size: 1, so that nothing is padded, or model.attn_implementation: "
        f"eager. {_CODE}."
    ),
    "invariant_order": f"Set train.full_determinism: true and train.dataloader_num_workers: 0. {_CODE}.",
    "invariant_merge": (
        "Set train.learning_rate above 0 (2e-4), where the adapter did nothing. Where it did, merge without what "
        "cannot be folded in (train.lora.use_dora: false)."
    ),
    # -- exports
    "prompt_parity": (
        f"The export reads the same conversation as other tokens; the sentence names the likely cause. Then {_EXPORT}."
    ),
    "asked_alike": f"What the exports were asked is not what the run has: {_COMPARE}.",
    "compared_as_listed": f"What was written down of this comparison contradicts itself: {_COMPARE}.",
    "vocabulary_parity": f"The export's tokenizer is not the model's: {_EXPORT}.",
    "template_carried": (
        f"The export has no chat template, or another: {_EXPORT}. Until then give the runtime "
        "prepare/chat_template.jinja."
    ),
    "distribution_parity": (
        "Export with more bits (gguf:q8_0 instead of gguf:q4_k_m), or allow more in expect.export_kl_mean_max "
        "({gguf:q4_k_m: 0.2})."
    ),
    "distribution_worst": (
        "Export with more bits (gguf:q8_0 instead of gguf:q4_k_m). Where nothing was quantized, the weights are "
        f"other ones: {_EXPORT}."
    ),
    "greedy_parity": (
        "Export with more bits (gguf:q8_0 instead of gguf:q4_k_m), or allow more in expect.export_greedy_min "
        "({gguf:q4_k_m: 0.5})."
    ),
    "stop_parity": (
        "Export with more bits (gguf:q8_0). Where no answer of the model ends by itself either, raise "
        "evaluate.max_new_tokens (64)."
    ),
    "stop_tokens": f"The runtime does not know the end-of-turn token, so answers run on: {_EXPORT}.",
    "no_special_tokens": (
        "Marks of turns stand in the export's answers: see that tokenizer_config.json of the model lists them as "
        f"special tokens, and {_EXPORT}."
    ),
    "learned_parity": (
        "Export with more bits (gguf:q8_0 instead of gguf:q4_k_m), or allow more with a lower "
        "expect.export_learned_min (0.8)."
    ),
    "served_parity": (
        f"The runtime's own server must render with prepare/chat_template.jinja and add no system message: {_EXPORT}."
    ),
    "constants_parity": (
        f"A number that the model depends on is another in the export; the sentence names it. Then {_EXPORT}."
    ),
    "merged_once": f"Merge from a base that does not hold the adapter already: {_MERGE}.",
    "merge_exact": f"The merged weights are not base + adapter: {_MERGE}, then {_EXPORT}.",
    "adapter_carried": f"The adapter in the export is not the one that was trained: {_EXPORT}.",
    "stored_bits": f"The export holds fewer bits a weight than its name says: {_EXPORT}.",
}


def with_remedy(verdict: Verdict) -> Verdict:
    """The verdict, with its remedy where it is refuted and has none of its own."""
    if not verdict.refuted or verdict.remedy:
        return verdict
    return replace(verdict, remedy=REMEDIES.get(verdict.name.partition("[")[0], ""))
