"""`elastic init`: a recipe for a teacher, written from its config.json, with its plan."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from elastic_core.budget import BYTE_UNITS, SECOND_UNITS, Budget
from elastic_core.cost import subnet_params
from elastic_core.geometry import ModelConfig
from elastic_core.planning.draft import draft_axes, draft_stages, fit_stages
from elastic_core.planning.machine import Accelerator
from elastic_core.planning.plan import RecipePlan
from elastic_core.planning.profile import read_table
from elastic_core.recipe import Recipe
from elastic_core.schema import NAME, build, descriptions, told
from elastic_core.subnet import full_subnet
from flows.commands.recipes import RECIPES
from tasks.reporting.numbers import counted, human_bytes, human_count, human_seconds

# Of the paper's own teacher, for who names no data.
NVIDIA_DATA = "hf://nvidia/Nemotron-Post-Training-Dataset-v2"
NVIDIA_SPLITS = ("math", "code", "stem", "chat")
SHARES = (0.73, 0.51)  # of the teacher's parameters: the paper's 9B and 6B of 12B
SCHEMA = RECIPES / "recipe.schema.json"
SMALL = 10**9  # parameters of a teacher below which bfloat16 saves too little to be worth its rounding
CALIBRATION_SHARE = 20  # one token in so many that are trained on, at most, is one to rank by
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}

_TARGET = re.compile(r"(a?)([0-9][0-9.]*(?:e[+]?[0-9]+)?) ?([A-Za-z]*)(@.*)?", re.IGNORECASE)


def parse_budgets(texts: Sequence[str], params: int) -> list[dict[str, Any]]:
    """Budgets from texts such as 9b, s=740e6, a3b, 16GiB@ctx=131072 and 12ms, as a recipe has them, the teacher first.

    `params` are the teacher's. Without a text, two sizes in the paper's proportions.
    """
    texts = texts or [f"{float(f'{share * params:.2g}'):.0f}" for share in SHARES]
    budgets = [_budget(text) for text in texts]
    taken = {budget["name"] for budget in budgets}
    full = next((name for name in (_size_name(params), "full") if name not in taken), "teacher")
    return [{"name": full}, *budgets]


def _budget(text: str) -> dict[str, Any]:
    head, equals, tail = text.partition("=")
    name, target = (head, tail) if equals and NAME.fullmatch(head) else ("", text)
    found = _TARGET.fullmatch(target.strip())
    active, amount, unit, serving = found.groups("") if found else ("", "", "", "")
    if found and not serving and unit.lower() in COUNTS:
        try:
            params = round(float(amount) * COUNTS[unit.lower()])
        except (ValueError, OverflowError):
            params = 0
        if params > 0:
            return {
                "name": name or active.lower() + _size_name(params),
                "active_params" if active else "params": params,
            }
    if found and not active and (serving or unit in BYTE_UNITS or unit in SECOND_UNITS):
        kind = "latency" if unit in SECOND_UNITS else "memory"
        default = f"{amount}{unit}".lower().replace(".", "_")
        return {"name": name or default, kind: target.strip()}
    raise ValueError(
        f"--budget is {text!r}; expected parameters, active parameters, memory or latency, such as 9b, a3b, "
        "16GiB@ctx=131072 or 12ms, and before it NAME= if it is to have a name of its own"
    )


def _size_name(params: int) -> str:
    """12b, 350m: a size in whole units, as models are called."""
    unit, scale = next(((unit, scale) for unit, scale in reversed(COUNTS.items()) if params >= scale), ("", 1.0))
    return f"{params / scale:.0f}{unit}"


def draft(
    teacher: str,
    model: ModelConfig,
    stored_dtype: str | None,
    *,
    family: str,
    budgets: Sequence[str],
    sources: Sequence[str],
    tokens: int,
    gpus: int,
    accelerator: Accelerator,
    latency_table: Path | None,
) -> tuple[Recipe, RecipePlan, str]:
    """A recipe for `teacher`, its plan on so many GPUs, and its text; ValueError for what no recipe can hold.

    It computes in bfloat16, but a small teacher whose weights are stored in float32 keeps that.
    """
    table = None if latency_table is None else read_table(latency_table)
    params = subnet_params(model, full_subnet(model))
    named = parse_budgets(budgets, params)
    targets = tuple(build(Budget, budget, f"budgets[{i}]") for i, budget in enumerate(named))
    axes = draft_axes(model, targets, table)
    stages = draft_stages(model, targets, tokens, gpus)
    data: dict[str, Any] = {
        "family": family,
        "teacher": {"path": teacher, "model": told(model)},
        "data": {"sources": _sources(sources)},
        "axes": {name: list(axes.choices(name)) for name in axes.names if len(axes.choices(name)) > 1},
        "budgets": named,
        **({"latency_table": absolute(latency_table)} if latency_table else {}),
        **_measuring(tokens, stages[0].sequence_length),
        "dtype": "float32" if stored_dtype == "float32" and params < SMALL else "bfloat16",
        "stages": [told(stage) for stage in stages],
    }
    recipe, plan = fit_stages(build(Recipe, data), model, accelerator, gpus, table)
    data["stages"] = [told(stage) for stage in recipe.stages]
    assert build(Recipe, data) == recipe, "what is written is what was planned"
    return recipe, plan, _summary(teacher, params, plan) + _text(data)


def _sources(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The sources of a recipe; ValueError for a file that is not here. `elastic check` looks at globs and URIs."""
    for path in paths:
        if "://" not in path and not glob.has_magic(path) and not Path(absolute(path)).exists():
            raise ValueError(
                f"--data is {path!r}: no such file or directory here; correct it, or name s3://..., hf://..., "
                "stdlib:// or a glob in quotes"
            )
    if paths:
        return [{"path": path if "://" in path else absolute(path)} for path in paths]
    return [{"path": NVIDIA_DATA, "split": split} for split in NVIDIA_SPLITS]


