"""Names of the places where sabotages patch, for `context.wrap`: `module:function` or `module:Class.method`."""

from __future__ import annotations

# -- data --------------------------------------------------------------------------------------------------------------

ENCODE_SFT = "finetune.data.encode:encode_sft"  # (example, row, *, template, ...): a row of tokens and labels
PROMPT_IDS = "finetune.data.encode:prompt_ids"  # (messages, *, tokenizer, template, system): the tokens of a question
SFT_COLLATOR = "trl.trainer.sft_trainer:DataCollatorForLanguageModeling"  # the class
SFT_COLLATE = f"{SFT_COLLATOR}.torch_call"  # (self, rows): the tensors of a batch
DPO_COLLATE = "trl.trainer.dpo_trainer:DataCollatorForPreference.torch_call"  # (self, pairs): the tensors of a batch

# -- training ----------------------------------------------------------------------------------------------------------

TRAINER = "transformers.trainer:Trainer"  # the class, of SFT and DPO alike: `f"{TRAINER}.log"`
CREATE_OPTIMIZER = f"{TRAINER}.create_optimizer"  # (self): the optimizer
CREATE_SCHEDULER = f"{TRAINER}.create_scheduler"  # (self, num_training_steps, ...): the scheduler
GET_SCHEDULER = "transformers.trainer:get_scheduler"  # (name, ...): the scheduler
TRAINING_STEP = f"{TRAINER}.training_step"  # (self, model, batch, ...): the loss, forward and backward
ITEMS_IN_BATCH = f"{TRAINER}._get_num_items_in_batch"  # (self, batches, device): what a loss is divided by
ADAMW_STEP = "torch.optim.adamw:AdamW.step"  # (self): changes the weights
SFT_TRAINER = "trl.trainer.sft_trainer:SFTTrainer"  # the class, a `Trainer`
SFT_LOSS = f"{SFT_TRAINER}.compute_loss"  # (self, model, inputs, ...): the loss
DPO_CONFIG = "trl.trainer.dpo_config:DPOConfig.__init__"  # (self, ..., **options)
USE_ADAPTER = "trl.trainer.dpo_trainer:use_adapter"  # (model, adapter_name): the model as reference
GET_PEFT_MODEL = "peft:get_peft_model"  # (model, config, ...): the model with an adapter
LOAD_TRAINED_MODEL = "finetune.backends.torch.training:load_model"  # (...): the model that is trained
LOAD_TRAINED_ADAPTER = "finetune.backends.torch.training:load_adapter"  # (...): the adapter that alignment goes on with
RESUME_WEIGHTS = f"{TRAINER}._load_from_checkpoint"  # (self, checkpoint, model)
RESUME_OPTIMIZER = f"{TRAINER}._load_optimizer_and_scheduler"  # (self, checkpoint), None where nothing is resumed

# -- evaluating --------------------------------------------------------------------------------------------------------

EVALUATE = "finetune.stages.evaluate"  # the module of the stage: `f"{EVALUATE}:_ask"`
PERPLEXITY = f"{EVALUATE}:_perplexity"  # (backend, handle, texts, tokenizer): what is found of held-out texts
IS_CORRECT = "finetune.evaluation.answers:is_correct"  # (text, answer, match): whether an answer is right
PHASES = "finetune.run.evidence:phases"  # (run, recipe): the model and adapter of base, trained, aligned
GENERATE = "transformers.generation.utils:GenerationMixin.generate"  # (self, *, input_ids, attention_mask, ...)
GENERATION_CONFIG = "finetune.backends.torch.inference:GenerationConfig"  # (**options)

# -- merging, exporting, serving ---------------------------------------------------------------------------------------

MERGE = "finetune.backends.torch.merging:merge"  # (model, adapter, out, ...): the folder of the merged model
LORA_DELTA = "peft.tuners.lora.layer:Linear.get_delta_weight"  # (self, adapter): what is added to a layer's weight
EXPORT_SOURCE = "finetune.stages.export:_source"  # (...): what is exported: model, base, adapter
SERVED_MODEL = "finetune.serving.models:final"  # (run, recipe): the model that is served
SERVER = "finetune.backends.torch.server"  # the module of the server: `f"{SERVER}:application"`
SERVED_REQUEST = f"{SERVER}:Handler._build_generation_config"  # (self, body, ...): how a request is answered
