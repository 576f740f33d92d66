"""A checkpoint directory in the terminal: loaded to be measured or to generate, and described in a line."""

from pathlib import Path

import torch

from elastic_core.cost import active_params, subnet_params
from elastic_core.files.checkpoint import read_config, read_family
from elastic_core.geometry import MOE
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.job import load_model


def load(checkpoint: Path, budget: str | None) -> tuple[ElasticNemotronH, Subnet]:
    """The model on this machine's device, and the subnet of the budget, or the whole of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model, read_family(checkpoint).budget(budget).subnet if budget else full_subnet(model.config)


def describe(directory: Path) -> str:
    config = read_config(directory)
    full = full_subnet(config)
    active = f"{active_params(config, full):,} of them active, " if config.layers_of(MOE) else ""
    return f"{subnet_params(config, full):,} parameters, {active}{config.num_layers} layers"
