"""What runs in another way on an NVIDIA GPU, because there every kernel has to be launched. Torch
only.

A kernel's launch takes the host 5 to 10 microseconds. A step of hundreds of small kernels waits for
the host and leaves the GPU idle. So here rows attend together, AdamW is one kernel a tensor, and a
decoding step is recorded once and replayed. Each function computes what the plain form next to it
in the heart computes, up to rounding, and tests hold it to that.
"""

import functools
import math
import os
import shutil
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def prepare(device: str | torch.device) -> None:
    """Settings of the process. Called before the first tensor goes to a GPU."""
    if torch.device(device).type != "cuda":
        return
    # Lengths change at every step. With segments of a fixed size a fifth of the memory and more is
    # lost to gaps.
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # cuDNN's attention is PyTorch's first choice on an H100. Its gradients at a head_dim of 256 are
    # reported as wrong, and it plans anew for every shape, which takes up to a second.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.device(device).index is not None:  # streams and graphs go to the current device
        torch.cuda.set_device(device)


# ------------------------------------------------------------------------------ AdamW in one kernel

WORTH_COMPILING = 2**22  # entries; the embedded model has fewer, LoRA on gemma-2b has more


def update_all(
    pieces: list, update: Callable, dither: Callable, chunk: int, shrink: Tensor | None, step: int,
    numbers: tuple,
) -> None:  # fmt: skip
    """As cpu.update_all, but `update` is compiled into one kernel. Tensors of equal size, up to
    `chunk` entries, share a launch."""
    if shrink is None:
        shrink = torch.ones((), device=pieces[0][2][0].device)
    # A number that changes from step to step would be compiled into the kernel, unless it is a
    # tensor.
    betas, eps, *changing = numbers
    numbers = betas, eps, *map(torch.tensor, changing)
    groups = defaultdict(list)
    for i, (keep, first, tensors) in enumerate(pieces):
        entries, count = tensors[0].shape[1], tensors[0].numel()
        alone = i if count > chunk or first else None
        groups[count, entries, len(tensors), keep, first, alone].append(tensors)
    for (count, entries, parts, keep, first, alone), members in groups.items():
        period = count if alone is None else chunk // entries * entries
        scalars = map(torch.tensor, (first, period, step, keep))
        joined = members[0]
        if len(members) > 1:
            joined = [torch.cat(same) for same in zip(*members)]
        _compiled(update, dither)([*map(_for_compiler, joined)], *scalars, shrink, numbers)
        if len(members) > 1:  # all but the gradient have changed
            for k in {*range(parts)} - {1}:
                torch._foreach_copy_([m[k] for m in members], joined[k].split(len(members[0][k])))


def _for_compiler(t: Tensor) -> Tensor:
    """The same matrix, for a kernel that serves any number of rows of this width."""
    # Not t itself, which is a view: the compiler distinguishes views by what they were made from.
    t = torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )
    torch._dynamo.maybe_mark_dynamic(t, 0)
    torch._dynamo.mark_static(t, 1)
    return t


@functools.cache
def _compiled(update: Callable, dither: Callable) -> Callable:
    """`update` as one kernel for (blocks, entries), with its dither computed on the way."""

    def kernel(tensors: list[Tensor], first, period, step, keep, shrink, numbers) -> None:
        weight, grad, *rest = tensors
        # The plain form counts entries from 0 in every chunk.
        place = torch.arange(weight.numel(), device=weight.device).view_as(weight)
        place = (place + first) % period
        offset = dither(place, step)
        update(weight, grad * shrink, *rest, offset=offset, keep=keep, numbers=numbers)

    return torch.compile(kernel)


def compiles(pieces: list) -> bool:
    """Whether to use update_all: on a GPU, where the compiler works, and with enough entries to
    repay ten seconds of compiling."""
    if not pieces or not pieces[0][2][0].is_cuda:
        return False
    return sum(tensors[0].numel() for *_, tensors in pieces) >= WORTH_COMPILING and has_compiler()


@functools.cache
def has_compiler() -> bool:
    """Whether PyTorch's compiler has what it needs: Triton and, for its launchers, a C compiler and
    the headers of Python."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    headers = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    import torch._dynamo  # takes seconds
    from torch.utils._triton import has_triton

    if compiler and headers and has_triton():
        # Every model has its own block sizes, and each makes a kernel. The usual limit is 8.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        return True
    missing = "Triton" if headers else "Python.h (of python3-dev)"
    missing = missing if compiler else "C compiler"
    print(f"note: there is no {missing} here, so AdamW is not compiled and takes longer")
    return False


# -------------------------------------------------------------------------- rows attend together


def attend_rows(attend: Callable, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *how):
    """transformer.attend_rows in one launch and not one a row. The rows come end to end, q (1, H,
    sum of lengths, N). For `attend`, which is transformer.attend_causally, they lie side by side,
    padded on the right, where the causal mask hides the padding."""
    place = _places(tuple(lengths), q.device)
    B, T = len(lengths), max(lengths)

    def side_by_side(x: Tensor) -> Tensor:  # (1, H, sum of lengths, N) -> (B, H, T, N)
        x = x[0].transpose(0, 1)  # (sum of lengths, H, N)
        padded = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, place, x)
        return padded.view(B, T, *x.shape[1:]).transpose(1, 2)

    rows = side_by_side(q), side_by_side(k), side_by_side(v)
    out = attend(*rows, *how)  # (B, H, T, N)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place).transpose(0, 1)[None]


@functools.lru_cache(maxsize=2)  # all layers of a micro-batch ask for the same
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the tokens of rows that lie end to end go in a padded (B * T): (sum of lengths,)."""
    T = max(lengths)
    places = torch.cat([torch.arange(n) + row * T for row, n in enumerate(lengths)])
    return places.to(device, non_blocking=True)


