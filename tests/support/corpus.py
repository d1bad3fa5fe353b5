"""Small token corpora for the tests of the data path, and the statements they are held against."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np

IDX_CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f4": 6, "f8": 7, "u2": 8}


def make_documents(sizes: list[int], vocabulary: int = 30_000, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, size) for size in sizes]


def idx_bytes(sizes: list[int], dtype: str = "u2", **header: int) -> bytes:
    """An .idx from the description of the format, packed number by number."""
    item = np.dtype(dtype).itemsize
    parts = [b"MMIDIDX\x00\x00", struct.pack("<Q", header.get("version", 1))]
    parts.append(struct.pack("<B", header.get("code", IDX_CODES[dtype])))
    parts.append(struct.pack("<Q", header.get("sequences", len(sizes))))
    parts.append(struct.pack("<Q", header.get("documents", len(sizes) + 1)))
    parts += [struct.pack("<i", size) for size in sizes]
    parts += [struct.pack("<q", sum(sizes[:n]) * item) for n in range(len(sizes))]
    parts += [struct.pack("<q", n) for n in range(len(sizes) + 1)]
    return b"".join(parts)


def write_pair(prefix: Path, documents: list[np.ndarray], dtype: str = "u2") -> Path:
    """A .bin/.idx pair made without the code under test."""
    flat = np.concatenate([np.empty(0, dtype), *documents]).astype("<" + dtype)
    prefix.with_name(prefix.name + ".bin").write_bytes(flat.tobytes())
    sizes = [len(document) for document in documents]
    prefix.with_name(prefix.name + ".idx").write_bytes(idx_bytes(sizes, dtype))
    return prefix


def write_shards(prefix: Path, data: bytes, cuts: list[int]) -> list[Path]:
    """`data` cut at the given bytes into prefix-000NN-of-000LL.bin."""
    edges = [0, *cuts, len(data)]
    paths = []
    for number, (start, stop) in enumerate(pairwise(edges)):
        path = prefix.with_name(f"{prefix.name}-{number:05d}-of-{len(cuts):05d}.bin")
        path.write_bytes(data[start:stop])
        paths.append(path)
    return paths


def neox_order(
    sizes: list[int], seq_len: int, seed: int, rows: int
) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """doc_idx, sample_idx, shuffle_idx as the original makes them: epoch by epoch, token by token.

    The samples are found by walking from document to document, as its C++ helper does.
    """
    wanted = math.ceil(rows * 1.005)
    epochs = tokens = 0
    while True:
        epochs, tokens = epochs + 1, tokens + sum(sizes)
        if (tokens - 1) // seq_len >= wanted:
            break
    random = np.random.RandomState(seed)
    doc_idx = np.array([*range(len(sizes))] * epochs, np.int32)
    random.shuffle(doc_idx)

    count = (tokens - 1) // seq_len
    sample_idx = [(0, 0)]
    place = offset = 0
    for _ in range(count):
        missing = seq_len + 1
        while True:
            rest = sizes[doc_idx[place]] - offset
            if rest >= missing:
                offset += missing - 1  # the last token is the next sample's first
                break
            missing, place, offset = missing - rest, place + 1, 0
        sample_idx.append((place, offset))

    shuffle_idx = np.array([*range(count)], np.uint32)
    random.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def neox_rows(documents: list[np.ndarray], seq_len: int, seed: int, rows: int) -> np.ndarray:
    """Every row of the order, by the flat statement: sample k = flat[L·k : L·k + L + 1]."""
    sizes = [len(document) for document in documents]
    doc_idx, _, shuffle_idx = neox_order(sizes, seq_len, seed, rows)
    flat = np.concatenate([documents[n] for n in doc_idx])
    return np.stack([flat[seq_len * k : seq_len * k + seq_len + 1] for k in map(int, shuffle_idx)])
