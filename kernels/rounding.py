"""32 bits kept in 16, in plain torch: a master in two halves, moments rounded at random.

The specification of what `adam_lean.py` does in its kernel, which also says why.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 rounded to the nearest, half away from zero; int16 of what that took)."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    high = ((bits.long() + 0x8000) >> 16).to(torch.int16)
    low = bits.to(torch.int16)  # modulo 2¹⁶, which is the difference
    return high.view(torch.bfloat16), low


def joined_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """(bf16, int16) -> the fp32 that `split_master` took apart, to the bit."""
    bits = (weight.view(torch.int16).int() << 16) + remainder.int()
    return bits.view(torch.float32)


def stochastic(x: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16, up in size where the part cut off plus random in [0, 2¹⁶) carries."""
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32)).long()
    return ((bits + random * ~x.isnan()) >> 16).to(torch.int16).view(torch.bfloat16)


def philox(seed: Tensor, counter: Tensor, step: Tensor) -> Tensor:
    """The four words (4, n) of Philox 4x32-10, int64 in [0, 2³²); key (seed, 0).

    counter (n,) int64 gives the first two words of the counter, step the third. Source: Salmon et
    al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
    """
    low = 0xFFFFFFFF
    a, b, c, d = counter & low, counter >> 32 & low, step.expand_as(counter), counter * 0
    key0, key1 = seed.long() & low, seed.long() >> 32 & low
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # modulo 2⁶⁴, as signed
        a, b, c, d = (
            (second >> 32 & low) ^ b ^ key0, second & low,
            (first >> 32 & low) ^ d ^ key1, first & low,
        )  # fmt: skip
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack((a, b, c, d))
