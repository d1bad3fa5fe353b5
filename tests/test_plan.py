"""The arithmetic of `plan` against a table computed elsewhere, and against the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import write_pair
from kernel_proof import REPOSITORY, Mutant, assert_killed

from bench.op import SIZES
from pythia_fast import plan
from pythia_fast.cli import main
from pythia_fast.config import Model, load, resolve
from pythia_fast.model import Pythia
from pythia_fast.train import Trainer

FILE = "pythia_fast/plan.py"
# One H200, T = 2048, V = 50304, from an independent calculation, to its printed digits:
# size, L, h, heads, tokens a step | N, N of products in millions, GFLOP a token causal, PaLM,
# executed | KB a token: layers, cross entropy, optimizer, all, attention | bound A: tokens/s, MFU %
# causal, PaLM | bound B: the same, shares of products, attention, memory in %, ms a step
TABLE = """
70m 6 512 8 65536 | 70426624 44.6 0.306 0.343 0.312 | 104.4 201.2 36.5 354.5 73.7 | 2095783 64.7 72.7 | 1684769 52.0 58.5 61.7 23.0 15.2 38.9
160m 12 768 12 65536 | 162322944 123.6 0.855 0.968 0.874 | 313.3 201.2 84.2 617.2 221.2 | 800468 69.2 78.3 | 639950 55.3 62.6 63.7 26.3 10.1 102.4
410m 24 1024 16 65536 | 405334016 353.5 2.423 2.725 2.473 | 835.6 201.2 210.3 1271.7 589.8 | 291840 71.5 80.4 | 236144 57.9 65.1 66.5 25.8 7.7 277.5
1b 16 2048 8 32768 | 1011781632 908.3 5.853 6.255 5.920 | 1114.1 201.2 1049.8 2414.3 786.4 | 124150 73.5 78.5 | 112451 66.5 71.1 79.9 13.1 6.9 291.4
1.4b 24 2048 16 32768 | 1414647808 1311.0 8.470 9.074 8.571 | 1671.2 201.2 1467.8 3389.4 1179.6 | 85933 73.6 78.8 | 77746 66.6 71.3 79.8 13.5 6.7 421.5
2.8b 32 2560 32 32768 | 2775208960 2645.4 16.879 17.885 17.047 | 2785.3 201.2 2879.6 5927.5 1966.1 | 43561 74.3 78.8 | 38812 66.2 70.2 80.1 14.1 5.9 844.3
6.9b 32 4096 32 16384 | 6856253440 6648.5 41.502 43.112 41.770 | 4456.4 201.2 14228.1 18984.0 3145.7 | 17456 73.2 76.1 | 16374 68.7 71.4 84.5 7.6 7.9 1000.6
12b 36 5120 40 16384 | 11842140160 11582.2 71.758 74.023 72.135 | 6266.9 201.2 24574.8 31165.7 4423.7 | 10146 73.6 75.9 | 9599 69.6 71.8 86.1 6.3 7.6 1706.9
"""
# GB: states at 18 and 10 bytes a parameter; activations of 1,024 tokens, all kept and selective
MEMORY = """
70m 1.3 0.7 .094 .057
160m 2.9 1.6 .283 .170
410m 7.3 4.1 .755 .453
1b 18.2 10.1 1.007 .604
1.4b 25.5 14.1 1.51 .906
2.8b 50.0 27.8 2.52 1.51
6.9b 123.4 68.6 4.03 2.42
12b 213.2 118.4 5.66 3.40
"""
LINES = TABLE.split("\n")[1:-1]


def printed(value: float, text: str) -> bool:
    """Whether value rounds to the digits that text has."""
    digits = len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.5000001 * 10**-digits


def model_of(line: str) -> tuple[Model, int]:
    _, layers, hidden, heads, tokens = line.split("|")[0].split()
    return Model(layers=int(layers), hidden=int(hidden), heads=int(heads)), int(tokens)


def numbers(line: str) -> list[float]:
    """What plan has for every column of TABLE behind the first bar."""
    m, step = model_of(line)
    card, f, t = plan.GPUS["H200"], plan.flops(m, 2048), plan.traffic(m, step)
    a, b = plan.bound_a(m, 2048, step, card), plan.bound_b(m, 2048, step, card)
    assert b is not None
    found = [m.parameters, plan.matmul_parameters(m) / 1e6]
    found += [x / 1e9 for x in (f.causal, f.palm, f.executed)]
    found += [x / 1e3 for x in (t.layers, t.cross_entropy, t.optimizer, t.streamed, t.attention)]
    for bound in (a, b):
        found.append(bound.tokens_per_s)
        found += [100 * plan.mfu(x, bound.tokens_per_s, card) for x in (f.causal, f.palm)]
    return [*found, *(100 * share for share in b.shares), 1e3 * step * b.seconds]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_flops_bytes_and_bounds(line: str) -> None:
    wanted = line.partition("|")[2].replace("|", " ").split()
    found = numbers(line)
    assert len(found) == len(wanted)
    assert all(map(printed, found, wanted)), list(zip(found, wanted, strict=True))


@pytest.mark.parametrize("line", MEMORY.split("\n")[1:-1], ids=lambda line: line.split()[0])
def test_memory(line: str) -> None:
    size, *wanted = line.split()
    m, _ = model_of(next(row for row in LINES if row.split()[0] == size))
    kept, selective = plan.activation_bytes(m), plan.activation_bytes(m, selective=True)
    states = [plan.memory(m, 0).states, plan.memory(m, 0, 2, lean=True).states]
    found = [x / 1e9 for x in (*states, 1024 * kept, 1024 * selective)]
    assert all(map(printed, found, wanted)), (found, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_models(size: str) -> None:
    """On the meta device: nothing is allocated. The products' weights are its matrices."""
    m = resolve({"model.preset": f"pythia-{size}"}).model
    named = dict(Pythia(m).named_parameters())
    assert sum(p.numel() for p in named.values()) == m.parameters
    matrices = sum(p.numel() for n, p in named.items() if p.dim() == 2 and "embed_in" not in n)
    assert matrices == plan.matmul_parameters(m)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_states_are_the_trainers(backend: str, tmp_path: Path) -> None:
    """18 bytes a parameter, and the gradients of a microbatch, as the trainer allocates them."""
    write_pair(tmp_path / "tokens", [np.arange(100) % 64] * 20)
    sizes = {"layers": 2, "hidden": 256, "heads": 4, "vocab_size": 1024}  # no padding in buffers
    page = {f"model.{key}": value for key, value in sizes.items()} | {
        "data.prefix": str(tmp_path / "tokens"), "data.order": "sequential", "data.seq_len": 8,
        "train.steps": 1, "train.batch_size": 1, "train.micro_batch_size": 1,
        "precision.compute": "fp16", "precision.loss_scaling": "dynamic",
        "kernels.backend": backend,
    }  # fmt: skip
    trainer = Trainer(resolve(page), tmp_path / "run")
    fused = backend == "triton"
    found, owned = plan.memory(trainer.config.model, 0, fused=fused), trainer.optimizer
    states = (owned.weight, owned.master, owned.grad, owned.exp_avg, owned.exp_avg_sq)
    assert sum(t.numel() * t.itemsize for t in states if t is not None) == found.states
    assert found.states == 18 * trainer.config.model.parameters
    trainer.model.loss(torch.zeros(1, 9, dtype=torch.long)).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert sum(g.numel() * g.itemsize for g in gradients) == found.gradients


