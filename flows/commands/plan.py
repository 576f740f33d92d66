"""What `elastic plan` prints: a recipe's plan as tables for people, or as JSON for machines."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from elastic_core.cost import DTYPE_BYTES, LatencyTable, budget_cost
from elastic_core.geometry import MOE
from elastic_core.layers.kinds import sizes_text
from elastic_core.planning.machine import DECODED_TOGETHER, LEAST_MARGIN, USABLE_SHARE, Accelerator, Locality
from elastic_core.planning.memory import Memory
from elastic_core.planning.plan import BudgetPlan, RecipePlan
from elastic_core.planning.stages import MeshPlan, StagePlan
from elastic_core.planning.steps import TOKENS_PER_CORE_SECOND, StepPlan
from elastic_core.recipe import Recipe
from elastic_core.schema import to_dict
from flows.commands.terminal import text_table, wide_console
from flows.serving.services import names_a_store
from tasks.reporting.fit import joined, unfit
from tasks.reporting.numbers import counted, human_bytes, human_count, human_seconds, percent

MEMORY_TITLES = {"parameters": "weights", "optimizer": "AdamW"}


def locality_of_runs(recipe: Recipe) -> Locality:
    """What lies where `elastic run` would work: a teacher in a directory, and the store that it brings along."""
    path = recipe.teacher.path
    return Locality(has_teacher=path is not None and Path(path).is_dir(), has_store=not names_a_store())


def counted_problems(recipe: Recipe) -> dict[str, int]:
    """The problems of each benchmark whose files lie here, by its name."""
    here = [each for each in recipe.evaluation.benchmarks if each.path is not None and "://" not in each.path]
    if not here:
        return {}
    from tasks.judging.benchmarks import read_benchmark  # the readers of corpora, which few plans need

    return {each.name: len(read_benchmark(each)) for each in here}


def parse_gpus(text: str) -> tuple[int, ...]:
    """Numbers of GPUs, such as 1,8,64."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--gpus is {text!r}; expected numbers of GPUs, such as 1,8,64")
    return tuple(dict.fromkeys(map(int, parts)))


def plan_json(plan: RecipePlan) -> dict[str, Any]:
    """The plan as plain data, with the totals that it only computes."""
    kept, most = plan.disk
    data = to_dict(plan) | {"feasible": plan.feasible, "fits_on": list(plan.fitting), "disk": kept, "most_disk": most}
    for step, step_data in zip(plan.steps, data["steps"], strict=True):
        step_data |= {"gpu_hours": plan.gpu_hours(step), "dollars": plan.dollars(step)}
    for each, benchmark_data in zip(plan.benchmarks, data["benchmarks"], strict=True):
        benchmark_data |= {"tokens": each.tokens, "gpu_hours": plan.judging_hours(each)}
    for stage, stage_data in zip(plan.stages, data["stages"], strict=True):
        for name in ("flops", "flops_at_most"):
            stage_data[name]["total"] = getattr(stage, name).total
        for mesh, mesh_data in zip(stage.meshes, stage_data["meshes"], strict=True):
            mesh_data["memory"]["total"] = mesh.memory.total
            mesh_data |= {"hours": mesh.hours, "gpu_hours": mesh.gpu_hours}
    return data


def print_plan(plan: RecipePlan, table: LatencyTable | None = None) -> None:
    """Print the plan to standard output: tables, then what they do not show, and what would have to change."""
    console = wide_console()
    share = percent(plan.least_params / plan.teacher_params, 1)
    active = f", {plan.teacher_active_params:,} of them active," if plan.model.layers_of(MOE) else ""
    console.print(
        f"{plan.family}: a teacher of {plan.teacher_params:,} parameters{active} in {plan.model.num_layers} layers; "
        f"its axes reach down to {plan.least_params:,} ({share})",
        highlight=False,
    )
    budgets = [_budget_row(plan, budget, table) for budget in plan.budgets]
    tables = (_stage_rows(plan), _work_rows(plan), _memory_rows(plan), _step_rows(plan), _time_rows(plan))
    benchmarks = [_benchmark_rows(plan)] if plan.benchmarks else []
    for rows in (budgets, _shape_rows(plan), *tables, *benchmarks):
        console.print(text_table(rows))
    for line in [*_explanations(plan), *_verdicts(plan, table)]:
        console.print(line, highlight=False, soft_wrap=True)


# Tables


