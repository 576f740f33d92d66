"""`elastic generate`: text at any budget, or begun by a small budget and continued by a larger one."""

from pathlib import Path

import torch
import typer

from elastic_core.files.checkpoint import read_family
from elastic_core.generate import chosen, decode, stop_tokens
from flows.commands.models import load
from tasks.corpus.chats import Chat
from tasks.corpus.problems import encode_prompts
from tasks.corpus.tokenizer import load_tokenizer


def generate_text(
    checkpoint: Path,
    prompt: str,
    *,
    budget: str | None,
    then: str | None,
    switch_after: int,
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Print the text token by token; after `switch_after` new tokens the budget `then` goes on, where one is given."""
    model, subnet = load(checkpoint, budget)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.chat_template:
        question = Chat([{"role": "user", "content": prompt}])
        ids = encode_prompts(tokenizer, [(question, "the prompt")], {})[0].ids
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
    switch = {switch_after: read_family(checkpoint).budget(then).subnet} if then else None
    text: list[int] = []
    for token in decode(
        model,
        torch.tensor([ids], device=model.embeddings.weight.device),
        subnet,
        max_new_tokens=max_new_tokens,
        choose=chosen(temperature, 1.0, [torch.seed()]),
        switch=switch,
    ):
        if int(token[0]) in stop_tokens(model.config):
            break
        shown = len(tokenizer.decode(text))
        text.append(int(token[0]))
        typer.echo(tokenizer.decode(text)[shown:], nl=False)
    typer.echo()
