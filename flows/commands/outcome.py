"""What a run leaves in the terminal: the budget table, the registry names, and where to look."""

from pathlib import Path

from flows.commands.terminal import text_table, wide_console
from tasks.promote import Verdict
from tasks.records import EvaluationRecord, OrderComparison, Release
from tasks.reporting.benchmarks import benchmark_table
from tasks.reporting.summary import evaluation_warnings, order_warnings, summary_table


def print_outcome(evaluation: EvaluationRecord, orders: OrderComparison, release: Release, verdict: Verdict) -> None:
    """Print the outcome of a run to standard output."""
    console = wide_console()
    console.print(text_table(summary_table(evaluation), title=f"{release.family} {release.version}"))
    if evaluation.scores:
        console.print(text_table(benchmark_table(evaluation), title="pass@1, percent"))
    for warning in (*evaluation_warnings(evaluation), *order_warnings(orders)):
        console.print(f"warning     {warning}", highlight=False, soft_wrap=True)
    console.print("registered  " + ", ".join(release.models.values()), highlight=False)
    console.print(f"promotion   {verdict.reason}", highlight=False)
    console.print(f"objects     {release.uri}", highlight=False, soft_wrap=True)
    report = release.report if Path(release.report).exists() else f"in MLflow, run {release.run_id}, report/index.html"
    console.print(f"report      {report}", highlight=False, soft_wrap=True)
    smallest = list(release.models.values())[-1]
    name = smallest.split(":")[0]
    pulled = name if verdict.promoted else smallest  # the name alone means its champion
    console.print(f"next        elastic pull {pulled} -o {name}", highlight=False, soft_wrap=True)
