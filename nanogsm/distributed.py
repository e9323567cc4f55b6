"""Many devices: everything that is different on them.

    torchrun --nproc-per-node 8 train_sft.py ...    # and train_ppo.py, train_prm.py, evaluate.py

torchrun starts the script once for every device. Each of these processes is a *rank*. Like
--micro-batch, the number of ranks changes time and memory and not the result, rounding apart. All
ranks read the same files, draw the same examples and compute the same learning rate, so little has
to be said between them:

  dealt      a step's micro-batches, and prompts to answer, go round like cards       deal
  added up   gradients, losses and log-probs, of which each rank made a part          add_up
  parts      With --shard N, every N ranks share one copy of the weights, of their    shard, own,
             gradients and moments: each has some rows of every matrix                whole
  rank 0     prints and writes files alone, and tells the others what it found         on_rank_0

Tensors and JSON travel, and nothing that is unpickled. The ports are open to whoever reaches them,
so use a private network. Without torchrun there is one rank, which deals to itself and has nobody
to tell.
"""

import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogsm import UserError

RANK, COUNT = 0, 1  # this process's number, and how many there are
ALONE = False  # whether this is rank 0 inside `on_rank_0`, while the others wait for it
# How long a rank waits for the others: while one of them writes a checkpoint, or samples the
# longest answers.
PATIENCE = datetime.timedelta(hours=1)
SMALL = 2**20  # entries; smaller gradients travel together


def start() -> None:
    """Meet the other ranks, if torchrun has started this process. All but rank 0 fall silent."""
    global RANK, COUNT
    needed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not needed <= os.environ.keys():
        return  # a cluster may set some of these for other purposes
    found = {name: os.environ[name] for name in needed - {"MASTER_ADDR"}}
    advice = "leave the environment variables of many devices to torchrun"
    for name, text in sorted(found.items()):
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}, which is not a number from 0 up: {advice}")
    rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    if rank >= count:
        raise UserError(f"RANK is {rank}, and must be below WORLD_SIZE, which is {count}: {advice}")
    RANK, COUNT = rank, count
    if COUNT == 1:
        return
    if RANK:
        sys.stdout = open(os.devnull, "w")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    versions = gathered([torch.__version__, platform.python_version()])
    if any(version != versions[0] for version in versions):
        said = ", ".join(f"rank {i} has {v[0]} on Python {v[1]}" for i, v in enumerate(versions))
        raise UserError(f"the machines have different versions of torch: {said}")


def end() -> None:
    """Wait until all ranks have done their work, then part."""
    # torchrun ends the others soon after the first that leaves, perhaps in the middle of a file.
    if dist.is_initialized():
        gathered(None)
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with a status. A rank that fails does not wait for the others."""
    if not dist.is_initialized():
        sys.exit(code)
    # Trap: Python's own exit would find threads that still talk to the others, and abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speaks_first() -> bool:
    """Whether this is the first rank that fails. The others fail because it is gone, so they have
    nothing to say."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store has gone with its process
        return False


def lost_peer(error: Exception) -> str | None:
    """One line about an error that means that another rank is gone; None for other errors."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting",
             "Broken pipe", "Socket Timeout", "recvValue failed",
             "remote process exited")  # fmt: skip
    if COUNT == 1 or not any(sign in text for sign in signs):
        return None
    return (f"rank {RANK} lost another rank, which was killed or cannot be reached: run the same "
            "command again to continue from the last checkpoint")  # fmt: skip


def local_device(device: str) -> str:
    """This rank's own device of the kind that --device names: "cuda" or "cpu"."""
    if COUNT == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise UserError(f"--device {device}: under torchrun give cuda or cpu; each process then "
                        "takes a GPU of its own")  # fmt: skip
    own, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= gpus:
        raise UserError(f"process {own} has no GPU: this machine has {gpus}, so give torchrun "
                        f"--nproc-per-node {gpus}")  # fmt: skip
    # (Not made torch's current device before machine.pick_compute has prepared the process for it.)
    return f"cuda:{own}"


# ---- dealt


def deal(cards: list, *models: nn.Module, backward: bool = False) -> Iterator:
    """This rank's share of a list: every COUNT-th, beginning with its own number.

    Pass the models that every card goes through, and backward=True if it also goes back. A sharded
    model needs all ranks in every pass, so a rank with one card fewer makes an empty one.
    """
    mine = cards[RANK::COUNT]
    yield from mine
    if len(mine) < largest_share(len(cards)):
        for model in filter(is_sharded, models):
            nothing = torch.zeros((1, 2), dtype=torch.long, device=model.device)
            with torch.set_grad_enabled(backward):
                hidden = model(nothing, [2])
            if backward:
                # An untied output head, which forward does not use, needs a gradient everywhere.
                out = hidden if model.config.tied else model.logits(hidden)
                (out.sum() * 0.0).backward()


