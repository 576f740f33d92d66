"""The `elastic` command. Nothing heavy is imported until a command needs it, so that help is instant."""

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from elastic_core.budget import Dtype
from elastic_core.geometry import FfnLayout
from elastic_core.planning.machine import H100
from flows import cli_registry

INTERRUPTED = 130  # what Typer makes of Ctrl-C

app = typer.Typer(
    name="elastic",
    help="Train one elastic Nemotron-H and register every size it holds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_registry.app)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe's file, or the name of one: tiny, small, nano-12b, ...")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: stages.0.steps=100 ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
BudgetName = Annotated[str | None, typer.Option(help="A budget of an elastic checkpoint; by default the whole model.")]
Directory = Annotated[Path, typer.Argument(help="A checkpoint directory.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The directory to write; it must not exist yet.")]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline here: teacher and data in, a registered family out."""
    from flows.commands.run import run_recipe

    run_recipe(recipe, overrides or [])


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to plan for.")] = "1,8,64",
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU.")] = "80GB",
    tflops: Annotated[
        float, typer.Option(help="TFLOP/s of a GPU at its peak, in the dtype of the recipe.")
    ] = H100.flops_per_second / 1e12,
    mfu: Annotated[float, typer.Option(help="The share of --tflops that training reaches.")] = H100.mfu,
    price: Annotated[float, typer.Option(help="Dollars for a GPU-hour.")] = H100.dollars_per_hour,
    bandwidth: Annotated[str, typer.Option(help="What a GPU reads of its memory in a second.")] = "3.35TB",
    link: Annotated[str, typer.Option(help="What a GPU sends to others of its host in a second.")] = "450GB",
    network: Annotated[str, typer.Option(help="What a host sends to others in a second.")] = "400GB",
    on_a_host: Annotated[int, typer.Option(help="GPUs that share a host.")] = 8,
    core_price: Annotated[float, typer.Option(help="Dollars for a core-hour.")] = 0.04,
    as_json: AsJson = False,
) -> None:
    """Say before spending what a recipe takes: sizes, tokens, FLOPs, memory, hours, dollars, and where it fits."""
    from elastic_core.budget import parse_bytes
    from elastic_core.planning.machine import Accelerator
    from elastic_core.planning.plan import plan_recipe
    from elastic_core.planning.profile import recipe_table
    from flows.commands.plan import (
        counted_problems,
        locality_of_runs,
        parse_gpus,
        plan_json,
        print_plan,
    )
    from flows.commands.recipes import load_recipe
    from flows.commands.teacher import teacher_geometry

    loaded = load_recipe(recipe, overrides or [])
    accelerator = Accelerator(
        memory=parse_bytes(gpu_memory, "--gpu-memory"),
        flops_per_second=tflops * 1e12,
        mfu=mfu,
        dollars_per_hour=price,
        bandwidth=parse_bytes(bandwidth, "--bandwidth"),
        link=parse_bytes(link, "--link"),
        network=parse_bytes(network, "--network"),
        on_a_host=on_a_host,
        dollars_per_core_hour=core_price,
    )
    table = recipe_table(loaded)
    model, locality = teacher_geometry(loaded), locality_of_runs(loaded)
    planned = plan_recipe(loaded, model, accelerator, parse_gpus(gpus), table, locality, counted_problems(loaded))
    if as_json:
        typer.echo(json.dumps(plan_json(planned), indent=2))
    else:
        print_plan(planned, table)
    planned.require_budgets()


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
) -> None:
    """Find before spending what would end a run: services, teacher, tokenizer, data as rendered, GPUs, disk."""
    from flows.commands.check import check_recipe
    from flows.commands.recipes import load_recipe
    from tasks.reporting.numbers import counted

    if faults := check_recipe(load_recipe(recipe, overrides or [])):
        raise ValueError(f"{recipe}: {counted(faults, 'fault')}, each in its line above")
    typer.echo(f"{recipe}: nothing stands in the way of `elastic run {recipe}`")


@app.command()
def init(
    teacher: Annotated[str, typer.Option(help="A checkpoint's directory, s3://BUCKET/PREFIX, or its name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write; it must not exist yet.")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="A size to make, the largest first: 9b, s=740e6, a3b (active), 16GiB@ctx=131072, 12ms; repeat it."
        ),
    ] = None,
    tokens: Annotated[float, typer.Option(help="Tokens to train on, both stages together.")] = 1e9,
    data: Annotated[
        list[str] | None, typer.Option(help="Documents to train on, as data.sources[].path has it; repeat it.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="What the family is called; by default after its teacher.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that the stages are to fit on.")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU.")] = "80GB",
    latency_table: Annotated[
        Path | None, typer.Option(help="A latency table of `elastic profile`, for budgets of latency.")
    ] = None,
) -> None:
    """Write a recipe for a teacher from its config.json, and show its plan."""
    from elastic_core.budget import parse_bytes
    from elastic_core.files.stock_config import read_config, stored_dtype
    from elastic_core.planning.profile import recipe_table
    from flows.commands.init import absolute, draft, family_name, write_recipe
    from flows.commands.plan import print_plan
    from flows.commands.teacher import config_at

    if not math.isfinite(tokens):
        raise ValueError(f"--tokens {tokens} is not a number of tokens; give one such as 1e9")
    path = here if Path(here := absolute(teacher)).is_dir() else teacher
    with config_at(path) as directory:
        model, stored = read_config(directory), stored_dtype(directory)
    recipe, plan, text = draft(
        path,
        model,
        stored,
        family=family or family_name(path),
        budgets=budget or [],
        sources=data or [],
        tokens=round(tokens),
        gpus=gpus,
        accelerator=replace(H100, memory=parse_bytes(gpu_memory, "--gpu-memory")),
        latency_table=latency_table,
    )
    write_recipe(output, text)
    print_plan(plan, recipe_table(recipe))
    typer.echo(
        f"{output}: look at its data, budgets and stages; then `elastic check {output}` and `elastic run {output}`"
    )


@app.command()
def schema(
    page: Annotated[bool, typer.Option("--page", help="Print the reference page, Markdown, instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, by which an editor completes and checks them."""
    from flows.commands.reference import recipe_page, recipe_schema

    typer.echo(recipe_page().rstrip() if page else json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@app.command()
def up(
    recipe: Annotated[Path, typer.Argument(help="The recipe that the forms are filled in with.")] = Path("tiny"),
    schedule: Annotated[
        str | None,
        typer.Option(help="When to look for new data or code and retrain: cron, or none to end it; else as before."),
    ] = None,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option(min=0.0, help="What a run of the schedule may take by its plan; above, it waits for a person."),
    ] = None,
    prefect_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Prefect's port; by default 4200, or a free one.")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="MLflow's port; by default 5000, or a free one.")
    ] = None,
    s3_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The object store's port; by default a free one.")
    ] = None,
) -> None:
    """Serve: Prefect and MLflow with their UIs, object store, workers, deployments, until Ctrl-C or `elastic down`."""
    from flows.commands.recipes import load_recipe
    from flows.serving import serve
    from flows.serving.schedule import Schedule
    from tasks.settings import make_home

    load_recipe(recipe)
    plan = Schedule(cron=schedule, max_gpu_hours=max_gpu_hours)
    serve.up(make_home(), recipe, plan, serve.Ports(prefect=prefect_port, mlflow=mlflow_port, s3=s3_port))


