"""The machines that a plan is for: GPUs, hosts and what they cost."""

import math
from dataclasses import dataclass

# The rest of a GPU's memory is for CUDA, NCCL's buffers and what the allocator cannot use.
USABLE_SHARE = 0.94

# A stage that leaves less of the usable memory is told: what the plan does not know may take it.
LEAST_MARGIN = 0.03

# Texts that are generated at once, each token of all of them at the cost of reading the weights.
DECODED_TOGETHER = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A GPU: bytes of memory, FLOP/s at its peak, the share of them that training reaches (MFU), dollars an hour.

    In a second it reads `bandwidth` bytes of its memory, and sends `link` bytes to others of its host. `on_a_host` GPUs
    share a host, which sends `network` bytes a second to others.
    """

    memory: int
    flops_per_second: float
    mfu: float
    dollars_per_hour: float
    bandwidth: float = 3.35e12
    link: float = 4.5e11
    network: float = 4e11
    on_a_host: int = 8
    dollars_per_core_hour: float = 0.04

    def __post_init__(self) -> None:
        for name in ("memory", "flops_per_second", "bandwidth", "link", "network", "on_a_host"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} must be above 0 and at most 1")
        for name in ("dollars_per_hour", "dollars_per_core_hour"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    @property
    def usable(self) -> int:
        """Bytes that can be planned with."""
        return int(USABLE_SHARE * self.memory)

    def hours(self, flops: float) -> float:
        """Hours of one GPU."""
        return flops / (self.flops_per_second * self.mfu) / 3600

    def sending_hours(self, by_gpu: float, by_host: float) -> float:
        """Hours in which each GPU sends so many bytes, and each host so many to others."""
        return max(by_gpu / self.link, by_host / self.network) / 3600

    def decoding_hours(self, tokens: int, weight_bytes: int) -> float:
        """Hours of one GPU that generates so many tokens, `DECODED_TOGETHER` texts at once."""
        return tokens / DECODED_TOGETHER * weight_bytes / self.bandwidth / 3600

    def margin(self, needed: int) -> float:
        """The share of the usable memory that stays free; negative where it does not do."""
        return 1 - needed / self.usable


# What a plan assumes where nobody says on what: an H100, rented, with NVLink and a port of 400 Gb/s for each.
H100 = Accelerator(memory=80 * 10**9, flops_per_second=989e12, mfu=0.4, dollars_per_hour=2.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """Where a run works: whether its teacher lies there already, which is not copied, and whether its store does."""

    has_teacher: bool = False
    has_store: bool = False


# Both are elsewhere: the most that is moved.
ELSEWHERE = Locality()