def _budget_row(plan: RecipePlan, budget: BudgetPlan, table: LatencyTable | None) -> dict[str, str]:
    return {
        "budget": budget.budget.name,
        "target": _target(plan, budget, table),
        "parameters": f"{budget.params:,}",
        **({"active": f"{budget.active_params:,}"} if plan.model.layers_of(MOE) else {}),
        "of the teacher": percent(budget.params / plan.teacher_params, 1),
        "used": percent(budget.cost / budget.target, 1) if budget.target is not None else "-",
        "weights": human_bytes(budget.bytes),
    }


def _target(plan: RecipePlan, budget: BudgetPlan, table: LatencyTable | None) -> str:
    if budget.target is None:
        return "full"
    counted = budget_cost(plan.model, budget.budget, table)
    return counted.text(budget.target).removesuffix(" parameters")


def _shape_rows(plan: RecipePlan) -> list[dict[str, str]]:
    return [
        {
            "budget": planned.budget.name,
            "layers": str(planned.subnet.depth),
            "hidden": str(planned.subnet.hidden),
            **sizes_text(plan.model, planned.subnet),
        }
        for planned in plan.budgets
    ]


def _stage_rows(plan: RecipePlan) -> list[dict[str, str]]:
    return [
        {
            "stage": planned.stage.name,
            "steps": f"{planned.stage.steps:,}",
            "batch": f"{planned.stage.batch_size:,}",
            "sequence": f"{planned.stage.sequence_length:,}",
            "sequences": f"{planned.sequences:,}",
            "tokens": human_count(planned.tokens),
            "micro-batch": f"{planned.stage.micro_batch_size:,}",
            "recompute": ("offloaded" if planned.stage.offload else "yes") if planned.stage.recompute else "no",
        }
        for planned in plan.stages
    ]


def _work_rows(plan: RecipePlan) -> list[dict[str, str]]:
    return [
        {
            "stage": planned.stage.name,
            "student FLOPs": _scientific(planned.flops.student),
            "teacher": _scientific(planned.flops.teacher),
            "recomputed": _scientific(planned.flops.recomputed),
            "together": _scientific(planned.flops.total),
            "at most": _scientific(planned.flops_at_most.total),
            "GPU-hours": _number(plan.accelerator.hours(planned.flops.total)),
            "cost": _dollars(plan.accelerator.dollars_per_hour * plan.accelerator.hours(planned.flops.total)),
        }
        for planned in plan.stages
    ]


def _memory_rows(plan: RecipePlan) -> list[dict[str, str]]:
    return [
        {
            "stage": planned.stage.name,
            "GPUs": f"{mesh.gpus:,}",
            **{
                MEMORY_TITLES.get(f.name, f.name): _gigabytes(getattr(mesh.memory, f.name))
                for f in dataclasses.fields(Memory)
            },
            "GB": _gigabytes(mesh.memory.total),
            "fits": _fits(mesh),
        }
        for planned in plan.stages
        for mesh in planned.meshes
    ]


def _step_rows(plan: RecipePlan) -> list[dict[str, str]]:
    """Every step of the pipeline; a stage's memory has a table of its own."""
    return [
        {
            "step": step.name,
            "GPU-hours": _number(plan.gpu_hours(step)) if plan.gpu_hours(step) else "-",
            "core-hours": _number(step.core_hours) if step.core_hours else "-",
            "GB on a GPU": _gigabytes(step.memory) if step.memory else "-",
            "from and to elsewhere": human_bytes(step.moved) if step.moved else "-",
            "disk": human_bytes(step.disk) if step.disk else "-",
            "meanwhile": human_bytes(step.scratch) if step.scratch else "-",
            "cost": _dollars(plan.dollars(step)) if plan.dollars(step) else "-",
        }
        for step in plan.steps
    ]


def _time_rows(plan: RecipePlan) -> list[dict[str, str]]:
    """The whole pipeline on each mesh; what is no stage runs on one GPU."""
    rows = []
    around = sum(map(plan.gpu_hours, plan.around))
    for index, gpus in enumerate(plan.gpus):
        meshes = {planned.stage.name: planned.meshes[index] for planned in plan.stages}
        gpu_hours = sum(mesh.gpu_hours for mesh in meshes.values())
        dollars = sum(map(plan.dollars, plan.around)) + sum(mesh.dollars for mesh in meshes.values())
        rows.append(
            {
                "GPUs": f"{gpus:,}",
                **{name: _hours(mesh.hours) for name, mesh in meshes.items()},
                "other steps": _hours(around),
                "together": _hours(around + sum(mesh.hours for mesh in meshes.values())),
                "GPU-hours": _number(around + gpu_hours),
                "between hosts": human_bytes(sent) if (sent := _between_hosts(meshes.values())) else "-",
                "cost": _dollars(dollars),
                "fits": "yes" if gpus in plan.fitting else "no",
            }
        )
    return rows


