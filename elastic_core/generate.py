"""Decoding at any budget, and switching budgets in mid-generation: a small submodel thinks, a large one answers."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from elastic_core.geometry import ModelConfig
from elastic_core.model import Cache, ElasticNemotronH, Padding
from elastic_core.subnet import Subnet

READ_AT_ONCE = 2048
COMPLETED_AT_ONCE = 32
PADDING = 0  # any token does: nothing reads it

# The next token of each row, (B,), by its logits, (B, V).
Choose = Callable[[Tensor], Tensor]


def likeliest(logits_BV: Tensor) -> Tensor:
    """The token of the largest logit."""
    return logits_BV.argmax(-1)


class Drawn:
    """Draws each row's next token by its probability, among the likeliest that together reach the share `top_p`.

    Each row has a seed of its own, so that what it draws does not depend on the rows beside it.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        evenly_B = torch.stack([torch.rand((), generator=own, dtype=torch.float64) for own in self._generators])
        probabilities_BV = (logits_BV.double() / self._temperature).softmax(-1)
        return nucleus(probabilities_BV, self._top_p, evenly_B.to(logits_BV.device))


def nucleus(probabilities_BV: Tensor, top_p: float, evenly_B: Tensor) -> Tensor:
    """The token that a number drawn evenly from 0 to below 1 falls on, where the unlikely ones have no room, (B,)."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = sorted_BV.where(sorted_BV.cumsum(-1) - sorted_BV < top_p, 0)
    ends_BV = kept_BV.cumsum(-1)
    place_B = (ends_BV <= evenly_B[:, None] * ends_BV[:, -1:]).sum(-1)
    last_B = (kept_BV > 0).sum(-1) - 1  # of those kept; a sum may round below what was drawn
    return order_BV.gather(1, place_B.minimum(last_B)[:, None])[:, 0]


def chosen(temperature: float, top_p: float, seeds: Sequence[int]) -> Choose:
    """The likeliest token at temperature 0, drawn ones otherwise; a seed a row."""
    return Drawn(temperature, top_p, seeds) if temperature > 0 else likeliest


@torch.inference_mode()
def decode(
    model: ElasticNemotronH,
    prompt_BT: Tensor,
    subnet: Subnet,
    *,
    max_new_tokens: int,
    choose: Choose = likeliest,
    padding: Padding | None = None,
    switch: Mapping[int, Subnet] | None = None,
    read_at_once: int = READ_AT_ONCE,
) -> Iterator[Tensor]:
    """Yield the next tokens (B,), one position at a time.

    `padding` is there where shorter prompts have tokens before them, which nothing of theirs sees. `switch` maps the
    number of new tokens so far to the subnet that goes on from there. States of one subnet are not those of another, so
    a switch reads the whole text again at the new subnet; what follows is exactly what that subnet would have said.
    Text is read in pieces of `read_at_once` tokens, so that a long prompt costs no more memory than its caches.
    """
    if prompt_BT.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, such as the beginning-of-sequence token")
    text_BT, unread_BT, cache = prompt_BT, prompt_BT, Cache(padding=padding)
    for count in range(max_new_tokens):
        if switch and count in switch:
            subnet, cache, unread_BT = switch[count], Cache(padding=padding), text_BT
        for piece_BT in unread_BT.split(read_at_once, dim=1):
            hidden_BTD = model(piece_BT, subnet, cache=cache)
        token_B = choose(model.logits(hidden_BTD[:, -1]))
        yield token_B
        unread_BT = token_B[:, None]
        text_BT = torch.cat([text_BT, unread_BT], dim=1)


def complete(
    model: ElasticNemotronH,
    prompts: Sequence[Sequence[int]],
    subnet: Subnet,
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    batch_size: int = COMPLETED_AT_ONCE,
) -> list[list[int]]:
    """Greedy completions, each up to and without its first stop token."""
    completions: list[list[int]] = [[] for _ in prompts]
    for batch in prompt_batches(prompts, batch_size):
        together = [prompts[i] for i in batch]
        found = complete_together(model, together, subnet, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        for i, completion in zip(batch, found, strict=True):
            completions[i] = completion
    return completions


def complete_together(
    model: ElasticNemotronH,
    prompts: Sequence[Sequence[int]],
    subnet: Subnet,
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    choose: Choose = likeliest,
) -> list[list[int]]:
    """Completions of prompts of any lengths in one batch, each up to and without its first stop token."""
    prompt_BT, padding = left_padded(prompts, model.embeddings.weight.device)
    completions: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for token_B in decode(model, prompt_BT, subnet, max_new_tokens=max_new_tokens, choose=choose, padding=padding):
        for row, token in enumerate(token_B.tolist()):
            if row in open_rows and token in stop_tokens:
                open_rows.discard(row)
            elif row in open_rows:
                completions[row].append(token)
        if not open_rows:
            break
    return completions


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Padding | None]:
    """Prompts as one batch in which all end together, and the padding before the shorter ones."""
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one token, such as the beginning-of-sequence token")
    longest = max(map(len, prompts))
    before = [longest - len(prompt) for prompt in prompts]
    rows = [[PADDING] * room + list(prompt) for room, prompt in zip(before, prompts, strict=True)]
    padding = Padding(torch.tensor(before, device=device), max(before)) if any(before) else None
    return torch.tensor(rows, device=device), padding


def prompt_batches(prompts: Sequence[Sequence[int]], batch_size: int = COMPLETED_AT_ONCE) -> list[list[int]]:
    """The indices of the prompts that are completed at once: prompts of one length, which need no padding."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in by_length.values()
        for start in range(0, len(indices), batch_size)
    ]


def stop_tokens(config: ModelConfig) -> set[int]:
    """The token ids that end generation: those of generation_config.json, where there is one (stock_config.py)."""
    eos = config.eos_token_id
    return set(eos) if isinstance(eos, tuple) else {eos} if eos is not None else set()
