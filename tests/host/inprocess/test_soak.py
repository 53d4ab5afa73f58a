"""Memory over runs that alternate hypernetworks, interrupts and unloads: benchmarks/soak.py, shortened."""

from __future__ import annotations

import pytest
import torch

SLACK_MIB = 0.01
"""Caches of small encodings may trade places."""


def test_nothing_is_left_of_runs_that_were_interrupted_unloaded_or_finished(comfy):
    from benchmarks.soak import soak

    early, late = soak(runs=30, measured=(10, 30), steps=2)
    assert (early.interrupted, late.interrupted) == (3, 10)
    assert late.loaded_models == early.loaded_models == 0
    assert late.tensors <= early.tensors
    assert late.tensor_mib <= early.tensor_mib + SLACK_MIB


def test_the_figures_see_what_stays(comfy):
    from benchmarks.soak import figures

    before = figures(1, 0)
    kept = torch.zeros(1 << 20)
    after = figures(2, 0)
    assert after.tensors == before.tensors + 1
    assert after.tensor_mib == pytest.approx(before.tensor_mib + 4)
    del kept
