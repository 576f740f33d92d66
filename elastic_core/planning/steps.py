"""What the steps around the training stages take: data, rankings, shapes, evaluation, publishing.

Planned from above: every measurement that a step may make is made, each at the full model. These steps run on one GPU
or on none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elastic_core.budget import Serving
from elastic_core.comparison import sizes_to_compare
from elastic_core.cost import DTYPE_BYTES, MemoryCost, shapes, subnet_params
from elastic_core.layers.kind import FLOAT32_BYTES
from elastic_core.planning.flops import forward_flops
from elastic_core.planning.machine import ELSEWHERE, Locality
from elastic_core.recipe import Recipe, Stage
from elastic_core.router import ElasticModel
from elastic_core.search import Space
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.losses import default_chunk_tokens
from elastic_core.training.resume import KEPT_CHECKPOINTS

# Of a tokenizer on one core; 100,000 to 450,000 are reported, by vocabulary and text.
TOKENS_PER_CORE_SECOND = 150_000
TOKEN_BYTES = 4
TEXT_BYTES = 4  # of a token, in the files that it is read from
ADAMW_BYTES = 3 * FLOAT32_BYTES  # of a parameter in a checkpoint: the weight and its two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A step of the pipeline that is no training stage.

    `flops` are on one GPU, whose memory is `memory` bytes at the peak; both are 0 where a step needs none. `decoded`
    tokens are generated one after another, up to 32 texts at once. `moved` bytes come from or go to other hosts. `disk`
    is what stays there, `scratch` what is there meanwhile.
    """

    name: str
    flops: int = 0
    memory: int = 0
    decoded: int = 0
    core_hours: float = 0.0
    moved: int = 0
    disk: int = 0
    scratch: int = 0


def data_tokens(recipe: Recipe) -> int:
    """Tokens to prepare: what the sources may give; where one has no limit, at least what the longest reader reads."""
    limits = [source.max_tokens for source in recipe.data.sources]
    limited = sum(limit for limit in limits if limit is not None)
    if None not in limits:
        return limited
    stages = [*recipe.stages, *([recipe.teacher.pretrain.stage()] if recipe.teacher.pretrain else [])]
    return max(limited, round(max(stage.tokens for stage in stages) / (1 - recipe.data.heldout_fraction)))


