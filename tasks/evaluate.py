"""Measure every budget on held-out data: the slices themselves, beside the teacher and beside cutting alone."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from elastic_core.budget import Dtype
from elastic_core.comparison import reorder_model
from elastic_core.cost import active_params, subnet_params
from elastic_core.files import checkpoint, reorder
from elastic_core.generate import decode, prompt_batches
from elastic_core.geometry import MOE, ModelConfig
from elastic_core.model import Cache, ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.subnet import Subnet, full_subnet, keep_layers
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.losses import distillation_loss
from elastic_core.training.tokens import TokenBatch
from tasks import tracking
from tasks.corpus.heldout import heldout_batches, predicted, sequences
from tasks.corpus.problems import Problem, encode_questions
from tasks.corpus.record import HELDOUT_FILE, read_record
from tasks.corpus.tokenizer import load_tokenizer
from tasks.judging.exact import Answers, Match, matches, recorded_problems, tally
from tasks.records import Artifact, BudgetEvaluation, Conditions, EvaluationRecord
from tasks.running.code import code_of
from tasks.running.devices import dealt, devices, gathered, on_devices
from tasks.running.steps import fingerprint, run, step
from tasks.settings import Settings

if TYPE_CHECKING:
    pass

DECODED_TOKENS = 64
DECODE_REPEATS = 3

# The settings that a held-out loss depends on; `sequences` says how much was there of the tokens asked for.
OF_THE_LOSS = ("sequence_length",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLoss:
    """Nats of cross-entropy and of KL to the teacher, summed over the `tokens` of a batch that count."""

    cross_entropy: float
    kl: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutLoss:
    """Held-out cross-entropy, and KL to the teacher, in nats a token, over `tokens` tokens under `conditions`."""

    cross_entropy: float
    kl: float
    tokens: int
    conditions: Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """A model's parameters and their bytes, those with the decoded text's caches, and its tokens a second."""

    params: int
    weight_bytes: int
    memory_bytes: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Which model reads held-out text: a checkpoint, at a subnet or whole, in random order where that has a seed.

    `teacher` is the checkpoint that its KL is to. Never more than these two are in memory.
    """

    model: str
    dtype: Dtype
    teacher: str | None = None
    subnet: Subnet | None = None
    random_seed: int | None = None


@step(on_gpu=True)
def evaluate(
    teacher: Artifact,
    reordered: Artifact,
    family: Artifact,
    slices: dict[str, Artifact],
    corpus: Artifact,
    settings: Evaluation,
    problems_digest: str | None,
    dtype: Dtype,
    seed: int,
) -> EvaluationRecord:
    """Held-out loss, KL, problems, speed and memory of every budget; and the loss of cutting without training.

    Every number is a step of its own inside this one, so that one run on a worker measures them all: an evaluation that
    was killed goes on at the first that is missing.
    """
    text, asked = of_the_text(settings), replace(settings, heldout_tokens=1, sequence_length=1, batch_size=1)
    config = checkpoint.read_config(Path(teacher.path))

    def answered(model: Artifact) -> Answers | None:
        if not settings.problems:
            return None
        return run(measure_answers, model=model, settings=asked, problems_digest=problems_digest, dtype=dtype)

    def measured(budget: checkpoint.ResolvedBudget) -> BudgetEvaluation:
        model, at = slices[budget.name], budget.subnet
        loss = run(measure_loss, model=model, teacher=teacher, corpus=corpus, settings=text, dtype=dtype)
        answers = answered(model)
        decoding = run(measure_decoding, model=model, corpus=corpus, settings=text, dtype=dtype)
        in_order, at_random = (
            run(measure_cut, reordered=reordered, subnet=at, corpus=corpus, settings=text, dtype=dtype, random_seed=by)
            for by in (None, seed)
        )
        return BudgetEvaluation(
            budget=budget.name,
            active_params=active(config, at),
            cross_entropy=loss.cross_entropy,
            kl=loss.kl,
            cut_cross_entropy=in_order,
            random_cut_cross_entropy=at_random,
            **asdict(decoding),
            accuracy=answers.accuracy if answers else None,
            accuracy_by_task=answers.by_task if answers else {},
            cut_answers=answers.cut if answers else None,
        )

    whole = run(measure_loss, model=teacher, teacher=teacher, corpus=corpus, settings=text, dtype=dtype)
    answers, full = answered(teacher), full_subnet(config)
    return EvaluationRecord(
        conditions=whole.conditions,
        teacher_params=subnet_params(config, full),
        teacher_active_params=active(config, full),
        teacher_cross_entropy=whole.cross_entropy,
        teacher_accuracy=answers.accuracy if answers else None,
        teacher_cut_answers=answers.cut if answers else None,
        heldout_tokens=whole.tokens,
        problems=answers.problems if answers else 0,
        budgets=tuple(measured(budget) for budget in checkpoint.read_family(Path(family.path)).budgets),
    )