def test_cards_by_the_drivers_name() -> None:
    """A PCIe or NVL card, or a GH200, has another peak: no MFU rather than a wrong one."""
    assert plan.card("NVIDIA H200") is plan.GPUS["H200"]
    assert plan.card("NVIDIA H100 80GB HBM3") is plan.GPUS["H100"]
    assert plan.card("NVIDIA A100-SXM4-40GB") is plan.GPUS["A100-40GB"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "AMD EPYC"):
        assert plan.card(other) is None


def test_bound_b_only_where_a_rate_is_published() -> None:
    card = plan.GPUS["H200"]
    small = resolve({"model.preset": "pythia-14m"}).model  # head dim 32
    assert plan.bound_b(small, 2048, 65536, card) is None
    assert plan.bound_b(Model(), 4096, 65536, card) is None
    assert plan.bound_b(Model(), 2048, 65536, card) is not None
    assert plan.bound_b(Model(), 2048, 65536, plan.GPUS["A100"]) is None


def check(module) -> None:  # type: ignore[no-untyped-def]
    m = Model()
    card, f = module.GPUS["H200"], module.flops(m, 2048)
    a, b = module.bound_a(m, 2048, 65536, card), module.bound_b(m, 2048, 65536, card)
    assert printed(a.tokens_per_s, "2095783") and printed(b.tokens_per_s, "1684769")
    assert printed(f.palm / 1e9, "0.343")