# ---------------------------------------------------------------------------- decoding, recorded

SLOTS = 128  # the cache's slots that attention reads are rounded up to these, so shapes repeat


def slots_read(filled: int, slots: int, device: torch.device) -> int:
    """How many of a cache's slots attention reads where `filled` have been written. On a GPU the
    number is rounded up to a multiple of SLOTS, so that one recording serves many lengths."""
    multiple = SLOTS if device.type == "cuda" else 1
    return min(math.ceil(filled / multiple) * multiple, slots)


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as attention's kernels want it: 0 where a query may look, -inf elsewhere. They would
    make it themselves, anew in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


@contextmanager
def recorded(model, packed) -> Iterator[tuple[Callable, Callable]]:
    """For the time of a generation: `with recorded(model, packed) as (choose, run)`, where `packed`
    is cpu.packed(model, choose).

    run(step, rows, used, uniform) calls step(used, uniform), which decodes one token for each row.
    On a GPU the kernels of a step are recorded as a CUDA graph and replayed with one launch. So a
    step must work in place, on tensors that stay where they are, and never look at a number.
    """
    if not _records(model.device.type):
        with packed as choose:
            yield choose, lambda step, rows, used, uniform: step(used, uniform)
        return
    norms = [m for m in model.modules() if type(m).__name__ == "RMSNorm" and m.is_gemma]
    try:
        for norm in norms:  # transformer.py's: 1 + weight once, and not at every token
            gain = 1.0 + norm.weight.detach().float()
            norm.forward = functools.partial(_scaled, gain=gain, eps=norm.eps)
        yield choose_in_two_levels, Recorder()
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _records(kind: str) -> bool:
    return kind == "cuda"


def _scaled(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), gain.shape, gain, eps).to(x.dtype)


class Recorder:
    """Runs a step plainly when its shapes are new, records it the second time, then replays it."""

    # The first run also allocates what a recording must not contain: workspaces of libraries, and
    # autocast's copies of weights.

    def __init__(self):
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.seen: set[tuple] = set()
        self.uniform: Tensor | None = None  # a step's random numbers, always in the same place
        self.side, self.pool = torch.cuda.Stream(), None

    def __call__(self, step: Callable, rows: int, used: list[int], uniform: Tensor | None) -> None:
        if uniform is not None:
            if self.uniform is None:  # a batch only becomes smaller
                self.uniform = torch.empty_like(uniform, dtype=torch.float64)
            uniform = self.uniform[:rows].copy_(uniform)
        shapes = rows, *used
        if shapes not in self.seen:
            self.seen.add(shapes)
            step(used, uniform)
            return
        if shapes not in self.graphs:
            self.graphs[shapes] = self._record(step, used, uniform)
        self.graphs[shapes].replay()

    def _record(self, step: Callable, used: list[int], uniform: Tensor | None):
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.side.wait_stream(main)
        # Not torch.cuda.graph(), which collects garbage and empties the cache every time.
        with torch.cuda.stream(self.side):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            step(used, uniform)
            graph.capture_end()
        main.wait_stream(self.side)
        self.pool = graph.pool()  # one graph runs at a time, so all may share their memory
        return graph


def choose_in_two_levels(model, hidden: Tensor, temperature: float, uniform: Tensor | None):
    """generate.choose, with cumulative sums over blocks of the vocabulary and then over the entries
    of one block. A sum over the whole vocabulary in float64 moves three times as many bytes."""
    logits = model.logits(hidden)  # (b, V)
    if uniform is None:
        return logits.argmax(-1)
    p = (logits.float() / temperature if temperature != 1 else logits).softmax(-1, torch.float32)
    width = 2 ** round(math.log2(p.shape[-1]) / 2)  # 512 for 256,000
    p = F.pad(p, (0, -p.shape[-1] % width)).unflatten(-1, (-1, width))  # (b, blocks, width)
    sums = p.sum(-1, dtype=torch.float64).cumsum(-1)  # (b, blocks)
    wanted = uniform.to(sums)[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[-1] - 1)  # (b, 1)
    before = F.pad(sums, (1, 0)).gather(-1, block)
    inside = p.gather(1, block[:, :, None].expand(-1, -1, width))[:, 0].double().cumsum(-1)
    token = torch.searchsorted(inside, wanted - before, right=True)
    return (block * width + token)[:, 0].clamp(max=logits.shape[-1] - 1)
