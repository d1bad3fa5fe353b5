"""What collectives cost by arithmetic: the links of a cluster and NCCL's rings on them.

A ring of n processes moves a message of S bytes in n parts, one part a step and link (Thakur et
al., "Optimization of collective communication operations in MPICH", 2005):

    all-reduce       2(n - 1) steps     2(n - 1)/n·S bytes sent by each process
    all-gather       n - 1 steps        (n - 1)/n·S, S the gathered size
    reduce-scatter   n - 1 steps        (n - 1)/n·S, S the size before scattering
    send             1 step             S

    seconds = base + steps·latency + bytes sent / bandwidth

base and latency are those of NCCL's own tuning model (NVIDIA/nccl, src/graph/tuning.cc, rings):
protocol Simple at full bandwidth, LL at a quarter of it with less latency; the faster is taken. In
a ring over N nodes, N - 1 of the steps of each half cross the network. It leaves at every node
through the network cards of all its members there (one a GPU), and is as slow as its slowest link.
An all-reduce may also climb a tree of the nodes and come down again, in LL: fewer steps, for small
messages. Sums in the switches (NVLS, SHARP) are left out: what they save is not counted.

Nothing here is measured on this project's runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pythia_fast.errors import InputError

NODE = 8  # GPUs that share NVLink
FP32 = 4  # bytes

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "send"]
Axis = Literal["tensor", "data", "pipeline"]


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes/s, one direction, of one GPU. latency: s a step, of Simple and of LL."""

    name: str
    bandwidth: float
    latency: tuple[float, float]


# NVLink 4: 367.6 of 450 GB/s, all-reduce on 8 H200 without NVLS (stas00/ml-engineering, network);
# NVLink 3: NCCL's own cap for compute capability 8.0, of 300 GB/s. InfiniBand: line rate, one port
# a GPU.
NVLINK = {
    "A100": Link("NVLink 3", 235e9, (3.4e-6, 0.47e-6)),
    "A100-40GB": Link("NVLink 3", 235e9, (3.4e-6, 0.47e-6)),
    "H100": Link("NVLink 4", 367.6e9, (3.4e-6, 0.47e-6)),
    "H200": Link("NVLink 4", 367.6e9, (3.4e-6, 0.47e-6)),
}
NETWORKS = {
    "HDR": Link("InfiniBand HDR", 25e9, (9.6e-6, 2.7e-6)),
    "NDR": Link("InfiniBand NDR", 50e9, (9.6e-6, 2.7e-6)),
}
USUAL_NETWORK = {"A100": "HDR", "A100-40GB": "HDR", "H100": "NDR", "H200": "NDR"}
BASE = (8.4e-6, 3.6e-6)  # of a collective: Simple, LL
SHARE = (1.0, 0.25)  # of the bandwidth: Simple, LL
TREE_BASE, TREE_NEAR, TREE_FAR = 4.4e-6, 0.52e-6, 5.0e-6  # s: a collective, a step by NVLink, by
TREE_SHARE = 0.9 / 3.8  # the network; of the bandwidth, each byte up and down


@dataclass(frozen=True)
class Fabric:
    """Links of a cluster of nodes of 8 GPUs, each with a network card of its own."""

    nvlink: Link
    network: Link

    @property
    def name(self) -> str:
        return f"{self.nvlink.name}, {self.network.name}"


def fabric(gpu: str, network: str | None = None) -> Fabric:
    """The links of a known card; network: HDR or NDR, default what its generation came with."""
    chosen = network or USUAL_NETWORK[gpu]
    if chosen not in NETWORKS:
        raise InputError(f"--network {chosen}: not known here; {', '.join(NETWORKS)} are")
    return Fabric(NVLINK[gpu], NETWORKS[chosen])


@dataclass(frozen=True)
class Group:
    """Processes of one collective: `size` of them on `nodes` nodes, equally many on each."""

    size: int
    nodes: int = 1

    @classmethod
    def strided(cls, size: int, stride: int) -> Group:
        """Every stride-th rank of a contiguous block of size·stride ranks."""
        here = max(1, min(size, NODE // stride))
        return cls(size, -(-size // here))

    def link(self, on: Fabric) -> Link:
        """The slowest link of its ring."""
        if self.nodes == 1:
            return on.nvlink
        cards = max(1, self.size // self.nodes)
        bandwidth = min(cards * on.network.bandwidth, on.nvlink.bandwidth)
        return Link(on.network.name, bandwidth, on.network.latency)


def sent(kind: Kind, size: int, message: float) -> float:
    """Bytes that one of `size` processes sends for a message of so many bytes."""
    if kind == "send":
        return message
    return (2 if kind == "all-reduce" else 1) * (size - 1) / size * message


def seconds(kind: Kind, group: Group, message: float, on: Fabric) -> float:
    """Of one collective; 0 where the group is one process."""
    if group.size == 1:
        return 0.0
    halves = 2 if kind == "all-reduce" else 1
    steps, across = halves * (group.size - 1), halves * (group.nodes - 1)
    if kind == "send":
        steps, across = 1, int(group.nodes > 1)
    link, volume = group.link(on), sent(kind, group.size, message)
    times = []
    for protocol in (0, 1):
        near, far = on.nvlink.latency[protocol], on.network.latency[protocol]
        latency = BASE[protocol] + (steps - across) * near + across * far
        times.append(latency + volume / (SHARE[protocol] * link.bandwidth))
    if kind == "all-reduce":
        steps_near = group.size / group.nodes - 1
        climb = steps_near * TREE_NEAR + math.log2(group.nodes) * TREE_FAR
        times.append(TREE_BASE + 2 * climb + 2 * message / (TREE_SHARE * link.bandwidth))
    return min(times)


@dataclass(frozen=True)
class Collective:
    """What one process runs `count` times a step, each on a message of `message` bytes.

    seconds: of all of them, one after another; exposed: of these, seconds no computation hides.
    """

    axis: Axis
    kind: Kind
    what: str
    link: str
    count: int
    message: float
    sent: float  # bytes a step that this process sends
    seconds: float
    exposed: float


def collective(
    axis: Axis, kind: Kind, what: str, group: Group,
    count: int, message: float, on: Fabric, exposed: float | None = None,
) -> Collective:  # fmt: skip
    """exposed: seconds; None: all of them."""
    total = count * seconds(kind, group, message, on)
    return Collective(
        axis, kind, what, group.link(on).name, count, message,
        count * sent(kind, group.size, message), total, total if exposed is None else exposed,
    )  # fmt: skip
