"""Verdicts on the merged model and the exports: the check parity. Each but the first two is of one model, which its name
has in a bracket: `prompt_parity[mlx]`, of the merged one `prompt_parity[merged]`."""

from __future__ import annotations

from finetune.checks.explained.entry import Explained, expect
from finetune.checks.parity import FACTOR_TOLERANCE
from finetune.parity.tolerances import told

HOP = ("compare/HOP.json",)

PARITY = {
    "exports_listed": Explained(
        measures="Entries of the list of exports that are not the recipe's, or whose path, backend, bytes, digest or "
        "files are not those there.",
        evidence=("export/exports.json", "export/report.json", "the folders of export/"),
        bound="0 entries off; fixed",
        fails="An export was replaced, edited or removed, or the list was.",
    ),
    "asked_alike": Explained(
        measures="Parts of what every model was asked (conversations, texts, rows, questions, vocabulary, template) "
        "that are not those of the run, tokenized again by the base's tokenizer.",
        evidence=(
            "compare/material.json",
            "evaluate/answers.jsonl",
            "prepare/train.jsonl",
            "prepare/chat_template.jinja",
        ),
        bound="0 parts; fixed",
        fails="The file was edited, or the run was prepared or evaluated again after the comparison.",
    ),
    "compared_as_listed": Explained(
        measures="Facts and counts of a comparison (path, bytes, type, what was compared, what the answers come to) "
        "that do not follow from the list of exports, the material and the answers.",
        evidence=(*HOP, "export/exports.json", "compare/material.json", "compare/merged.json"),
        bound="0 facts off; fixed",
        fails="The comparison was edited, or is of another export than the one there.",
    ),
    "prompt_parity": Explained(
        measures="The share of conversations and texts that the model's own runtime turns into the token ids of the "
        "training.",
        evidence=HOP,
        bound="a share of 1; fixed",
        fails="Another chat template, a begin token that is doubled or missing, spaces added, or a pre-tokenizer that "
        "splits otherwise.",
    ),
    "vocabulary_parity": Explained(
        measures="The share of tokens that come out as in training, in texts that hold the whole vocabulary.",
        evidence=HOP,
        bound="a share of 1; fixed",
        fails="The conversion lost added tokens or merges, renumbered some, or names another pre-tokenizer.",
    ),
    "template_carried": Explained(
        measures="Whether the model carries the chat template of the training, to the letter.",
        evidence=HOP,
        bound="yes (1); fixed",
        fails="The exporter wrote none, or the base's own instead of the recipe's.",
    ),
    "distribution_parity": Explained(
        measures="The mean KL divergence, in nats, of the model's next-token distributions from those of the model it "
        "was made from, over fixed texts and training rows.",
        evidence=HOP,
        bound=f"at most expect.export_kl_mean_max of this export, or else {told('kl_mean')}",
        fails="Too coarse a quantization, a constant that is read otherwise (rope, scale), a doubled adapter, or other "
        "weights.",
    ),
    "distribution_worst": Explained(
        measures="The largest KL divergence, in nats, at any of these positions.",
        evidence=HOP,
        bound=f"at most {told('kl_max')}; fixed by format",
        fails="As for distribution_parity; at one place alone often a quantization that is too coarse for a rare "
        "token.",
    ),
    "greedy_parity": Explained(
        measures="The share of greedy answers that are the same as the reference's token by token; those that part at "
        "a tie count.",
        evidence=HOP,
        bound=f"at least expect.export_greedy_min of this export, or else {told('greedy')}",
        fails="Too coarse a quantization, another prompt, or other weights or constants.",
    ),
    "stop_parity": Explained(
        measures="Of the answers that the reference ended by itself, the share that this model ends too.",
        evidence=HOP,
        bound=f"at least {told('stopped')}; fixed by format",
        fails="The end-of-turn token is not declared (eos_token_id), weights are too coarse, or "
        "evaluate.max_new_tokens too few.",
    ),
    "stop_tokens": Explained(
        measures="Tokens that the training taught to end an answer with, at which the runtime, left to itself, does "
        "not end one.",
        evidence=HOP,
        bound="0 tokens; fixed",
        fails="The export declares the base's end token only, or none.",
    ),
    "no_special_tokens": Explained(
        measures="Answers in whose text a mark of a turn stands.",
        evidence=HOP,
        bound="0 answers; fixed",
        fails="The runtime does not take the mark for a special token, or does not stop at it.",
    ),
    "learned_parity": Explained(
        measures="Of the probes that the reference answers, the share that this model answers.",
        evidence=HOP,
        bound=f"at least {expect('export_learned_min')}, or where that is less {told('learned')}; of a quantization one probe "
        "may be lost",
        fails="What was learned lies in differences that the quantization rounds away, or the export is of another "
        "run.",
    ),
    "served_parity": Explained(
        measures="The share of answers of the runtime's own server, given messages, that are those of the runtime "
        "given ids.",
        evidence=HOP,
        bound="at least the share that greedy_parity is held to",
        fails="The server renders the conversation by another template, or adds a system message.",
    ),
    "constants_parity": Explained(
        measures="Constants of the architecture (rope, norms, scales, heads, end tokens ...) that the runtime reads as "
        "other values than the reference's.",
        evidence=HOP,
        bound="0 constants; fixed",
        fails="The converter drops or derives a constant, or the runtime reads it under another name.",
    ),
    "merged_once": Explained(
        measures="How often the adapter is in the merged weights, from the weights of base, adapter and merged model.",
        evidence=("compare/merged.json", "train/adapter", "align/adapter"),
        bound=f"within {FACTOR_TOLERANCE:g} of 1; fixed",
        fails="It was merged into a base that held it already, not at all, or with another scale (lora_alpha, "
        "use_rslora).",
    ),
    "merge_exact": Explained(
        measures="Weights of the merged model that are not base + adapter, but for rounding.",
        evidence=("compare/merged.json", "train/adapter", "align/adapter"),
        bound="0 weights; fixed",
        fails="The merge went through a coarser type, left modules out, or changed weights that have no adapter.",
    ),
    "adapter_carried": Explained(
        measures="Tensors of the adapter inside a bundle that are not those that were trained.",
        evidence=HOP,
        bound="0 tensors; fixed",
        fails="The bundle has the adapter of another run, or of before the alignment.",
    ),
    "stored_bits": Explained(
        measures="Bits that a weight takes in the model's files.",
        evidence=HOP,
        bound="at least the bits that its name says (q4_k_m: 4.5); fixed by format",
        fails="It was quantized more coarsely than it is called.",
    ),
}