MUTANTS = [
    Mutant("attention counted twice", FILE, "linear + 12 * product", "linear + 24 * product"),
    Mutant("no optimizer", FILE, "+ self.optimizer + self.ends", "+ self.ends"),
    Mutant(
        "embedding multiplied",
        FILE,
        "+ m.vocab_size * m.hidden\n",
        "+ 2 * m.vocab_size * m.hidden\n",
    ),
    Mutant("head's product left out", FILE, " + [(m.vocab_size, h)]", ""),
    Mutant("no overhead", FILE, "OVERHEAD = 1.01", "OVERHEAD = 1.0"),
]


def test_check() -> None:
    check(plan)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = REPOSITORY / "configs/pythia-70m.toml"
    assert main(["plan", str(page), "--gpus", "1", "--gpu", "h200", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["measured"] is False and row["gpus"] == 1 and row["fits"] is True
    assert row["memory_bytes"]["states"] == 18 * row["parameters"]  # fp16 gradients, and a sum
    assert row["flops"] == pytest.approx(0.306e9 * 2048 * 1024 * 143_000, rel=2e-3)
    step = row["tokens_per_step"] / row["bound_a"]["tokens_per_s"]
    assert row["bound_a"]["ms_per_step"] == pytest.approx(1e3 * step)
    assert row["bound_a"]["hours"] == pytest.approx(step * 143_000 / 3600)
    assert row["bound_b"]["tokens_per_s"] < row["bound_a"]["tokens_per_s"]
    assert main(["plan", str(page)]) == 0
    assert "bounds, not measurements" in capsys.readouterr().out


def test_the_largest_microbatch_that_fits() -> None:
    config = load(str(REPOSITORY / "configs/pythia-1.4b.toml"), ["--recipe", "modern"])
    row, limit = plan.plan(config, "H100"), plan.GPUS["H100"].memory
    rows = row["largest_micro_batch_size"]
    small, large = (plan.memory(config.model, n * rows * 2048).total for n in (1, 2))
    assert small <= limit < large
    row = plan.plan(load(REPOSITORY / "configs/pythia-12b.toml"), "H200")
    assert (row["fits"], row["largest_micro_batch_size"]) == (False, 0)


@pytest.mark.parametrize("size", ["70m", "1b", "2.8b"])
def test_the_largest_microbatch_is_one_that_the_page_can_have(size: str) -> None:
    """Ranks whose 16-bit gradients are rounded one by one each need whole microbatches."""
    page, wanted = REPOSITORY / f"configs/pythia-{size}.toml", {"70m": 32, "1b": 16, "2.8b": 16}
    rows = plan.plan(load(page), "H200")["largest_micro_batch_size"]
    assert rows == wanted[size]  # 1,024 rows over 32 or 64 ranks
    assert load(page, ["--train.micro_batch_size", str(rows)]).accumulation == 1


def test_gradients_of_the_recipe() -> None:
    """Bytes a parameter: fp32 ones, fp16 ones, and with the sum of two ranks beside them."""
    page = str(REPOSITORY / "configs/pythia-70m.toml")
    wanted = {("modern", "1"): 18, ("pythia-v1", "1"): 16, ("pythia-v1", "2"): 18}
    for (recipe, ranks), states in wanted.items():
        flags = ["--recipe", recipe, "--precision.sum_ranks", ranks]
        row = plan.plan(load(page, flags), "H200")
        assert row["memory_bytes"]["states"] == states * row["parameters"], (recipe, ranks)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "H999"], "H200, H100, A100, A100-40GB are"),
        (["--recipe", "modern", "--precision.compute", "fp32"], "plans are for bf16 and fp16"),
    ],
)
def test_bad_input(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(REPOSITORY / "configs/pythia-70m.toml"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
