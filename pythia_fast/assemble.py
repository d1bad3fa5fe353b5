"""Model, optimizer and pipeline of one process, as the page and its place in the mesh want them.

In this order, on the meta device until the optimizer gives the parameters memory: ops with the
tensor-parallel collectives, local shapes, the layers of this process's stages, rows for FSDP2;
then the optimizer; then what takes the place of layers and head in training.
"""

from __future__ import annotations

from pythia_fast.config import Config
from pythia_fast.lean import LeanAdamW
from pythia_fast.model import Pythia
from pythia_fast.ops import Ops
from pythia_fast.optim import DTYPES, AdamW
from pythia_fast.parallel.data import shard_fully
from pythia_fast.parallel.mesh import Mesh
from pythia_fast.parallel.pipeline import Pipeline, keep_own
from pythia_fast.parallel.tensor import localise, tensor_ops
from pythia_fast.progress import say


def assemble(c: Config, mesh: Mesh, ops: Ops) -> tuple[Pythia, AdamW, Pipeline | None]:
    """Raises InputError where the page asks for what does not go together."""
    parts, stages = mesh.group("tensor"), mesh.group("pipeline")
    model = Pythia(c.model, ops)
    if parts is not None:
        model = Pythia(c.model, tensor_ops(ops, parts, c.parallel.sequence))
        localise(model, mesh.degrees.tensor)
    if stages is not None:
        keep_own(model, c, mesh)
    full = c.parallel.shard == "full" and mesh.degrees.data > 1
    if full:
        shard_fully(model, mesh, DTYPES[c.precision.compute])
    of = (model, c.optimizer, c.precision, ops, mesh.device, mesh, c.parallel)
    lean = c.optimizer.states == "lean"
    optimizer = LeanAdamW(*of, seed=c.train.seed) if lean else AdamW(*of)
    if optimizer.arrival is not None:
        model.gpt_neox.before = optimizer.arrival.before
    if not full:
        fuse(model, optimizer, c, mesh)
    elif ops.name == "triton":
        say("parallel.shard = 'full': layers run op by op, their fused form wants flat gradients")
    return model, optimizer, None if stages is None else Pipeline(model, optimizer, c, mesh)


def fuse(model: Pythia, optimizer: AdamW, c: Config, mesh: Mesh) -> None:
    """Gives the model its fused blocks and head: on the kernels, with gradients added in fp32.

    Lean states may add them in bf16, of which there is no original to follow. Not where gradients
    may differ run to run: attention is then torch's where that is faster.
    """
    lean = c.optimizer.states == "lean" and c.precision.ranks == 1
    adds = c.precision.gradients == "fp32" or lean
    if model.ops.name != "triton" or not adds or not c.kernels.deterministic:
        return
    from pythia_fast import block  # triton, which not every platform has

    if block.takes(c.model.head_dim, c.model.rotary_dim, optimizer.weight.dtype):
        recompute = c.kernels.recompute == "selective"
        parts, sequence = mesh.group("tensor"), c.parallel.sequence
        model.fused = block.Fused(model, optimizer, recompute, parts, sequence)


def obstacle(model: Pythia, optimizer: AdamW, pipeline: Pipeline | None) -> str | None:
    """Why a step of these cannot be recorded as a CUDA graph."""
    if optimizer.loss_scale is not None:
        return "since loss scaling decides on the host whether a step counts"
    if pipeline is not None:
        return "since a pipeline's schedule sends and receives"
    if model.fused is None:
        return "since its blocks are not fused"
    if not optimizer.on_kernels:
        return "since torch's AdamW updates"
    if optimizer.mesh.degrees.world > 1:
        return "since collectives between processes have not been recorded yet"
    return None
