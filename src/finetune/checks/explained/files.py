"""Verdicts on files, logs and reports: the checks seal, records, reports and artifacts."""

from __future__ import annotations

from finetune.checks.artifacts import DRIFT
from finetune.checks.explained.entry import Explained, of_trainings
from finetune.recipe.sections import Evaluate

ROWS = Evaluate.model_fields["score_rows"].default
DRIFTS = ", ".join(f"{bound:g} in {dtype}" for dtype, bound in DRIFT.items())
RESULTS = ("train/adapter", "train/model", "align/adapter", "align/model")

SEAL = {
    "sealed": Explained(
        measures="Changes since the run was written: lines of the log that do not follow from the one before, and "
        "recipe, reports, verdicts and manifest whose digest is not the one that log and manifest hold.",
        evidence=("events.jsonl", "manifest.json", "recipe.yaml", "verdicts.json", "STAGE/report.json"),
        bound="0 changes; fixed",
        fails="A file was edited, cut, put in from another run, copied in part, or damaged on the disk.",
    ),
}

RECORDS = {
    "rows_scored": Explained(
        measures="Whether every phase scored the same training rows, all of them prepared, each with the tokens that "
        "it has, and as many as asked: evaluate.score_rows, or those of the first step where they are more.",
        evidence=("evaluate/rows.json", "prepare/train.jsonl", "events.jsonl"),
        bound=f"0 numbers off; evaluate.score_rows is {ROWS} by default",
        fails="Rows or a phase are missing from the scores, or the prepared rows are others now.",
    ),
    "counts_as_reported": Explained(
        measures="The numbers of experiments, exports and their bytes, rehearsed exports and comparisons that the "
        "reports tell, against the files there.",
        evidence=(
            "measure/report.json", "rehearse/report.json", "export/report.json", "compare/report.json",
            "export/exports.json", "rehearse/exports.json",
        ),
        bound="0 numbers off; fixed",
        fails="A report was edited, or a file of an experiment, an export or a comparison is gone or was put in.",
    ),
    "records_whole": Explained(
        measures="Files of records, and events of the log, that do not hold what is declared of them: types, keys, "
        "none missing and none more.",
        evidence=("events.jsonl", "every record of the stages"),
        bound="0 damaged; fixed",
        fails="A file was cut, edited, or written by another version.",
    ),
    "told_of": Explained(
        measures="What log, reports and files do not tell of one another: that each stage began and ended, from which "
        "inputs and models, when; that every artifact is made of listed files and every record is an artifact; which "
        "recipe was stored.",
        evidence=("events.jsonl", "STAGE/report.json", "export/exports.json", "recipe.yaml"),
        bound="0 untold; fixed",
        fails="Files of another run were put in, events were cut away, or a stage was made again behind the log's "
        "back.",
    ),
}  # fmt: skip

REPORTS = {
    **of_trainings(
        "log_as_trained",
        Explained(
            measures="The steps in the run's log against those that the trainer's stage wrote down at its end, value "
            "by value, each due by {stage}.logging_steps and there once, in order.",
            evidence=("events.jsonl", "{stage}/trainer_logs.json", "{stage}/report.json"),
            bound="0 numbers off; fixed",
            fails="One of the two logs was edited or cut, or steps were lost or logged twice over a resume.",
        ),
    ),
    **of_trainings(
        "report_as_logged",
        Explained(
            measures="What the training's report tells (first and last loss, tokens, steps, planned steps, resumes, "
            "speed) against its logged steps and what the recipe plans for its {rows}.",
            evidence=("{stage}/report.json", "events.jsonl", "{file}"),
            bound="0 numbers off; fixed",
            fails="The report or the log was edited, or the training took another number of steps than the recipe "
            "plans.",
        ),
    ),
    "prepared_as_reported": Explained(
        measures="What the report of prepare tells (rows, tokens, entropies, template, vocabulary) counted again from "
        "its files, and the digests of the data files.",
        evidence=(
            "prepare/report.json", "prepare/train.jsonl", "prepare/eval.jsonl", "prepare/preferences.jsonl",
            "prepare/template.json", "prepare/chat_template.jinja", "prepare/sources.json", "the data files",
        ),
        bound="0 numbers off; fixed",
        fails="The prepared files or their report were edited, or the data files have changed since.",
    ),
}  # fmt: skip