def _benchmark_rows(plan: RecipePlan) -> list[dict[str, str]]:
    """What benchmarks take at most; a number that is not known is a question mark."""

    def known(count: int | None) -> str:
        return "?" if count is None else human_count(count)

    return [
        {
            "benchmark": each.name,
            "problems": "?" if each.problems is None else f"{each.problems:,}",
            "runs": str(each.runs),
            "tokens each": f"{each.max_new_tokens:,}",
            "of a model": known(each.tokens_of_a_model),
            "models": str(each.models),
            "tokens at most": known(each.tokens),
            "GPU-hours": _number(hours) if (hours := plan.judging_hours(each)) else "-",
            "cost": _dollars(plan.accelerator.dollars_per_hour * hours) if hours else "-",
        }
        for each in plan.benchmarks
    ]


def _between_hosts(meshes: Iterable[MeshPlan]) -> int:
    return sum(mesh.between_hosts for mesh in meshes)


def _fits(mesh: MeshPlan) -> str:
    if mesh.fits:
        return "tightly" if mesh.tight else "yes"
    return "no" if mesh.micro_steps is not None else "batch"


def _scientific(count: float) -> str:
    return f"{count:.2e}".replace("e+", "e") if count else "-"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}" if count >= 5e7 else f"{count / 1e9:.2g}"


