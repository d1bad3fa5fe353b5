"""Trains one run: `pythia-fast train CONFIG.toml`.

Read `Trainer.train_step` first: it is the whole step. `Trainer.run` is the loop around it: batches,
the ledger, metrics, validation, checkpoints. A run directory is the only state; started again, it
continues from its newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import math
import signal
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pythia_fast import checkpoint, ledger
from pythia_fast.assemble import assemble, obstacle
from pythia_fast.config import Config, flatten, to_toml
from pythia_fast.data.build import load_tokenizer
from pythia_fast.data.commands import rows_from, valid_rows_from
from pythia_fast.data.files import publish
from pythia_fast.data.loader import RUNNING_START, Loader, Share, read_batch
from pythia_fast.errors import CheckError, InputError
from pythia_fast.explain import differences
from pythia_fast.graph import Compute, graphed
from pythia_fast.host import Clock, keep_freed_memory, noted_signals
from pythia_fast.journal import Journal
from pythia_fast.metrics import read_steps, require_trackers
from pythia_fast.model import initial_weights
from pythia_fast.ops import select
from pythia_fast.optim import DTYPES
from pythia_fast.parallel.data import put_
from pythia_fast.parallel.mesh import Mesh, joined, local_device
from pythia_fast.parallel.same import check_same_data, check_same_directory
from pythia_fast.parallel.tensor import local_part
from pythia_fast.progress import say
from pythia_fast.saving import Saver
from pythia_fast.schedule import learning_rate

_UNSAVED = 1 << 10  # above every signal: a save beside training has failed


class Stopped(Exception):
    """A signal arrived and the state is saved; carries the signal's number."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved at step {step}")
        self.signum = signum


