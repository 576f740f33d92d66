"""The class that comes with NVIDIA's checkpoints in Puzzle's form, as far as vLLM needs one: it has none of its own."""

import copy

from transformers import NemotronHConfig


class NemotronHPuzzleConfig(NemotronHConfig):
    model_type = "nemotron_h_puzzle"

    def get_nemotron_h_config_for_layer(self, layer: int) -> "NemotronHPuzzleConfig":
        own = copy.copy(self)
        for name, value in self.block_configs[layer].items():
            setattr(own, name, value)
        return own