def _measuring(tokens: int, length: int) -> dict[str, Any]:
    """Calibration and evaluation at the length of the first stage, in proportion to what is trained."""
    samples = max(16, min(1024, tokens // (CALIBRATION_SHARE * length)))
    heldout = max(16 * length, min(1_000_000, tokens // 100))
    return {
        "importance": {
            "samples": samples,
            "sequence_length": length,
            "depth_samples": max(4, samples // 16),
            "comparison_tokens": min(32_768, heldout),
        },
        "shapes": {"sequence_length": length},
        "evaluation": {"heldout_tokens": heldout, "sequence_length": length},
    }


def _summary(teacher: str, params: int, plan: RecipePlan) -> str:
    gpus, meshes = plan.gpus[0], [stage.meshes[0] for stage in plan.stages]
    hours = sum(mesh.hours for mesh in meshes)
    fits = "" if plan.fitting else ", on which it does not fit"
    spent = f"{human_count(sum(stage.tokens for stage in plan.stages))} tokens, {human_seconds(3600 * hours)}"
    return (
        f"# A family of {teacher}, {params:,} parameters, drafted by `elastic init`: look at data, budgets, stages.\n"
        f"# By its plan: {spent} on {counted(gpus, 'GPU')} of {human_bytes(plan.accelerator.memory)}{fits}.\n"
    )


def _text(data: dict[str, Any]) -> str:
    """YAML with a line above each part that says what it is."""
    parts = []
    for name, value in data.items():
        said = descriptions(Recipe)[name].partition(" Example: ")[0]
        in_lines = name == "teacher" or not isinstance(value, dict | list)  # what is innermost is in braces elsewhere
        style = False if in_lines else None
        dumped = yaml.safe_dump({name: value}, default_flow_style=style, sort_keys=False, width=110, allow_unicode=True)
        parts.append(f"# {said}\n{dumped}")
    return "\n".join(parts)


def write_recipe(path: Path, text: str) -> None:
    """Write the recipe; its first line leads an editor to the schema, where that is in the repository."""
    first = ""
    if SCHEMA.is_file():
        first = f"# yaml-language-server: $schema={SCHEMA}\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(first + text)
    except FileExistsError:
        raise ValueError(f"{path} exists; name another file") from None


def absolute(path: str | Path) -> str:
    """The absolute path without `..`. Where there is one, links are followed: `link/..` is above what it leads to."""
    here = Path(path).expanduser()
    return str(here.resolve() if ".." in here.parts else here.absolute())


def family_name(teacher: str) -> str:
    """What a family of this teacher may be called: the last part of its path, in small letters."""
    last = teacher.rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-_")[:60] or "family"