class Trainer:
    """Model, optimizer and data of one run. The caller holds the run's lock."""

    def __init__(self, config: Config, run: Path, mesh: Mesh | None = None) -> None:
        """mesh: this process among others; None: it is alone."""
        c = self.config = config
        self.run_dir = run
        self.mesh = mesh or Mesh.alone(local_device())
        self.device = self.mesh.device
        if self.device.type == "cpu":
            keep_freed_memory()
        ops = select(c.kernels.backend, self.device, c.kernels.deterministic)
        self.rows = rows_from(c)
        self.valid_tokens = _valid_tokens(c)
        self.model, self.optimizer, self.pipeline = assemble(c, self.mesh, ops)
        self.compute: Compute = self._on_device
        if c.kernels.graph:
            why_not = obstacle(self.model, self.optimizer, self.pipeline)
            self.compute = graphed(self._on_device, self.device, why_not)
        self.permanent = frozenset(checkpoint.schedule(c.checkpoint.steps, c.train.steps))
        self.step = 0  # steps done, skipped ones too
        self.first_step = 0  # that of the checkpoint a run was imported from
        self.lr = 0.0  # of the last step
        self.new = False  # there was no checkpoint, as the main process saw the directory

    # --- the step ---

    def train_step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on tokens (batch_size / data, T + 1) int64, pinned or on the device.

        Returns the mean loss of all processes' rows (nats a token) and the gradient norm before
        clipping, on the device, where the next step overwrites them. The host's part: what changes
        from step to step.
        """
        c, optimizer = self.config, self.optimizer
        counts_updates = c.optimizer.schedule_counts == "updates"
        count = optimizer.updates if counts_updates else self.step
        self.lr = learning_rate(c.optimizer, count, c.train.steps)
        optimizer.begin(self.lr)
        loss, norm = self.compute(tokens)
        self.step += 1
        return loss, norm

    def _on_device(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The device's part: a function of the tokens and of the scalars that `begin` has written.

        A CUDA graph records it (`graph.py`): nothing here may differ from step to step.
        """
        c, optimizer = self.config, self.optimizer
        tokens = tokens.to(self.device, non_blocking=True)
        factor = optimizer.loss_factor  # of the loss before backward
        if self.pipeline is not None:  # whose inner stages have no tokens
            loss = self.pipeline.step(tokens, factor / c.tokens_per_step)
            return self.mesh.sum_(loss, "data") / factor, optimizer.apply()
        positions = tokens[:, 1:].numel() * self.mesh.degrees.data  # of the step
        loss = torch.zeros((), device=self.device)
        alone = self.mesh.degrees.data == 1  # else this process is one rank, and these its rows
        for share in rank_shares(tokens, c) if alone else tokens[None]:
            microbatches = share.split(c.train.micro_batch_size)
            for rows in microbatches:
                optimizer.last = rows is microbatches[-1]
                micro_loss = self.model.loss(rows, factor / positions)
                micro_loss.backward()
                optimizer.accumulate()
                loss += micro_loss.detach()
            optimizer.end_rank()
        norm = optimizer.apply()
        return self.mesh.sum_(loss, "data") / factor, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the first train.valid_rows held-out rows, nats a token."""
        assert self.valid_tokens is not None
        tokens = self._staged(self.valid_tokens).to(self.device, non_blocking=True)
        scale = 1.0 / (tokens.shape[0] * (tokens.shape[1] - 1))
        rows = tokens.split(self.config.train.micro_batch_size)
        loss = self.model.loss if self.pipeline is None else self.pipeline.evaluate
        total = torch.zeros((), device=self.device)
        for start in range(0, len(rows), self.mesh.degrees.data):  # every process runs as often
            mine = start + self.mesh.copy
            found = loss(rows[min(mine, len(rows) - 1)], scale)
            if mine < len(rows):
                total += found
        return self.mesh.sum_(total, "data").item()

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Trains to the last step and returns the last row of metrics.jsonl."""
        c = self.config
        running = self._load_newest()
        if self.mesh.main:
            if (d := self.mesh.degrees).world > 1:
                say(f"{d.world} processes: data {d.data}, tensor {d.tensor}, pipeline {d.pipeline}")
            with publish(self.run_dir / "config.toml") as page:
                page.write(to_toml(c).encode())
        with ExitStack() as stack:
            arrived = stack.enter_context(noted_signals())
            self.journal = stack.enter_context(
                Journal(c, self.run_dir, self.step, running, self.first_step, self.mesh.main)
            )
            saving = c.checkpoint
            self.saver = stack.enter_context(
                Saver(self.run_dir, self.mesh, saving.keep, saving.async_)
            )
            if 0 in self.permanent and self.new:
                self._save()
            loader = Loader(
                self.rows, c.train.batch_size, self.step, c.train.steps, c.model.vocab_size,
                share=self._share(),
            )  # fmt: skip
            stack.enter_context(closing(loader))
            clock = Clock(c.tokens_per_step)
            for batch in loader:
                try:
                    loss, norm = self.train_step(self._staged(batch.tokens))
                except CheckError as error:  # loss scaling gave up
                    raise self._end(str(error)) from None
                self.journal.trained(batch)
                self.mesh.settle(c.parallel.timeout)
                clock.tick()
                # agreed upon once a step: a signal that arrives later ends the next step
                stop = self.mesh.largest(_UNSAVED if self.saver.failed else (*arrived, 0)[0])
                if stop == _UNSAVED:
                    self.saver.wait()  # raises where the failure is this process's own
                    raise self._end("a save beside training failed on another process")
                save = self.step in self.permanent or self._every(c.checkpoint.every) or stop
                valid = self.valid_tokens is not None and self._due(c.train.valid_every)
                log = valid or self._due(c.log.every)
                if save or log:
                    self._check_finite(loss.item(), norm.item())
                if log:
                    row = self._row(loss.item(), norm.item(), clock.rate())
                    if valid:
                        row["valid_loss"] = self.validate()
                    self.journal.log(row)
                if save:
                    self._save()
                if save or valid:
                    clock.restart()
                if stop:
                    self.saver.wait()
                    raise Stopped(stop, self.step)
        return self._last_row()

    def _share(self) -> Share | None:
        """The rows of a step that are this process's own; None: all."""
        mesh, pipeline = self.mesh, self.pipeline
        if mesh.degrees.world == 1:
            return None
        reads = pipeline is None or pipeline.first or pipeline.last
        b, copies = self.config.train.micro_batch_size, mesh.degrees.data
        return Share(b, copies, mesh.copy, ledger=mesh.main, reads=reads)

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    def _due(self, every: int) -> bool:
        return self._every(every) or self.step == self.config.train.steps

    def _check_finite(self, loss: float, norm: float) -> None:
        if self.optimizer.loss_scale is not None:
            return  # an overflow is a skipped step; the loss scale knows when there are too many
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._end(f"loss {loss}, gradient norm {norm}")

    def _end(self, reason: str) -> CheckError:
        newest = checkpoint.newest(self.run_dir)
        where = f"the newest checkpoint is step {newest} in {self.run_dir}"
        return CheckError(f"step {self.step}: {reason}; {where}")

    def _row(self, loss: float, norm: float, tokens_per_s: float) -> dict[str, Any]:
        row = {
            "step": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "loss": _or_null(loss),
            "lr": self.lr,
            "grad_norm": _or_null(norm),
            "tokens_per_s": round(tokens_per_s, 1),
        }
        if self.optimizer.loss_scale is not None:
            row["loss_scale"] = self.optimizer.loss_scale.scale
            row["skipped"] = self.step - self.optimizer.updates
        return row

    def _last_row(self) -> dict[str, Any]:
        rows = list(read_steps(self.run_dir / "metrics.jsonl"))
        return rows[-1] if rows else {"step": self.step}

    def _staged(self, tokens: np.ndarray) -> Tensor:
        """tokens as int64 on the host; beside a GPU pinned, and not reused before they are read."""
        host = torch.from_numpy(tokens.astype(np.int64))
        return host.pin_memory() if self.device.type == "cuda" else host

    # --- state on disk ---

    def _newest(self) -> int | None:
        """The newest complete checkpoint's step, as the main process sees the directory."""
        if not self.mesh.main:
            return None
        checkpoint.clean(self.run_dir)
        return checkpoint.newest(self.run_dir)

    def _load_newest(self) -> str:
        """Loads the newest complete checkpoint, or draws the initial weights.

        Returns the ledger's running digest there. Refuses a checkpoint of another recipe, and data
        that differ from what it was trained on.
        """
        step = self.mesh.together(self._newest)[0]
        self.new = step is None
        if step is None:
            self._initialise()
            return RUNNING_START
        path = checkpoint.directory(self.run_dir, step)
        try:
            manifest = checkpoint.read_manifest(path)
            imported = "ledger" not in manifest  # no history here
            _check_recipe(path, self.config, manifest)
            state = self.optimizer.state()
            weights_alone = imported and "updates" not in manifest
            wanted = {k: v for k, v in state.items() if k.startswith("model.") or not weights_alone}
            checkpoint.load(path, wanted, self.mesh)
            self.optimizer.take(wanted)
        except (CheckError, checkpoint.Incomplete) as error:
            before = [s for s in checkpoint.steps(self.run_dir) if s < step]
            way_out = f"; remove {path} to continue from step {before[-1]}" if before else ""
            error.args = (f"{error}{way_out}",)
            raise
        self.step = step
        self.optimizer.resume_at(manifest.get("updates", step), manifest.get("loss_scale"))
        if self.mesh.main:
            say(f"{'starting' if imported else 'resuming'} from {path}")
        self.first_step = manifest.get("first_step", step if imported else 0)
        if imported:
            return RUNNING_START
        self.mesh.together(lambda: self._prove_data(manifest))
        return str(manifest["ledger"])

    def _prove_data(self, manifest: dict[str, Any]) -> None:
        """Raises InputError where ledger or data are not those that a checkpoint was trained on.

        The main process reads for all.
        """
        if not self.mesh.main:
            return
        changed = manifest["data_files"] != ledger.files_state(self.config.data.prefix)
        steps = ledger.to_verify(self.first_step, self.step, self.config.tokens_per_step, changed)
        ledger.Ledger(self.run_dir, self.step, manifest["ledger"], self.first_step).close()
        ledger.verify(self.run_dir, self.rows, self.config.train.batch_size, steps)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draws the initial weights, the same on any layout: each process keeps its part."""
        parameters = dict(self.model.named_parameters())
        parts, part = self.mesh.degrees.tensor, self.mesh.part
        dtype = DTYPES[self.config.precision.compute]
        for name, drawn in initial_weights(self.config.model, self.config.train.seed):
            if name in parameters:
                put_(parameters[name], local_part(name, drawn, parts, part), dtype)
        self.optimizer.sync_weights(from_model=True)

    def _save(self) -> None:
        self.journal.sync()
        extra = {
            "config": flatten(self.config),
            "tokens": self.step * self.config.tokens_per_step,
            "ledger": self.journal.running,
            "data_files": ledger.files_state(self.config.data.prefix),
            "updates": self.optimizer.updates,
            "first_step": self.first_step,
        }
        if self.optimizer.loss_scale is not None:
            extra["loss_scale"] = self.optimizer.loss_scale.state()
        permanent = self.step in self.permanent
        self.saver.save(self.step, self.optimizer.state(), extra, permanent)


def rank_shares(tokens: Tensor, c: Config) -> Tensor:
    """tokens (batch_size, T + 1) -> (ranks, rows of a rank, T + 1), each rank's rows in order.

    With R ranks of b rows a microbatch, microbatch m of rank r is rows [m·R·b + r·b, + b) of the
    step. Source: GPT-NeoX v1.0 samplers.py:127-165.
    """
    micro = (-1, c.precision.ranks, c.train.micro_batch_size)
    return tokens.unflatten(0, micro).transpose(0, 1).flatten(1, 2)


def _or_null(value: float) -> float | None:
    """JSON has no infinity: a skipped step has no norm."""
    return value if math.isfinite(value) else None


def train(config: Config, run: Path) -> dict[str, Any]:
    """Trains `config` in the directory `run` to its last step, from wherever it stands.

    Returns the last row of metrics.jsonl. Raises InputError, CheckError (a loss that is not
    finite) or Stopped.
    """
    if config.data.tokenizer:  # refused now, not after the last step
        load_tokenizer(config.data.tokenizer, config.model.vocab_size)
    require_trackers(config)
    with joined(config) as mesh:
        if mesh.main:
            for line in differences(config):
                say(f"differs from the published recipe: {line}")
        with ExitStack() as stack:
            mesh.each(lambda: mesh.main and stack.enter_context(checkpoint.RunLock(run)))
            check_same_directory(mesh, run)
            trainer = mesh.each(lambda: Trainer(config, run, mesh))
            check_same_data(mesh, trainer.rows, config)
            return trainer.run()


# what an imported model computes; its activation and rotary table are the trainer's choice, because
# the published files name the exact GELU for models trained with the tanh form
_FUNCTION = ("layers", "hidden", "heads", "vocab_size", "rotary_pct", "rotary_base", "norm_eps")


def _check_recipe(path: Path, config: Config, manifest: dict[str, Any]) -> None:
    """Refuses to continue a checkpoint under a page that decides other losses.

    Imported weights fix the function. An imported optimizer state also fixes what is known of its
    run: "known" of the manifest, keys of its config that are no defaults.
    """
    saved, imported = checkpoint.config_of(path), "ledger" not in manifest
    if not imported and saved.recipe and config.recipe and saved.recipe != config.recipe:
        raise InputError(
            f"{path} was trained with recipe = {saved.recipe!r}, not {config.recipe!r}: "
            "recipes do not mix, choose another directory with --run"
        )
    before, now = saved.decisive, config.decisive
    fixed = {f"model.{name}" for name in _FUNCTION} | set(manifest.get("known", ()))
    way_out = "set it in the page" if imported else "choose another directory with --run"
    keys = [key for key in now if key in before and (key in fixed or not imported)]
    if others := [key for key in keys if before[key] != now[key]]:
        first, rest = others[0], len(others) - 1
        more = f", and {rest} more key{'s' * (rest > 1)}" if rest else ""
        raise InputError(
            f"{path} was trained with {first} = {before[first]!r}, not {now[first]!r}{more}: "
            f"{way_out}"
        )


def _valid_tokens(config: Config) -> np.ndarray | None:
    """The held-out rows (train.valid_rows, T + 1), checked; None where the page names none."""
    rows, wanted = valid_rows_from(config), config.train.valid_rows
    if rows is None:
        return None
    prefix = config.data.valid_prefix
    if len(rows) < wanted:
        raise InputError(f"{prefix} holds {len(rows)} rows, train.valid_rows = {wanted}")
    try:
        return read_batch(rows, 0, wanted, config.model.vocab_size).tokens
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from None
