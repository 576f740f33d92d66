"""Decoding at any budget, and switching budgets in mid-generation: a small submodel thinks, a large one answers."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from elastic_core.model import Cache, ElasticNemotronH
from elastic_core.subnet import Subnet

READ_AT_ONCE = 2048
COMPLETED_AT_ONCE = 32


@torch.inference_mode()
def decode(
    model: ElasticNemotronH,
    prompt_BT: Tensor,
    subnet: Subnet,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    switch: Mapping[int, Subnet] | None = None,
    read_at_once: int = READ_AT_ONCE,
) -> Iterator[Tensor]:
    """Yield the next tokens (B,), one position at a time; greedy at temperature 0, sampled otherwise.

    `switch` maps the number of new tokens so far to the subnet that goes on from there. States of one subnet are not
    those of another, so a switch reads the whole text again at the new subnet; what follows is exactly what that subnet
    would have said. Text is read in pieces of `read_at_once` tokens, so that a long prompt costs no more memory than
    its caches.
    """
    if prompt_BT.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, such as the beginning-of-sequence token")
    text_BT, unread_BT, cache = prompt_BT, prompt_BT, Cache()
    for count in range(max_new_tokens):
        if switch and count in switch:
            subnet, cache, unread_BT = switch[count], Cache(), text_BT
        for piece_BT in unread_BT.split(read_at_once, dim=1):
            hidden_BTD = model(piece_BT, subnet, cache=cache)
        logits_BV = model.logits(hidden_BTD[:, -1])
        if temperature > 0:
            token_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            token_B = logits_BV.argmax(-1)
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
    device = model.embeddings.weight.device
    completions: list[list[int]] = [[] for _ in prompts]
    for batch in prompt_batches(prompts, batch_size):
        prompt_BT = torch.tensor([list(prompts[i]) for i in batch], device=device)
        open_rows = set(range(len(batch)))
        for token_B in decode(model, prompt_BT, subnet, max_new_tokens=max_new_tokens):
            for row, token in enumerate(token_B.tolist()):
                if row in open_rows and token in stop_tokens:
                    open_rows.discard(row)
                elif row in open_rows:
                    completions[batch[row]].append(token)
            if not open_rows:
                break
    return completions


def prompt_batches(prompts: Sequence[Sequence[int]], batch_size: int = COMPLETED_AT_ONCE) -> list[list[int]]:
    """The indices of the prompts that are completed at once.

    Prompts of one length share a batch, because padding would enter the Mamba states.
    """
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in by_length.values()
        for start in range(0, len(indices), batch_size)
    ]
