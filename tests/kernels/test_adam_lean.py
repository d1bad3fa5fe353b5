"""AdamW on lean states: the master exact, the rounding random, unbiased and the same again."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, scalar
from torch import Tensor

from pythia_fast.kernels import adam, reference, rounding
from pythia_fast.kernels import adam_lean as kernels
from pythia_fast.kernels.rounding import joined_master, split_master

FILE = "kernels/adam_lean.py"
MUTANTS = [
    Mutant("remainder lost", FILE, "((b_w << 16) + b_r)", "(b_w << 16)"),
    Mutant("remainder without sign", FILE, "tl.load(remainder + o, mask=m).to(tl.int32)", "(tl.load(remainder + o, mask=m).to(tl.int32) & 0xFFFF)"),
    Mutant("weight truncated", FILE, "(b_bits + 0x8000) >> 16", "b_bits >> 16"),
    Mutant("m rounded down", FILE, "(b_bits + (b_random & 0xFFFF)) >> 16", "b_bits >> 16"),
    Mutant("m and v share their bits", FILE, "_stochastic(b_v, b_random >> 16)", "_stochastic(b_v, b_random)"),
    Mutant("the same bits every step", FILE, "b_zero + b_step.to(tl.int32), b_zero", "b_zero, b_zero"),
    Mutant("the same bits for every seed", FILE, "tl.load(seed), i_counter", "tl.load(seed) * 0, i_counter"),
    Mutant("one word for all quarters", FILE, "o, None, b_words[q]", "o, None, b_words[0]"),
    Mutant("bits by place in the part", FILE, "first // (4 * GROUP) + tl.program_id", "0 * first + tl.program_id"),
    Mutant("NaN becomes a number", FILE, "tl.where(_is_nan(b_bits), 0x7FC00000, b_bits)", "b_bits"),
    Mutant("NaN of a moment becomes a number", FILE, "tl.where(_is_nan(b_bits), 0x7FC0, b_rounded)", "b_rounded"),
    Mutant("decay one element too far", FILE, "o < decay_until", "o <= decay_until"),
    Mutant("no clip factor", FILE, ".to(tl.float32) * b_scale", ".to(tl.float32)"),
    Mutant("tail written past the end", FILE, "(o >= 0) & (o < n)", "o >= 0"),
    Mutant("update of the rounded moment lost", FILE, "(b_m * b_u1)", "(tl.load(exp_avg + o, mask=m).to(tl.float32) * b_u1)"),
]  # fmt: skip

N = 9000  # two whole tiles and a part
State = list[Tensor]


def bits(master: Tensor) -> Tensor:
    return master.view(torch.int32)


def start(n: int = N, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    master, m, v = (torch.randn(n, generator=generator).to(DEVICE) for _ in range(3))
    return [*split_master(0.02 * master), (1e-3 * m).bfloat16(), (1e-6 * v.square()).bfloat16()]


def run(module, state: State, grad: Tensor, t: float = 7, seed: int = 1234, until: int = 5000, first: int = 0):  # type: ignore[no-untyped-def] # fmt: skip
    key = torch.tensor([seed], device=DEVICE)
    scalars = (scalar(1e-2), scalar(t), scalar(0.5))
    module.adamw_lean_(*state, grad, until, *scalars, key, first)
    return state


def gradient(n: int = N, seed: int = 9) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * 1e-3


def check(module: ModuleType) -> None:
    # nothing is written past the end (first: what does would end the process further down)
    padded = [torch.cat((t, torch.zeros(5000, dtype=t.dtype, device=DEVICE))) for t in start()]
    run(module, [t[:N] for t in padded], gradient(N + 5000)[:N])
    assert not any(t[N:].any() for t in padded)
    for first in (0, 300, 3 * 4096):
        for dtype in (torch.float32, torch.float16):
            grad = gradient().to(dtype)
            ours, expected = (run(of, start(), grad, first=first) for of in (module, reference))
            # 1 ulp of the update, and so of m and v before they are rounded
            master, exact = joined_master(*ours[:2]), joined_master(*expected[:2])
            torch.testing.assert_close(master, exact, rtol=3e-7, atol=3e-8)
            weight, remainder = split_master(master)
            assert torch.equal(weight, ours[0]) and torch.equal(remainder, ours[1])
            for a, b in zip(ours[2:], expected[2:], strict=True):
                assert (a != b).float().mean() < 1e-3, "rounded by other bits"
                torch.testing.assert_close(a, b, rtol=1e-2, atol=0)
    # the master is exact: as `adamw_` has it from the same moments
    halves = start()
    master, m, v = joined_master(*halves[:2]), halves[2].float(), halves[3].float()
    adam.adamw_(None, master, m, v, gradient(), 5000, scalar(1e-2), scalar(7), scalar(0.5))
    assert torch.equal(bits(joined_master(*run(module, halves, gradient())[:2])), bits(master))
    # a NaN stays one
    for bad in (0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001):
        grad = torch.full((8,), bad, dtype=torch.int32, device=DEVICE).view(torch.float32)
        found = run(module, start(8), grad, until=8)
        assert all(t.isnan().all() for t in (found[0], *found[2:])), hex(bad)
        assert joined_master(*found[:2]).isnan().all()


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


# --- the two halves -------------------------------------------------------------------------------


def test_every_master_is_a_pair_and_every_pair_a_master() -> None:
    """All low halves under exponents and signs of every kind; NaN alone is not kept."""
    high = torch.tensor([0, 1, 0x3F7F, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x0080, 0x42FF])
    high = torch.cat((high, high + 0x8000))
    patterns = (high[:, None] << 16 | torch.arange(2**16)).flatten()
    master = patterns.to(torch.int32).view(torch.float32)
    weight, remainder = split_master(master)
    whole = joined_master(weight, remainder)
    known = ~master.isnan()
    assert torch.equal(bits(whole)[known], bits(master)[known]) and whole[~known].isnan().all()
    assert weight[~known].isnan().all()
    # a pair is its own split: the other way round, for remainders of every size
    again = split_master(whole[known])
    assert torch.equal(again[0], weight[known]) and torch.equal(again[1], remainder[known])


def test_the_weight_is_the_nearest_half_away_from_zero() -> None:
    master = torch.randn(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,))
    weight, _ = split_master(master)
    ties = (bits(master) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties], master.bfloat16()[~ties])
    halfway = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32)
    up = split_master(halfway.view(torch.float32))[0]
    assert up.tolist() == [1.0078125, 1.015625, -1.0078125]


# --- the rounding ---------------------------------------------------------------------------------


def test_the_oracle_gives_the_published_words() -> None:
    """Known answers of Random123 for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    assert philox([ones] * 4, [ones] * 2) == "408f276d 41c83b0e a20bc7c6 6d5451fd"


