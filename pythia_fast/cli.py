"""The command line: `pythia-fast COMMAND ...`, the same as `python -m pythia_fast COMMAND ...`.

Each command is one function that imports what it needs when it runs, so that --help needs no torch.
Results go to stdout (with --json as JSON lines), everything else to stderr. Exit codes: 0 done,
1 the thing checked is wrong, 2 bad input, 130 and 143 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pythia_fast import __version__
from pythia_fast.command import Parser, add_command, print_rows, several, some_path, speaks
from pythia_fast.data.cli import add_data_commands
from pythia_fast.errors import CheckError, InputError, outcome

if TYPE_CHECKING:
    from pythia_fast.config import Config

_OVERRIDE = re.compile(r"--([a-z_]+\.[a-z_]+|recipe)(=.*)?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = given[given[:1] == ["--"] :]  # behind it torchrun takes no flag for one of its own
    try:
        given, overrides = _split_overrides(given)
        options, unknown = _parser().parse_known_args(given)
        if unknown:
            raise InputError(f"unexpected {' '.join(unknown)}{_suggestion(unknown[0])}")
        if overrides and not options.takes_config:
            raise InputError(f"{overrides[0]}: this command takes no configuration keys")
        if options.takes_config and options.config.is_dir():
            raise InputError(f"{options.config} is a directory, expected a page")
        options.overrides = overrides
        return options.run_command(options) or 0
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing more to say
        return 0
    except (Exception, KeyboardInterrupt) as error:
        found = outcome(error)
        if found is None:
            raise
        return _fail(error, *found)


def _fail(error: BaseException, line: str, code: int) -> int:
    """What all processes of a launch raise is said by the first."""
    rank = getattr(error, "rank", None)
    where = "" if rank is None else f"rank {rank}: "
    if line and (where or speaks()):
        print(f"pythia-fast: {where}{line}", file=sys.stderr)
    return code


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--section.key value` and `--section.key=value` from the command's own flags."""
    own, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not _OVERRIDE.fullmatch(argument):
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument:
            overrides += [value for value in [next(rest, None)] if value is not None]
    return own, overrides


def _suggestion(flag: str) -> str:
    from pythia_fast.config import describe_keys

    keys: dict[str, str] = {}
    for name, _, _ in describe_keys():
        keys.setdefault(name.rpartition(".")[2], f"--{name}")
    close = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), keys, n=1)
    return f"; did you mean {keys[close[0]]}?" if close and flag.startswith("-") else ""


# --- commands -------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from pythia_fast.config import load

    def read() -> Config:
        return load(options.config, options.overrides)

    if not several():
        return _train_page(options, read())
    from pythia_fast.parallel.launch import Launch

    with Launch() as launch:
        return _train_page(options, launch.page(read))


def _train_page(options: argparse.Namespace, config: Config) -> int:
    if options.explain:
        from pythia_fast.explain import as_text, explain

        if not speaks():
            return 0
        print_rows(options, list(explain(config)), as_text(config))
        return 0
    run = options.run or Path("runs") / options.config.stem
    from pythia_fast.train import Stopped, train  # torch: only once the page is known to be good

    try:
        last = train(config, run)
    except Stopped as stopped:
        if speaks():
            print(f"pythia-fast: {stopped}; the same command continues", file=sys.stderr)
        return 128 + stopped.signum
    if not speaks():
        return 0
    from pythia_fast.report.summary import summarise

    summary, text = summarise(config, run, last)
    print_rows(options, [summary], text)
    return 0


def _import(options: argparse.Namespace) -> None:
    from pythia_fast import hf
    from pythia_fast.neox import reader

    if not options.directory.is_dir():
        raise InputError(f"{options.directory}: no such directory")
    found = reader.find(options.directory)
    if found is not None:
        path = reader.import_checkpoint(found, options.run, options.yaml)
    elif not (options.directory / "config.json").exists():
        raise InputError(
            f"{options.directory}: neither a Hugging Face directory (config.json) nor a NeoX "
            "checkpoint (global_step<N>)"
        )
    elif options.yaml is not None:
        raise InputError(f"{options.directory}: --yaml goes with a NeoX checkpoint, not with this")
    else:
        path = hf.import_checkpoint(options.directory, options.run)
    print_rows(options, [{"checkpoint": str(path)}], f"imported to {path}")