def active(config: ModelConfig, subnet: Subnet) -> int | None:
    """The parameters that a token uses, where experts make them fewer than all; else None."""
    return active_params(config, subnet) if config.layers_of(MOE) else None


def of_the_text(settings: Evaluation) -> Evaluation:
    """What of the settings a held-out loss is measured by; problems that change leave it as it is."""
    return Evaluation(
        heldout_tokens=settings.heldout_tokens,
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
    )


@step("held-out loss of {model.name}", on_gpu=True)
def measure_loss(
    model: Artifact, teacher: Artifact, corpus: Artifact, settings: Evaluation, dtype: Dtype
) -> HeldoutLoss:
    """Held-out loss of a stock checkpoint, and its KL to the teacher, where it is not the teacher itself."""
    batches = _heldout(teacher, corpus, settings)
    taught_by = teacher.path if model.digest != teacher.digest else None
    loss, kl = shared_loss(Reader(model=model.path, dtype=dtype, teacher=taught_by), batches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    under = conditions(Path(corpus.path), settings, batches, dtype, device)
    return HeldoutLoss(cross_entropy=loss, kl=kl, tokens=predicted(batches), conditions=under)


@step("held-out loss of a cut", on_gpu=True)
def measure_cut(
    reordered: Artifact,
    subnet: Subnet,
    corpus: Artifact,
    settings: Evaluation,
    dtype: Dtype,
    random_seed: int | None,
) -> float:
    """Held-out loss of cutting a subnet with no training: in the order of importance, or in the seed's random order."""
    reader = Reader(model=reordered.path, dtype=dtype, subnet=subnet, random_seed=random_seed)
    return shared_loss(reader, _heldout(reordered, corpus, settings))[0]


@step("answers of {model.name}", on_gpu=True)
def measure_answers(model: Artifact, settings: Evaluation, problems_digest: str | None, dtype: Dtype) -> Answers:
    """How many held-out problems a stock checkpoint answers exactly."""
    assert settings.problems, "asked only where there are problems"
    problems = recorded_problems(settings, problems_digest)
    # What is decoded together decides how the last bits round, so that batches are made before devices are counted.
    prompts = encode_questions(load_tokenizer(Path(model.path)), problems, settings.chat_template_kwargs)
    batches = prompt_batches([prompt.ids for prompt in prompts])
    asked = [[problems[index] for index in batch] for batch in batches]
    shares = [(model.path, dtype, settings, share) for share in dealt(asked, devices())]
    answered = zip(chain(*batches), chain(*gathered(on_devices(_matched, shares))), strict=True)
    return tally(problems, [match for _, match in sorted(answered)])


@step("speed of {model.name}", on_gpu=True)
def measure_decoding(model: Artifact, corpus: Artifact, settings: Evaluation, dtype: Dtype) -> Decoding:
    """Size, memory and speed of a stock checkpoint as it decodes."""
    loaded = _load(model.path, dtype)
    prompt = _heldout(model, corpus, settings)[0]
    speed, cache_bytes = decoding_speed(loaded, full_subnet(loaded.config), prompt)
    weight_bytes = sum(weight.nbytes for weight in loaded.parameters())
    return Decoding(
        params=sum(weight.numel() for weight in loaded.parameters()),
        weight_bytes=weight_bytes,
        memory_bytes=weight_bytes + cache_bytes,
        tokens_per_second=speed,
    )


def _heldout(model: Artifact, corpus: Artifact, settings: Evaluation) -> list[TokenBatch]:
    vocab_size = checkpoint.read_config(Path(model.path)).vocab_size
    return heldout_batches(Path(corpus.path) / HELDOUT_FILE, settings, vocab_size)


def _load(path: str, dtype: Dtype) -> ElasticNemotronH:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return job.load_model(Path(path), device, job.DTYPES[dtype])


def shared_loss(reader: Reader, batches: list[TokenBatch]) -> tuple[float, float]:
    """Mean cross-entropy, and mean KL to the teacher (0 without one), in nats a token, read by all devices."""
    return mean_loss(gathered(on_devices(read_losses, [(reader, share) for share in dealt(batches, devices())])))


def read_losses(share: tuple[Reader, list[TokenBatch]]) -> list[BatchLoss]:
    """What a reader loses on each batch."""
    reader, batches = share
    model = _load(reader.model, reader.dtype)
    subnet = reader.subnet or full_subnet(model.config)
    if reader.random_seed is not None:
        order = reorder.random_order(model.config, generator(reader.random_seed, "random order"))
        reorder_model(model, order)
        subnet = replace(subnet, layers=keep_layers(order.layers, subnet.depth))
    teacher = _load(reader.teacher, reader.dtype) if reader.teacher else None
    return batch_losses(model, subnet, batches, teacher)


def conditions(
    corpus: Path, settings: Evaluation, batches: list[TokenBatch], dtype: Dtype, device: torch.device
) -> Conditions:
    """Under what a loss on these batches of the corpus is measured."""
    record = read_record(corpus)
    return Conditions(
        heldout_sha256=record.heldout.sha256,
        tokenizer_sha256=record.tokenizer_sha256,
        sequences=sequences(batches),
        tokens=predicted(batches),
        settings={name: getattr(settings, name) for name in OF_THE_LOSS},
        dtype=dtype,
        device=device.type,
        code=fingerprint([code_of(function).modules for function in (heldout_batches, heldout_loss)]),
    )


def heldout_loss(
    student: ElasticNemotronH, subnet: Subnet, batches: list[TokenBatch], teacher: ElasticNemotronH | None = None
) -> tuple[float, float]:
    """Mean cross-entropy, and mean KL(teacher || student) (0 without a teacher), in nats a token."""
    return mean_loss(batch_losses(student, subnet, batches, teacher))


def mean_loss(losses: list[BatchLoss]) -> tuple[float, float]:
    """Mean cross-entropy and mean KL in nats a token."""
    tokens = sum(loss.tokens for loss in losses)
    return sum(loss.cross_entropy for loss in losses) / tokens, sum(loss.kl for loss in losses) / tokens


@torch.inference_mode()
def batch_losses(
    student: ElasticNemotronH, subnet: Subnet, batches: list[TokenBatch], teacher: ElasticNemotronH | None = None
) -> list[BatchLoss]:
    """What a student loses on each batch; the KL is 0 without a teacher."""
    losses = list[BatchLoss]()
    for batch in (batch.to(student.embeddings.weight.device) for batch in batches):
        parts = distillation_loss(
            last_hidden(student, subnet, batch),
            student.head_weight(subnet.hidden),
            last_hidden(teacher, full_subnet(teacher.config), batch) if teacher else None,
            teacher.lm_head.weight if teacher else None,
            batch.targets_BT.flatten(),
            kl_weight=1.0 if teacher else 0.0,
            ce_weight=1.0,
            learned=batch.learned,
        )
        nats, kl = float(parts.cross_entropy) * parts.tokens, float(parts.kl) * parts.tokens
        losses.append(BatchLoss(cross_entropy=nats, kl=kl, tokens=parts.tokens))
    return losses


def last_hidden(reader: ElasticNemotronH, subnet: Subnet, batch: TokenBatch) -> torch.Tensor:
    """The last hidden states of every token of a batch, (B x T, D)."""
    hidden_BTD: torch.Tensor = reader(batch.inputs_BT, subnet, packing=batch.packing)
    return hidden_BTD.flatten(0, 1)


Asked = tuple[str, Dtype, Evaluation, list[list[Problem]]]


def _matched(share: Asked) -> list[list[Match]]:
    """What became of the problems of each batch."""
    path, dtype, settings, batches = share
    model, tokenizer = _load(path, dtype), load_tokenizer(Path(path))
    return [matches(model, tokenizer, batch, settings) for batch in batches]


def decoding_speed(submodel: ElasticNemotronH, subnet: Subnet, batch: TokenBatch) -> tuple[float, int]:
    """Tokens a second when decoding one sequence after a prompt, and the bytes of its caches. Median of three."""
    prompt_BT = batch.inputs_BT[:1, : (batch.inputs_BT.shape[1] + 1) // 2].to(submodel.embeddings.weight.device)
    speeds = []
    for _ in range(DECODE_REPEATS):
        times = [
            time.perf_counter()
            for _ in _synchronised(decode(submodel, prompt_BT, subnet, max_new_tokens=DECODED_TOKENS))
        ]
        speeds.append((len(times) - 1) / (times[-1] - times[0]))
    cache = Cache()
    with torch.inference_mode():
        submodel(prompt_BT, subnet, cache=cache)
    held: list[dict[int, Any]] = [cache.conv, cache.ssm, cache.keys, cache.values]
    return statistics.median(speeds), sum(state.nbytes for states in held for state in states.values())


def _synchronised(tokens: Iterator[torch.Tensor]) -> Iterator[int]:
    """Each token once it has really been computed."""
    for token_B in tokens:
        yield int(token_B[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Cross-entropy in nats a token, and where there were problems the shares answered exactly, and cut off."""

    cross_entropy: float
    accuracy: float | None
    cut_answers: float | None = None


@step("measure {model.name}", on_gpu=True)
def measure(model: Artifact, corpus: Artifact, settings: Evaluation, problems_digest: str | None) -> Measurement:
    """Measure a stock checkpoint on a corpus's held-out part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    directory = Path(model.path)
    loaded = job.load_model(directory, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    batches = heldout_batches(Path(corpus.path) / HELDOUT_FILE, settings, loaded.config.vocab_size)
    loss, _ = heldout_loss(loaded, full_subnet(loaded.config), batches)
    problems = recorded_problems(settings, problems_digest)
    tokenizer = load_tokenizer(directory)
    if not problems:
        return Measurement(cross_entropy=loss, accuracy=None)
    answers = tally(problems, matches(loaded, tokenizer, problems, settings))
    return Measurement(cross_entropy=loss, accuracy=answers.accuracy, cut_answers=answers.cut)


def log_measurement(
    settings: Settings, version: tracking.ModelVersion, corpus: Artifact, measured: Measurement
) -> None:
    """Keep a measurement in MLflow: a run of its own in the family's experiment, named after the model."""
    heldout = read_record(Path(corpus.path)).heldout.sha256
    key = fingerprint(version.name, version.version, heldout)[:32]
    run_id = tracking.open_run(
        settings.tracking_uri,
        experiment=version.tags[tracking.FAMILY],
        run_key=key,
        run_name=f"{version.name} v{version.version} measured",
        tags={"elastic.model": f"{version.name}:{version.version}", tracking.HELDOUT_DIGEST: heldout},
    )
    found = asdict(measured).items()
    tracking.log_metrics(settings.tracking_uri, run_id, {name: value for name, value in found if value is not None})
    tracking.finish_run(settings.tracking_uri, run_id)
