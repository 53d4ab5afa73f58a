"""The cost of a part of a model: operations and bytes, counted by running it on the meta device.

Tensors have shapes there and no values, so a model of 12 billion parameters runs in a second.
Operations are those of the matrix products and convolutions that would run, bytes those of the tensors
that would be alive at once. The results are estimates: kernels use scratch memory, and allocators round.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

MATRIX = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices whose product measures a device's rate."""


def _attention_backward(grad: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Twice the forward pass: what flash attention recomputes within itself is not counted."""
    return 2 * sdpa_flop_count(q.shape, k.shape, v.shape)


OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _attention_backward,
}
"""Operations of each kernel that multiplies matrices or convolves; what the others do does not count."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one sample of the backbone's batch, or of one image."""

    forward: float
    """Floating-point operations; a multiplication and an addition are two."""
    backward: float
    """With what gradient checkpointing recomputes."""
    kept: int
    """Bytes alive between forward and backward pass."""
    peak: int
    """Most bytes alive at once, weights not counted."""

    def beside(self, other: Cost) -> Cost:
        """Returns the cost of two graphs over one image; each peaks while the other's tensors are kept."""
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.kept + other.kept,
            max(self.peak + other.kept, other.peak + self.kept),
        )


NOTHING = Cost(0.0, 0.0, 0, 0)


class Layout(NamedTuple):
    """What a tensor on the meta device is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Returns a tensor's layout. Raises TypeError if it has values."""
        if tensor.device.type != "meta":
            raise TypeError
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def tensor(self) -> Tensor:
        """Returns a new tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class MetaKernels:
    """Runs a kernel on the meta device once for the same arguments: most take a millisecond of Python."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Layout | tuple[Layout, ...]] = {}

    def run(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns a kernel's result, or new tensors of the same layouts where they are known."""
        try:
            key = kernel, _key(args), _key(tuple(kwargs.items()))
            known = self._results.get(key)
        except TypeError:  # the arguments do not decide the layout, or cannot be compared
            return kernel(*args, **kwargs)
        if isinstance(known, Layout):
            return known.tensor()
        if known is not None:
            return tuple(layout.tensor() for layout in known)
        result = kernel(*args, **kwargs)
        storages = [id(storage) for storage in _storages((result, *args, *kwargs.values()))]
        new = [id(storage) for storage in _storages(result)]
        if not kernel._schema.is_mutable and all(storages.count(number) == 1 for number in new):
            self._remember(key, result)
        return result

    def _remember(self, key: Hashable, result: Any) -> None:
        with contextlib.suppress(TypeError, AttributeError):  # something that is no tensor on the meta device
            self._results[key] = (
                tuple(map(Layout.of, result)) if isinstance(result, tuple) else Layout.of(result)
            )


def _key(value: Any) -> Hashable:
    """Returns what decides the layout of a kernel's result. Raises TypeError where more may."""
    if isinstance(value, (tuple, list)):
        return tuple(_key(item) for item in cast("Sequence[Any]", value))
    if not isinstance(value, Tensor):
        return type(value), value  # 1, 1.0 and True are equal, and not the same argument
    if value.dim() == 0:  # scalars promote types in their own way
        raise TypeError
    return Layout.of(value)


class Tally(TorchDispatchMode):
    """Counts the operations inside it, and the bytes of its tensors that are alive at once.

    torch's FlopCounterMode knows which module it is in, for which it keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernels = MetaKernels()
        self.operations = 0.0
        """Floating-point operations; a multiplication and an addition are two."""
        self.bytes = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs and counts one kernel."""
        given = kwargs or {}
        result = self._kernels.run(func, args, given)
        if (count := OPERATIONS.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **given, out_val=result)
        # What a kernel returns in the memory of its arguments is not new.
        given_memory = {id(storage) for storage in _storages((*args, *given.values()))}
        for storage in _storages(result):
            if id(storage) not in given_memory and id(storage) not in self._alive:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        self._alive.add(id(storage))
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, number: int, count: int) -> None:
        self._alive.discard(number)
        self.bytes -= count


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, (tuple, list)):
        for item in cast("Sequence[Any]", value):
            yield from _storages(item)


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Replaces attention inside the block by one that keeps no matrix of all pairs of tokens.

    That one runs on a GPU, and not on the meta device. (A TorchFunctionMode is not heard inside backward
    passes, where checkpointed blocks run again.)
    """
    attention: Any = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if attn_mask is not None:
            return attention(query, key, value, attn_mask, *args, **kwargs)
        kwargs.pop("enable_gqa", None)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, *args, **kwargs)[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def cost_of(forward: Callable[[], Tensor]) -> Cost:
    """Returns what a function on meta tensors costs, and its backward pass where it has a gradient."""
    with flash_attention(), Tally() as tally:
        output = forward()
        there, kept = tally.operations, tally.bytes
        if output.requires_grad:
            output.float().mean().backward()
        return Cost(there, tally.operations - there, kept, tally.peak)


class _Reached(Exception):
    """Ends a forward at a module."""


def operations_until(module: nn.Module, forward: Callable[[], object]) -> float:
    """Returns the operations of a forward on meta tensors up to the end of one of its modules."""

    def stop(*_: object) -> None:
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        with torch.no_grad(), Tally() as tally, contextlib.suppress(_Reached):
            forward()
    finally:
        handle.remove()
    return tally.operations


def matrix_rate(
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the floating-point operations a second of a large matrix product, the median of some runs."""
    side = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    inner = 10 if device.type == "cuda" else 1

    def seconds() -> float:
        _wait(device)
        start = clock()
        for _ in range(inner):
            torch.mm(a, b)
        _wait(device)
        return clock() - start

    seconds()
    return inner * 2 * side**3 / statistics.median(seconds() for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
