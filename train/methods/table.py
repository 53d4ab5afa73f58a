"""The training methods by their names in recipes."""

from __future__ import annotations

from collections.abc import Mapping

from train.methods.alignprop import alignprop
from train.methods.dance_grpo import dance_grpo
from train.methods.dpo import dpo
from train.methods.hyperalign import hyperalign
from train.methods.kto import kto
from train.methods.mix_grpo import mix_grpo
from train.methods.settings import MethodName
from train.methods.spo import spo
from train.methods.srpo import srpo
from train.methods.step import Method

METHODS: Mapping[MethodName, Method] = {
    "hyperalign": hyperalign,
    "alignprop": alignprop,
    "dpo": dpo,
    "kto": kto,
    "dance_grpo": dance_grpo,
    "mix_grpo": mix_grpo,
    "srpo": srpo,
    "spo": spo,
}
