"""Layouts over many GPUs: against hand counts, torch's own sharding, and the plan of one GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from kernel_proof import REPOSITORY, Mutant, assert_killed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pythia_fast import communication, estimate, layouts, plan, stages
from pythia_fast.communication import NODE
from pythia_fast.config import Config, load
from pythia_fast.estimate import Estimate
from pythia_fast.layouts import Held, Layout
from pythia_fast.model import Pythia
from pythia_fast.ops import select
from pythia_fast.parallel import tensor as runtime
from pythia_fast.parallel.degrees import Degrees

SIZES = ["70m", "410m", "1.4b", "6.9b", "12b"]


def config(size: str, *flags: str) -> Config:
    return load(REPOSITORY / f"configs/pythia-{size}.toml", ["--recipe", "modern", *flags])


def estimated(
    size: str = "1.4b", gpu: str = "H100", *flags: str, data: int = 1, tensor: int = 1,
    pipeline: int = 1, sequence: bool = False, schedule: str = "1f1b", stages_per_rank: int = 1,
    shard: str = "optimizer", rows: int = 4,
) -> Estimate:  # fmt: skip
    at = Layout(data, tensor, pipeline, sequence, schedule, stages_per_rank, shard, rows)
    return Estimate(config(size, *flags), at, plan.GPUS[gpu], communication.fabric(gpu))


# --- one GPU: what the plan of one GPU says -------------------------------------------------------


@pytest.mark.parametrize("gpu", ["H200", "A100"])
@pytest.mark.parametrize("size", SIZES)
def test_one_gpu_is_the_plans(size: str, gpu: str) -> None:
    """Products of bound B, attention and bytes of bound A, memory of `plan.memory`."""
    found = estimated(size, gpu)
    c, m, card, tokens = found.config, found.config.model, plan.GPUS[gpu], 4 * 2048
    step = c.tokens_per_step
    a = plan.bound_a(m, 2048, step, card)
    b = plan.bound_b(m, 2048, step, replace(card, name="H200"), tokens)
    assert b is not None
    wanted = (b.products + a.attention + a.memory) * step
    took = found.step()
    assert took.total == pytest.approx(took.compute + took.optimizer)
    assert took.total == pytest.approx(wanted, rel=1e-9)
    memory, single = found.memory(), plan.memory(m, tokens)
    assert (memory.states, memory.activations, memory.logits) == (
        single.states, single.activations, single.logits
    )  # fmt: skip
    assert memory.total == single.total and not found.collectives()


# --- 256 ranks: what torch shards -----------------------------------------------------------------

COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")  # row-parallel: inputs split
ROWS = ("query_key_value", "dense_h_to_4h", "embed_in", "embed_out")


@contextmanager
def fake(world: int) -> Iterator[None]:
    """A process group of which this process is the first rank; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    yield
    dist.destroy_process_group()


@pytest.fixture
def ranks() -> Iterator[None]:
    with fake(256):
        yield


@pytest.fixture
def two_ranks() -> Iterator[None]:
    with fake(2):
        yield


