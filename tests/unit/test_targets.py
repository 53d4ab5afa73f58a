"""Layers' names in LoRA files."""

from __future__ import annotations

import pytest

from hyperalign.targets import LoraNames, Place, Target


def test_a_layer_s_keys_are_those_of_kohya_s_trainer_by_default() -> None:
    layer = "lora_unet_mid_block_attentions_0_to_q"
    assert LoraNames("lora_unet_").keys("mid_block.attentions.0.to_q") == (
        f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"
    )  # fmt: skip


def test_a_family_may_name_them_otherwise_and_without_an_alpha() -> None:
    names = LoraNames("model.", dot=".", down="lora_A", up="lora_B", has_alpha=False)
    assert names.keys("block.0.to_q") == (
        "model.block.0.to_q.lora_A.weight", "model.block.0.to_q.lora_B.weight", None
    )  # fmt: skip


def test_what_says_where_a_layer_lies_stays_as_it_is() -> None:
    for fixed, name in ((Place("a"), "path"), (LoraNames("a"), "prefix"), (Target("a", 1, 2), "name")):
        with pytest.raises(AttributeError):
            setattr(fixed, name, "b")
    assert (Place("a"), Target("a", 1, 2)) == (Place("a", None), Target("a", 1, 2))
