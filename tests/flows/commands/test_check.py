"""Laws of `elastic check`: what a run would fail by hours later is a line now, every fault in one go."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from geometries import MODELS, write_hollow
from typer.testing import CliRunner

from elastic_core.geometry import ModelConfig
from flows.cli import app
from tasks.artifacts import Store, put_file
from tasks.corpus.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from tasks.reporting.numbers import human_count
from tasks.running.usage import WORKSPACE, noting
from tasks.settings import BUCKET, SIGNING_KEY, TRACKING_URI, Settings

pytestmark = pytest.mark.usefixtures("settings", "large_disk")

# More tokens than the longest sequence of what `elastic init` writes.
CHATS = [[("user", f"what is {i}+{i}"), ("assistant", str(i + i) + " or so" * 300 * (i > 0))] for i in range(40)]
ROWS = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a family of any size."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))


def teacher(directory: Path, model: ModelConfig) -> Path:
    write_hollow(directory, model)
    train_tokenizer([], directory, vocab_size=SMALLEST_VOCABULARY)
    return directory


def initiated(directory: Path, name: str = "random-0") -> Path:
    """A teacher and its recipe, as `elastic init` writes it."""
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = directory / "recipe.yaml"
    given = ["--teacher", str(teacher(directory / "teacher", MODELS[name])), "--data", str(directory / "rows.jsonl")]
    result = CliRunner().invoke(app, ["init", *given, "--tokens", "4e8", "-o", str(recipe)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return recipe


def checked(recipe: Path, *overrides: str) -> tuple[str, str]:
    """What `elastic check` prints, and the line that it ends with where it finds a fault."""
    result = CliRunner().invoke(app, ["check", str(recipe), *overrides])
    assert result.exception is None or isinstance(result.exception, ValueError), result.exception
    return result.output, str(result.exception or "")


@pytest.mark.parametrize("name", MODELS)
def test_what_init_writes_passes_every_check(name: str, tmp_path: Path) -> None:
    output, fault = checked(initiated(tmp_path, name))
    assert not fault and "FAULT" not in output, output
    looked_at = re.findall(r"^ok     ([^:]+):", output, flags=re.MULTILINE)
    assert looked_at == ["Prefect", "MLflow", "bucket", "teacher", "data.sources[0]", "budgets", "GPUs", "disk"]
    assert "nothing stands in the way of `elastic run" in output


def test_the_first_chat_is_shown_as_the_template_renders_it(tmp_path: Path) -> None:
    recipe = initiated(tmp_path)
    output, _ = checked(recipe)
    assert "\n         | <|user|>what is 0+0<|assistant|>0</s>\n" in output
    sources = [{"path": str(tmp_path / "rows.jsonl"), "train_on": "assistant", "max_documents": 1}]
    output, _ = checked(recipe, f"data.sources={json.dumps(sources)}")
    assert "the first 1 texts are 15 tokens, 2 of them learned" in output


def test_stages_that_read_the_data_many_times_are_noted(tmp_path: Path) -> None:
    recipe = initiated(tmp_path)
    output, fault = checked(recipe)
    (note,) = [line for line in output.splitlines() if line.startswith("note   data: ")]
    assert re.search(r"the stages train on (399|400|401)M, [\d,]{5,} times as many", note) and not fault
    (counted,) = re.findall(r"the first 40 texts are ([\d,]+) tokens", output)  # which are all
    tokens = int(counted.replace(",", ""))
    assert f"hold at most about {human_count(tokens)} tokens" in note
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 10 * ROWS))
    (held,) = re.findall(r"hold at most about ([\d.]+)K tokens", checked(recipe)[0])
    assert 10 * tokens <= 1000 * float(held) <= 40 * tokens
    few = [f"stages.{stage}.{setting}=1" for stage in (0, 1) for setting in ("steps", "batch_size", "micro_batch_size")]
    assert "note   data" not in checked(recipe, *few, "stages.0.sequence_length=8", "stages.1.sequence_length=8")[0]


def test_data_that_do_not_fill_a_sequence_are_a_fault(tmp_path: Path) -> None:
    recipe = initiated(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    output, fault = checked(recipe)
    assert re.search(
        r"FAULT  data: the sources hold at most about [\d.]+K tokens, too few for a sequence of stage2", output
    )
    assert fault


def test_a_benchmark_is_read_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": f"{i + 1}"}) + "\n" for i in range(7)))
    output, fault = checked(initiated(tmp_path), f"evaluation.benchmarks=[{{name: sums, path: {file}, format: exact}}]")
    assert not fault and f"ok     benchmark sums: {file}: 7 problems, 8 runs of each" in output


Spoil = Callable[[Path, pytest.MonkeyPatch], list[str]]


def no_tokenizer(directory: Path, _: pytest.MonkeyPatch) -> list[str]:
    for file in (directory / "teacher").glob("*token*"):
        file.unlink()
    return []


def cut_weights(directory: Path, _: pytest.MonkeyPatch) -> list[str]:
    with (directory / "teacher/model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    return []


def robot(directory: Path, _: pytest.MonkeyPatch) -> list[str]:
    row = {"messages": [{"role": "robot", "content": "beep"}]}
    with (directory / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return []


def small_disk(_: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    return []


def setting(*overrides: str) -> Spoil:
    return lambda directory, patch: list(overrides)


def environment(**variables: str) -> Spoil:
    def apply(_: Path, patch: pytest.MonkeyPatch) -> list[str]:
        for name, value in variables.items():
            patch.setenv(name, value)
        return []

    return apply


def no_engine(directory: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setenv("PATH", str(directory))
    return ["evaluation.engine={program: vllm}"]


FAULTS: dict[str, tuple[Spoil, str]] = {
    "no teacher": (setting("teacher.path=/no/such/teacher"), r"teacher: teacher.path '/no/such/teacher' is not here"),
    "no tokenizer": (no_tokenizer, r"teacher: .*no tokenizer can be loaded"),
    "weights cut off": (cut_weights, r"teacher: .*model.safetensors"),
    "another geometry": (setting("teacher.model.vocab_size=299"), r"teacher: teacher.model.vocab_size is 299, but"),
    "axis of another": (setting("axes.ffn=[24,16]"), r"teacher: axes.ffn begins with 24; it must begin with the"),
    "no data": (setting("data.sources.0.path=/no/rows.jsonl"), r"data.sources\[0\]: .*/no/rows.jsonl"),
    "role of no template": (robot, r"data.sources\[0\]: .*rows.jsonl line 41: the chat template refuses it"),
    "no problems": (setting("evaluation.problems=/no/a.jsonl"), r"evaluation.problems: /no/a.jsonl: No such file"),
    "no benchmark": (
        setting("evaluation.benchmarks=[{name: sums, path: /no/sums.jsonl, format: exact}]"),
        r"benchmark sums: /no/sums.jsonl: No such file; correct the path of benchmark sums",
    ),
    "no endpoint": (
        setting("evaluation.endpoint={url: 'http://127.0.0.1:9/v1', model: m}"),
        r"evaluation.endpoint: it cannot be reached, or broke off; check that it is up",
    ),
    "no engine": (
        no_engine,
        r"evaluation.engine: no engine: no vllm that can serve is installed; pip install",
    ),
    "budget too small": (setting("budgets.2.params=1000"), r"budgets: .* cannot be met by these axes; `elastic plan`"),
    "budget too large": (setting("budgets.1.params=999999999999"), r"budgets: budget .* is above the teacher's"),
    "no bucket": (
        environment(**{BUCKET: "no-such-bucket"}),
        r"bucket: s3://no-such-bucket .*does not exist",
    ),
    "no MLflow": (
        environment(**{TRACKING_URI: "http://127.0.0.1:9"}),
        r"MLflow: MLflow at http://127.0.0.1:9 does not answer",
    ),
    "no key": (
        environment(**{SIGNING_KEY: "/no/key.pem"}),
        r"keys: ELASTIC_SIGNING_KEY_FILE=.* cannot be read",
    ),
    "no room": (small_disk, r"disk: about .* are needed at the most, and .* are free in .*; make room, or set"),
}


@pytest.mark.parametrize(("spoil", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_has_a_line_that_says_where_it_is(
    spoil: Spoil, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = initiated(tmp_path)
    output, fault = checked(recipe, *spoil(tmp_path, monkeypatch))
    (line,) = [line for line in output.splitlines() if line.startswith("FAULT")]
    assert re.match(f"FAULT  {says}", line), line
    assert fault == f"{recipe}: 1 fault, each in its line above"
    assert "nothing stands in the way" not in output


def test_all_faults_are_found_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = initiated(tmp_path)
    small_disk(tmp_path, monkeypatch)
    faults = ("data.sources.0.path=/no/rows.jsonl", "evaluation.problems=/no/a.jsonl")
    output, fault = checked(recipe, *faults, "budgets.1.params=999999999999")
    assert re.findall(r"^FAULT  ([^:]+):", output, flags=re.MULTILINE) == [
        "data.sources[0]", "evaluation.problems", "budgets",
    ]  # fmt: skip
    output, fault = checked(recipe, *faults)
    assert re.findall(r"^FAULT  ([^:]+):", output, flags=re.MULTILINE) == [
        "data.sources[0]", "evaluation.problems", "disk",
    ]  # fmt: skip
    assert fault == f"{recipe}: 3 faults, each in its line above"


def test_what_a_half_done_run_has_written_is_not_needed_again(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = initiated(tmp_path)
    small_disk(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt), noting(settings.home, yaml.safe_load(recipe.read_text())["family"]):
        checkpoint = settings.home / WORKSPACE / "stage1-x" / "checkpoint"
        checkpoint.parent.mkdir(parents=True)
        with checkpoint.open("wb") as file:
            file.truncate(100 * 2**30)
        raise KeyboardInterrupt
    output, fault = checked(recipe)
    assert not fault and "beside 100 GiB of a run that goes on" in output, output


def test_a_teacher_and_data_in_a_bucket_are_looked_at_without_the_weights(
    tmp_path: Path, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = initiated(tmp_path)
    root = f"s3://{settings.bucket}"
    for file in (tmp_path / "teacher").iterdir():
        if file.suffix != ".safetensors":
            put_file(store, file, f"{root}/teacher/{file.name}")
    put_file(store, tmp_path / "rows.jsonl", f"{root}/data/rows.jsonl")
    output, fault = checked(recipe, f"teacher.path={root}/teacher", f"data.sources.0.path={root}/data")
    assert not fault, output
    assert f"{root}/teacher: " in output and "its weights are looked at when they are here" in output
    assert "<|user|>what is 0+0<|assistant|>0</s>" in output


def test_a_teacher_that_a_recipe_trains_has_its_data_looked_at(tmp_path: Path) -> None:
    recipe = initiated(tmp_path)
    data = yaml.safe_load(recipe.read_text())
    small = data["stages"][0]
    data["teacher"] = {
        "pretrain": {
            "model": data["teacher"]["model"],
            **{name: small[name] for name in ("sequence_length", "batch_size", "steps", "optimizer")},
        }
    }
    recipe.write_text(yaml.safe_dump(data))
    output, fault = checked(recipe)
    assert not fault, output
    assert "ok     teacher: trained by the run" in output
    assert "<|user|>what is 0+0<|assistant|>0</s>" in output