def _number(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def _dollars(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 100 else f"${dollars:.2f}"


def _hours(hours: float) -> str:
    if hours < 1 / 3600:
        return "< 1 s"
    return f"{hours / 24:.1f} days" if hours >= 48 else human_seconds(3600 * hours)


# Sentences


def _explanations(plan: RecipePlan) -> Iterator[str]:
    gpu = plan.accelerator
    yield (
        f"Assumed: GPUs of {human_bytes(gpu.memory)}, {percent(USABLE_SHARE)} of it to plan with; "
        f"{gpu.flops_per_second / 1e12:,.0f} TFLOP/s, {percent(gpu.mfu)} of it reached; "
        f"{human_bytes(gpu.link)} a second from GPU to GPU and {human_bytes(gpu.network)} out of a host of "
        f"{gpu.on_a_host}, while they compute; "
        f"${gpu.dollars_per_hour:.2f} a GPU-hour, ${gpu.dollars_per_core_hour:.2f} a core-hour; the fused kernels; "
        f"{TOKENS_PER_CORE_SECOND:,} tokens a second and core to prepare data."
    )
    yield (
        "In the last table a stage takes the hours of computing or of sending, whichever are more; the tables before "
        "count computing alone."
    )
    yield (
        "Steps that are no stage run on one GPU or on none, and are planned from above: every measurement that may be "
        "made, each at the full model."
    )
    yield (
        "Subnets are examples within their budgets; the router chooses. While it learns, a soft choice runs wider than "
        "its budget: at most, everything runs at full size."
    )
    yield from _judging(plan)
    for planned in plan.stages:
        if planned.host_bytes:
            of_a_host = human_bytes(gpu.on_a_host * planned.host_bytes)
            yield (
                f"{planned.stage.name} keeps {human_bytes(planned.host_bytes)} for each GPU in pinned host memory, "
                f"{of_a_host} on a host of {gpu.on_a_host}."
            )
    longest = max(plan.stages, key=lambda planned: planned.stage.sequence_length)
    saved, recomputed = longest.sequence_bytes
    yield (
        f"A sequence is never divided between GPUs. The activations of one of {longest.stage.sequence_length:,} tokens "
        f"take {human_bytes(saved)}, or with recompute {human_bytes(recomputed)} and one layer's."
    )


def _judging(plan: RecipePlan) -> Iterator[str]:
    """What the table of benchmarks assumes and leaves out."""
    if not plan.benchmarks:
        return
    hours = sum(map(plan.judging_hours, plan.benchmarks))
    dollars = _dollars(plan.accelerator.dollars_per_hour * hours)
    together = f"together {_number(hours)} GPU-hours and {dollars}" if hours else "none of them on GPUs of this run"
    yield (
        f"Benchmarks are in no other table: at most, every completion is as long as it may be, {together}. "
        f"{DECODED_TOGETHER} texts are decoded at once, each token of all at the cost of reading the weights."
    )
    if unknown := [each.name for each in plan.benchmarks if each.problems is None]:
        yield f"How many problems {joined(unknown)} has is not known before its files are here, and is not counted."


def _verdicts(plan: RecipePlan, table: LatencyTable | None) -> Iterator[str]:
    for budget in plan.budgets:
        if not budget.feasible:
            yield _infeasible(plan, budget, table)
    for step in plan.around:
        if step.memory > plan.accelerator.usable:
            yield _too_large(plan, step)
    for planned in plan.stages:
        for mesh in planned.meshes:
            yield from _mesh_verdicts(plan, planned, mesh)
    if experts := sum(planned.meshes[-1].between_experts or 0 for planned in plan.stages):
        yield (
            f"On {plan.gpus[-1]:,} GPUs the hosts would send one another {human_bytes(experts)} of tokens if every "
            "expert lay whole on one GPU (expert parallelism, which is not built); as planned they send "
            f"{human_bytes(_between_hosts(planned.meshes[-1] for planned in plan.stages))}."
        )
    meshes = joined([f"{gpus:,}" for gpus in plan.fitting]) if plan.fitting else "none of these numbers of"
    yield f"It fits on {meshes} GPU{'s' * (plan.fitting != (1,))}."
    if not plan.feasible:
        yield "It does not run as it stands: a budget cannot be met."


def _mesh_verdicts(plan: RecipePlan, planned: StagePlan, mesh: MeshPlan) -> Iterator[str]:
    if not mesh.fits:
        yield unfit(plan.accelerator, planned, mesh)
    elif mesh.tight:
        yield _tight(planned, mesh)
    if mesh.rare:
        yield _rare(planned, mesh)
    if mesh.between_copies is not None:
        yield _copies(planned, mesh, mesh.between_copies)
    if mesh.sending > mesh.computing:
        yield _sending(plan.accelerator, planned, mesh)


def _infeasible(plan: RecipePlan, budget: BudgetPlan, table: LatencyTable | None) -> str:
    assert budget.target is not None
    counted = budget_cost(plan.model, budget.budget, table)
    ways = [f"{choice} in axes.{axis}" for axis, choice in budget.choices.items()]
    remedy = f", or make room with {joined(ways, 'or')}" if ways else ""
    return (
        f"budget {budget.budget.name} cannot be met: the smallest subnet has {counted.text(budget.cost)}, "
        f"{counted.text(budget.cost - budget.target)} above it; raise the budget{remedy}."
    )


def _too_large(plan: RecipePlan, step: StepPlan) -> str:
    needed, usable = human_bytes(step.memory), human_bytes(plan.accelerator.usable)
    weights = 2 * plan.teacher_params * DTYPE_BYTES[plan.dtype]
    remedy = "Lower its batch_size or sequence_length."
    if weights > plan.accelerator.usable:
        remedy = f"Teacher and largest size alone are {human_bytes(weights)}: it needs a GPU with more memory."
    return f"{step.name}: {needed} are needed on one GPU and {usable} are there. {remedy}"


def _tight(planned: StagePlan, mesh: MeshPlan) -> str:
    return (
        f"{planned.stage.name} on {counted(mesh.gpus, 'GPU')} fits with {percent(mesh.margin, 1)} to "
        f"spare. Below {percent(LEAST_MARGIN)}, a fragmented memory may end it; more GPUs, recompute or a smaller "
        "micro-batch leave more."
    )


def _rare(planned: StagePlan, mesh: MeshPlan) -> str:
    return (
        f"{planned.stage.name} on {counted(mesh.gpus, 'GPU')}: not every step trains {joined(mesh.rare)}, "
        f"since a step gives its {planned.stage.batch_size:,} sequences to the budgets "
        f"{planned.stage.rows_together(mesh.gpus):,} at a time. The shares hold over many steps; a larger batch_size "
        "holds them in each."
    )


def _copies(planned: StagePlan, mesh: MeshPlan, between: int) -> str:
    return (
        f"{planned.stage.name} on {mesh.gpus:,} GPUs also fits with sharding: hybrid, a copy of the weights on every "
        f"host; then the hosts send one another {human_bytes(between)} instead of {human_bytes(mesh.between_hosts)}."
    )


def _sending(gpu: Accelerator, planned: StagePlan, mesh: MeshPlan) -> str:
    inside = gpu.sending_hours(mesh.sent, 0) >= mesh.sending
    faster = "faster links between GPUs do (--link)" if inside else "a faster network does (--network)"
    remedy = f"No larger micro-batch that fits ends that; {faster}."
    if (larger := mesh.larger) is not None:
        remedy = f"micro_batch_size: {larger.micro_batch_size} ends that, with {human_bytes(larger.memory)} on a GPU."
    return (
        f"{planned.stage.name} on {mesh.gpus:,} GPUs waits for what they send one another: that takes "
        f"{_hours(mesh.sending)}, computing {_hours(mesh.computing)}. {remedy}"
    )