def philox(counter: list[int], key: list[int]) -> str:
    """Salmon et al. 2011, written out in Python's integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & 0xFFFFFFFF, (p >> 32) ^ d ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return " ".join(f"{w:08x}" for w in (a, b, c, d))


def test_philox_is_that_of_plain_integers() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        counter, step = int(random.integers(2**40)), int(random.integers(2**20))
        seed = int(random.integers(2**32))
        ours = rounding.philox(
            torch.tensor(seed), torch.tensor([counter]), torch.tensor(step)
        )[:, 0]  # fmt: skip
        plain = philox([counter & 0xFFFFFFFF, counter >> 32, step, 0], [seed, 0])
        assert " ".join(f"{int(w):08x}" for w in ours) == plain


def test_parts_give_the_bits_of_the_whole() -> None:
    """Whatever range is updated in one call: the boundary of row biases, or of another layout."""
    whole = run(kernels, start(), gradient())
    for cut in (128, 4096, 5001):
        parts = start()
        for lo, hi in ((0, cut), (cut, N)):
            until = min(max(5000 - lo, 0), hi - lo)
            run(kernels, [t[lo:hi] for t in parts], gradient()[lo:hi], until=until, first=lo)
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True)), cut


def test_rounding_is_unbiased_and_by_other_bits_each_step() -> None:
    """m = 1 + p·ulp stays in the mean: rounded to the nearest it would be 1 for ever."""
    n = 40_000
    m = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    state = [*split_master(torch.zeros(n, device=DEVICE)), m, m.clone()]
    seen = []
    for t in (1, 2):
        fresh = [s.clone() for s in state]
        # (1 − β₁)(g − 1) = 0.3 of the distance of bf16 above 1
        grad = torch.full((n,), 2 * (1 + 0.3 * 2**-7 / 0.1), device=DEVICE)
        seen.append(run(kernels, fresh, grad, t=t)[2])
    up = [(s > 1).float() for s in seen]
    for share in up:
        assert share.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / n) ** 0.5)
    together = (up[0] * up[1]).mean().item()
    assert together == pytest.approx(0.09, abs=5 * (0.09 / n) ** 0.5)
    neighbours = (up[0][:-1] * up[0][1:]).mean().item()
    assert neighbours == pytest.approx(0.09, abs=5 * (0.09 / n) ** 0.5)


def test_bad_input_names_the_argument() -> None:
    weight, remainder, m, v = start(8)
    with pytest.raises(TypeError, match="remainder: dtype bfloat16, not int16"):
        run(kernels, [weight, weight, m, v], gradient(8), until=8)
    with pytest.raises(TypeError, match="weight: dtype float32"):
        run(kernels, [weight.float(), remainder, m, v], gradient(8), until=8)
    with pytest.raises(ValueError, match="exp_avg_sq: shape"):
        run(kernels, [weight, remainder, m, v[:7]], gradient(8), until=8)
    with pytest.raises(ValueError, match="decay_until: 9 of 8"):
        run(kernels, [weight, remainder, m, v], gradient(8), until=9)