def largest_share(n: int) -> int:
    """The most rows that one rank gets of n."""
    return -(-n // COUNT)


# ---- added up


@torch.no_grad()
def add_up(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over all ranks, in place."""
    if COUNT > 1:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


@torch.no_grad()
def add_up_gradients(params: Iterable[Tensor]) -> None:
    """Each .grad becomes its sum over all ranks. Nothing is divided: a rank's share of the loss has
    been divided by the supervised tokens of the whole step."""
    if COUNT == 1:
        return
    small, large = [], []
    for p in params:
        if is_part(p):  # FSDP has summed it during backward
            continue
        if p.grad is None:  # a rank that was dealt nothing
            p.grad = torch.zeros_like(p)
        (small if p.grad.numel() < SMALL else large).append(p.grad)
    together = torch.cat([g.flatten() for g in small]) if small else None
    add_up(*large, *([together] if small else []))
    if small:
        for g, summed in zip(small, together.split([g.numel() for g in small])):
            g.copy_(summed.view_as(g))


def largest(x: Tensor) -> Tensor:
    """The largest of the ranks' numbers, ()."""
    if COUNT > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


# ---- told


def gathered(mine: Any) -> list:
    """What every rank has, in their order: JSON values, sent as bytes."""
    if COUNT == 1:
        return [mine]
    data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(COUNT)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    most = max(int(size) for size in sizes)
    padded = torch.zeros(most, dtype=torch.uint8)
    padded[: len(data)] = data
    found = [torch.zeros_like(padded) for _ in range(COUNT)]
    dist.all_gather(found, padded)
    return [json.loads(x[: int(n)].numpy().tobytes()) for x, n in zip(found, sizes)]


def on_rank_0(do: Callable[[], Any]) -> Any:
    """What `do` returns on rank 0, which alone calls it: a JSON value, told to all. A UserError of
    rank 0 is raised on all."""
    global ALONE
    if COUNT == 1 or ALONE:
        return do()
    told, error = [None, None], None
    if RANK == 0:
        try:
            ALONE = True
            told[0] = do()
        except UserError as e:
            told[1], error = str(e), e
        finally:
            ALONE = False
    told = gathered(told)[0]
    if told[1] is not None:
        raise error or UserError(told[1])
    return told[0]


def check_same(settings: dict) -> None:
    """UserError if the ranks have different settings, which are JSON values. A setting that only
    some ranks have is different, too. So are ranks that are elsewhere in the program, and say
    something else."""
    first, *others = everyone = gathered(settings)
    names = {"what they do"}
    if all(isinstance(one, dict) for one in everyone):
        absent = object()
        names = {
            name for one in others for name in first | one
            if one.get(name, absent) != first.get(name, absent)
        }  # fmt: skip
    if names:
        shown, more = sorted(names)[:8], len(names) - 8
        also = f" and {more} more" * (more > 0)
        raise UserError(f"the processes differ in {', '.join(shown)}{also}: start the same "
                        "command with the same files on every machine")  # fmt: skip


def agreed(signal: int | None) -> int | None:
    """The signal that any rank was sent, None if none was."""
    return next((s for s in gathered(signal) if s is not None), None) if COUNT > 1 else signal


# ---- parts


def shard(model: nn.Module, size: int, kind: str) -> None:
    """Let every `size` ranks share one copy of a model, by PyTorch's FSDP2. There are COUNT / size
    copies. Each block is put together when it runs, forward and backward, and taken apart again.
    The embedding stays whole from forward to the end of backward, so that the lookup and the output
    projection can add to its gradient.

    Trap: after a forward, parameters() shows the whole embedding, in memory that FSDP frees later.
    Call `reshard` before you read weights. The optimizer holds the parts and is safe.
    """
    from torch.distributed.fsdp import fully_shard  # takes 2 seconds

    # Autocast would keep a bfloat16 copy of every weight that it has seen: of the whole model.
    torch.set_autocast_cache_enabled(False)
    shape = (size,) if size == COUNT else (COUNT // size, size)
    mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for module in (*model.model["layers"], model):  # the root comes last
        fully_shard(module, mesh=mesh)
        # Gradients are sums. Each module has to be told, and gloo has no other sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def reshard(model: nn.Module) -> None:
    """Take a model apart that a forward without a backward has left whole."""
    if is_sharded(model):
        model.reshard()


def is_part(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")  # a DTensor, whose import takes 2 seconds


def own(t: Tensor) -> Tensor:
    """The rows of t that this rank has: all, unless t is a part."""
    return t.to_local() if is_part(t) else t


def whole(t: Tensor) -> Tensor:
    """All rows of t. Where t is a part, all ranks have to call this."""
    return t.full_tensor() if is_part(t) else t


def first_row(t: Tensor) -> int:
    """The number of this rank's first row of t."""
    if not is_part(t) or t.dim() == 0:
        return 0
    mesh = t.device_mesh
    place, parts = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    return min(place * -(-len(t) // parts), len(t))


def first_entry(t: Tensor) -> int:
    return first_row(t) * math.prod(t.shape[1:])


def rows_here(rows: Any, like: Tensor) -> Any:
    """`rows` has all rows, as a tensor or as a slice of a file. Returns those that this rank has of
    `like`."""
    return rows[first_row(like) : first_row(like) + len(own(like))] if is_part(like) else rows


def as_part(mine: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as a part of a tensor that is shaped like `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
