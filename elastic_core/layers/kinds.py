"""The layer kinds that there are, by the letter that stands for each in the pattern of layers."""

from elastic_core.geometry import KIND_NAMES, ModelConfig
from elastic_core.layers.attention import AttentionKind
from elastic_core.layers.ffn import FeedForwardKind
from elastic_core.layers.kind import Kind
from elastic_core.layers.mamba import MambaKind
from elastic_core.layers.moe import MixtureKind
from elastic_core.subnet import Subnet, sizes_at

KINDS: dict[str, Kind] = {
    kind.letter: kind for kind in (FeedForwardKind(), MambaKind(), AttentionKind(), MixtureKind())
}


def kind_names(model: ModelConfig) -> dict[str, str]:
    """What the kinds of the model's layers are called, by letter."""
    return {letter: KIND_NAMES[letter] for letter in KINDS if model.layers_of(letter)}


def sizes_text(model: ModelConfig, subnet: Subnet) -> dict[str, str]:
    """The sizes of the kept layers of each kind, by its name; the smallest and the largest where they differ."""
    found = dict[str, str]()
    for letter, name in kind_names(model).items():
        kept = [sizes_at(subnet, model, layer) for layer in model.layers_of(letter) if layer in subnet.layers]
        spans = {axis: sorted({at[axis] for at in kept}) for axis in model.axes_of(letter)}
        ends = {axis: "-".join(map(str, sizes[:1] + sizes[1:][-1:])) for axis, sizes in spans.items()}
        found[name] = KINDS[letter].text(ends) if kept else "-"
    return found
