"""The layer kinds that there are, by the letter that stands for each in the pattern of layers."""

from elastic_core.layers.attention import AttentionKind
from elastic_core.layers.ffn import FeedForwardKind
from elastic_core.layers.kind import Kind
from elastic_core.layers.mamba import MambaKind
from elastic_core.layers.moe import MixtureKind

KINDS: dict[str, Kind] = {
    kind.letter: kind for kind in (FeedForwardKind(), MambaKind(), AttentionKind(), MixtureKind())
}
