"""Records of the run as a whole: its manifest, its verdicts, the report that every stage leaves."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from finetune.run.records import Time, record
from finetune.run.records.trained import Adapted


@record
class Gpu(TypedDict):
    name: str
    memory_bytes: int


@record
class Seeds(TypedDict):
    seed: int
    data_seed: int


@record
class Git(TypedDict):
    sha: str
    dirty: bool


@record
class Seal(TypedDict):
    """What a run was when the last command on it ended: the lines of the log, the digest of the last one, and of every
    file that no stage left (what stages leave is in their reports, whose digests are in the log)."""

    lines: int
    last: str
    files: dict[str, str]


@record
class Manifest(TypedDict):
    """On what, with what and from what a run was made. `digest` is that of all the rest (`finetune.run.seal`)."""

    time: str
    command: str
    directory: str
    finetune: str
    python: str
    packages: dict[str, str]
    platform: str
    cpu: str
    cores: int | None
    threads: dict[str, str]
    memory_bytes: int
    gpus: list[Gpu]
    seeds: dict[str, Seeds]
    git: Git | None
    data: NotRequired[dict[str, str]]  # from `prepare` on
    model: NotRequired[dict[str, str]]  # from `fetch` on
    kept: NotRequired[dict[str, list[str]]]  # trainings made with other code or libraries, and what differs
    schema: NotRequired[int]  # version 0.1 wrote none, nor a seal
    seal: NotRequired[Seal]
    digest: NotRequired[str]


@record
class StoredVerdict(TypedDict):
    name: str
    passed: bool | None
    measured: float | None
    compare: str
    bound: float | None
    unit: str
    evidence: str
    why: str
    outcome: str
    remedy: str


@record
class StoredVerdicts(TypedDict):
    time: str
    passed: bool
    verdicts: list[StoredVerdict]
    cause: NotRequired[str]
    schema: NotRequired[int]  # version 0.1 wrote none


@record
class Peak(TypedDict):
    """Bytes: of the process (resident set), and of the device where there is one."""

    process: int
    device: NotRequired[int]


@record
class MadeWith(TypedDict):
    """What computed a stage (`finetune.run.fingerprint`); of a training that was taken over from version 0.1, what is known."""

    python: str
    libraries: dict[str, str]
    modules: NotRequired[dict[str, str]]
    finetune: NotRequired[str]


class _Report(TypedDict):
    """What every stage's report says; see `finetune.run.report.Report`."""

    stage: str
    fingerprint: str
    started: Time
    seconds: float
    artifacts: dict[str, str]
    peak: Peak
    notes: list[str]
    asked: NotRequired[str | None]  # these four are not there in a run of version 0.1
    files: NotRequired[dict[str, str]]
    made_with: NotRequired[MadeWith]
    schema: NotRequired[int]


@record
class FetchMetrics(TypedDict):
    bytes: int
    seconds: float
    parameters: NotRequired[int]  # of safetensors only


@record
class PrepareMetrics(TypedDict):
    """Entropies are in nats a token; what is not there was not asked for (rows of SFT, pairs)."""

    vocab_size: int
    template_sha256: str
    rows: NotRequired[int]
    eval_rows: NotRequired[int]
    tokens: NotRequired[int]
    trained_tokens: NotRequired[int]
    trained_tokens_min: NotRequired[int]
    longest_row: NotRequired[int]
    lost_answer_tokens: NotRequired[int]
    unigram_entropy: NotRequired[float]
    uniform_entropy: NotRequired[float]
    preference_rows: NotRequired[int]


@record
class TrainMetrics(TypedDict):
    """What a backend says of a training (see `Backend.train`), and what its steps add up to."""

    trainable_parameters: int
    frozen_parameters: int
    quantized_parameters: NotRequired[int]
    quantized_bytes: NotRequired[int]
    weight_bytes: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    frozen_sha256_before: str
    frozen_sha256_after: str
    world_size: int
    device: NotRequired[str]  # the fake backend of version 0.1 told neither this nor the next two so marked
    steps: int
    planned_steps: int
    stopped: bool
    resumed_from: int | None
    steps_without_effect: int
    first_move: NotRequired[float | None]  # a resumed optimizer has a past, and no first step; what is no Adam has none
    clipped_norm: NotRequired[
        float | None
    ]  # the largest that the optimizer got; None: it was resumed after its last step
    steps_watched: NotRequired[int]  # these four are not there in a run of version 0.1; parts that were resumed count
    plans: NotRequired[list[list[int]]]  # [first step but one, steps planned] of each part that had a plan of its own
    changed: NotRequired[list[str]]  # what became another on the way (--resume --changed)
    unexamined: NotRequired[list[int]]  # steps of checkpoints of an earlier version that it went on from
    adaptations: NotRequired[list[Adapted]]  # what it did to go on where it could not (on_oom, on_nan)
    optimized_parameters: NotRequired[int]
    weight_decay: NotRequired[float]  # version 0.1 on MLX told none
    adam_beta1: NotRequired[float]  # an Adam's, these three
    adam_beta2: NotRequired[float]
    adam_epsilon: NotRequired[float]
    lora_dropout: NotRequired[float | None]  # an adapter's
    first_loss: float
    last_loss: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float | None
    seconds_per_step: float


@record
class CountMetrics(TypedDict, total=False):
    bytes: int
    exports: int
    hops: int
    experiments: list[str]


@record
class FetchReport(_Report):
    metrics: FetchMetrics


@record
class PrepareReport(_Report):
    metrics: PrepareMetrics


@record
class TrainReport(_Report):
    metrics: TrainMetrics


@record
class EvaluateReport(_Report):
    metrics: dict[str, float]  # a share or a perplexity, by kind of question and phase


@record
class CountReport(_Report):
    metrics: CountMetrics
