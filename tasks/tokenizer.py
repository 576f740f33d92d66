"""Train a small byte-level BPE tokenizer with a chat template, for recipes that train their own teacher.

What is saved is a stock fast tokenizer: `AutoTokenizer.from_pretrained` loads it, and it gives every text back exactly.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("system", "user", "assistant")
# Their ids are their positions: NemotronH's configuration expects pad 0, bos 1 and eos 2.
SPECIAL_TOKENS = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES))
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# A turn is its role's token and its content. Only the assistant's turn ends in eos, because only it is generated.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role ' + message.role + ' is not system, user or assistant') -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(
    texts: Iterable[str], output_dir: Path, *, vocab_size: int, max_bytes: int = 2_000_000
) -> PreTrainedTokenizerFast:
    """Train on the first `max_bytes` (UTF-8) of `texts`, save to `output_dir`, and return the tokenizer.

    The same texts give the same files, byte for byte. Digits are tokens of their own, so that a small model can learn
    arithmetic. ValueError when the texts cannot fill a vocabulary of exactly `vocab_size` tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size={vocab_size} is below {SMALLEST_VOCABULARY} (256 bytes and the special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, max_bytes), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"the texts fill a vocabulary of {found} tokens, not vocab_size={vocab_size}; give more text")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(output_dir)
    return fast


def _first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The texts until `max_bytes` are reached; the last one is cut at a character."""
    left = max_bytes
    for text in texts:
        encoded = text.encode()
        if len(encoded) >= left:
            yield encoded[:left].decode(errors="ignore")
            return
        left -= len(encoded)
        yield text
