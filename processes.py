"""Several processes, started by torchrun: weights sharded with FSDP2, rows shared out.

All processes draw the same batch, each passes its share of the rows through the model, and all learn every result. Without
torchrun there is one process, no process group, and nothing is wrapped.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Decoder


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; the first one alone prints."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torchrun ends all processes when one fails; the timeout must outlast a checkpoint, which one process writes
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if rank() == 0 else nowhere):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for the others, and they for this process


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(x: Tensor | float) -> Tensor | float:
    """The sum of x over all processes."""
    if not dist.is_initialized():
        return x
    summed = x.clone() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed if isinstance(x, Tensor) else summed.item()


def gather(x) -> list:
    """x of every process, by rank; tensors must be on the CPU."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def shard(model: Decoder):
    """FSDP2: every process keeps its part of the weights, gradients and moments; a layer is gathered while it runs."""
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(model.embed.weight.device.type, (world_size(),))
    for module in (*model.layers, model):
        # the weights of the outermost one stay after `forward`, since the head runs outside of it
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # a sum: the loss has been divided by the tokens of all processes
        module.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor factors


@contextlib.contextmanager
def gathered(model: Decoder) -> Iterator[None]:
    """All weights on every process: passes in here wait for nobody, so that each process may make as many as it needs."""
    blocks = (*model.layers, model) if isinstance(model, FSDPModule) else ()
    for block in blocks:
        block.unshard()
        block.set_reshard_after_forward(False, recurse=False)
    yield
    for block in blocks:
        block.reshard()
        block.set_reshard_after_forward(block is not model, recurse=False)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in one piece; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def collected(x: Tensor) -> Tensor:
    """A sharded tensor in one piece on the CPU of the first process; any other tensor as it is."""
    if not isinstance(x, DTensor):
        return x
    return whole(x).to("cpu" if rank() == 0 else "meta", copy=True)  # a copy: a view would be saved with its padding


def whole_model(model: Decoder) -> Decoder:
    """A sharded decoder in one piece on the CPU of the first process; any other decoder as it is."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        plain = Decoder(model.hf_config)
    plain.load_state_dict({name: collected(x) for name, x in model.state_dict().items()}, assign=True)
    plain.generation_config = model.generation_config
    return plain


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """A moment of Adam, sharded like its parameter."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:  # Adam's step counter is a scalar
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