@app.command()
def status() -> None:
    """Say what `elastic up` has running, and whether it answers; fails unless all of it does."""
    from flows.serving import serve
    from tasks.settings import home_directory

    if not serve.status(home_directory()):
        raise typer.Exit(1)


@app.command()
def down() -> None:
    """Stop the `elastic up` of this state directory; the state stays."""
    from flows.serving import serve
    from tasks.settings import home_directory

    serve.down(home_directory())


@app.command()
def profile(
    source: Annotated[Path, typer.Argument(help="A recipe or an elastic checkpoint, whose choices are measured.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The latency table to write, JSON.")],
    context: Annotated[int, typer.Option(help="Tokens in the context of the step that is timed.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="The dtype to compute in.")] = "bfloat16",
) -> None:
    """Measure on this device how long a decoding step takes at every choice of the axes, for latency budgets."""
    from flows.commands.profile import profile_source

    profile_source(source, output, context=context, batch=batch, dtype=dtype)


@app.command("slice")
def slice_(
    checkpoint: Directory,
    output: Output,
    budget: Annotated[str | None, typer.Option(help="A budget of the family, by name.")] = None,
    params: Annotated[float | None, typer.Option(help="Any size instead: at most this many parameters.")] = None,
    active_params: Annotated[
        float | None, typer.Option(help="At most this many that a token passes through, of a model with experts.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="At most this much memory when serving: 16GiB@ctx=131072[,batch=8,dtype=...].")
    ] = None,
    latency: Annotated[str | None, typer.Option(help="At most this long a decoding step: 12ms.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A latency table of `elastic profile`; by default the family's own.")
    ] = None,
    ffn_layout: Annotated[
        FfnLayout, typer.Option(help="Widths that differ by layer: padded to one, or a list that few engines load.")
    ] = "padded",
) -> None:
    """Cut a budget, or any size between, out of an elastic checkpoint."""
    from flows.commands.slice import slice_family

    slice_family(
        checkpoint,
        output,
        budget=budget,
        sizes={"--params": params, "--active-params": active_params, "--memory": memory, "--latency": latency},
        profile=profile,
        ffn_layout=ffn_layout,
    )


@app.command("eval")
def evaluate(
    checkpoint: Directory,
    heldout: Annotated[Path, typer.Option(help="Held-out tokens: heldout.safetensors of a prepared corpus.")],
    budget: BudgetName = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.")] = 100_000,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence, as the recipe's evaluation has them.")] = 256,
) -> None:
    """Measure a checkpoint's cross-entropy on held-out tokens."""
    from elastic_core.recipe import Evaluation
    from flows.commands.models import load
    from tasks.corpus.heldout import heldout_batches, predicted
    from tasks.corpus.record import RECORD_FILE
    from tasks.evaluate import heldout_loss
    from tasks.promote import is_tokenizer_of

    settings = Evaluation(heldout_tokens=tokens, sequence_length=sequence_length)
    if (heldout.parent / RECORD_FILE).is_file() and not is_tokenizer_of(checkpoint, heldout.parent):
        typer.echo(f"warning: {heldout} was encoded with another tokenizer than that of {checkpoint}", err=True)
    model, subnet = load(checkpoint, budget)
    batches = heldout_batches(heldout, settings, model.config.vocab_size)
    loss, _ = heldout_loss(model, subnet, batches)
    measured = {"tokens": predicted(batches), "sequence_length": sequence_length}
    typer.echo(json.dumps({"checkpoint": str(checkpoint), "budget": budget, "cross_entropy": loss, **measured}))


@app.command()
def generate(
    checkpoint: Directory,
    prompt: Annotated[str, typer.Argument(help="What to say to the model; a user's turn where there is a template.")],
    budget: BudgetName = None,
    then: Annotated[str | None, typer.Option(help="The budget to switch to after --switch-after tokens.")] = None,
    switch_after: Annotated[int, typer.Option(min=0, help="New tokens before the switch.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of sampling; 0 is greedy.")] = 0.0,
) -> None:
    """Generate text at any budget, or let a small budget begin and a larger one go on."""
    from flows.commands.generate import generate_text

    generate_text(
        checkpoint,
        prompt,
        budget=budget,
        then=then,
        switch_after=switch_after,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


Run = Annotated[str, typer.Argument(help="A run's name or id, or the beginning of its id, as `elastic runs` has them.")]


@app.command()
def runs(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many, the newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the runs on Prefect's server: their names, states and times."""
    from flows.commands.runs import list_runs

    list_runs(limit, as_json=as_json)


@app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
) -> None:
    """Print what a run and its steps on workers have logged."""
    from flows.commands.logs import print_logs

    print_logs(run, follow=follow)


@app.command()
def cancel(run: Run) -> None:
    """End a run and its steps on workers; a new run of the same recipe goes on where it was."""
    from flows.commands.cancel import cancel_run

    cancel_run(run)


def main() -> None:
    """The entry point: a fault that the user can mend is one line on stderr, and a non-zero exit code."""
    from flows.commands.terminal import complain, explained, missing

    terminal = logging.StreamHandler()
    for package in ("elastic_core", "tasks", "flows"):
        logging.getLogger(package).setLevel(logging.INFO)
        logging.getLogger(package).addHandler(terminal)
    # The Hub's client prints each of its retries twice; what comes of them is said by us, in one line.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:
        if message := error.format_message():  # it is empty where the help was shown instead
            complain(f"{message.rstrip('.')}; --help tells more")
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        complain(missing(error))
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        complain(explained(error))
        sys.exit(1)
    if status == INTERRUPTED:
        complain("interrupted; run the same command again to go on")
    sys.exit(status)


if __name__ == "__main__":
    main()
