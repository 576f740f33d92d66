"""Everything a run is configured by: frozen dataclasses, validated on construction, filled from YAML or JSON.

`Recipe` is the root. A recipe file fills these classes and nothing more; the Prefect form and the command line are
made from the same classes, so a default lives here or nowhere.
"""

from dataclasses import dataclass, field
from dataclasses import field as dataclass_field
from typing import Literal

from elastic_core.budget import Budget, Dtype, check_order
from elastic_core.geometry import Axes, FfnLayout, ModelConfig
from elastic_core.schema import Strict, checked_name, multiple_of, not_negative, positive

Storage = Literal["materialised", "nested"]
MambaScores = Literal["absolute", "signed"]
TemplateArgument = str | bool | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource(Strict):
    """Documents to train on: a file, glob or directory, `s3://bucket/prefix`, `hf://org/name`, or `stdlib://`.

    A row that holds `messages_field` goes through the tokenizer's chat template; any other row is its `field`. The
    template is given the row's `tools_field`, the arguments in `chat_template_kwargs` here and in a column of that
    name, and `enable_thinking` where `reasoning_field` says on or off. Where nothing says so, a turn without a thought
    is rendered with thinking turned off, if the template can.

    `special_tokens` text: a special token that a document spells is characters. tokens: it is that token.
    `train_on` assistant: of a chat only what the assistant writes is learned; a text is learned whole.
    `max_skipped` rows that cannot be used are left out; one more is an error.
    """

    path: str
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    field: str = "text"
    messages_field: str = "messages"
    tools_field: str = "tools"
    reasoning_field: str = "reasoning"
    chat_template_kwargs: dict[str, TemplateArgument] = dataclass_field(default_factory=dict)
    special_tokens: Literal["text", "tokens"] = "text"
    train_on: Literal["all", "assistant"] = "all"
    split: str = "train"
    max_documents: int | None = None
    max_tokens: int | None = None
    max_skipped: int = 0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a glob, a directory, s3://, hf:// or stdlib://")
        positive(self, *(name for name in ("max_documents", "max_tokens") if getattr(self, name) is not None))
        not_negative(self, "max_skipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Strict):
    """What the family is trained and measured on.

    Sequences are packed with documents. Where `separate_documents`, none is read after another: state, convolution and
    attention begin anew with each, in training, rankings and held-out losses alike. Else a sequence is one text.
    """

    sources: tuple[DataSource, ...]
    heldout_fraction: float = 0.02
    separate_documents: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer(Strict):
    """AdamW, with a linear warm-up and then a constant or cosine rate down to `final_fraction` of the peak."""

    learning_rate: float
    warmup_steps: int = 60
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "max_grad_norm")
        not_negative(self, "warmup_steps", "weight_decay")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction} must lie between 0 and 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: each must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSchedule(Strict):
    """How the router takes part in a stage (arXiv 2511.16664, section on the router).

    `mode` soft: the student runs under probability-weighted masks. hard: under the sampled choice, which carries the
    selected probability's gradient. frozen: on the subnets resolved from the router as it stands, without masks.
    `temperature` (tau) falls exponentially and `scale` rises linearly, each from its first value to its last.
    """

    mode: Literal["soft", "hard", "frozen"] = "soft"
    learning_rate: float = 1e-2
    temperature: tuple[float, float] = (1.0, 0.05)
    scale: tuple[float, float] = (1.0, 10.0)
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "learning_rate")
        not_negative(self, "loss_weight")
        if min(*self.temperature, *self.scale) <= 0:
            raise ValueError(f"temperature={self.temperature} and scale={self.scale} must be greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Strict):
    """One stage of distillation: `batch_size` sequences of `sequence_length` tokens a step, for `steps` steps.

    `budgets` gives each budget's share of every global batch; shares are exact over the batch (C6). `shares` by_need:
    that holds for the first steps; later a budget's share follows its measured KL to the teacher, and the full size,
    which starts at KL 0, gets `full_share`. `budget_rows` sequences in a row share a budget: as many as there are
    processes unless said, for all processes run one budget at a time, at most `micro_batch_size` sequences at once.
    `recompute` keeps of each layer its input alone until the backward pass, which costs a second forward pass.
    """

    name: str
    sequence_length: int
    batch_size: int
    steps: int
    budgets: dict[str, float]
    optimizer: Optimizer
    shares: Literal["by_need", "fixed"] = "by_need"
    full_share: float = 0.05
    budget_rows: int | None = None
    router: RouterSchedule = field(default_factory=RouterSchedule)
    micro_batch_size: int = 1
    recompute: bool = False
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        positive(self, "sequence_length", "batch_size", "steps", "micro_batch_size", "checkpoint_every")
        if self.budget_rows is not None:
            positive(self, "budget_rows")
            multiple_of("batch_size", self.batch_size, "budget_rows", self.budget_rows)
        checked_name("stage", self.name)
        multiple_of("batch_size", self.batch_size, "micro_batch_size", self.micro_batch_size)
        if not self.budgets or min(self.budgets.values()) < 0 or sum(self.budgets.values()) <= 0:
            raise ValueError(f"budgets={self.budgets} must give each budget a share of at least 0, and some more")
        if not 0 <= self.full_share < 1:
            raise ValueError(f"full_share={self.full_share} must be at least 0 and below 1")

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length

    def micro_steps(self, processes: int) -> int:
        """Micro-batches that each of so many processes runs in a step; ValueError where the batch does not divide."""
        together = self.micro_batch_size * processes
        multiple_of("batch_size", self.batch_size, "micro_batch_size x processes", together)
        return self.batch_size // together

    def rows_together(self, processes: int) -> int:
        """Rows that share a budget with so many processes; ValueError where the batch does not divide among them."""
        together = self.budget_rows or processes
        multiple_of("budget_rows", together, "processes", processes)
        multiple_of("batch_size", self.batch_size, "budget_rows", together)
        return together


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Strict):
    """The task loss: kl_weight x forward KL(teacher || student) at `temperature` + ce_weight x cross-entropy.

    `teacher` frozen: a copy of the checkpoint teaches every budget. trainable: the full budget teaches the smaller
    ones and learns from cross-entropy itself.
    """

    teacher: Literal["frozen", "trainable"] = "frozen"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "temperature")
        if self.kl_weight < 0 or self.ce_weight < 0 or self.kl_weight + self.ce_weight == 0:
            raise ValueError(f"kl_weight={self.kl_weight}, ce_weight={self.ce_weight}: one must be greater than 0")
        if self.teacher == "trainable" and self.ce_weight == 0:
            raise ValueError("teacher=trainable needs ce_weight > 0; without it the full budget has nothing to learn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining(Strict):
    """Train a teacher from nothing, for recipes without one: a tokenizer, then cross-entropy on the data.

    A micro-batch is the whole batch unless `micro_batch_size` says otherwise.
    """

    model: ModelConfig
    sequence_length: int
    batch_size: int
    steps: int
    optimizer: Optimizer
    micro_batch_size: int | None = None
    tokenizer_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        positive(self, "sequence_length", "batch_size", "steps", "tokenizer_bytes")
        if self.micro_batch_size is not None:
            positive(self, "micro_batch_size")
            multiple_of("batch_size", self.batch_size, "micro_batch_size", self.micro_batch_size)

    def stage(self) -> Stage:
        """The same run as a stage at the full budget, so that one training loop serves both."""
        return Stage(
            name="pretrain",
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size or self.batch_size,
            steps=self.steps,
            budgets={"full": 1.0},
            optimizer=self.optimizer,
            router=RouterSchedule(mode="frozen"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher(Strict):
    """The checkpoint to start from: `path` (directory, `s3://...` or `org/name[@revision]`) or `pretrain`, one of them.

    `model` is the geometry expected at `path`: it lets `elastic plan` work without a download, and is checked against
    the checkpoint's config.json when that is fetched.
    """

    path: str | None = None
    model: ModelConfig | None = None
    pretrain: Pretraining | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pretrain is None):
            raise ValueError("name either path or pretrain, and not both")
        if self.path == "":
            raise ValueError("path is empty; name a directory, s3://... or org/name")
        if self.pretrain is not None and self.model is not None:
            raise ValueError("model describes the checkpoint at path; a teacher that is trained has pretrain.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance(Strict):
    """Calibration of the rankings: sequences for the width scores, and (fewer, being run often) for depth.

    `hidden` principal: before anything is ranked, the residual stream is rotated to its principal components, which
    leaves the teacher's function as it is, and then a cut of hidden channels loses far less. channels: the teacher's
    own channels are ranked, as in arXiv 2511.16664. `mamba_scores`: absolute sums |s| over the tokens, s the input of
    the SSM; signed sums s, which is that paper's letter and lets channels of both signs cancel. What cutting in the
    order of importance loses is compared with `random_orders` random orders on `comparison_tokens` held-out tokens.
    """

    samples: int = 1024
    sequence_length: int = 8192
    batch_size: int = 1
    depth_samples: int = 64
    hidden: Literal["principal", "channels"] = "principal"
    mamba_scores: MambaScores = "absolute"
    comparison_tokens: int = 32_768
    random_orders: int = 5

    def __post_init__(self) -> None:
        positive(self, "samples", "sequence_length", "batch_size", "depth_samples", "comparison_tokens")
        if self.random_orders < 2:
            raise ValueError(f"random_orders={self.random_orders} must be at least 2, so that they have a spread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes(Strict):
    """How each budget's subnet is chosen: by the measured loss of its cut, or by the router's word alone.

    `measured`: before training, and after each stage whose router trained, subnets within the budgets are cut from the
    teacher and their KL to it is measured on `samples` calibration sequences; at most `measurements` of them, a forward
    pass each. `router`: as arXiv 2511.16664 has it, the router starts from nothing and its most likely choice is taken.
    """

    by: Literal["measured", "router"] = "measured"
    samples: int = 4
    sequence_length: int = 8192
    batch_size: int = 1
    measurements: int = 600

    def __post_init__(self) -> None:
        positive(self, "samples", "sequence_length", "batch_size", "measurements")


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(Strict):
    """The router's size; its schedule belongs to each stage."""

    hidden_size: int = 256

    def __post_init__(self) -> None:
        positive(self, "hidden_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Strict):
    """What is measured of every budget: held-out tokens, and problems answered by generation (exact match).

    A problem is a chat whose last message is the answer; its template is given `chat_template_kwargs`.
    """

    heldout_tokens: int = 1_000_000
    sequence_length: int = 8192
    batch_size: int = 1
    problems: str | None = None
    max_problems: int = 256
    max_new_tokens: int = 512
    chat_template_kwargs: dict[str, TemplateArgument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(self, "heldout_tokens", "sequence_length", "batch_size", "max_problems", "max_new_tokens")
        if self.problems == "":
            raise ValueError("problems is empty; name a file of problems, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion(Strict):
    """The gate to `champion`: held-out cross-entropy at most `margin` (relative) above the present champion's."""

    margin: float = 0.01

    def __post_init__(self) -> None:
        not_negative(self, "margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Strict):
    """A whole run: from a teacher and a dataset to a registered family.

    `latency_table` is the file of `elastic profile` that latency budgets are counted by. `storage` is how slices are
    published: each whole, for every MLflow client, or nested in one another, for `elastic pull`, at the storage of the
    largest. `ffn_layout` is how slices hold FFN widths that differ by layer: padded with zeros to one width, or as a
    list, which vLLM, transformers and llama.cpp do not load.
    """

    family: str
    teacher: Teacher
    data: DataConfig
    axes: Axes
    budgets: tuple[Budget, ...]
    stages: tuple[Stage, ...]
    importance: Importance = field(default_factory=Importance)
    shapes: Shapes = field(default_factory=Shapes)
    router: Router = field(default_factory=Router)
    distillation: Distillation = field(default_factory=Distillation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    promotion: Promotion = field(default_factory=Promotion)
    latency_table: str | None = None
    dtype: Dtype = "bfloat16"
    ffn_layout: FfnLayout = "padded"
    storage: Storage = "materialised"
    seed: int = 0

    def __post_init__(self) -> None:
        checked_name("family", self.family)
        if "." in self.family:
            raise ValueError(
                f"family {self.family!r} has a '.': CATALOG.SCHEMA.MODEL is a name in Unity Catalog, which registers "
                "MLflow's own model format alone, copied into its own storage, and no checkpoint in S3; leave out the "
                "'.' and use an MLflow registry"
            )
        check_order(self.budgets)
        timed = [b.name for b in self.budgets if b.latency is not None]
        if timed and self.latency_table is None:
            raise ValueError(
                f"budget {timed[0]} is a latency, which needs latency_table: the file that `elastic profile` "
                "measures on the device to serve from"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2^63")
        names, stages = [b.name for b in self.budgets], [s.name for s in self.stages]
        if not stages or len(set(stages)) < len(stages):
            raise ValueError(f"stages {stages} must be at least one, each name once")
        for stage in self.stages:
            for name in stage.budgets:
                if name not in names:
                    raise ValueError(f"stage {stage.name}: budget {name!r} is not one of {', '.join(names)}")