def shard_tensors(module: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Each parameter becomes a DTensor over `mesh`, on the meta device."""
    for name, parameter in list(module.named_parameters()):
        placement = (
            Shard(1) if name.endswith(COLUMNS) else Shard(0) if any(r in name for r in ROWS)
            else Replicate()
        )  # fmt: skip
        owner, _, own = name.rpartition(".")
        made = distribute_tensor(parameter.detach(), mesh, [placement])
        setattr(module.get_submodule(owner), own, torch.nn.Parameter(made))


def local(parameter: torch.Tensor) -> int:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().numel()


@pytest.mark.parametrize(
    ("size", "pipeline", "tensor"), [("12b", 1, 1), ("12b", 4, 4), ("1.4b", 2, 8), ("12b", 8, 2)]
)
def test_shards_are_torchs(size: str, pipeline: int, tensor: int, ranks: None) -> None:
    """Parameters and states of each pipeline rank, of 256, by DTensor and FSDP2."""
    data = 256 // (pipeline * tensor)
    found = estimated(
        size, "H200", "--model.vocab_size", "50688",  # as published; 50,304 has no 256 equal shares
        data=data, tensor=tensor, pipeline=pipeline, shard="full", rows=1,
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (pipeline, data, tensor), mesh_dim_names=("p", "d", "t"))
    model = Pythia(found.config.model)
    shard_tensors(model, mesh["t"])
    named = dict(model.named_parameters())
    first = 0
    for rank in range(pipeline):
        (chunk,) = found.of_rank(rank)
        held = [
            name for name in named
            if ("embed_in" in name and chunk.embedding)
            or (("embed_out" in name or "final_layer_norm" in name) and chunk.head)
            or ("layers." in name
                and first <= int(name.split("layers.")[1].split(".")[0]) < first + chunk.layers)
        ]  # fmt: skip
        first += chunk.layers
        assert sum(local(named[name]) for name in held) == found.parameters(rank)
        replicated = sum(local(named[n]) for n in held if "layernorm" in n or "layer_norm" in n)
        assert replicated == stages.replicated(found.config.model, chunk)
    assert first == found.config.model.layers
    if size == "12b":  # FSDP2 cuts each parameter's rows once more
        for block in model.gpt_neox.layers:
            fully_shard(block, mesh=mesh["d"])
        fully_shard(model, mesh=mesh["d"])
        total = sum(local(p) for p in model.parameters())
        held_states = sum(found.memory_of(rank).states for rank in range(pipeline))
        assert 18 * total == held_states


# --- communication --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "data", "tensor"),
    [(1, 64, 1), (4, 8, 2), (2, 4, 8), (8, 32, 1), (4, 1, 2), (1, 2, 4)],
)
def test_groups_lie_on_the_nodes(pipeline: int, data: int, tensor: int) -> None:
    """Nodes of each axis's groups, counted rank by rank in the mesh's own numbering."""
    at = Degrees(pipeline, data, tensor)
    where: dict[str, set[tuple[int, int]]] = {"data": set(), "tensor": set()}
    for axis, own in (("data", 1), ("tensor", 2)):
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(at.world):
            place = at.coordinates(rank)
            groups.setdefault(place[:own] + place[own + 1 :], []).append(rank // NODE)
        for nodes in groups.values():
            assert len(set(Counter(nodes).values())) == 1  # equally many on each
            where[axis].add((len(nodes), len(set(nodes))))
    found = estimated(data=data, tensor=tensor, pipeline=pipeline)
    assert where["data"] == {(found.copies.size, found.copies.nodes)}
    assert where["tensor"] == {(found.parts.size, found.parts.nodes)}


def ring(module: ModuleType) -> None:
    """By hand: 8 GPUs of one node, 32 over 4 nodes, 2 over 2, of a large and of a small message."""
    on = module.fabric("H100")
    one, four, two = module.Group(8), module.Group(32, 4), module.Group(2, 2)
    large = 8e9
    near = 8.4e-6 + 7 * 3.4e-6 + 7 / 8 * large / 367.6e9
    assert module.seconds("all-gather", one, large, on) == pytest.approx(near)
    assert module.seconds("all-reduce", one, large, on) == pytest.approx(2 * near - 8.4e-6)
    # 8 network cards of 50 GB/s together are faster than NVLink
    far = 8.4e-6 + 28 * 3.4e-6 + 3 * 9.6e-6 + 31 / 32 * large / 367.6e9
    assert module.seconds("reduce-scatter", four, large, on) == pytest.approx(far)
    alone = 8.4e-6 + 9.6e-6 + 1 / 2 * large / 50e9
    assert module.seconds("reduce-scatter", two, large, on) == pytest.approx(alone)
    assert module.seconds("send", two, large, on) == pytest.approx(18e-6 + large / 50e9)
    assert module.seconds("send", module.Group(2), 4, on) == pytest.approx(4.07e-6, rel=1e-3)
    assert module.seconds("all-reduce", module.Group(1), large, on) == 0
    # a number over 256 GPUs: up and down a tree of 32 nodes
    tree = 4.4e-6 + 2 * (7 * 0.52e-6 + 5 * 5e-6)
    assert module.seconds("all-reduce", module.Group(256, 32), 4, on) == pytest.approx(
        tree, rel=1e-3
    )
    assert module.sent("all-reduce", 8, 80) == 140 and module.sent("all-gather", 8, 80) == 70


def test_ring_by_hand() -> None:
    ring(communication)


def counted(module: ModuleType) -> None:
    """A step of 1.4b by hand: 24 layers, h 2048, V 50304, 4 × 2048 tokens a microbatch."""
    c, on = config("1.4b"), communication.fabric("H100")
    rows, M = 2 * 4 * 2048 * 2048, 1024 // (4 * 4)

    def found(*layout: object) -> dict[tuple[str, str, str], tuple[int, float]]:
        made = module.Estimate(c, Layout(*layout), plan.GPUS["H100"], on)  # type: ignore[arg-type]
        return {(x.axis, x.kind, x.what): (x.count, x.message) for x in made.collectives()}

    layer = 12 * 2048**2 + 13 * 2048
    split = (12 * 2048**2 + 7 * 2048) // 2 + 6 * 2048
    assert found(4, 2, 1, False, "1f1b", 1, "optimizer", 4) == {
        ("tensor", "all-reduce", "layers, forward"): (24 * M, rows),
        ("tensor", "all-reduce", "layers, backward"): (24 * M, rows),
        ("tensor", "all-reduce", "embedding, forward"): (M, rows),
        ("tensor", "all-reduce", "head, backward"): (M, rows),
        ("tensor", "all-gather", "cross-entropy statistics"): (M, 2 * 3 * 4 * 4 * 2048),
        ("tensor", "all-reduce", "LayerNorm gradients"): (1, 4 * (24 * 4 + 2) * 2048),
        ("data", "reduce-scatter", "gradients"):
            (24, 4 * (24 * split + 50304 * 2048 + 2 * 2048) / 24),
        ("data", "all-gather", "weights"): (24, 2 * (24 * split + 50304 * 2048 + 2 * 2048) / 24),
        ("data", "all-reduce", "gradient norm"): (1, 4),
    }  # fmt: skip
    scattered = found(4, 2, 1, True, "1f1b", 1, "none", 4)
    assert scattered["tensor", "reduce-scatter", "layers, backward"] == (24 * M, rows)
    assert scattered["tensor", "all-gather", "layers, backward"] == (24 * M, rows)
    assert scattered["tensor", "all-reduce", "LayerNorm gradients"][1] == 4 * (24 * 6 + 2) * 2048
    assert scattered["data", "all-reduce", "gradients"][0] == 24
    whole = found(8, 1, 1, False, "1f1b", 1, "full", 4)
    assert whole["data", "reduce-scatter", "gradients"] == (
        32 * 26, 4 * (24 * layer + 2 * 50304 * 2048 + 2 * 2048) / 26
    )  # fmt: skip
    assert whole["data", "all-gather", "weights, backward"][0] == 32 * 26
    piped = found(2, 1, 4, False, "interleaved-1f1b", 3, "none", 4)
    assert piped["pipeline", "send", "activations, and their gradients"] == (2 * 3 * 128, rows)


def test_collectives_by_hand() -> None:
    counted(estimate)


def test_sequence_moves_the_same_bytes() -> None:
    whole, split = (
        sum(x.sent for x in estimated(tensor=4, data=2, sequence=on).collectives()
            if x.axis == "tensor" and x.count > 1)
        for on in (False, True)
    )  # fmt: skip
    assert whole == pytest.approx(split)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_collectives_are_the_runtimes(
    sequence: bool, two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One microbatch of a tiny model on the trainer's own tensor-parallel ops, every call seen."""
    flags = "--model.layers 3 --model.hidden 64 --model.heads 4 --model.vocab_size 256".split()
    flags += "--data.seq_len 16 --train.batch_size 2".split()
    c = config("70m", *flags, "--train.micro_batch_size", "2")
    at = Layout(1, 2, 1, sequence, "1f1b", 1, "none", 2)
    made = Estimate(c, at, plan.GPUS["H100"], communication.fabric("H100"))
    wanted: Counter[tuple[str, float]] = Counter()
    for one in made.collectives():
        if one.what not in ("LayerNorm gradients", "gradient norm"):  # once a step
            wanted[one.kind, one.message] += one.count
    seen: Counter[tuple[str, float]] = Counter()

    def watch(kind: str, owner: object, name: str, whole: int) -> None:
        """whole: which argument has the size before scattering or after gathering."""

        def call(*tensors: torch.Tensor, group: object, async_op: bool = False) -> object:
            seen[kind, tensors[whole].numel() * tensors[whole].itemsize] += 1
            tensors[0].fill_(0.5)  # no other process says what it would be
            return SimpleNamespace(wait=lambda: None)

        monkeypatch.setattr(owner, name, call)

    watch("all-reduce", dist, "all_reduce", 0)
    watch("all-gather", runtime, "all_gather", 0)
    watch("reduce-scatter", runtime, "reduce_scatter", 1)
    ops = runtime.tensor_ops(select("reference", torch.device("cpu")), dist.group.WORLD, sequence)
    model = Pythia(c.model, ops)
    runtime.localise(model, 2)
    model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.loss(torch.zeros(2, 17, dtype=torch.long)).backward()
    assert seen == wanted
    assert sum(p.numel() for p in model.parameters()) == made.parameters(0)


# --- memory ---------------------------------------------------------------------------------------


def held(module: ModuleType) -> None:
    """12b by hand: h 5120, 36 layers, b T = 2048 tokens."""
    c = config("12b")
    n, x = c.model.parameters, 2 * 2048 * 5120  # bytes of b T h elements

    def made(*layout: object, page: Config = c) -> Held:
        found: Held = module.Held(page, Layout(*layout), plan.GPUS["H100"])  # type: ignore[arg-type]
        return found

    for shard, wanted in (
        ("none", 18 * n), ("optimizer", 6 * n + (12 + 4) * n / 8), ("full", 18 * n / 8)
    ):  # fmt: skip
        assert made(8, 1, 1, False, "1f1b", 1, shard, 1).memory().states == wanted
    v1 = {"1b": 2 + 12 + 2 + 4, "70m": 2 + 12 + 2}  # 16-bit gradients; 1b's are summed in fp32
    for size, width in v1.items():
        page = load(REPOSITORY / f"configs/pythia-{size}.toml")
        summed = made(page.precision.sum_ranks, 1, 1, False, "1f1b", 1, "none", 4, page=page)
        assert summed.memory().states == width * page.model.parameters
    for tensor, sequence, of_layer in (
        (1, False, 15),
        (4, False, 3 + 12 / 4),
        (4, True, 1 + 13 / 4),
    ):
        found = made(1, tensor, 1, sequence, "1f1b", 1, "none", 1).memory()
        assert found.activations == 36 * of_layer * x
        assert found.logits == 2 * c.model.vocab_size * 2048 / tensor
    selective = config("12b", "--kernels.recompute", "selective")
    found = made(1, 4, 1, False, "1f1b", 1, "none", 1, page=selective).memory()
    assert found.activations == 36 * (1 + 8 / 4) * x
    # fully sharded: two layers gathered, both ends, and the gradient of an end in 16 bits and fp32
    layer, end = 12 * 5120**2 + 13 * 5120, c.model.vocab_size * 5120
    whole = made(8, 1, 1, False, "1f1b", 1, "full", 1).memory()
    last = 2 * 5120
    assert whole.buffers == 2 * (2 * layer + 2 * end + last) + 6 * (2 * end + last)
    # a pipeline: the first rank holds most microbatches; torch receives each in a buffer of its own
    piped = made(2, 1, 8, False, "1f1b", 1, "none", 1)
    for rank, chunk in enumerate(piped.chunks):
        memory = piped.memory_of(rank)
        assert memory.activations == chunk.layers * 15 * x * (8 - rank)
        assert memory.buffers == 512 * x * (2 if 0 < rank < 7 else 1)
    gpipe = made(64, 1, 4, False, "gpipe", 1, "none", 1)
    assert gpipe.memory_of(3).logits == 2 * 2048 * (c.model.vocab_size + 15 * 5120)
    assert gpipe.memory_of(2).logits == 0
    in_16_bits = config("12b", "--precision.gradients", "bf16")  # no fused head: logits are kept
    gpipe = module.Held(in_16_bits, gpipe.layout, plan.GPUS["H100"])
    assert gpipe.memory_of(3).logits == 16 * 2 * 2048 * c.model.vocab_size


def test_memory_by_hand() -> None:
    held(layouts)


# --- mutants --------------------------------------------------------------------------------------

COMMUNICATION, ESTIMATE = "pythia_fast/communication.py", "pythia_fast/estimate.py"
LAYOUTS = "pythia_fast/layouts.py"
CHECKS = {COMMUNICATION: ring, ESTIMATE: counted, LAYOUTS: held}
MUTANTS = [
    Mutant("all-reduce at half its volume", COMMUNICATION, '(2 if kind == "all-reduce" else 1)', "1"),
    Mutant("one network card a node", COMMUNICATION, "cards = max(1, self.size // self.nodes)", "cards = 1"),
    Mutant("network faster than NVLink", COMMUNICATION, "min(cards * on.network.bandwidth, on.nvlink.bandwidth)", "cards * on.network.bandwidth"),
    Mutant("latency of NVLink between nodes", COMMUNICATION, "+ across * far", "+ across * near"),
    Mutant("no tree", COMMUNICATION, "times.append(TREE_BASE", "times.append(1 + TREE_BASE"),
    Mutant("an all-reduce of the embedding a layer", ESTIMATE, '("embedding, forward", 1)', '("embedding, forward", layers)'),
    Mutant("gradients reduced each microbatch", ESTIMATE, "self.copies, self.buckets, size", "self.copies, self.buckets * self.microbatches, size"),
    Mutant("weights gathered in fp32", ESTIMATE, '(("all-gather", "weights", WIDTH * n', '(("all-gather", "weights", FP32 * n'),
    Mutant("fully sharded once a step", ESTIMATE, "self.copies, times * units, size", "self.copies, units, size"),
    Mutant("row biases not summed with sequence", ESTIMATE, "m, chunk, at.sequence)", "m, chunk, False)"),
    Mutant("sends of one stage a rank", ESTIMATE, "2 * at.stages_per_rank * times", "2 * times"),
    Mutant("moments not sharded", LAYOUTS, "split = plan.STATES - WIDTH", "split = plan.STATES - WIDTH - 8"),
    Mutant("sums in the gradients' buffer", LAYOUTS, "(split + self.reduced) * n", "split * n"),
    Mutant("logits of one microbatch in gpipe", LAYOUTS, '("gpipe", "zero-bubble")', '("zero-bubble",)'),
    Mutant("logits kept by the fused head", LAYOUTS, "m.hidden if fused else", "m.hidden if not fused else"),
    Mutant("every rank holds as many microbatches", LAYOUTS, "at.schedule, rank, at.pipeline", "at.schedule, 0, at.pipeline"),
    Mutant("first rank receives activations", LAYOUTS, "ends = (rank == 0) + ", "ends = "),
    Mutant("gathered gradient in fp32 alone", LAYOUTS, "(WIDTH + FP32) * max", "FP32 * max"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, CHECKS[mutant.file], tmp_path)
