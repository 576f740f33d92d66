"""The model card of a slice and of an elastic checkpoint: README.md, as the Hub and the registry show it.

A card says what is known when the files are written. Scores are measured later, of these very files: the section of
scores is filled in the copy that is published.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from elastic_core.cost import active_params
from elastic_core.files.puzzle import is_puzzle
from elastic_core.geometry import MOE, ModelConfig
from elastic_core.layers.kinds import KINDS
from elastic_core.subnet import full_subnet

if TYPE_CHECKING:
    from elastic_core.files.checkpoint import Family, ResolvedBudget

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?=@|$)")
LICENSE = ("license", "license_name", "license_link")

_LOADING = """\
## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # transformers 5: tested with 5.23

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")  # transformers 4.57 too
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto")
```

```
vllm serve DIRECTORY --mamba-ssm-cache-dtype float32     # tested with vLLM 0.32
python convert_hf_to_gguf.py DIRECTORY --outfile m.gguf  # llama.cpp's converter, then llama-server -m m.gguf
```
"""
_NOT_LOADING = """\
## Load it

The FFN widths of this checkpoint differ by layer and are written as a list. vLLM 0.32, transformers 5.23 and llama.cpp
do not load it; cut it again with `--ffn-layout padded`, which is the same function.
"""
_LOADING_PUZZLE = """\
## Load it

The widths of the experts of this checkpoint differ by layer and are written as NVIDIA's Puzzle writes them, in
`block_configs`. SGLang reads that, and so does llama.cpp's converter where experts have latent channels. vLLM 0.32
wants the configuration class of NVIDIA's own checkpoints beside it, and transformers 5.23 has none; for these cut it
again with `--ffn-layout padded`, which is the same function.
"""


def slice_card(config: ModelConfig, *, params: int, zeros: int, dtype: str, family: "Family | None", name: str) -> str:
    """The card of a slice; `zeros` of the elements in its files pad layers and are not among its `params`."""
    lineage = family.lineage if family is not None else {}
    padding = f" and {zeros:,} zeros that pad layers to one width" if zeros else ""
    shape = {
        "parameters": f"{params:,}{padding}",
        "active parameters": f"{active_params(config, full_subnet(config)):,}" if config.layers_of(MOE) else None,
        "dtype": dtype,
        "layers": f"{config.num_layers}: `{config.hybrid_override_pattern}`",
        "hidden size": config.hidden_size,
        **dict(kind.width(config) for letter, kind in KINDS.items() if config.layers_of(letter)),
        "longest text": f"{config.max_position_embeddings} tokens",
    }
    return "\n".join(
        [
            *_front_matter(lineage),
            f"# {name}",
            "",
            "One size of an elastic Nemotron-H model, cut out of its checkpoint with no training after the cut.",
            "",
            *_table(shape),
            *_made_from(lineage),
            *_SCORES,
            _how_to_load(config),
        ]
    )


def _how_to_load(config: ModelConfig) -> str:
    if len(set(config.ffn_sizes)) > 1:
        return _NOT_LOADING
    return _LOADING_PUZZLE if is_puzzle(config) else _LOADING


def family_card(config: ModelConfig, family: "Family") -> str:
    """The card of an elastic checkpoint."""
    return "\n".join(
        [
            *_front_matter(family.lineage),
            "# Elastic checkpoint",
            "",
            "One set of weights that holds every size below, and loads as the full model. `elastic slice DIRECTORY`",
            "cuts out a size, or any size between.",
            "",
            *_table({budget.name: _size(config, budget) for budget in family.budgets}),
            *_made_from(family.lineage),
            *_SCORES,
            _LOADING,
        ]
    )


def _size(config: ModelConfig, budget: "ResolvedBudget") -> str:
    active = f", {active_params(config, budget.subnet):,} of them active" if config.layers_of(MOE) else ""
    return f"{budget.params:,} parameters{active}"


_SCORES = [
    "## Scores",
    "",
    "Loss, KL to the teacher and accuracy are with the registered version: in its description, in its tags, which say",
    "how each was measured, and in the report of its run.",
    "",
]


def _front_matter(lineage: Mapping[str, object]) -> list[str]:
    teacher = _HUB_NAME.match(str(lineage.get("teacher", "")))
    return [
        "---",
        *([f"base_model: {teacher.group()}"] if teacher else []),
        *(f"{key}: {lineage[key]}" for key in LICENSE if key in lineage),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [nemotron_h, mamba2, elastic]",
        "---",
        "",
    ]


def _made_from(lineage: Mapping[str, object]) -> list[str]:
    return ["## Made from", "", *_table(lineage)] if lineage else []


def _table(rows: Mapping[str, object]) -> list[str]:
    filled = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items() if value is not None]
    return ["| | |", "| --- | --- |", *filled, ""]
