"""Forwards are replaced for a while, and what was there before comes back."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook as OffloadHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from hyperalign.hosts.forwards import is_replaced, owners, replace_forward, restore_forward, watched

X = torch.ones(1, 2)


class Doubling:
    """Another object whose method replaces a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_replaced_forward_runs_and_the_class_s_own_comes_back() -> None:
    layer, other = nn.Identity(), Doubling()
    assert not is_replaced(layer)
    original = replace_forward(layer, other.forward)
    assert is_replaced(layer) and owners(layer) == [None, other]
    assert torch.equal(layer(X), 2 * X)
    restore_forward(layer, other.forward, original)
    assert not is_replaced(layer) and owners(layer) == [None, None]
    assert torch.equal(layer(X), X)


def test_a_forward_of_another_patch_comes_back_as_it_was() -> None:
    layer, other = nn.Identity(), Doubling()
    layer.forward = theirs = lambda x: x + 1
    original = replace_forward(layer, other.forward)
    assert original is theirs
    restore_forward(layer, other.forward, original)
    assert layer.__dict__["forward"] is theirs


def test_an_offloaded_forward_is_replaced_below_the_offload() -> None:
    """Accelerate keeps the wrapped forward in `_old_forward` and its own in `forward`."""
    layer, other = nn.Identity(), Doubling()
    old = layer.forward
    layer.__dict__["_old_forward"] = old
    layer.forward = hook = lambda x: layer.__dict__["_old_forward"](x) + 10
    original = replace_forward(layer, other.forward)
    assert original is old
    assert torch.equal(layer(X), 2 * X + 10)
    assert owners(layer)[0] is other
    restore_forward(layer, other.forward, original)
    assert layer.__dict__["_old_forward"] is old and layer.__dict__["forward"] is hook


def test_a_forward_that_offload_has_moved_is_found() -> None:
    layer, other = nn.Identity(), Doubling()
    original = replace_forward(layer, other.forward)
    layer.__dict__["_old_forward"] = layer.__dict__["forward"]
    layer.forward = hook = lambda x: layer.__dict__["_old_forward"](x)
    restore_forward(layer, other.forward, original)
    assert layer.__dict__["_old_forward"] == original and layer.__dict__["forward"] is hook


def test_a_later_patch_stays() -> None:
    layer, other = nn.Identity(), Doubling()
    original = replace_forward(layer, other.forward)
    layer.forward = later = lambda x: x - 1
    restore_forward(layer, other.forward, original)
    assert layer.__dict__["forward"] is later


@pytest.mark.parametrize("traced", [True, False])
def test_a_watch_receives_each_output_and_leaves_nothing(traced: bool) -> None:
    layer, seen = nn.Linear(2, 3), []
    before = dict(layer.__dict__)
    with watched(layer, seen.append, traced):
        output = layer(X)
        layer(2 * X)
    layer(X)
    assert len(seen) == 2 and torch.equal(seen[0], output)
    assert layer.__dict__ == before


@pytest.mark.parametrize("traced", [True, False])
def test_a_watch_ends_with_an_exception_of_the_one_who_watches(traced: bool) -> None:
    layer = nn.Linear(2, 3)

    def see(_: torch.Tensor) -> None:
        raise KeyError

    with pytest.raises(KeyError), watched(layer, see, traced):
        layer(X)
    assert "forward" not in layer.__dict__ and "hyperalign_watch" not in layer.__dict__


def test_a_compiled_block_is_watched_outside_its_graph() -> None:
    layer, seen = nn.Linear(2, 3), []
    layer.compile(backend="eager")
    compiled = layer.__dict__["_compiled_call_impl"]
    with watched(layer, seen.append):
        output = layer(X)
        assert "forward" not in layer.__dict__
    assert len(seen) == 1 and torch.equal(seen[0], output)
    assert layer.__dict__["_compiled_call_impl"] is compiled
    layer(X)
    assert len(seen) == 1


def test_a_traced_watch_breaks_no_graph() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    with watched(model[0], seen.append, traced=True), torch.no_grad():
        expected = model(X)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), expected)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


class Adding(ModelHook):
    """A hook of diffusers that calls the forward itself, as its caches do."""

    def new_forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.fn_ref.original_forward(x) + 10


@pytest.mark.parametrize(
    "hooks", [[ModelHook()], [Adding()], [ModelHook(), Adding()], [Adding(), ModelHook()]]
)
@pytest.mark.parametrize("hooks_first", [True, False])
def test_a_forward_below_diffusers_hooks_outlives_them(hooks: list[ModelHook], hooks_first: bool) -> None:
    layer, other = nn.Identity(), Doubling()
    registry = HookRegistry.check_if_exists_or_initialize(layer)

    def hook() -> None:
        for number, each in enumerate(hooks):
            registry.register_hook(each, str(number))

    if hooks_first:
        hook()
    original = replace_forward(layer, other.forward)
    if not hooks_first:
        hook()
    added = 10.0 * sum(isinstance(each, Adding) for each in hooks)
    assert torch.equal(layer(X), 2 * X + added) and other in owners(layer)
    for number in reversed(range(len(hooks))):
        registry.remove_hook(str(number))
    assert torch.equal(layer(X), 2 * X) and other in owners(layer)
    hook()
    restore_forward(layer, other.forward, original)
    assert torch.equal(layer(X), X + added) and other not in owners(layer)


@pytest.mark.parametrize("offload_first", [True, False])
def test_a_forward_is_replaced_below_offload_and_hooks(offload_first: bool) -> None:
    layer, other = nn.Identity(), Doubling()
    steps = [
        lambda: add_hook_to_module(layer, OffloadHook()),
        lambda: HookRegistry.check_if_exists_or_initialize(layer).register_hook(Adding(), "adding"),
    ]
    for step in steps if offload_first else reversed(steps):
        step()
    original = replace_forward(layer, other.forward)
    assert getattr(original, "__self__", None) is layer
    assert torch.equal(layer(X), 2 * X + 10)
    restore_forward(layer, other.forward, original)
    assert torch.equal(layer(X), X + 10) and other not in owners(layer)
