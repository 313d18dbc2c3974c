"""How a launch of wgmma.py is cut: its settings, what they make of a product, and which of them fit a program."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import common
from uniql_jax.pallas_kernels.dequant_matmul.hopper.common import BARRIERS, BLOCK, SHARED, fitting
from uniql_jax.pallas_kernels.dequant_matmul.hopper.handover import Handover
from uniql_jax.pallas_kernels.dequant_matmul.hopper.wgmma_registers import CHUNK, HALF
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the work is cut, and how far ahead it is loaded."""

    tile_m: int = 128
    """Rows of x of a program: a multiple of 64 up to 256."""
    tall: int = 1
    """Blocks of 64 weight rows that each multiplying warpgroup holds; tile_m * tall is at most 256."""
    x_slots: int = 4
    """Slots of half a group of x."""
    word_slots: int = 4
    """Slots of a group of packed words."""
    split: int = 1
    """Programs that share a contraction; their float32 parts are added by XLA."""
    cluster: int = 1
    """Programs of neighbouring rows that load x together."""
    exchange: bool = True
    """Threads exchange what they unpack; else x is permuted outside."""
    programs: int = 0
    """Programs at once, each with its share of the tiles; 0 asks the device for its SMs."""
    consumers: int = 2
    """Warpgroups that multiply, 2 to 4; the more there are, the fewer registers each has."""
    joined: bool = False
    """The programs that share a contraction are a cluster and add up themselves (handover.py)."""
    along_k: int = 1
    """Multiplying warpgroups of a joined program that take its groups in turn; the others are next to each other."""


class Plan(NamedTuple):
    """What a launch is cut into."""

    along_m: int
    along_n: int
    """Tiles of x, and clusters of tiles of the weight."""
    per_share: int
    """Groups of a share of the contraction."""
    clusters: int
    """Clusters that run at once."""
    rows: int
    """Weight rows of a program."""
    handover: Handover | None
    """Of programs that are joined."""

    @property
    def tiles(self) -> int:
        return self.along_m * self.along_n


def shared_bytes(settings: Settings, itemsize: int, handover: Handover | None) -> int:
    """Shared memory of a program, barriers aside."""
    x = settings.x_slots * settings.tile_m * HALF * 2
    words = settings.word_slots * settings.consumers // settings.along_k * settings.tall * BLOCK * tiling.GROUP // 2
    if handover:
        return x + words + handover.buffers * handover.bytes
    return x + words + settings.consumers * 2 * CHUNK[itemsize] * BLOCK * itemsize


def supported(weight: Weight, settings: Settings | None = None, count: int = 1) -> None:
    """Raise NotImplementedError for what the kernel cannot do with `count` rows of x."""
    settings = settings or Settings()
    common.supported(weight)
    size, rows = 4 if settings.split > 1 else 2, settings.tile_m
    blocks = 4 * settings.tall * settings.consumers // settings.along_k
    in_turn = settings.consumers % settings.along_k or settings.word_slots % settings.along_k
    if settings.along_k > 1 and (not settings.joined or in_turn or settings.x_slots % (2 * settings.along_k)):
        raise NotImplementedError(f"{settings.along_k} warpgroups that take groups in turn, in {settings}")
    if settings.joined and (settings.split not in (2, 4, 8) or blocks % settings.split or settings.cluster > 1):
        raise NotImplementedError(f"a cluster of {settings.split} programs that share a contraction of {settings}")
    if rows % 64 or not 0 < rows * settings.tall <= 256:
        raise NotImplementedError(f"a tile of {settings.tile_m} rows of x and {settings.tall} blocks of the weight")
    if not 2 <= settings.consumers <= 4:
        raise NotImplementedError(f"{settings.consumers} warpgroups that multiply")
    if shared_bytes(settings, size, plan_of(count, weight, settings).handover) > SHARED - BARRIERS:
        raise NotImplementedError(f"{settings} needs more shared memory than there is")


def plan_of(count: int, weight: Weight, settings: Settings) -> Plan:
    """How a launch is cut."""
    rows = settings.consumers // settings.along_k * BLOCK * settings.tall
    along_m, along_n = -(-count // settings.tile_m), -(-weight.features // (rows * settings.cluster))
    programs = settings.programs or compat.cores()
    per_share, work = -(-weight.groups // settings.split), along_m * along_n
    if settings.joined:
        clusters = min(max(1, fitting(programs, settings.split)), work)
        handover = handover_of(settings, 1 if work <= clusters else 2)
        return Plan(along_m, along_n, per_share, clusters, rows, handover)
    clusters = min(max(1, programs // settings.cluster), work * settings.split)
    return Plan(along_m, along_n, per_share, clusters, rows, None)


def handover_of(settings: Settings, buffers: int) -> Handover:
    """How joined programs add up."""
    abreast = settings.consumers // settings.along_k
    return Handover(settings.split, settings.along_k, abreast, settings.tall, settings.tile_m // 8, buffers)
