"""Laws of decoding: prompts of any lengths in one batch say what each says alone; what is drawn has its probability."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from elastic_core.files.checkpoint import load_weights, read_config
from elastic_core.generate import Drawn, chosen, complete_together, decode, left_padded, likeliest, nucleus
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Subnet, full_subnet

# Of the last bits, by which sums differ that are made in another order; the logits are about 1.
FLOAT64 = 1e-12
SMALL = Subnet(
    hidden=24, ffn=(16,) * 8, mamba_heads=(4,) * 8, mamba_head_dim=4, attention_heads=(2,) * 8, layers=(0, 1, 2, 3, 4)
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ElasticNemotronH:
    made = ElasticNemotronH(read_config(tiny_checkpoint), backend="torch")
    made.load_state_dict(load_weights(tiny_checkpoint))
    return made.double().eval()


def random_prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(vocab_size) for _ in range(chance.randint(1, 40))] for _ in range(count)]


def alone(model: ElasticNemotronH, prompt: Sequence[int], new: int, stop: set[int]) -> list[int]:
    """One prompt after the other, read again whole for every token: no cache, no batch, no padding."""
    text = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            token = int(model.logits(model(torch.tensor([text]), full_subnet(model.config)))[0, -1].argmax())
        if token in stop:
            break
        text.append(token)
    return text[len(prompt) :]


def test_200_prompts_of_any_lengths_in_one_batch_say_what_each_says_alone(model: ElasticNemotronH) -> None:
    prompts = random_prompts(200, model.config.vocab_size, seed=1)
    full, stop = full_subnet(model.config), set(range(12))
    together = complete_together(model, prompts, full, max_new_tokens=4, stop_tokens=stop)
    assert together == [alone(model, prompt, 4, stop) for prompt in prompts]
    assert len(set(map(len, prompts))) > 30  # as many lengths
    assert {len(completion) for completion in together} > {0, 4}  # some stop at once, and some not at all


@pytest.mark.parametrize("read_at_once", [1, 2, 7, 2048])
@pytest.mark.parametrize("subnet", ["full", "small"])
def test_no_logit_sees_the_padding(model: ElasticNemotronH, subnet: str, read_at_once: int) -> None:
    """However the padding falls on the pieces that a text is read in."""
    at = full_subnet(model.config) if subnet == "full" else SMALL
    prompts = [[5], [7, 8, 9], list(range(17)), list(range(20, 40))]

    def logits(rows: list[list[int]]) -> list[torch.Tensor]:
        found = list[torch.Tensor]()

        def note(logits_BV: torch.Tensor) -> torch.Tensor:
            found.append(logits_BV)
            return torch.full((len(logits_BV),), 11)  # the same text goes on in every batch

        prompt_BT, padding = left_padded(rows, torch.device("cpu"))
        list(decode(model, prompt_BT, at, max_new_tokens=4, choose=note, padding=padding, read_at_once=read_at_once))
        return found

    together, each = logits(prompts), [logits([prompt]) for prompt in prompts]
    for step, logits_BV in enumerate(together):
        expected = torch.cat([own[step] for own in each])
        assert (logits_BV - expected).abs().max() / expected.abs().max() < FLOAT64


def test_what_is_drawn_has_its_probability_among_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).log()
    draws = 4000
    drawn = Drawn(1.0, 0.8, list(range(draws)))(logits.expand(draws, -1))
    shares = drawn.bincount(minlength=5) / draws
    expected = torch.tensor([0, 0.4, 0.3, 0.15, 0]) / 0.85  # 0.4 + 0.3 do not reach 0.8, with 0.15 they do
    assert (shares - expected).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard deviations
    assert shares[0] == shares[4] == 0
    colder = Drawn(0.5, 1.0, list(range(draws)))(logits.expand(draws, -1)).bincount(minlength=5) / draws
    squared = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]) ** 2
    assert (colder - squared / squared.sum()).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_the_ends_of_the_numbers_fall_on_tokens_that_may_be_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.25, 0.25]], dtype=torch.float64)
    for top_p, last in ((1e-9, 1), (0.5, 1), (0.6, 2), (1.0, 3)):
        for evenly, expected in ((0.0, 1), (1 - 1e-16, last), (1.0, last)):
            found = nucleus(probabilities, top_p, torch.tensor([evenly], dtype=torch.float64))
            assert int(found) == expected, (top_p, evenly)


def test_a_row_draws_by_its_own_seed_alone() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, reversed_rows = Drawn(1.0, 1.0, [1, 2, 3]), Drawn(1.0, 1.0, [3, 2, 1])
    for _ in range(5):
        assert together(logits).tolist() == reversed_rows(logits.flip(0)).flip(0).tolist()
    assert chosen(0.0, 0.5, [1]) is likeliest


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        left_padded([[1], []], torch.device("cpu"))
