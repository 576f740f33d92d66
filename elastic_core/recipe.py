"""Everything a run is configured by: frozen dataclasses, validated on construction, filled from YAML or JSON.

`Recipe` is the root. A recipe file fills these classes and nothing more; the Prefect form and the command line are
made from the same classes, so a default lives here or nowhere. Below each field stands one sentence with its unit and
an example: the form, `elastic schema`, flows/recipes/README.md and the errors show it.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from elastic_core.budget import Budget, Dtype, check_order
from elastic_core.geometry import Axes, FfnLayout, ModelConfig
from elastic_core.judging import TEACHER, Reference
from elastic_core.judging import Evaluation as Evaluation
from elastic_core.judging import Promotion as Promotion
from elastic_core.schema import UNKEYED, Strict, checked_name, multiple_of, not_negative, positive
from elastic_core.sources import DataConfig as DataConfig
from elastic_core.sources import DataSource as DataSource
from elastic_core.sources import TemplateArgument as TemplateArgument

Storage = Literal["materialised", "nested"]
Sharding = Literal["full", "hybrid"]

Scores = Literal["added", "activations", "signed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer(Strict):
    """AdamW: the learning rate rises linearly, then stays or falls."""

    learning_rate: float
    """The peak learning rate. Example: `9.0e-5`."""
    warmup_steps: int = 60
    """Steps in which the learning rate rises to its peak. Example: `60`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after its peak: stay, or fall along a cosine. Example: `cosine`."""
    final_fraction: float = 0.1
    """The share of the peak at which a `cosine` ends, from 0 to 1. Example: `0.1`."""
    weight_decay: float = 0.0
    """A step takes the learning rate times this share off every weight. Example: `0.01`."""
    beta1: float = 0.9
    """The decay of the gradient's running mean, from 0 to below 1. Example: `0.9`."""
    beta2: float = 0.95
    """The decay of the squared gradient's running mean, from 0 to below 1. Example: `0.95`."""
    max_grad_norm: float = 1.0
    """The norm to which a larger gradient is scaled down. Example: `1.0`."""

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "max_grad_norm")
        not_negative(self, "warmup_steps", "weight_decay")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction} must lie between 0 and 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: each must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSchedule(Strict):
    """How the router takes part in a stage (arXiv 2511.16664, section on the router)."""

    mode: Literal["soft", "hard", "frozen"] = "soft"
    """What the student runs under: `soft`, probability-weighted masks; `hard`, the sampled choice, which carries the
    selected probability's gradient; `frozen`, the subnets that stand, without masks, while the router learns nothing.
    Example: `frozen`."""
    learning_rate: float = 1e-2
    """The router's own peak learning rate. Example: `1.0e-2`."""
    temperature: tuple[float, float] = (1.0, 0.05)
    """The Gumbel-Softmax temperature at the first step and at the last; it falls exponentially.
    Example: `[1.0, 0.05]`."""
    scale: tuple[float, float] = (1.0, 10.0)
    """What the router's logits are multiplied by at the first step and at the last; it rises linearly.
    Example: `[1.0, 10.0]`."""
    loss_weight: float = 1.0
    """The weight of the router's loss, which is the distance of its expected cost from the budget. Example: `1.0`."""

    def __post_init__(self) -> None:
        positive(self, "learning_rate")
        not_negative(self, "loss_weight")
        if min(*self.temperature, *self.scale) <= 0:
            raise ValueError(f"temperature={self.temperature} and scale={self.scale} must be greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Strict):
    """One stage of distillation: each step trains on one global batch, whose sequences the budgets share."""

    name: str
    """What the stage is called, once in a recipe. Example: `stage1`."""
    sequence_length: int
    """Tokens in a sequence. Example: `8192`."""
    batch_size: int
    """Sequences in a step, over all processes together. Example: `1536`."""
    steps: int
    """Steps of the optimizer. Example: `5166`."""
    budgets: dict[str, float]
    """The share of every global batch that each budget gets, by its name; the shares need not add up to 1.
    Example: `{12b: 0.5, 9b: 0.3, 6b: 0.2}`."""
    optimizer: Optimizer
    """The optimizer of the weights."""
    shares: Literal["by_need", "fixed"] = "by_need"
    """Whether the shares are `fixed`, or follow `by_need` each budget's measured KL to the teacher after the first
    steps, with 5 % at least for each but the full size. Example: `fixed`."""
    full_share: float = 0.05
    """With `by_need`, the share of the full size, which starts at KL 0, from 0 to below 1. Example: `0.1`."""
    budget_rows: int | None = None
    """Sequences in a row that share a budget, a divisor of `batch_size`; unset, as many as there are processes, which
    all run one budget at a time. Example: `8`."""
    router: RouterSchedule = field(default_factory=RouterSchedule)
    """How the router takes part."""
    expert_balance: float = 0.0
    """How far each step moves an expert's selection bias against its load (arXiv 2408.15664); 0 keeps the teacher's.
    Example: `0.001`."""
    micro_batch_size: int = field(default=1, metadata=UNKEYED)
    """Sequences that a process runs at once, a divisor of `batch_size`; a stage that is half done goes on with fewer
    where memory does not hold them. Example: `2`."""
    recompute: bool = field(default=False, metadata=UNKEYED)
    """Whether a layer keeps its input alone until the backward pass, which saves memory and costs a second forward
    pass. Example: `true`."""
    offload: bool = field(default=False, metadata=UNKEYED)
    """Whether the inputs that `recompute` keeps wait in host memory, copied beside the compute. Example: `true`."""
    sharding: Sharding = field(default="full", metadata=UNKEYED)
    """Which processes divide weights, gradients and moments: `full`, all of them; `hybrid`, those of one host, so that
    every host has a copy, and hosts send one another gradients alone, once a step. Example: `hybrid`."""
    checkpoint_every: int = field(default=100, metadata=UNKEYED)
    """The most steps between checkpoints, to which a killed run goes back. Example: `50`."""
    checkpoint_minutes: float = field(default=30.0, metadata=UNKEYED)
    """The most minutes between checkpoints, by the first process's clock. Example: `10`."""
    sources: dict[str, float] | None = None
    """The weight of each source of data that the stage draws from, by its name; unset, the sources' own weights.
    Example: `{books: 0.8, web: 0.2}`."""

    def __post_init__(self) -> None:
        if self.sources is not None and (min(self.sources.values(), default=0) < 0 or not any(self.sources.values())):
            raise ValueError(f"sources={self.sources} must give each source a weight of at least 0, and one a greater")
        positive(self, "sequence_length", "batch_size", "steps", "micro_batch_size")
        positive(self, "checkpoint_every", "checkpoint_minutes")
        not_negative(self, "expert_balance")
        if self.budget_rows is not None:
            positive(self, "budget_rows")
            multiple_of("batch_size", self.batch_size, "budget_rows", self.budget_rows)
        checked_name("stage", self.name)
        if self.offload and not self.recompute:
            raise ValueError("offload=true moves the inputs that recompute keeps; set recompute=true too")
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

    def divides_among(self, processes: int) -> bool:
        """Whether so many processes can each run as many micro-batches, all of them on one budget at a time."""
        together = self.budget_rows or processes
        return self.micro_steps(1) % processes == self.batch_size % together == together % processes == 0

    def rows_together(self, processes: int) -> int:
        """Rows that share a budget with so many processes; ValueError where the batch does not divide among them."""
        together = self.budget_rows or processes
        multiple_of("budget_rows", together, "processes", processes)
        multiple_of("batch_size", self.batch_size, "budget_rows", together)
        return together


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Strict):
    """The task loss: kl_weight x forward KL(teacher || student) + ce_weight x cross-entropy."""

    teacher: Literal["frozen", "trainable"] = "frozen"
    """Who teaches: `frozen`, a copy of the checkpoint teaches every budget; `trainable`, the full budget teaches the
    smaller ones and itself learns from cross-entropy. Example: `trainable`."""
    kl_weight: float = 1.0
    """The weight of the KL, at least 0. Example: `1.0`."""
    ce_weight: float = 0.0
    """The weight of the cross-entropy, at least 0. Example: `0.1`."""
    temperature: float = 1.0
    """What the logits of teacher and student are divided by in the KL. The paper does not name its own; the tiny recipe
    has the least KL at 4, and the least held-out loss at 1. Example: `2.0`."""

    def __post_init__(self) -> None:
        positive(self, "temperature")
        if self.kl_weight < 0 or self.ce_weight < 0 or self.kl_weight + self.ce_weight == 0:
            raise ValueError(f"kl_weight={self.kl_weight}, ce_weight={self.ce_weight}: one must be greater than 0")
        if self.teacher == "trainable" and self.ce_weight == 0:
            raise ValueError("teacher=trainable needs ce_weight > 0; without it the full budget has nothing to learn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining(Strict):
    """A teacher trained from nothing, for recipes without one: a tokenizer, then cross-entropy on the data."""

    model: ModelConfig
    """The geometry of the teacher."""
    sequence_length: int
    """Tokens in a sequence. Example: `8192`."""
    batch_size: int
    """Sequences in a step, over all processes together. Example: `32`."""
    steps: int
    """Steps of the optimizer. Example: `1350`."""
    optimizer: Optimizer
    """The optimizer of the weights."""
    micro_batch_size: int | None = field(default=None, metadata=UNKEYED)
    """Sequences that a process runs at once, a divisor of `batch_size`; unset, the whole batch. Example: `4`."""
    tokenizer_bytes: int = 2_000_000
    """Bytes of text that the tokenizer is trained on, at most. Example: `100000000`."""

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
    """The checkpoint to start from: one that is there, or one to train."""

    path: str | None = None
    """Where the checkpoint is: a directory, `s3://bucket/prefix`, or `org/name` on the Hub, with `@revision` to pin it;
    this or `pretrain`. Example: `nvidia/NVIDIA-Nemotron-Nano-12B-v2`."""
    model: ModelConfig | None = None
    """The geometry expected at `path`: it lets `elastic plan` work without a download, and is compared with the
    checkpoint's config.json.
    """
    pretrain: Pretraining | None = None
    """How to train a teacher first; this or `path`."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pretrain is None):
            raise ValueError("name either path or pretrain, and not both")
        if self.path == "":
            raise ValueError("path is empty; name a directory, s3://... or org/name")
        if self.pretrain is not None and self.model is not None:
            raise ValueError("model describes the checkpoint at path; a teacher that is trained has pretrain.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance(Strict):
    """How the teacher's components are ranked, and how the rankings are compared with random orders."""

    samples: int = 1024
    """Calibration sequences for the scores of the widths. Example: `256`."""
    sequence_length: int = 8192
    """Tokens in a calibration sequence. Example: `8192`."""
    batch_size: int = 1
    """Calibration sequences run at once. Example: `4`."""
    depth_samples: int = 64
    """Calibration sequences for the ranking of the layers, which runs each many times. Example: `16`."""
    hidden: Literal["principal", "channels"] = "principal"
    """What of the residual stream is ranked: its `principal` components, to which it is rotated first without changing
    the teacher's function, and of which a cut loses far less; or, as in arXiv 2511.16664, the teacher's own `channels`.
    Example: `channels`."""
    scores: Scores = "added"
    """What heads, channels and neurons are ranked by: `added`, the norm of what they add to the residual stream;
    `activations`, the absolute activations of arXiv 2511.16664, of which a cut loses more; `signed`, its letter, which
    sums a Mamba channel's inputs with their signs. Example: `activations`."""
    comparison_tokens: int = 32_768
    """Held-out tokens on which cutting in the order of importance is compared with cutting in random orders; 0 leaves
    the comparison out, on which nothing else depends. Example: `4096`."""
    random_orders: int = 5
    """Random orders to compare with, at least 2. Example: `5`."""

    def __post_init__(self) -> None:
        positive(self, "samples", "sequence_length", "batch_size", "depth_samples")
        not_negative(self, "comparison_tokens")
        if self.random_orders < 2:
            raise ValueError(f"random_orders={self.random_orders} must be at least 2, so that they have a spread")

    @property
    def ranking(self) -> "Importance":
        """These settings but for those of the comparison: a change of those ranks nothing anew."""
        default = Importance()
        return replace(self, comparison_tokens=default.comparison_tokens, random_orders=default.random_orders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes(Strict):
    """How each budget's subnet is chosen."""

    by: Literal["measured", "router"] = "measured"
    """`measured`: before training, and after a stage whose router learned, subnets within the budgets are cut from the
    teacher, and the one with the least KL to it is taken; `router`: as arXiv 2511.16664 has it, the router starts from
    nothing and its most likely choice is taken. Example: `router`."""
    samples: int = 4
    """Calibration sequences that a cut is measured on. Example: `16`."""
    sequence_length: int = 8192
    """Tokens in such a sequence. Example: `8192`."""
    batch_size: int = 1
    """Sequences run at once. Example: `4`."""
    measurements: int = 600
    """Subnets to measure at most, a forward pass over all samples each. Example: `200`."""

    def __post_init__(self) -> None:
        positive(self, "samples", "sequence_length", "batch_size", "measurements")


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(Strict):
    """The router's size; its schedule belongs to each stage."""

    hidden_size: int = 256
    """Neurons in the hidden layer of each axis's MLP. Example: `256`."""

    def __post_init__(self) -> None:
        positive(self, "hidden_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Strict):
    """A whole run: from a teacher and a dataset to a registered family."""

    family: str
    """What the family is called; its members are registered as `FAMILY-BUDGET`. Example: `nano`."""
    teacher: Teacher
    """The checkpoint to start from."""
    data: DataConfig
    """The documents to train and measure on."""
    axes: Axes
    """The sizes that each part of the model may take."""
    budgets: tuple[Budget, ...]
    """The sizes to make, from the largest to the smallest. Example: `[{name: 12b}, {name: 9b, params: 8900000000}]`."""
    stages: tuple[Stage, ...]
    """The stages of distillation, in their order."""
    importance: Importance = field(default_factory=Importance)
    """How the teacher's components are ranked."""
    shapes: Shapes = field(default_factory=Shapes)
    """How each budget's subnet is chosen."""
    router: Router = field(default_factory=Router)
    """The router's size."""
    distillation: Distillation = field(default_factory=Distillation)
    """The loss that the family learns from."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """What is measured of every budget."""
    references: tuple[Reference, ...] = ()
    """Models beside the family in the table of benchmarks.
    Example: `[{name: Qwen3-8B, published: {math-500: 96.3}, source: "arXiv 2511.16664, table 1"}]`."""
    promotion: Promotion = field(default_factory=Promotion)
    """The gate to `champion`."""
    latency_table: str | None = None
    """The file of `elastic profile` that latency budgets are counted by; needed for those alone.
    Example: `h100.json`."""
    dtype: Dtype = "bfloat16"
    """The floating-point type that the models compute in. Example: `float32`."""
    ffn_layout: FfnLayout = "padded"
    """How slices hold widths of FFN layers and experts that differ by layer: `padded` with zeros to one width, or as a
    `list`. Of FFN layers no engine loads one; of experts SGLang and llama.cpp do. Example: `list`."""
    storage: Storage = "materialised"
    """How slices are published: `materialised`, each whole, for every MLflow client; `nested` in one another, for
    `elastic pull`, at the storage of the largest. Example: `nested`."""
    seed: int = 0
    """The seed of everything random in a run. Example: `1`."""

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
        sources = [source.name for source in self.data.sources if source.name is not None]
        for stage in self.stages:
            for name in stage.budgets:
                if name not in names:
                    raise ValueError(f"stage {stage.name}: budget {name!r} is not one of {', '.join(names)}")
            for name in stage.sources or ():
                if name not in sources:
                    known = f"one of {', '.join(sources)}" if sources else "named in data.sources"
                    raise ValueError(f"stage {stage.name}: source {name!r} is not {known}")
        self._check_judging(names)

    def _check_judging(self, budgets: list[str]) -> None:
        """ValueError for a taken name, an unknown benchmark, a gate on unknown weights, slices that no engine loads."""
        benchmarks = [benchmark.name for benchmark in self.evaluation.benchmarks]
        known = f"one of {', '.join(benchmarks)}" if benchmarks else "in evaluation.benchmarks, which is empty"
        taken = [TEACHER, *budgets]
        for reference in self.references:
            if reference.name in taken:
                raise ValueError(f"reference {reference.name!r} has the name of another model; give it its own")
            taken.append(reference.name)
            for name in reference.published:
                if name not in benchmarks:
                    raise ValueError(f"reference {reference.name!r}: benchmark {name!r} is not {known}")
        for name in self.promotion.benchmarks:
            if name not in benchmarks:
                raise ValueError(f"promotion.benchmarks: {name!r} is not {known}")
        endpoint = self.evaluation.endpoint
        if self.promotion.benchmarks and endpoint is not None and endpoint.doubt:
            raise ValueError(f"promotion.benchmarks: {endpoint.doubt}")
        if self.evaluation.engine is not None and self.ffn_layout == "list":
            raise ValueError("evaluation.engine: neither vllm nor transformers loads ffn_layout list; choose padded")
