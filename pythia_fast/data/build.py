"""Text to ``.bin/.idx``: documents in their order, encoded by many processes, one writer.

A ``.txt`` file is one document; so is a line of ``.jsonl`` or ``.jsonl.zst``, its text under a key.
As in the original preprocessing, a document without tokens is left out, and the id of
``<|endoftext|>`` follows each one. The bytes do not depend on the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pythia_fast.data.files import ahead, locked, progress, publish
from pythia_fast.data.indexed import IndexedWriter, beside, split_prefix
from pythia_fast.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
UINT16_VOCABULARY = 65500  # below this the original stores uint16, else int32
LINES_A_REPORT = 256  # of progress
BLOCK_BYTES = 1 << 20  # of text handed to a process at a time, and of a read
HOLD_OUT = 20  # every 20th document of the quickstart corpus is for validation


@dataclass(frozen=True)
class Document:
    """A document as found: where it stands, its bytes, and the JSON key (None: plain text)."""

    where: str
    data: bytes
    key: str | None = None

    def text(self) -> str:
        """Its text. Raises InputError that begins with the file and line."""
        try:
            if self.key is None:
                return self.data.decode()
            value = json.loads(self.data)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where}: not UTF-8 at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.where}: not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(self.key), str):
            raise InputError(f"{self.where}: no string under the key {self.key!r}")
        return str(value[self.key])


@dataclass(frozen=True)
class Built:
    """What was written: documents and tokens in the files, empty documents left out."""

    prefix: str
    dtype: str
    documents: int
    tokens: int
    empty: int


def build(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    key: str = "text",
    append_eod: bool = True,
    workers: int | None = None,
) -> Built:
    """Writes `out`.bin and .idx from files or directories (searched deeply, in sorted order).

    tokenizer: a `tokenizers` JSON file. workers: processes, default one for each core. Raises
    InputError for an unreadable document, naming file and line; nothing is left behind then.
    """
    files = find_texts(inputs)
    total = sum(path.stat().st_size for path in files)
    with progress(f"encoding {len(files)} files", total, "bytes") as advance:

        def documents() -> Iterator[Document]:
            for path in files:
                yield from read_documents(path, key, advance)

        return write_documents(documents(), tokenizer, out, append_eod=append_eod, workers=workers)


def write_documents(
    documents: Iterable[Document],
    tokenizer: str | Path,
    out: str | Path,
    *,
    append_eod: bool = True,
    workers: int | None = None,
) -> Built:
    """Encodes the documents in `workers` processes and writes them in their order."""
    encoder = Encoder(str(tokenizer), append_eod)
    dtype = np.dtype("<u2" if encoder.vocab_size < UINT16_VOCABULARY else "<i4")
    count, tokens, empty = 0, 0, 0
    with IndexedWriter(out, dtype) as writer:
        for ids, sizes, left_out in _encoded(encoder, _blocks(documents), workers):
            writer.add_many(ids, sizes)
            count, tokens, empty = count + len(sizes), tokens + len(ids), empty + left_out
    return Built(str(split_prefix(out)), dtype.name, count, tokens, empty)


Encoded = tuple[NDArray[np.int32], NDArray[np.int32], int]  # ids, sizes, empty documents


class Encoder:
    """Turns blocks of documents into token ids; a process makes its own from the same arguments."""

    def __init__(self, path: str, append_eod: bool) -> None:
        self.arguments = (path, append_eod)
        self.tokenizer = load_tokenizer(path)
        self.vocab_size: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.eod: list[int] = []
        if append_eod:
            eod = self.tokenizer.token_to_id(END_OF_TEXT)
            if eod is None:
                raise InputError(f"{path}: has no {END_OF_TEXT} to append to documents")
            self.eod = [eod]

    def __call__(self, block: list[Document]) -> Encoded:
        texts = [document.text() for document in block]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [encoding.ids + self.eod for encoding in encodings if encoding.ids]
        sizes = np.array([len(document) for document in found], np.int32)
        ids = np.fromiter(chain.from_iterable(found), np.int32, int(sizes.sum()))
        return ids, sizes, len(block) - len(found)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(path: str, append_eod: bool) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    _encoder = Encoder(path, append_eod)


def _encode_in_worker(block: list[Document]) -> Encoded:
    assert _encoder is not None
    return _encoder(block)


def _encoded(
    encoder: Encoder, blocks: Iterable[list[Document]], workers: int | None
) -> Iterator[Encoded]:
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(encoder, blocks)
        return
    # spawned, not forked: the caller may hold threads
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, encoder.arguments) as pool:
        yield from ahead(pool, _encode_in_worker, blocks, depth=3 * workers)


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.data)
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def find_texts(inputs: Sequence[str | Path]) -> list[Path]:
    """The files named, and those with a known suffix in the directories named, sorted within."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
            files += [file for file in inside if file.is_file()]
        elif not path.is_file():
            raise InputError(f"{path}: no such file or directory")
        elif not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: the name does not end in {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise InputError(f"{', '.join(map(str, inputs))}: no files in {', '.join(SUFFIXES)}")
    return files


def read_documents(
    path: Path, key: str, advance: Callable[[float, str], None]
) -> Iterator[Document]:
    """The documents of one file; blank lines of JSONL are none. advance: told the bytes read."""
    if path.suffix == ".txt":
        yield Document(str(path), path.read_bytes())
        advance(path.stat().st_size, "")
        return
    with path.open("rb") as file:
        told = 0
        lines = _zst_lines(file, path) if path.suffix == ".zst" else file
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{path}:{number}", line, key)
            if number % LINES_A_REPORT == 0:
                advance(file.tell() - told, "")
                told = file.tell()
        advance(file.tell() - told, "")


def _zst_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines of one or more zstd frames; a truncated last frame is an error, not an end."""
    import zstandard

    tail, decoder = b"", None
    while data := file.read(BLOCK_BYTES):
        while data:
            decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
            try:
                tail += decoder.decompress(data)
            except zstandard.ZstdError as error:
                raise InputError(f"{path}: damaged zstd data: {error}") from None
            data = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
        *lines, tail = tail.split(b"\n")
        yield from lines
    if decoder is not None:
        raise InputError(f"{path}: truncated: the last zstd frame does not end")
    if tail:
        yield tail


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """A `tokenizers` JSON file. Raises InputError when it is none.

    vocab_size: of the model it serves; an id beyond it is refused. Fewer ids are usual: the suite
    pads its vocabulary.
    """
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise InputError(f"{path}: no such tokenizer file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        raise InputError(f"{path}: not a tokenizers JSON file: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            f"{path}: token id {largest} is beyond the model's vocabulary {vocab_size}"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | Path) -> None:
    """Byte-level BPE in the form of GPT-NeoX-20B's: NFC, <|endoftext|> and <|padding|> are 0 and 1.

    vocab_size counts both and the 256 bytes; a small corpus may yield fewer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    smallest = 256 + 2
    if vocab_size < smallest:
        raise InputError(f"vocab_size {vocab_size} is below the {smallest} of bytes and specials")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with publish(Path(out)) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def standard_library_corpus() -> Iterator[tuple[str, str]]:
    """(name, text) of this interpreter's own library sources, sorted; without tests and packages.

    Files that are empty or not UTF-8 are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                yield name.as_posix(), text


def prepare_quickstart(directory: Path, vocab_size: int) -> None:
    """Makes tokenizer.json, train/document and valid/document (.bin, .idx) of the library's text.

    Does nothing when corpus.json, written last, says that this interpreter made them for this
    vocab_size; that page holds the counts of both parts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / ".lock"):
        corpus = list(standard_library_corpus())
        page, tokenizer = directory / "corpus.json", directory / "tokenizer.json"
        outs = {part: directory / part / "document" for part in ("train", "valid")}
        made_of = {
            "vocab_size": vocab_size,
            "files": len(corpus),
            "characters": sum(len(text) for _, text in corpus),
        }
        made = [beside(out, end) for out in outs.values() for end in (".bin", ".idx")]
        whole = all(path.is_file() for path in (page, tokenizer, *made))
        if whole and made_of.items() <= json.loads(page.read_text()).items():
            return
        page.unlink(missing_ok=True)
        parts = {
            "train": [pair for n, pair in enumerate(corpus, start=1) if n % HOLD_OUT],
            "valid": corpus[HOLD_OUT - 1 :: HOLD_OUT],
        }
        with progress("training a tokenizer on the standard library", 3, "stages") as advance:
            train_tokenizer((text for _, text in parts["train"]), vocab_size, tokenizer)
            built = {}
            for part, pairs in parts.items():
                advance(1, f"encoding the {part} part")
                documents = [Document(name, text.encode()) for name, text in pairs]
                built[part] = asdict(write_documents(documents, tokenizer, outs[part], workers=1))
        with publish(page) as file:
            file.write(json.dumps(made_of | built, indent=1).encode())
