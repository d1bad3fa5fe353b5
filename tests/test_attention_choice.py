"""Which attention runs: the fastest measured, kept by machine; torch's where no kernel fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pythia_fast import attention
from pythia_fast.kernels import reference
from pythia_fast.model import rotary_tables

OUT_OF_MEMORY = -2.0


class Candidates:
    """Three attentions that count their calls, and a clock that says what each is to take."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.calls, self.measured = milliseconds, [], 0

    def functions(self) -> dict[str, attention.Attention]:
        return {name: self._named(name) for name in self.milliseconds}

    def _named(self, name: str) -> attention.Attention:
        def attend(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            self.calls.append(name)
            if self.milliseconds[name] == OUT_OF_MEMORY:
                raise torch.OutOfMemoryError("no memory now")
            if self.milliseconds[name] < 0:
                raise RuntimeError("No available kernel. Aborting execution.")
            return reference.attention(qkv, cos, sin)

        return attend

    def clock(self, call) -> float:
        self.measured += 1
        call()
        return self.milliseconds[self.calls[-1]]


def inputs(positions: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, positions, 2, 96), *rotary_tables(positions, 8)


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({"ours": 1.0, "flash": 2.0, "cudnn": 1.5}, "ours"),
        ({"ours": 1.0, "flash": 2.0, "cudnn": 0.5}, "cudnn"),
        ({"ours": 1.0, "flash": 0.99, "cudnn": 2.0}, "ours"),  # within the margin
        ({"ours": 1.0, "flash": 2.0, "cudnn": -1.0}, "ours"),  # refused
        ({"ours": -1.0, "flash": 2.0, "cudnn": 3.0}, "flash"),
    ],
)
def test_the_fastest_runs_and_is_kept(
    milliseconds: dict[str, float], expected: str, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "made" / "attention.json"
    known = Candidates(**milliseconds)
    choice = attention.Fastest(known.functions(), known.clock, file, "card A")
    qkv, cos, sin = inputs()
    out = choice(qkv, cos, sin)
    torch.testing.assert_close(out, reference.attention(qkv, cos, sin))
    assert known.calls[-1] == expected and known.measured == 3
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{expected} runs" in said and "2 5 2 96 float32" in said
    choice(qkv, cos, sin)
    again = attention.Fastest(known.functions(), known.clock, file, "card A")
    again(qkv, cos, sin)
    assert known.measured == 3  # neither call measured anew
    other = attention.Fastest(known.functions(), known.clock, file, "card B")
    other(qkv, cos, sin)
    assert known.measured == 6
    assert json.loads(file.read_text()) == {
        card: {"2 5 2 96 float32": expected} for card in ("card A", "card B")
    }
    choice(*inputs(7))
    assert known.measured == 9  # another shape


@pytest.mark.parametrize("content", ["", "[]", '{"card A": {"2 5 2 96 float32": "gone"}}'])
def test_a_broken_or_old_file_is_measured_again(content: str, tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    file.write_text(content)
    known = Candidates(ours=2.0, flash=1.0)
    attention.Fastest(known.functions(), known.clock, file, "card A")(*inputs())
    assert known.calls[-1] == "flash" and known.measured == 2


def test_a_directory_that_cannot_be_made_costs_only_the_memory(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    known = Candidates(ours=1.0)
    file = tmp_path / "file" / "attention.json"
    attention.Fastest(known.functions(), known.clock, file, "card A")(*inputs())
    assert "is not kept" in capsys.readouterr().err.replace("\n", " ")


def test_want_of_memory_is_not_kept(tmp_path: Path) -> None:
    """It is of this moment: the choice holds for this run and is measured again in the next."""
    known = Candidates(ours=OUT_OF_MEMORY, flash=2.0)
    file = tmp_path / "attention.json"
    attention.Fastest(known.functions(), known.clock, file, "card A")(*inputs())
    assert known.calls[-1] == "flash" and not file.exists()


def test_measuring_leaves_the_random_numbers_of_the_run(tmp_path: Path) -> None:
    known = Candidates(ours=1.0)
    given = inputs()
    before = torch.get_rng_state()
    attention.Fastest(known.functions(), known.clock, tmp_path / "f.json", "card A")(*given)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_refused_is_an_error_with_every_reason(tmp_path: Path) -> None:
    known = Candidates(ours=-1.0, flash=-1.0)
    choice = attention.Fastest(known.functions(), known.clock, tmp_path / "f.json", "card A")
    with pytest.raises(RuntimeError, match=r"No available kernel.*No available kernel"):
        choice(*inputs())


def test_a_head_dim_without_a_kernel_runs_on_torch() -> None:
    """D = 24: the rotation kernel, then torch."""
    choice = attention.select(torch.device("cpu"), deterministic=True)
    qkv, (cos, sin) = torch.randn(2, 9, 2, 72), rotary_tables(9, 6)
    expected = reference.attention(qkv, cos, sin)
    torch.testing.assert_close(choice(qkv.clone(), cos, sin), expected)


def test_rotary_dims_that_no_kernel_turns_run_on_torch() -> None:
    """All 80 of D = 80."""
    choice = attention.select(torch.device("cpu"), deterministic=True)
    qkv, (cos, sin) = torch.randn(1, 9, 2, 240), rotary_tables(9, 80)
    expected = reference.attention(qkv, cos, sin)
    torch.testing.assert_close(choice(qkv.clone(), cos, sin), expected)


def test_many_queries_decode_on_torch() -> None:
    """A prompt of more than 16 positions, with padding on the left of its second row."""
    q, cache = torch.randn(2, 20, 2, 64), torch.randn(2, 2, 2, 30, 64)
    first = torch.tensor([0, 7], dtype=torch.int32)
    expected = reference.attention_decode(q, *cache, 25, first)
    torch.testing.assert_close(attention.decode(q, *cache, 25, first), expected)
    short = attention.decode(q[:, -3:], *cache, 25, first)
    torch.testing.assert_close(short, expected[:, -3:], atol=1e-5, rtol=1e-5)
