"""infra/README.md: its table has every variable, its links lead somewhere, its figures are those of the plan."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "infra/README.md").read_text()
COMPOSE = (ROOT / "infra/compose.yaml").read_text()
SOURCES = "".join(path.read_text() for folder in ("tasks", "flows") for path in (ROOT / folder).rglob("*.py"))
TABLE = {
    name
    for row in re.findall(r"^\| (`[^|]*) \|", README.partition("## Variables")[2], flags=re.MULTILINE)
    for name in re.findall(r"`(\w+)`", row)
}


def test_the_table_has_every_variable_of_ours():
    named = set(re.findall(r'"(ELASTIC_[A-Z0-9_]+)"', SOURCES)) | set(re.findall(r"\$\{(\w+)", COMPOSE))
    assert named <= TABLE


def test_the_table_has_every_variable_that_a_worker_is_given():
    settings = yaml.safe_load_all((ROOT / "infra/kubernetes/workspace.yaml").read_text())
    in_pods = {name for manifest in settings for name in manifest.get("data", ())}
    assert in_pods | set(yaml.safe_load(COMPOSE)["services"]["worker-gpu"]["environment"]) <= TABLE


def test_the_links_lead_somewhere():
    written_by_make = {"benchmarks.md"} if "infra/benchmarks.md" in (ROOT / "Makefile").read_text() else set()
    for link in set(re.findall(r"\]\(([^)#]+)\)", README)) - written_by_make:
        assert (ROOT / "infra" / link).exists(), link


def test_the_figures_on_long_context_are_those_of_the_plan():
    command = [sys.executable, "-m", "flows.cli", "plan", "nano-12b", "--gpus", "8,64"]
    said = ""
    for change in ([], ["stages.1.offload=false"]):
        planned = subprocess.run([*command, *change], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert planned.returncode == 0, planned.stderr
        said += planned.stdout
    paragraph = " ".join(README.partition("Long context")[2].partition("\n\n")[0].split())
    figures = re.findall(r"\d[\d,.]*\d(?= GB| tokens)", paragraph)
    assert len(figures) >= 5
    for figure in figures:
        assert figure in said, figure
