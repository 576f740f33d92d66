"""Our own decoder as the engine that answers benchmarks: for small models, with nothing to install or to serve."""

from collections.abc import Sequence
from pathlib import Path

import torch

from elastic_core.budget import Dtype
from elastic_core.generate import COMPLETED_AT_ONCE, chosen, complete_together, stop_tokens
from elastic_core.judging import Sampling
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from elastic_core.training import job
from tasks.corpus.chats import CLOSE, OPEN, Chat, Row
from tasks.corpus.problems import Prompt, encode_prompts, spoken
from tasks.corpus.tokenizer import load_tokenizer
from tasks.judging.problems import Problem
from tasks.judging.samples import Completion, SampleFile, Wanted, keep, missing_from
from tasks.running.bars import Report
from tasks.running.devices import devices, shared

# The tokens of prompts that are completed together, how each is drawn, and its seed.
Batch = tuple[list[list[int]], Sampling, list[int]]


class Decoder:
    """The engine that decodes a stock checkpoint on every device of this machine.

    `identity` tells the model, and all else that an answer depends on.
    """

    def __init__(self, directory: Path, dtype: Dtype, identity: str) -> None:
        self.identity = identity
        self._directory, self._dtype = directory, dtype

    def fill(self, samples: SampleFile, wanted: Sequence[Wanted], report: Report) -> None:
        """Make the samples that are missing, batch by batch; each batch is kept as a whole."""
        missing, tokenizer = missing_from(samples, wanted), load_tokenizer(self._directory)
        problems = {problem.id: problem for problem, _, _ in missing}
        sampling = missing[0][2].sampling
        prompts = dict(zip(problems, encoded(self._directory, list(problems.values()), sampling), strict=True))
        missing.sort(key=lambda each: len(prompts[each[0].id].ids))  # so that little of a batch is padding
        batches = [missing[i : i + COMPLETED_AT_ONCE] for i in range(0, len(missing), COMPLETED_AT_ONCE)]
        count, done = devices(), len(wanted) - len(missing)
        with shared(_loaded, [(self._directory, self._dtype, place) for place in range(count)]) as everywhere:
            for first in range(0, len(batches), count):
                together = batches[first : first + count]
                asked: list[Batch] = [
                    ([prompts[p.id].ids for p, _, _ in batch], sampling, [request.seed for _, _, request in batch])
                    for batch in together
                ]
                for batch, completed in zip(together, everywhere.ask(_completed, asked), strict=False):
                    for each, ids in zip(batch, completed, strict=True):
                        text = as_asked(spoken(ids, tokenizer), prompts[each[0].id], sampling)
                        keep(samples, each, completion(text, len(ids), sampling))
                    done += len(batch)
                    report(done, len(wanted))


def encoded(directory: Path, problems: Sequence[Problem], sampling: Sampling) -> list[Prompt]:
    """What the model of a checkpoint reads; ValueError, with the row, where its chat template refuses a problem."""

    def messages(problem: Problem) -> list[Row]:
        system = [] if sampling.system is None else [{"role": "system", "content": sampling.system}]
        return [*system, {"role": "user", "content": problem.prompt}]

    chats = [(Chat(messages(problem)), problem.where) for problem in problems]
    return encode_prompts(load_tokenizer(directory), chats, {})


def as_asked(text: str, prompt: Prompt, sampling: Sampling) -> str:
    """A completion as one that begins inside a thought, or outside, whichever the sampling says that it does."""
    if prompt.thinking == sampling.thinking:
        return text
    return f"{OPEN}{text}" if prompt.thinking else f"{CLOSE}{text}"


def completion(text: str, tokens: int, sampling: Sampling) -> Completion:
    """A completion of so many tokens; the one that ends it counts, as servers count it."""
    if tokens == sampling.max_new_tokens:
        return Completion(text=text, tokens=tokens, finish="length")
    return Completion(text=text, tokens=tokens + 1, finish="stop")


Loaded = tuple[ElasticNemotronH, int]


def _loaded(share: tuple[Path, Dtype, int]) -> Loaded:
    """The model on a device, and the place of that among all."""
    directory, dtype, place = share
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return job.load_model(directory, device, job.DTYPES[dtype]), place


def _completed(loaded: Loaded, batches: Sequence[Batch]) -> list[list[int]]:
    """The tokens of this device's batch, of those that all devices complete at once."""
    model, place = loaded
    if place >= len(batches):
        return []
    prompts, sampling, seeds = batches[place]
    return complete_together(
        model,
        prompts,
        full_subnet(model.config),
        max_new_tokens=sampling.max_new_tokens,
        stop_tokens=stop_tokens(model.config),
        choose=chosen(sampling.temperature, sampling.top_p, seeds),
    )