ARTIFACTS = {
    "stages_finished": Explained(
        measures="Stages of the recipe that left a report, without those that ran before the model which is there now.",
        evidence=("STAGE/report.json", "events.jsonl"),
        bound="all stages that the recipe wants",
        fails="The run stopped on the way, or a training or merge was done again and what follows it was not.",
    ),
    "artifacts_intact": Explained(
        measures="The share of files listed in the stages' reports that still have their digest; files that came in "
        "count against it.",
        evidence=("STAGE/report.json", "every file of the stages"),
        bound="a share of 1; fixed",
        fails="A file of the run was edited, deleted, replaced, or damaged on the disk.",
    ),
    "sizes_as_reported": Explained(
        measures="The model that was asked for, its bytes and parameters, and the bytes of the merged model, as "
        "reported, against the recipe and the files.",
        evidence=("fetch/report.json", "fetch/model.json", "merge/report.json", "merge/model", "the files of the base"),
        bound="0 numbers off; fixed",
        fails="A report was edited, or the model's files are others now.",
    ),
    "saved_whole": Explained(
        measures="Parameters stored in the result of each training, as a share of those that were trained.",
        evidence=(*RESULTS, "train/report.json", "align/report.json"),
        bound="at least 1; fixed",
        fails="Tensors were lost in saving: a full disk, a wrapper's names, a part that is not saved with an adapter.",
    ),
    "saved_precision": Explained(
        measures="Bytes of the stored tensors of each training, as a share of those that they took while trained.",
        evidence=(*RESULTS, "train/report.json", "align/report.json"),
        bound="at least 1; fixed",
        fails="The result was cast to a coarser type when it was saved, which rounds the training away.",
    ),
    "saved_last": Explained(
        measures="Tensors of each training's result that differ, bit by bit, from the checkpoint of its last step. Not "
        "owed without checkpoints, nor with early stopping, which keeps the best.",
        evidence=(*RESULTS, "train/checkpoint-N", "align/checkpoint-N", "train/report.json", "align/report.json"),
        bound="0 tensors; fixed",
        fails="An earlier checkpoint, another training or an average of weights was saved as the result.",
    ),
    "adapter_config": Explained(
        measures="Settings of the adapter's adapter_config.json that act on its tensors (r, lora_alpha, use_rslora, "
        "target_modules, base ...) and are not those that it was trained with.",
        evidence=("train/adapter", "align/adapter", "fetch/model.json"),
        bound="0 settings; those of train.lora, or of the adapter that the training went on from",
        fails="The file was edited, or comes from another adapter: with another lora_alpha it is scaled otherwise.",
    ),
    "weights_finite": Explained(
        measures="Tensors of the trainings' results and of the merged model that hold NaN or infinity; the sentence "
        "names the first model that has some, the base included.",
        evidence=(*RESULTS, "merge/model", "fetch/model.json"),
        bound="0 tensors; fixed",
        fails="The training diverged, float16 overflowed, or the base came so.",
    ),
    "saved_tokenizer": Explained(
        measures="Token ids of the merged model's tokenizer that mean another text than the base's, and texts of the "
        "first rows and pairs that it reads as other ids.",
        evidence=("merge/model", "fetch/model.json", "prepare/train.jsonl", "prepare/preferences.jsonl"),
        bound="0 ids or texts; fixed",
        fails="Tokens were added or renumbered, another tokenizer was saved, or its configuration lost a setting.",
    ),
    "fresh_process": Explained(
        measures="The worst distance, in nats a token, of answers that a process of its own scored with the merged "
        "model from what evaluate says of them; of rows or pairs where no question is asked. The chat template must be "
        "the run's.",
        evidence=(
            "measure/fresh.json", "prepare/template.json", "evaluate/answers.jsonl", "evaluate/rows.json",
            "evaluate/preferences.jsonl", "prepare/preferences.jsonl",
        ),
        bound=f"at most {DRIFTS}; by model.dtype, for rounding",
        fails="The merge is not what was evaluated, was saved in part, or needs something that only lived in memory.",
    ),
}  # fmt: skip
