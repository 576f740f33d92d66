"""Measure every budget on held-out data: the slices themselves, beside the teacher and beside cutting alone."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from elastic_core.budget import Dtype
from elastic_core.cost import subnet_params
from elastic_core.files import checkpoint, reorder
from elastic_core.generate import complete, decode
from elastic_core.geometry import ModelConfig
from elastic_core.model import Cache, ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.schema import to_dict
from elastic_core.subnet import Subnet, full_subnet, keep_layers
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.losses import distillation_loss
from elastic_core.training.tokens import TokenBatch, TokenRows
from tasks import tracking
from tasks.corpus.problems import Problem, encode_questions, read_problems
from tasks.corpus.record import HELDOUT_FILE, read_record
from tasks.corpus.tokenizer import load_tokenizer
from tasks.records import Artifact, BudgetEvaluation, Conditions, EvaluationRecord
from tasks.running.code import code_of
from tasks.running.progress import progress_bar
from tasks.running.steps import fingerprint, step
from tasks.settings import Settings

DECODED_TOKENS = 64
DECODE_REPEATS = 3

# No held-out loss depends on these; `sequences` says how much was there of the tokens asked for.
NOT_OF_THE_LOSS = {"heldout_tokens", "batch_size"}
NOT_OF_THE_LOSS |= {"problems", "max_problems", "max_new_tokens", "chat_template_kwargs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Exact-match accuracy over all problems, and by kind of problem."""

    accuracy: float
    by_task: Mapping[str, float]


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
    """Held-out loss, KL, problems, speed and memory of every budget; and the loss of cutting without training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load_as = job.DTYPES[dtype]
    teaching = job.load_model(Path(teacher.path), device, load_as)
    full = full_subnet(teaching.config)
    batches = heldout_batches(Path(corpus.path) / HELDOUT_FILE, settings, teaching.config.vocab_size)
    tokenizer = load_tokenizer(Path(teacher.path))
    problems = read_problems(Path(settings.problems), settings.max_problems) if settings.problems else []
    teacher_answers = answer(teaching, tokenizer, problems, settings)
    teacher_loss, _ = heldout_loss(teaching, full, batches)
    cut = job.load_model(Path(reordered.path), device, load_as)
    random_order = reorder.random_order(cut.config, generator(seed, "random order"))
    shuffled = shuffled_copy(cut, random_order)
    measured = []
    with progress_bar("evaluating") as report:
        for done, budget in enumerate(checkpoint.read_family(Path(family.path)).budgets):
            submodel = job.load_model(Path(slices[budget.name].path), device, load_as)
            whole = full_subnet(submodel.config)
            loss, kl = heldout_loss(submodel, whole, batches, teaching)
            random_layers = keep_layers(random_order.layers, budget.subnet.depth)
            answers = answer(submodel, tokenizer, problems, settings)
            speed, cache_bytes = decoding_speed(submodel, whole, batches[0])
            weight_bytes = sum(weight.nbytes for weight in submodel.parameters())
            measured.append(
                BudgetEvaluation(
                    budget=budget.name,
                    params=sum(weight.numel() for weight in submodel.parameters()),
                    weight_bytes=weight_bytes,
                    memory_bytes=weight_bytes + cache_bytes,
                    cross_entropy=loss,
                    kl=kl,
                    cut_cross_entropy=heldout_loss(cut, budget.subnet, batches)[0],
                    random_cut_cross_entropy=heldout_loss(
                        shuffled, replace(budget.subnet, layers=random_layers), batches
                    )[0],
                    tokens_per_second=speed,
                    accuracy=answers.accuracy if answers else None,
                    accuracy_by_task=answers.by_task if answers else {},
                )
            )
            report(done + 1, len(slices))
    return EvaluationRecord(
        conditions=conditions(Path(corpus.path), settings, batches, dtype, device),
        teacher_params=subnet_params(teaching.config, full),
        teacher_cross_entropy=teacher_loss,
        teacher_accuracy=teacher_answers.accuracy if teacher_answers else None,
        heldout_tokens=predicted(batches),
        problems=len(problems),
        budgets=tuple(measured),
    )


def heldout_batches(path: Path, settings: Evaluation, vocab_size: int) -> list[TokenBatch]:
    """Held-out tokens in batches, from all over the file, up to the number asked for.

    ValueError when there is not one sequence, or a token that a model of `vocab_size` does not have.
    """
    try:
        rows = TokenRows(path, settings.sequence_length)
    except (OSError, checkpoint.CheckpointError) as error:
        raise ValueError(f"{path} holds no tokens ({error}); name heldout.safetensors of a prepared corpus") from error
    if rows.num_rows == 0:
        raise ValueError(
            f"{path} holds no sequence of {settings.sequence_length} tokens; raise data.heldout_fraction or lower "
            "evaluation.sequence_length"
        )
    batches = batches_of(rows, spread(rows.num_rows, settings.heldout_tokens, settings), settings.batch_size)
    highest = max(int(tokens.max()) for batch in batches for tokens in (batch.inputs_BT, batch.targets_BT))
    if highest >= vocab_size:
        raise ValueError(
            f"{path} holds token {highest}, but the model's vocab_size is {vocab_size}; "
            "use tokens of the model's own tokenizer"
        )
    if predicted(batches) == 0:
        raise ValueError(
            f"{path}: none of the {sequences(batches)} sequences read holds a token to learn; hold out more documents"
        )
    return batches


def spread(rows: int, tokens: int, settings: Evaluation) -> list[int]:
    """As many of a file's rows as hold `tokens`, at even distances: its sources lie one after the other."""
    count = min(rows, max(1, tokens // settings.sequence_length))
    return [place * rows // count for place in range(count)]


def batches_of(rows: TokenRows, chosen: Sequence[int], size: int) -> list[TokenBatch]:
    """The chosen rows, `size` of them together."""
    return [rows.batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]


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
        settings={name: value for name, value in to_dict(settings).items() if name not in NOT_OF_THE_LOSS},
        dtype=dtype,
        device=device.type,
        code=fingerprint([code_of(function).modules for function in (heldout_batches, heldout_loss)]),
    )


def sequences(batches: list[TokenBatch]) -> int:
    """The rows of all batches."""
    return sum(len(batch.inputs_BT) for batch in batches)


def predicted(batches: list[TokenBatch]) -> int:
    """The tokens whose loss counts: those learned, and not the first of a sequence or of a document."""
    return sum(batch.learned for batch in batches)


@torch.inference_mode()
def heldout_loss(
    student: ElasticNemotronH, subnet: Subnet, batches: list[TokenBatch], teacher: ElasticNemotronH | None = None
) -> tuple[float, float]:
    """Mean cross-entropy, and mean KL(teacher || student) (0 without a teacher), in nats a token."""
    device = student.embeddings.weight.device
    cross_entropy = kl = tokens = 0.0
    for batch in (batch.to(device) for batch in batches):
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
        cross_entropy += float(parts.cross_entropy) * parts.tokens
        kl += float(parts.kl) * parts.tokens
        tokens += parts.tokens
    return cross_entropy / tokens, kl / tokens


def last_hidden(reader: ElasticNemotronH, subnet: Subnet, batch: TokenBatch) -> torch.Tensor:
    """The last hidden states of every token of a batch, (B x T, D)."""
    hidden_BTD: torch.Tensor = reader(batch.inputs_BT, subnet, packing=batch.packing)
    return hidden_BTD.flatten(0, 1)


def shuffled_copy(source: ElasticNemotronH, order: reorder.Order) -> ElasticNemotronH:
    """The same function with its components in another order: what cutting without a ranking would cut."""
    with torch.device("meta"):
        shuffled = ElasticNemotronH(source.config)
    weights = {name: weight.cpu() for name, weight in source.state_dict().items()}
    moved = reorder.reorder_weights(weights, order, source.config)
    shuffled.load_state_dict({name: w.to(source.embeddings.weight.device) for name, w in moved.items()}, assign=True)
    return shuffled.requires_grad_(False)


def answer(
    submodel: ElasticNemotronH, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], settings: Evaluation
) -> Answers | None:
    """Answer every problem greedily; None without problems. What counts is what follows the last thought."""
    if not problems:
        return None
    prompts = encode_questions(tokenizer, problems, settings.chat_template_kwargs)
    completions = complete(
        submodel,
        [prompt.ids for prompt in prompts],
        full_subnet(submodel.config),
        max_new_tokens=settings.max_new_tokens,
        stop_tokens=stop_tokens(submodel.config),
    )
    asked, right = Counter(problem.task for problem in problems), Counter[str]()
    for problem, prompt, completion in zip(problems, prompts, completions, strict=True):
        right[problem.task] += prompt.answer(str(tokenizer.decode(completion))) == problem.answer
    return Answers(
        accuracy=right.total() / len(problems), by_task={task: right[task] / asked[task] for task in sorted(asked)}
    )


def stop_tokens(config: ModelConfig) -> set[int]:
    """The token ids that end generation: those of generation_config.json, where there is one (stock_config.py)."""
    eos = config.eos_token_id
    return set(eos) if isinstance(eos, tuple) else {eos} if eos is not None else set()


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
    """Cross-entropy in nats a token, and the share of problems answered exactly, where there were any."""

    cross_entropy: float
    accuracy: float | None


@step(on_gpu=True)
def measure(model: Artifact, corpus: Artifact, settings: Evaluation, problems_digest: str | None) -> Measurement:
    """Measure a stock checkpoint on a corpus's held-out part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    directory = Path(model.path)
    loaded = job.load_model(directory, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    batches = heldout_batches(Path(corpus.path) / HELDOUT_FILE, settings, loaded.config.vocab_size)
    loss, _ = heldout_loss(loaded, full_subnet(loaded.config), batches)
    problems = read_problems(Path(settings.problems), settings.max_problems) if settings.problems else []
    tokenizer = load_tokenizer(directory)
    answers = answer(loaded, tokenizer, problems, settings)
    return Measurement(cross_entropy=loss, accuracy=answers.accuracy if answers else None)


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
        run_name=f"evaluate-{version.name}-{version.version}",
        tags={"elastic.model": f"{version.name}:{version.version}", tracking.HELDOUT_DIGEST: heldout},
    )
    metrics = {"cross_entropy": measured.cross_entropy}
    if measured.accuracy is not None:
        metrics["accuracy"] = measured.accuracy
    tracking.log_metrics(settings.tracking_uri, run_id, metrics)
    tracking.finish_run(settings.tracking_uri, run_id)