class Around:
    """The steps of a recipe around its stages, for a teacher of the geometry `elastic.config`."""

    def __init__(
        self, recipe: Recipe, elastic: ElasticModel, subnets: Mapping[str, Subnet], locality: Locality = ELSEWHERE
    ) -> None:
        self.recipe, self.locality, self.subnets = recipe, locality, subnets
        self.elastic, self.model = elastic, elastic.config
        self.full = full_subnet(self.model)
        self.teacher_bytes = DTYPE_BYTES[recipe.dtype] * subnet_params(self.model, self.full)
        self.slice_bytes = [DTYPE_BYTES[recipe.dtype] * subnet_params(self.model, s) for s in subnets.values()]

    def before(self) -> Iterator[StepPlan]:
        """Until the first stage."""
        if self.recipe.teacher.pretrain is None:
            brought = 0 if self.locality.has_teacher else self.teacher_bytes
            yield StepPlan(name="teacher", moved=brought, disk=brought)
        yield self.data()
        if self.recipe.importance.hidden == "principal":
            yield self.rotation()
        yield self.ranking()
        yield StepPlan(name="reorder", disk=self.teacher_bytes)
        if self.recipe.shapes.by == "measured":
            yield self.shapes("shapes")
        if self.recipe.importance.comparison_tokens:
            yield self.orders()

    def after_stage(self, stage: Stage) -> Iterator[StepPlan]:
        """The shapes that are measured again once a stage's router has trained."""
        if self.recipe.shapes.by == "measured" and stage.router.mode != "frozen":
            yield self.shapes(f"shapes after {stage.name}")

    def after(self) -> Iterator[StepPlan]:
        """From the last stage to the registry."""
        yield StepPlan(name="slices", disk=sum(self.slice_bytes))
        yield self.evaluation()
        nested = self.recipe.storage == "nested"
        published = self.teacher_bytes if nested else self.teacher_bytes + sum(self.slice_bytes)
        yield StepPlan(
            name="publish",
            moved=published,
            disk=published if self.locality.has_store else 0,
            scratch=published if nested else 0,
        )

    def data(self) -> StepPlan:
        """Files of S3 are copied before they are read; how many more they hold than the run takes is not known."""
        tokens, sources = data_tokens(self.recipe), self.recipe.data.sources
        limits = [source.max_tokens for source in sources if source.path.startswith("s3://")]
        copied = sum(tokens if limit is None else limit for limit in limits)
        learned = any(source.train_on == "assistant" for source in self.recipe.data.sources)
        return StepPlan(
            name="data",
            core_hours=tokens / TOKENS_PER_CORE_SECOND / 3600,
            moved=tokens * TEXT_BYTES,
            disk=tokens * (TOKEN_BYTES + learned),
            scratch=min(copied, tokens) * TEXT_BYTES,
        )

    def rotation(self) -> StepPlan:
        """A forward pass for the covariance of the residual stream, and another copy of the teacher."""
        settings = self.recipe.importance
        forward = forward_flops(self.model, self.full, settings.sequence_length)
        return StepPlan(
            name="rotation",
            flops=settings.samples * forward.total,
            memory=self.forward_bytes(settings.batch_size * settings.sequence_length),
            disk=self.teacher_bytes,
        )

    def ranking(self) -> StepPlan:
        """The width scores, and the rounds of layer removal, as if no candidate of a round were dropped early."""
        settings, depth = self.recipe.importance, self.elastic.axes.depth[-1]
        length, layers = settings.sequence_length, self.model.num_layers
        forward = forward_flops(self.model, self.full, length)
        rounds = range(depth + 1, layers + 1)
        runs = sum(left * (left - 1) // 2 + 2 * left for left in rounds) + (layers if rounds else 0)
        of_a_layer = (forward.total - forward.head) // layers
        samples = max(1, settings.depth_samples // settings.batch_size) * settings.batch_size
        kept = samples * length * self.model.hidden_size * DTYPE_BYTES[self.recipe.dtype]
        return StepPlan(
            name="ranking",
            flops=settings.samples * forward.total + samples * runs * of_a_layer,
            memory=self.forward_bytes(settings.batch_size * length) + kept,
        )

    def shapes(self, name: str) -> StepPlan:
        """Every single cut, and as many subnets as the search may measure, each a forward pass and its loss."""
        settings = self.recipe.shapes
        measured = len(list(Space(self.elastic).single_cuts())) + settings.measurements + 1
        forward = forward_flops(self.model, self.full, settings.sequence_length)
        kept = settings.samples * settings.sequence_length * self.model.hidden_size * DTYPE_BYTES[self.recipe.dtype]
        batch = settings.batch_size * settings.sequence_length
        return StepPlan(
            name=name,
            flops=measured * settings.samples * (forward.total + forward.head),
            memory=self.forward_bytes(batch) + kept + self.loss_bytes(batch),
        )

    def orders(self) -> StepPlan:
        """Every cut in the order of importance and in the random ones, and the teacher beside each."""
        settings, evaluation = self.recipe.importance, self.recipe.evaluation
        cuts = sum(map(len, sizes_to_compare(self.elastic.axes, self.model).values())) * (1 + settings.random_orders)
        sequences = max(1, settings.comparison_tokens // evaluation.sequence_length)
        forward = forward_flops(self.model, self.full, evaluation.sequence_length)
        batch = evaluation.batch_size * evaluation.sequence_length
        return StepPlan(
            name="orders",
            flops=2 * cuts * sequences * forward.total,
            memory=self.forward_bytes(batch) + self.loss_bytes(batch),
        )

    def evaluation(self) -> StepPlan:
        """The teacher alone; each slice with the teacher beside it; its cut before training; a random cut."""
        settings, length = self.recipe.evaluation, self.recipe.evaluation.sequence_length
        sequences = max(1, settings.heldout_tokens // length)
        full = forward_flops(self.model, self.full, length).total
        slices = [forward_flops(self.model, subnet, length).total for subnet in self.subnets.values()]
        answers = settings.max_problems * settings.max_new_tokens if settings.problems else 0
        batch = settings.batch_size * length
        return StepPlan(
            name="evaluation",
            flops=sequences * ((1 + len(slices)) * full + 3 * sum(slices)),
            memory=self.forward_bytes(batch) + self.loss_bytes(batch) + self.teacher_bytes,
            decoded=answers * (1 + len(slices)),
        )

    def checkpoints(self, router_params: int) -> int:
        """Bytes of a stage's checkpoints while it trains: those that are kept, and the one that is written."""
        params = subnet_params(self.model, self.full) + router_params
        return (KEPT_CHECKPOINTS + 1) * ADAMW_BYTES * params

    def forward_bytes(self, tokens: int) -> int:
        """The teacher, and a forward pass of so many tokens without caches."""
        serving = Serving(context=tokens, batch=1, dtype=self.recipe.dtype)
        counted = MemoryCost(model=self.model, serving=serving, prefill=tokens)
        layers = set(shapes(self.model, self.full))
        return self.teacher_bytes + max(counted.fixed_peak(self.model.hidden_size), *map(counted.peak, layers))

    def loss_bytes(self, tokens: int) -> int:
        """The hidden states of two models, and a chunk's logits of both and one more like them."""
        hidden, width = self.model.hidden_size, DTYPE_BYTES[self.recipe.dtype]
        rows = min(default_chunk_tokens(self.model.vocab_size, hidden), tokens)
        return 2 * tokens * hidden * width + 3 * rows * self.model.vocab_size * FLOAT32_BYTES
