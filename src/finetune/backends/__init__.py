"""What computes. Only paths, strings, plain numbers and the opaque handle from `load` cross this line.

Verbs: `load`, `train` (yields steps), `score`, `distributions`, `generate`, `merge`; and those that read without
computing: `tokenizer`, `render` (a conversation to ids, the runtime's own way), `constants` (what the runtime takes a
model's constants to be), and `tensors` (what is stored in a model or adapter directory). Python code that comes with a
model runs where `trust_remote_code` is True, and nobody is asked: where it is needed and False, UsageError.

A `model` is what the runtime loads: a Hugging Face directory (torch), an MLX directory (mlx), a GGUF file (llamacpp),
a Modelfile (ollama).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from finetune.core.errors import UsageError
from finetune.core.lookup import find
from finetune.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from finetune.recipe import Recipe

BACKENDS: dict[str, str] = {
    "torch": "finetune.backends.torch:TorchBackend",
    "fake": "finetune.backends.fake:FakeBackend",
    "llamacpp": "finetune.backends.llamacpp:LlamaCppBackend",
    "mlx": "finetune.backends.mlx:MlxBackend",
    "ollama": "finetune.backends.ollama:OllamaBackend",
}


Constant = float | int | bool | str | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. `rows` is a JSONL file: SFT `input_ids`, `labels` (-100: not trained), `row`; DPO `prompt_ids`,
    `chosen_ids`, `rejected_ids`, `row`. `options` are the recipe section's keys. `model`, `adapter`, `out` are
    directories; checkpoints go to `out/checkpoint-N`, the result to `out/adapter` (LoRA) or `out/model` (full)."""

    objective: str  # sft | dpo
    method: str  # lora | full
    model: Path
    out: Path
    rows: Path
    options: Mapping[str, Any]
    lora: Mapping[str, Any] | None = None
    adapter: Path | None = None
    eval_rows: Path | None = None
    resume: Path | None = None
    chat_template: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # dtype, device, attn_implementation, trust_remote_code
    name: str = "run"  # what trackers call this training
    identity: str = ""  # the record that checkpoints hold (`finetune.run.identity.leave`); empty: none
    should_stop: Callable[[], bool] = lambda: False  # asked after every step; True saves a checkpoint and ends early


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step as it happened. `loss` is the mean over trained tokens (nats); `rows` the data rows in it;
    `skipped` counts those told of here that changed nothing (`on_nan: skip`): `loss` is that of the others, if there are any;
    `extra` holds what else the trainer logged (DPO: rewards/margins, rewards/accuracies, ...)."""

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    tokens: int
    trained_tokens: int
    rows: tuple[int, ...] = ()
    epoch: float = 0.0
    skipped: int = 0
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model answered. `finish` is `stop` (an end-of-turn token, not in `ids`) or `length`."""

    ids: tuple[int, ...]
    text: str
    finish: str


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One stored tensor: `sha256` of its bytes, `shape`, `norm` (Euclidean)."""

    sha256: str
    shape: tuple[int, ...]
    norm: float


@runtime_checkable
class Backend(Protocol):
    """The contract; `tests/contract.py` runs the same tests against every implementation.

    `checkpoint_files` are patterns; a checkpoint without a file of each has not the state to go on with.
    Where `trains` is False, `train`, `merge` and `tensors` raise UsageError (see InferenceOnly); where `scores` is False,
    `score` and `distributions` do, since the runtime tells no probabilities of given tokens.
    """

    name: str
    trains: bool
    scores: bool
    checkpoint_files: tuple[str, ...]

    def tokenizer(self, model: Path, *, trust_remote_code: bool = False) -> Tokenizer: ...

    def load(self, model: Path, adapter: Path | None = None, **settings: Any) -> Any: ...

    def train(self, job: Job) -> Generator[Step, None, dict[str, Any]]:
        """Yield every optimizer step; when the iterator ends, the result is on disk, or, where `job.should_stop` ended it
        early, a checkpoint. A checkpoint appears once the next step is asked for, so that its own is in the log by then;
        `close()` leaves none. A step that fails is a StepError (backends/failing.py); a loss or gradient that is no finite
        number is one too, before it changes a weight, unless the option `on_nan` is `skip` or `ignore`. Of the step before
        there is a checkpoint then, but not for `rollback`, which goes back further. `return` value: a dict of facts
        (trainable and frozen counts, digests, bytes, `steps`, `stopped`)."""
        ...

    def score(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Natural-log probability of every target token of (context ids, target ids)."""
        ...

    def distributions(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], out: Path) -> None:
        """Write to `out` (a NumPy `.npy` file: float32, target positions x vocabulary) the natural-log probabilities of
        every token at every target position of (context ids, target ids), pair after pair."""
        ...

    def generate(self, handle: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Greedy continuation of every prompt, ended by what the runtime itself takes for an end of turn."""
        ...

    def render(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
    ) -> list[list[int] | str]:
        """The ids that the runtime, with the template and tokenizer stored in the model, would prompt itself with for
        an answer to each conversation (`role`, `content`); a text says why it refuses one."""
        ...

    def constants(self, model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
        """What the runtime takes the model's constants to be, under Hugging Face's names (see CONSTANTS); those that it
        does not tell are left out."""
        ...

    def merge(self, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        """Write base + adapter as one model directory, tokenizer included."""
        ...

    def tensors(self, directory: Path) -> dict[str, TensorFacts]: ...


@runtime_checkable
class Serves(Protocol):
    """What a backend whose runtime has a server of its own can do besides."""

    def chat(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_new_tokens: int
    ) -> list[Generation]:
        """The server's greedy answers to messages, as a client gets them: text and finish, no ids."""
        ...


# Constants of an architecture that a runtime may read differently; `rope_theta` is the position encoding's base.
CONSTANTS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rope_theta", "norm_eps", "tie_word_embeddings",
    "sliding_window", "eos_token_id", "bos_token_id", "add_bos_token",
)  # fmt: skip


class InferenceOnly:
    """What a backend that only runs models says to the verbs that make them."""

    name: str
    trains = False
    checkpoint_files: tuple[str, ...] = ()

    def train(self, job: Job) -> Generator[Step, None, dict[str, Any]]:
        raise self._refusal("train")

    def merge(self, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        raise self._refusal("merge")

    def tensors(self, directory: Path) -> dict[str, TensorFacts]:
        raise self._refusal("read tensors")

    def _refusal(self, verb: str) -> UsageError:
        return UsageError(f"the backend '{self.name}' only runs models; it cannot {verb}. Set 'backend: torch'")


def get(name: str) -> Backend:
    """The backend of that name."""
    return find("backend", name, BACKENDS)()  # type: ignore[no-any-return]


def tokenizer_of(recipe: Recipe, model: Path) -> Tokenizer:
    """The tokenizer of a model directory, as the recipe's backend reads it."""
    return get(recipe.backend).tokenizer(model, trust_remote_code=recipe.model.trust_remote_code)
