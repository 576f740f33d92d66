"""What each training stage takes on so many GPUs: FLOPs, memory, traffic, time, money, and what would make it fit."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from elastic_core.budget import Dtype
from elastic_core.cost import subnet_params
from elastic_core.geometry import ModelConfig
from elastic_core.planning.flops import backward_flops, forward_flops, recomputed_flops
from elastic_core.planning.machine import LEAST_MARGIN, Accelerator
from elastic_core.planning.memory import Memory, MicroStep, activation_bytes, host_bytes, training_memory
from elastic_core.planning.traffic import averaging_traffic, expert_parallel_traffic, micro_step_traffic
from elastic_core.recipe import Distillation, Sharding, Stage
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.curriculum import Need


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFlops:
    """Floating-point operations of a stage: the student's forward and backward passes, the teacher's forward passes,
    and the student's forward passes that recomputation adds."""

    student: int
    teacher: int
    recomputed: int

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.recomputed


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Settings of a stage, or the number of GPUs, that would make it fit, and the bytes on a GPU then."""

    gpus: int
    recompute: bool
    offload: bool
    sharding: Sharding
    micro_batch_size: int
    sequence_length: int
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """A stage on so many GPUs. `micro_steps` is None where its batch does not divide over them.

    `changes` are single changes that make it fit where it does not, or one of several settings where no single one
    does; none, if nothing does.

    `margin` is the share of the usable memory that stays free; a fit is `tight` below `LEAST_MARGIN`. `sent` is what
    one GPU sends in the whole stage, `between_hosts` what leaves all hosts together, in bytes; `between_copies` is what
    would leave them with a copy of the weights on every host, None where there is one or it does not fit, and
    `between_experts` with every expert whole on one GPU, None without experts. `hours` are the longer of `computing`
    and `sending`, which overlap; `larger` is the smallest micro-batch that fits with which sending is not the longer.
    `rare` are the budgets that not every step trains, for their share of it is less than the rows that share a budget.
    """

    gpus: int
    micro_steps: int | None
    memory: Memory
    margin: float
    fits: bool
    sent: int
    between_hosts: int
    between_copies: int | None
    between_experts: int | None
    computing: float
    sending: float
    dollars: float
    larger: Change | None
    changes: tuple[Change, ...]
    rare: tuple[str, ...]

    @property
    def hours(self) -> float:
        return max(self.computing, self.sending)

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours

    @property
    def tight(self) -> bool:
        return self.fits and self.margin < LEAST_MARGIN


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage on every mesh. `flops_at_most` is for a router that always samples the full model.

    `sequence_bytes` is what one sequence's activations take: all saved, and recomputed. No sequence is divided between
    GPUs. `host_bytes` is what offloading takes of the host's memory for each GPU.
    """

    stage: Stage
    sequences: int
    tokens: int
    flops: StageFlops
    flops_at_most: StageFlops
    sequence_bytes: tuple[int, int]
    host_bytes: int
    meshes: tuple[MeshPlan, ...]