def _export(options: argparse.Namespace) -> None:
    for form, flags in _EXPORT_FLAGS.items():
        for flag in flags:
            if form != options.format and getattr(options, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')} goes with --format {form} alone")
    own = _EXPORT_FLAGS[options.format]
    given = {flag: getattr(options, flag) for flag in own if getattr(options, flag) is not None}
    for flag, value in given.items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{flag} {value}: at least 1 is needed")
    if options.format == "neox":
        from pythia_fast import checkpoint
        from pythia_fast.neox import writer

        dtype = checkpoint.config_of(options.checkpoint).precision.compute
        writer.export(options.checkpoint, options.out, **given)
    else:
        from pythia_fast import hf

        dtype = given.setdefault("dtype", "fp16")
        hf.export(options.checkpoint, options.out, **given)
    row = {"directory": str(options.out), "format": options.format, "dtype": dtype}
    print_rows(options, [row], f"exported to {options.out}, weights in {dtype}")


# the flags of one form of export alone; their names are the arguments of its function
_EXPORT_FLAGS = {"hf": ("dtype", "tokenizer", "hidden_act"), "neox": ("tensor", "ranks")}


def _generate(options: argparse.Namespace) -> None:
    from pythia_fast.generate import continue_texts

    results = continue_texts(
        options.checkpoint,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        tokenizer=options.tokenizer,
    )
    for result in results:
        print_rows(options, [result], result["prompt"] + result["text"])


def _verify(options: argparse.Namespace) -> int:
    from pythia_fast import checkpoint

    path = options.checkpoint
    run = sorted(path.glob("checkpoints/step*"), key=lambda p: (len(p.name), p.name))
    code = 0
    for one in run or [path]:
        try:
            files = checkpoint.verify(one)["files"]
        except InputError as error:  # of a run, all are looked at; what is not whole is wrong
            if not run:
                raise
            code = _fail(error, str(error), 1)
            continue
        except CheckError as error:
            code = _fail(error, str(error), 1)
            continue
        row = {
            "checkpoint": str(one),
            "files": len(files),
            "bytes": sum(entry["bytes"] for entry in files.values()),
        }
        text = f"{one}: {row['files']} files, {row['bytes'] / 1e9:.2f} GB, every sha256 agrees"
        print_rows(options, [row], text)
    return code


def _doctor(options: argparse.Namespace) -> int:
    from pythia_fast.doctor import examine

    rows = examine()
    text = "\n".join(f"{'ok  ' if r['ok'] else 'no  '} {r['what']}: {r['found']}" for r in rows)
    print_rows(options, rows, text)
    return 0 if all(row["ok"] for row in rows if row["required"]) else 1


def _prebuild(options: argparse.Namespace) -> None:
    from pythia_fast.config import load
    from pythia_fast.prebuild import prebuild
    from pythia_fast.prebuilt import VARIABLE

    row = prebuild(load(options.config, options.overrides), options.gpu.upper(), options.out)
    text = (
        f"{row['compiled']} kernels compiled for {row['gpu']} in {row['seconds']:.0f} s,"
        f" {row['kept']} were there; a run with {VARIABLE}={options.out} compiles none of them"
    )
    print_rows(options, [row], text)


def _plan(options: argparse.Namespace) -> None:
    from pythia_fast import plan, recommend
    from pythia_fast.config import parse_overrides, read_page, resolve
    from pythia_fast.parallel.degrees import degrees

    page, gpu = read_page(options.config), options.gpu.upper()
    config = resolve(page, options.overrides, f"{options.config}: ")
    network = options.network and options.network.upper()
    p = config.parallel
    gpus = options.gpus
    if gpus is None:
        gpus = math.prod(max(degree, 1) for degree in (p.data, p.tensor, p.pipeline))
    if gpus == 1:
        degrees(config, 1)
        rows = [plan.plan(config, gpu)]
        text = plan.describe(rows[0])
    else:
        given = {*parse_overrides(options.overrides)}
        given |= {key for key in page if key.startswith("parallel.")}
        rows = recommend.rows(config, gpus, gpu, network, given)
        text = recommend.describe(rows)
    if options.timeline:
        from pythia_fast.report import timeline

        timeline.save(timeline.data(config, gpus, gpu, network), options.timeline)
    print_rows(options, rows, text)


def _bench(options: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "suite.py").exists():
        raise InputError("bench needs the repository: `pip install -e .` in a checkout")
    sys.path.insert(0, str(root))
    from bench.suite import run

    return run(options.minutes, options.out, options.only, options.json, options.small)


# --- parsing --------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pythia-fast",
        description="Trains the Pythia suite from hand-written Triton kernels, and proves it.",
        epilog="example: pythia-fast train configs/quickstart.toml --train.steps 100",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pythia-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    train = add_command(
        commands, "train", _train, "train one run; continues where it stands",
        "pythia-fast train configs/pythia-70m.toml --data.prefix /data/pile/document",
        takes_config=True,
    )  # fmt: skip
    train.add_argument("--run", type=Path, help="run directory (default: runs/<config's name>)")
    train.add_argument(
        "--explain", action="store_true",
        help="print every switch, its value in both recipes, and what differs; train nothing",
    )  # fmt: skip

    add_data_commands(commands)
    bring = add_command(
        commands, "import", _import, "a Hugging Face GPTNeoX or NeoX directory to a new run",
        "pythia-fast import pythia-70m/ --run runs/from-hub",
    )  # fmt: skip
    bring.add_argument(
        "directory", type=Path, help="with config.json and weights, or global_step<N> of GPT-NeoX"
    )
    bring.add_argument("--run", type=some_path, required=True, help="new run directory")
    bring.add_argument("--yaml", type=Path, help="the NeoX run's page: heads, rates, batch")
    export = add_command(
        commands, "export", _export, "a checkpoint to a Hugging Face or NeoX directory",
        "pythia-fast export runs/quickstart/checkpoints/step600 --out hf/",
    )  # fmt: skip
    export.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    export.add_argument("--out", type=some_path, required=True, help="new directory")
    export.add_argument("--format", choices=("hf", "neox"), default="hf")
    export.add_argument("--tensor", type=int, help="neox: tensor-parallel ranks (1)")
    export.add_argument("--ranks", type=int, help="neox: data-parallel ranks (1)")
    export.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"),
        help="hf: of the weights (fp16, as the suite's); neox: always what the run computed in",
    )  # fmt: skip
    export.add_argument("--tokenizer", type=Path, help="hf: default the run's own, if it named one")
    export.add_argument(
        "--hidden-act", choices=("gelu", "gelu_new", "gelu_pytorch_tanh"),
        help="hf: gelu as the Hub's config.json says (default), or the tanh form trained with",
    )  # fmt: skip

    generate = add_command(
        commands, "generate", _generate, "continue prompts",
        "pythia-fast generate runs/quickstart/checkpoints/step600 --prompt 'def main'",
    )  # fmt: skip
    generate.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    generate.add_argument("--prompt", action="append", required=True, help="may be given again")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="tokens (64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    generate.add_argument("--tokenizer", type=Path, help="default: the run's own")

    verify = add_command(
        commands, "verify", _verify, "compare checkpoints with the sha256 of their files",
        "pythia-fast verify runs/quickstart",
    )  # fmt: skip
    verify.add_argument("checkpoint", type=Path, help="a checkpoint, or a run for all of its own")
    plan = add_command(
        commands, "plan", _plan, "memory, time and communication of a run, by arithmetic",
        "pythia-fast plan configs/pythia-12b.toml --gpus 256 --gpu H100 --recipe modern",
        takes_config=True,
    )  # fmt: skip
    plan.add_argument(
        "--gpus", type=int,
        help="1 to 1024: layouts, the recommended one first; keys of [parallel], and a flag "
        "--train.micro_batch_size, are kept (default: as many as those keys name)",
    )  # fmt: skip
    plan.add_argument("--gpu", default="H200", help="H200 (default), H100, A100 or A100-40GB")
    plan.add_argument("--network", help="between nodes: NDR (default; for A100 HDR) or HDR")
    plan.add_argument(
        "--timeline", type=Path, metavar="FILE.png",
        help="draw a step of the page's own layout under each pipeline schedule",
    )  # fmt: skip
    prebuild = add_command(
        commands, "prebuild", _prebuild, "compile a run's kernels ahead of it, without a GPU",
        "pythia-fast prebuild configs/pythia-1b.toml --gpu H100 --out kernels-h100",
        takes_config=True,
    )  # fmt: skip
    prebuild.add_argument("--gpu", required=True, help="A100, H100 or H200 (SXM), or B200")
    prebuild.add_argument(
        "--out", type=some_path, required=True, help="directory, may hold other pages"
    )
    bench = add_command(
        commands, "bench", _bench, "kernels and training beside their peers, in one run",
        "pythia-fast bench --minutes 9 --out runs/bench --only train",
    )  # fmt: skip
    bench.add_argument("--minutes", type=float, default=9.0, help="of all together (9)")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (runs/bench)")
    bench.add_argument("--only", nargs="+", metavar="PART", help="e.g. baselines train layer_norm")
    bench.add_argument("--small", action="store_true", help="a smoke test on the CPU, no timing")

    add_command(
        commands, "doctor", _doctor, "what this machine can run, what is missing, how to get it",
        "pythia-fast doctor",
    )  # fmt: skip
    return parser
