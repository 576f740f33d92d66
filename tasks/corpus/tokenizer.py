"""Load and check a checkpoint's tokenizer; train a small one, for recipes that train their own teacher.

What is trained is a byte-level BPE with a chat template, saved as a stock fast tokenizer: `AutoTokenizer` loads it, and
it gives every text back exactly.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic_core.files.pointers import pointer_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("system", "user", "assistant")
# Their ids are their positions: NemotronH's configuration expects pad 0, bos 1 and eos 2.
SPECIAL_TOKENS = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES))
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# What of a checkpoint directory decides the ids that a text is given.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

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


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a checkpoint directory, from its files alone. ValueError if it has no eos token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # a second, for those alone who load one

    for file in tokenizer_files(directory):
        if fault := pointer_fault(file):
            raise ValueError(fault)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        cause = str(error).strip().partition("\n")[0].rstrip(": ")
        raise ValueError(
            f"{directory}: no tokenizer can be loaded ({cause}); add the teacher's tokenizer.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{directory}: {type(tokenizer).__name__} is not a fast tokenizer; add a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{directory}: the tokenizer has no eos token; set eos_token in tokenizer_config.json")
    return tokenizer


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """ValueError if the tokenizer can give an id that a model of `vocab_size` does not have."""
    needed = max(load_tokenizer(directory).get_vocab().values()) + 1
    if needed > vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {needed} tokens but the model's vocab_size is {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files in a checkpoint directory, in a fixed order."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def train_tokenizer(
    texts: Iterable[str],
    output_dir: Path,
    *,
    vocab_size: int,
    max_length: int | None = None,
    max_bytes: int = 2_000_000,
) -> "PreTrainedTokenizerFast":
    """Train on the first `max_bytes` (UTF-8) of `texts`, save to `output_dir`, and return the tokenizer.

    The same texts give the same files, byte for byte. Digits are tokens of their own, so that a small model can learn
    arithmetic. `max_length` is the model's longest sequence in tokens, where it has one. ValueError when the texts
    cannot fill a vocabulary of exactly `vocab_size` tokens.
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
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    (output_dir / "tokenizer_config.json").write_text(json.dumps(_stock_config(max_length), indent=2) + "\n")
    (output_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return load_tokenizer(output_dir)


def _stock_config(max_length: int | None) -> dict[str, object]:
    """tokenizer_config.json as transformers 4 and 5 both read it. What 5 saves by itself, 4 cannot load."""
    longest = {} if max_length is None else {"model_max_length": max_length}
    return {
        **longest,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # a batch generates to the right of its prompts
    }


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
