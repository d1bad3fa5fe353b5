"""Layouts over many GPUs: against hand counts, torch's own sharding, and the plan of one GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from kernel_proof import REPOSITORY, Mutant, assert_killed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bench import layouts as pages
from pythia_fast import communication, estimate, layouts, plan, recommend, stages
from pythia_fast.cli import main
from pythia_fast.communication import NODE
from pythia_fast.config import Config, load
from pythia_fast.estimate import Estimate
from pythia_fast.layouts import Held, Layout
from pythia_fast.model import Pythia
from pythia_fast.ops import select
from pythia_fast.parallel import tensor as runtime
from pythia_fast.parallel.degrees import Degrees, degrees

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

        def call(*tensors: torch.Tensor, group: object) -> None:
            seen[kind, tensors[whole].numel() * tensors[whole].itemsize] += 1
            tensors[0].fill_(0.5)  # no other process says what it would be

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
    for tensor, sequence, of_layer in ((1, False, 15), (4, False, 3 + 12 / 4), (4, True, 15 / 4)):
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
    assert gpipe.memory_of(3).logits == 16 * 2 * c.model.vocab_size * 2048


def test_memory_by_hand() -> None:
    held(layouts)


def best_cut(module: ModuleType) -> None:
    """Against all cuts into runs of layers, by dynamic programming over the slowest."""
    ends = ((0.0, 0.0), (0.1, 0.8), (0.3, 2.7))
    for count, (embedding, head) in product([2, 3, 5, 8, 12, 24, 36], ends):
        chunks = module.cut(36, count, 1.0, embedding, head)
        assert sum(chunk.layers for chunk in chunks) == 36 and len(chunks) == count
        assert min(chunk.layers for chunk in chunks) >= 1
        assert chunks[0].embedding and chunks[-1].head
        best = {0: 0.0}
        for stage in range(count):
            extra = embedding * (stage == 0) + head * (stage == count - 1)
            best = {
                stop: min(max(cost, stop - begin + extra) for begin, cost in best.items()
                          if begin < stop)
                for stop in range(stage + 1, 37)
            }  # fmt: skip
        costs = [c.layers + embedding * c.embedding + head * c.head for c in chunks]
        assert max(costs) == pytest.approx(best[36])
    assert [c.layers for c in module.cut(36, 8, 1.0, 0.0, 0.8)] == [4, 4, 4, 5, 5, 5, 5, 4]


def test_cut_is_the_best() -> None:
    best_cut(stages)


def tensor_parallel(module: ModuleType) -> None:
    """4 ranks: a quarter of every product and byte but of the norms and the residual; the norms'
    too with sequence. At infinite width of a product, so that its length does not matter.
    """
    m, card, tokens = config("12b").model, replace(plan.GPUS["H100"], copy=1e12), 2048
    one = module.layer_seconds(m, card, 2048, tokens)
    norms = 2 * 5120 * tokens / 1e12 * 3 / 4  # seconds of each element a token that is not split
    fill = 96 * 2 * tokens / card.product  # of a product, divided by the length that it contracts
    for sequence, forward, backward in ((False, 4, 5), (True, 0, 0)):
        four = module.layer_seconds(m, card, 2048, tokens, 4, sequence)
        # contracted: h by 7h/4 outputs, 5h/4 by h; in the backward 3h/4, h and h
        lost = fill * (5120 - 5120 / 4)  # the output product's shorter length
        assert four.forward - one.forward / 4 == pytest.approx(forward * norms + lost)
        lost = fill * (5120 - 5120 / 4) * 2  # of both column-parallel ones
        assert four.inputs - one.inputs / 4 == pytest.approx(backward * norms + lost)
        assert four.weights == pytest.approx(one.weights / 4)


def test_tensor_parallel_seconds() -> None:
    tensor_parallel(stages)


# --- the search -----------------------------------------------------------------------------------


def test_every_layout_is_one_that_training_accepts() -> None:
    c = config("2.8b")
    found = list(recommend.candidates(c, 64))
    assert len(set(found)) == len(found) > 500
    for at in found:
        page = recommend.page(c, at)
        assert degrees(page, 64) == Degrees(at.pipeline, at.data, at.tensor)
        assert page.train.batch_size % (at.data * at.rows) == 0
    assert {at.tensor for at in found} == {1, 2, 4, 8}
    assert {at.schedule for at in found} == {"1f1b", "interleaved-1f1b"}


def test_keys_that_the_page_sets_are_kept() -> None:
    flags = "--parallel.pipeline 4 --parallel.schedule zero-bubble --parallel.shard none".split()
    found = set(recommend.candidates(config("2.8b", *flags), 32))
    assert {(at.pipeline, at.schedule, at.shard) for at in found} == {(4, "zero-bubble", "none")}
    assert {
        at.data for at in recommend.candidates(config("2.8b", "--parallel.data", "16"), 64)
    } == {16}


def test_the_recommended_one_is_fast_and_simple() -> None:
    rows = recommend.rows(config("12b"), 256, "H100")
    assert [row["recommended"] for row in rows] == [True] + [False] * (len(rows) - 1)
    times = [row["seconds_per_step"]["total"] for row in rows]
    assert times[1:] == sorted(times[1:]) and times[0] <= recommend.AS_FAST * min(times)
    keys = [(r["data"], r["tensor"], r["pipeline"], r["shard"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert row["measured"] is False
        assert row["memory_bytes"]["total"] <= row["memory_bytes"]["usable"] < 84e9
        assert sum(row["layers_of_stages"]) == 36
        step = row["seconds_per_step"]
        parts = ("compute", "optimizer", "bubble", "tensor", "data", "pipeline")
        assert step["total"] == pytest.approx(sum(step[part] for part in parts))
        assert row["tokens_per_s"] == pytest.approx(1024 * 2048 / step["total"])
        assert row["hours"] == pytest.approx(step["total"] * 143_000 / 3600)


def test_recommended_flags_are_that_layout() -> None:
    c = config("6.9b")
    for row in recommend.rows(c, 64, "A100-40GB")[:20]:
        again = config("6.9b", *recommend.flags(row).split())
        for key in ("tensor", "pipeline", "sequence", "schedule", "stages_per_rank"):
            assert getattr(again.parallel, key) == row[key]
        assert again.train.micro_batch_size == row["micro_batch_size"]
        assert row["data"] == 1 or again.parallel.shard == row["shard"]


def test_a_second_and_no_torch() -> None:
    """The largest plan there is, in a process of its own."""
    code = (
        "import sys, time; from pythia_fast.cli import main; begin = time.process_time();"
        "code = main(['plan', 'configs/pythia-12b.toml', '--recipe', 'modern', '--gpus', '1024',"
        "'--gpu', 'h200', '--json']);"
        "print(time.process_time() - begin, 'torch' in sys.modules, 'numpy' in sys.modules, code,"
        "file=sys.stderr)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    seconds, *others = done.stderr.split()
    assert others == ["False", "False", "0"], time.perf_counter() - begin
    assert float(seconds) < 1.0
    assert len([json.loads(line) for line in done.stdout.splitlines()]) > 10


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = str(REPOSITORY / "configs/pythia-1b.toml")
    arguments = ["plan", page, "--recipe", "modern", "--gpus", "8", "--gpu", "a100"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "not measured" in out and "NVLink 3, InfiniBand HDR" in out
    assert main([*arguments, "--network", "ndr", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["links"] == "NVLink 3, InfiniBand NDR" and rows[0]["recommended"]
    assert out.splitlines()[2].split()[:4] == [
        str(rows[0][key]) for key in ("data", "tensor", "pipeline", "shard")
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--gpus 2048", "--gpus 2048: 1 to 1024 are planned"),
        ("--gpus 0", "--gpus 0: 1 to 1024 are planned"),
        ("--gpus 8 --gpu h999", "H200, H100, A100, A100-40GB are"),
        ("--gpus 8 --network edr", "--network EDR: not known here; HDR, NDR are"),
        ("--gpus 8 --recipe modern --precision.compute fp32", "plans are for bf16 and fp16"),
        (
            "--gpus 8 --gpu h100 --recipe modern --parallel.data 4 --parallel.tensor 2 --parallel.shard none",
            "layouts fits in 95%",
        ),
        (
            "--gpus 8 --recipe modern --parallel.tensor 3",
            "parallel.tensor = 3 times parallel.pipeline = 1 does not divide the 8",
        ),
        (
            "--gpus 7 --recipe modern --parallel.data 7",
            "train.batch_size = 1024 is not divisible by parallel.data = 7",
        ),
        (
            "--gpus 8 --precision.sum_ranks 64",
            "sum_ranks = 64 ranks of 16-bit gradients are parallel.data",
        ),
        ("--gpus 8 --recipe modern --timeline x.png", "--parallel.pipeline above 1 is needed"),
    ],
)
def test_bad_input(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(REPOSITORY / "configs/pythia-12b.toml"), *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_the_page_of_layouts_is_true() -> None:
    """`python -m bench.layouts` would write what docs/ has."""
    docs = REPOSITORY / "docs"
    text = (docs / pages.PAGE).read_text(encoding="utf-8")
    assert text == pages.page(), "run python -m bench.layouts"
    assert all(figure.is_saved(docs) for figure in pages.figures())
    assert set(re.findall(r"\((pipeline-.*?)\)", text)) == {
        path.name for path in docs.glob("pipeline-*.png")
    }


# --- mutants --------------------------------------------------------------------------------------

COMMUNICATION, ESTIMATE = "pythia_fast/communication.py", "pythia_fast/estimate.py"
LAYOUTS, STAGES = "pythia_fast/layouts.py", "pythia_fast/stages.py"
CHECKS = {
    COMMUNICATION: [ring], ESTIMATE: [counted], LAYOUTS: [held], STAGES: [best_cut, tensor_parallel]
}  # fmt: skip
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
    Mutant("every rank holds as many microbatches", LAYOUTS, "at.schedule, rank, at.pipeline", "at.schedule, 0, at.pipeline"),
    Mutant("first rank receives activations", LAYOUTS, "ends = (rank == 0) + ", "ends = "),
    Mutant("gathered gradient in fp32 alone", LAYOUTS, "(WIDTH + FP32) * max", "FP32 * max"),
    Mutant("head weighs nothing", STAGES, "last * layer + head)", "last * layer)"),
    Mutant("layers left over behind the last stage first", STAGES, "(i >= inner - more)", "(i < more)"),
    Mutant("norms split without sequence", STAGES, "split = p if sequence else 1", "split = p"),
    Mutant("full products on every rank", STAGES, "(h, 5 * h // p)]", "(h, 5 * h)]"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    def check(module: ModuleType) -> None:
        for own in CHECKS[mutant.file]:
            own(module)

    assert_killed(mutant, check, tmp_path)