@dataclass(frozen=True, slots=True)
class StageWork:
    """A stage with all that its plan depends on; `subnets` by the names of its budgets."""

    model: ModelConfig
    stage: Stage
    distillation: Distillation
    subnets: Mapping[str, Subnet]
    router_params: int
    dtype: Dtype
    accelerator: Accelerator

    def plan(self, gpus: Sequence[int]) -> StagePlan:
        stage, flops = self.stage, self.flops(self.subnets)
        full = full_subnet(self.model)
        widest = self.subnets if stage.router.mode == "frozen" else dict.fromkeys(self.subnets, full)
        one = dataclasses.replace(self.largest(stage), sequences=1)
        return StagePlan(
            stage=stage,
            sequences=stage.steps * stage.batch_size,
            tokens=stage.tokens,
            flops=flops,
            flops_at_most=self.flops(widest),
            sequence_bytes=(
                activation_bytes(self.model, dataclasses.replace(one, recompute=False, offload=False)),
                activation_bytes(self.model, dataclasses.replace(one, recompute=True, offload=False)),
            ),
            host_bytes=host_bytes([self.largest(stage), *self.micro_steps(stage)]),
            meshes=tuple(self.mesh(count, flops.total) for count in gpus),
        )

    def shares(self) -> dict[str, Fraction]:
        """The share of each budget that has any; where shares follow need, as if all cut sizes needed as much."""
        full = full_subnet(self.model)
        need = Need(self.stage, [name for name, subnet in self.subnets.items() if subnet == full])
        need.add(dict.fromkeys(self.stage.budgets, 1.0))
        return {name: Fraction(share) for name, share in need.shares().items() if share > 0}

    def masked(self, subnet: Subnet) -> bool:
        return self.stage.router.mode != "frozen" and subnet != full_subnet(self.model)

    def flops(self, subnets: Mapping[str, Subnet]) -> StageFlops:
        """The FLOPs of the whole stage, with every budget at its subnet of `subnets`."""
        model, length, full = self.model, self.stage.sequence_length, full_subnet(self.model)
        student = teacher = recomputed = Fraction(0)
        for name, share in self.shares().items():
            subnet, masked = subnets[name], self.masked(self.subnets[name])
            student += share * (forward_flops(model, subnet, length) + backward_flops(model, subnet, length)).total
            if self.stage.recompute:
                recomputed += share * recomputed_flops(model, subnet, length, masked=masked).total
            teaches_itself = self.distillation.teacher == "trainable" and self.subnets[name] == full
            if self.distillation.kl_weight > 0 and not teaches_itself:
                teacher += share * forward_flops(model, full, length).total
        sequences = self.stage.steps * self.stage.batch_size
        return StageFlops(
            student=round(sequences * student),
            teacher=round(sequences * teacher),
            recomputed=round(sequences * recomputed),
        )

    def largest(self, stage: Stage) -> MicroStep:
        """The micro-step that needs most: while a router learns, a soft choice may enclose the whole model."""
        steps = self.micro_steps(stage)
        if any(step.masked for step in steps):
            return self.micro_step(stage, full_subnet(self.model), masked=True)
        return max(steps, key=lambda step: subnet_params(self.model, step.subnet))

    def micro_steps(self, stage: Stage) -> list[MicroStep]:
        """The micro-step of each budget that the stage trains."""
        subnets = [self.subnets[name] for name in self.shares()]
        return [self.micro_step(stage, subnet, masked=self.masked(subnet)) for subnet in subnets]

    def micro_step(self, stage: Stage, subnet: Subnet, *, masked: bool) -> MicroStep:
        return MicroStep(
            subnet=subnet,
            masked=masked,
            sequences=stage.micro_batch_size,
            sequence_length=stage.sequence_length,
            recompute=stage.recompute,
            offload=stage.offload,
            distillation=self.distillation,
            dtype=self.dtype,
        )

    def memory(self, stage: Stage, gpus: int) -> Memory:
        shards = self.shards(stage, gpus)
        return training_memory(self.model, self.largest(stage), gpus=shards, router_params=self.router_params)

    def shards(self, stage: Stage, gpus: int) -> int:
        """The number of GPUs that divide the weights."""
        return gpus if stage.sharding == "full" else min(gpus, self.accelerator.on_a_host)

    def mesh(self, gpus: int, flops: int) -> MeshPlan:
        divides = self.divides(self.stage, gpus)
        memory = self.memory(self.stage, gpus)
        fits = divides and memory.total <= self.accelerator.usable
        computing, (sent, between) = self.accelerator.hours(flops) / gpus, self.sent(self.stage, gpus)
        sending = self.sending(self.stage, gpus)
        return MeshPlan(
            gpus=gpus,
            micro_steps=self.stage.micro_steps(gpus) if divides else None,
            memory=memory,
            margin=self.accelerator.margin(memory.total),
            fits=fits,
            sent=sent,
            between_hosts=between,
            between_copies=self.between_copies(gpus) if between else None,
            between_experts=self.between_experts(gpus) if between else None,
            computing=computing,
            sending=sending,
            dollars=gpus * max(computing, sending) * self.accelerator.dollars_per_hour,
            larger=self.larger(gpus, computing) if divides and sending > computing else None,
            changes=() if fits else tuple(self.changes(gpus)),
            rare=tuple(self.rare(gpus)) if divides else (),
        )

    def sent(self, stage: Stage, gpus: int) -> tuple[int, int]:
        """Bytes that one GPU sends in the whole stage, and that leave all hosts together.

        While a router learns, no layer is sure to be left out.
        """
        full, within, layers = full_subnet(self.model), Fraction(0), set[int]()
        shards, hosts = self.shards(stage, gpus), self.hosts(gpus)
        for name, share in self.shares().items():
            subnet = full if self.masked(self.subnets[name]) else self.subnets[name]
            step = dataclasses.replace(self.largest(stage), subnet=subnet)
            within += share * micro_step_traffic(self.model, step, shards).sent(shards)
            layers |= {*subnet.layers}
        within *= Fraction(stage.batch_size, stage.micro_batch_size * gpus)
        if shards == gpus:
            return round(within * stage.steps), round(hosts * within * stage.steps) if hosts > 1 else 0
        averaging = averaging_traffic(self.model, layers, shards, hosts)
        return round((within + averaging) * stage.steps), averaging * gpus * stage.steps

    def hosts(self, gpus: int) -> int:
        return -(-gpus // self.accelerator.on_a_host)

    def sending(self, stage: Stage, gpus: int) -> float:
        """Hours that it takes to send all that a stage sends."""
        sent, between = self.sent(stage, gpus)
        return self.accelerator.sending_hours(sent, between / self.hosts(gpus))

    def larger(self, gpus: int, hours: float) -> Change | None:
        """The smallest larger micro-batch that fits and sends in so many hours."""
        most = self.stage.batch_size // gpus
        sizes = (size for size in range(self.stage.micro_batch_size + 1, most + 1) if most % size == 0)
        stages = (dataclasses.replace(self.stage, micro_batch_size=size) for size in sizes)
        return self.first(gpus, (stage for stage in stages if self.sending(stage, gpus) <= hours))

    def between_experts(self, gpus: int) -> int | None:
        """Bytes of tokens that would leave all hosts in the stage if every expert lay whole on one GPU."""
        by_sequence = Fraction(0)
        for name, share in self.shares().items():
            step = dataclasses.replace(self.largest(self.stage), subnet=self.subnets[name], sequences=1)
            by_sequence += share * expert_parallel_traffic(self.model, step)
        elsewhere = 1 - Fraction(self.accelerator.on_a_host, gpus)
        return round(by_sequence * elsewhere * self.stage.steps * self.stage.batch_size) or None

    def between_copies(self, gpus: int) -> int | None:
        hybrid = dataclasses.replace(self.stage, sharding="hybrid")
        return self.sent(hybrid, gpus)[1] if hybrid != self.stage and self.change(hybrid, gpus) else None

    def divides(self, stage: Stage, gpus: int) -> bool:
        """Whether the batch, and the rows that share a budget, divide among so many GPUs, and these among hosts."""
        together, shards = stage.budget_rows or gpus, self.shards(stage, gpus)
        return stage.batch_size % (stage.micro_batch_size * gpus) == together % gpus == gpus % shards == 0

    def rare(self, gpus: int) -> Iterator[str]:
        places = self.stage.batch_size // self.stage.rows_together(gpus)
        return (name for name, share in self.shares().items() if share * places < 1)

    # What would fit

    def changes(self, gpus: int) -> Iterator[Change]:
        """Single changes that make the stage fit; failing those, the fewest GPUs with everything else at its least."""
        found = [change for change in self.single_changes(gpus) if change is not None]
        if not any(change.sequence_length == self.stage.sequence_length for change in found):
            sparing = dataclasses.replace(self.stage, recompute=True, offload=True, micro_batch_size=1)
            found += [change for change in [self.fewest_gpus(sparing)] if change is not None]
        yield from dict.fromkeys(found)

    def single_changes(self, gpus: int) -> Iterator[Change | None]:
        stage = self.stage
        if not stage.recompute:
            yield self.change(dataclasses.replace(stage, recompute=True), gpus)
        if not stage.offload:
            yield self.change(dataclasses.replace(stage, recompute=True, offload=True), gpus)
        if stage.sharding != "full":
            yield self.change(dataclasses.replace(stage, sharding="full"), gpus)
        smaller = (size for size in range(stage.micro_batch_size - 1, 0, -1) if stage.batch_size % size == 0)
        yield self.first(gpus, (dataclasses.replace(stage, micro_batch_size=size) for size in smaller))
        yield self.fewest_gpus(stage)
        halves = (stage.sequence_length >> power for power in range(1, stage.sequence_length.bit_length()))
        yield self.first(gpus, (dataclasses.replace(stage, sequence_length=length) for length in halves))

    def first(self, gpus: int, stages: Iterator[Stage]) -> Change | None:
        return next((change for stage in stages if (change := self.change(stage, gpus)) is not None), None)

    def fewest_gpus(self, stage: Stage) -> Change | None:
        stage = dataclasses.replace(stage, sharding="full")  # else more hosts hold more copies
        together = stage.batch_size // stage.micro_batch_size
        counts = (count for count in range(1, together + 1) if together % count == 0)
        return next((change for count in counts if (change := self.change(stage, count)) is not None), None)

    def change(self, stage: Stage, gpus: int) -> Change | None:
        """The change to these settings, if they fit."""
        if not self.divides(stage, gpus):
            return None
        memory = self.memory(stage, gpus).total
        if memory > self.accelerator.usable:
            return None
        return Change(
            gpus=gpus,
            recompute=stage.recompute,
            offload=stage.offload,
            sharding=stage.sharding,
            micro_batch_size=stage.micro_batch_size,
            sequence_length=stage.sequence_length,
            memory=memory,
        )
