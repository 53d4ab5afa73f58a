"""`--set`: what a name means, what a value must be, and what the refusals say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.cli import main as commands
from hyperalign.cli.sample.convert import Graph, read
from hyperalign.cli.sample.settings import changes_of
from hyperalign.errors import HyperAlignError

TEXT = ["STRING", {"multiline": True}]
INFO: dict[str, Any] = {
    "Encode": {"input": {"required": {"text": TEXT, "clip": ["CLIP"]}}, "output": ["CONDITIONING"]},
    "EncodeTwice": {
        "input": {"required": {"clip_l": TEXT, "t5xxl": TEXT, "guidance": ["FLOAT", {}]}},
        "output": ["CONDITIONING"],
    },
    "Control": {
        "input": {"required": {"positive": ["CONDITIONING"], "negative": ["CONDITIONING"]}},
        "output": ["CONDITIONING", "CONDITIONING"],
    },
    "Guidance": {"input": {"required": {"conditioning": ["CONDITIONING"]}}, "output": ["CONDITIONING"]},
    "Guider": {"input": {"required": {"conditioning": ["CONDITIONING"]}}, "output": ["GUIDER"]},
    "Sampler": {
        "input": {
            "required": {
                "positive": ["CONDITIONING"],
                "negative": ["CONDITIONING"],
                "seed": ["INT", {"control_after_generate": True, "min": 0, "max": 1000}],
                "cfg": ["FLOAT", {"min": 0.0, "max": 100.0}],
                "sampler_name": [["euler", "heun", "dpmpp_2m"]],
                "tiled": ["BOOLEAN", {}],
            }
        },
        "output": ["LATENT"],
    },
    "Reward": {"input": {"required": {"prompt": TEXT}}, "output": []},
    "Words": {"input": {"required": {"value": TEXT}}, "output": ["STRING"]},
    "Join": {"input": {"required": {"a": TEXT, "b": TEXT}}, "output": ["STRING"]},
}
SAMPLING = {"seed": 7, "cfg": 4.0, "sampler_name": "euler", "tiled": False}


def graph(**nodes: Any) -> Graph:
    """A graph of nodes given as id=(type, inputs) or id=(type, inputs, title)."""
    prompt: dict[str, Any] = {
        name[1:]: {"class_type": kind, "inputs": inputs, "_meta": {"title": title[0] if title else kind}}
        for name, (kind, inputs, *title) in nodes.items()
    }
    return read(prompt, INFO)


def plain(**more: Any) -> Graph:
    return graph(
        n1=("Encode", {"text": "a cat"}, "Prompt"),
        n2=("Encode", {"text": "blurry"}, "Negative prompt"),
        n3=("Sampler", {"positive": ["1", 0], "negative": ["2", 0], **SAMPLING}, "Base"),
        **more,
    )


SECOND = ("Sampler", {"positive": ["1", 0], "negative": ["2", 0], **SAMPLING}, "Aligned")


def test_a_name_that_one_node_has_is_enough():
    assert changes_of(plain(), INFO, "seed=5") == {("3", "seed"): 5}
    assert changes_of(plain(), INFO, "cfg=1.5") == {("3", "cfg"): 1.5}
    assert changes_of(plain(), INFO, "tiled=yes") == {("3", "tiled"): True}
    assert changes_of(plain(), INFO, "sampler_name=heun") == {("3", "sampler_name"): "heun"}


def test_a_name_that_several_have_is_refused_with_the_ways_to_say_which():
    with pytest.raises(HyperAlignError) as caught:
        changes_of(plain(n4=SECOND), INFO, "seed=5")
    said = str(caught.value)
    assert "2 widgets: seed of 'Base' (#3) (now 7); seed of 'Aligned' (#4) (now 7)" in said
    assert "--set '#3.seed=5'" in said
    assert "--set '*.seed=5'" in said


@pytest.mark.parametrize("address", ["Aligned.seed", "aligned.seed", "#4.seed"])
def test_titles_and_ids_say_which(address):
    assert changes_of(plain(n4=SECOND), INFO, f"{address}=5") == {("4", "seed"): 5}


def test_a_star_means_all():
    assert changes_of(plain(n4=SECOND), INFO, "*.seed=5") == {("3", "seed"): 5, ("4", "seed"): 5}


def test_unknown_names_say_the_nearest():
    with pytest.raises(HyperAlignError, match="no widget 'sed'; the nearest are seed"):
        changes_of(plain(), INFO, "sed=5")
    with pytest.raises(HyperAlignError, match=r"no widget 'Bse\.seed'; the nearest are .*Base\.seed"):
        changes_of(plain(), INFO, "Bse.seed=5")
    with pytest.raises(HyperAlignError, match="'zzz'; it has cfg, sampler_name, seed, text, tiled"):
        changes_of(plain(), INFO, "zzz=5")
    with pytest.raises(HyperAlignError, match="expected NAME=VALUE"):
        changes_of(plain(), INFO, "seed")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed=many", "expected a whole number"),
        ("seed=1.5", "expected a whole number"),
        ("seed=1001", "from 0 to 1000"),
        ("cfg=nan", "from 0.0 to 100.0"),
        ("cfg=-1", "from 0.0 to 100.0"),
        ("tiled=maybe", "expected true or false"),
        ("sampler_name=eular", "expected one of euler"),
    ],
)
def test_values_that_do_not_fit_are_refused(setting, said):
    with pytest.raises(HyperAlignError, match=said):
        changes_of(plain(), INFO, setting)


def test_a_value_that_the_file_lacks_can_be_set_and_one_from_nowhere_cannot():
    content = graph(n1=("Encode", {"clip": ["9", 0]}), n2=("Guidance", {"conditioning": ["1", 0]}))
    assert changes_of(content, INFO, "text=x") == {("1", "text"): "x"}
    linked = graph(n1=("Encode", {"text": ["9", 0]}))
    with pytest.raises(HyperAlignError, match="comes over a link from 'no node' .#9."):
        changes_of(linked, INFO, "text=x")


@given(st.integers(-(10**6), 10**6))
def test_a_whole_number_is_taken_as_it_is_or_refused(number: int):
    try:
        assert changes_of(plain(), INFO, f"seed={number}") == {("3", "seed"): number}
    except HyperAlignError:
        assert not 0 <= number <= 1000


@given(st.text())
def test_any_text_is_a_prompt(text: str):
    assert changes_of(plain(), INFO, f"prompt={text}") == {("1", "text"): text}


def test_a_random_seed_is_in_range():
    seeds = {changes_of(plain(), INFO, "seed=random")["3", "seed"] for _ in range(20)}
    assert len(seeds) > 1
    assert all(0 <= seed <= 1000 for seed in seeds)
    with pytest.raises(HyperAlignError, match="expected a number"):
        changes_of(plain(), INFO, "cfg=random")


# --- prompts


def test_the_prompt_is_what_the_sampler_takes_as_positive():
    assert changes_of(plain(), INFO, "prompt=a dog") == {("1", "text"): "a dog"}
    assert changes_of(plain(), INFO, "negative=ugly") == {("2", "text"): "ugly"}
    swapped = plain()
    inputs = swapped.prompt["3"]["inputs"]
    inputs["positive"], inputs["negative"] = inputs["negative"], inputs["positive"]
    assert changes_of(swapped, INFO, "prompt=a dog") == {("2", "text"): "a dog"}


def test_the_prompt_is_found_through_what_hands_conditionings_on():
    found = graph(
        n1=("Encode", {"text": "a cat"}),
        n2=("Encode", {"text": "blurry"}),
        n5=("Guidance", {"conditioning": ["1", 0]}),
        n6=("Control", {"positive": ["5", 0], "negative": ["2", 0]}),
        n3=("Sampler", {"positive": ["6", 0], "negative": ["6", 1], **SAMPLING}),
    )
    assert set(changes_of(found, INFO, "prompt=x")) == {("1", "text")}
    assert set(changes_of(found, INFO, "negative=x")) == {("2", "text")}


def test_both_texts_of_a_flux_encoder_are_the_prompt():
    found = graph(
        n1=("EncodeTwice", {"clip_l": "cat", "t5xxl": "a cat", "guidance": 3.5}),
        n2=("Guider", {"conditioning": ["1", 0]}),
    )
    assert set(changes_of(found, INFO, "prompt=x")) == {("1", "clip_l"), ("1", "t5xxl")}
    with pytest.raises(HyperAlignError, match="no widget 'negative'"):
        changes_of(found, INFO, "negative=x")


def test_a_text_from_another_node_is_set_there():
    found = plain(n8=("Words", {"value": "a cat"}))
    found.prompt["1"]["inputs"]["text"] = ["8", 0]
    assert changes_of(found, INFO, "prompt=x") == {("8", "value"): "x"}
    assert changes_of(found, INFO, "Prompt.text=x") == {("8", "value"): "x"}
    joined = plain(n8=("Join", {"a": "a", "b": "cat"}))
    joined.prompt["1"]["inputs"]["text"] = ["8", 0]
    with pytest.raises(HyperAlignError, match=r"over a link from 'Join' \(#8\)"):
        changes_of(joined, INFO, "Prompt.text=x")
    with pytest.raises(HyperAlignError, match=r"over a link from 'Join' \(#8\)"):
        changes_of(joined, INFO, "prompt=x")


def test_string_nodes_and_pipes_are_followed_as_in_images():
    shown = {"input": {"required": {"text": ["STRING", {"forceInput": True}]}}, "output": ["STRING"]}
    pair = {"input": INFO["Control"]["input"], "output": ["BASIC_PIPE"]}
    kinds = {
        "ShowText|pysssss": shown,
        "ToBasicPipe": pair,
        "FromBasicPipe": {
            "input": {"required": {"basic_pipe": ["BASIC_PIPE"]}},
            "output": ["MODEL", "CLIP", "VAE", "CONDITIONING", "CONDITIONING"],
        },
    }
    found = plain(n8=("Words", {"value": "a cat"}))
    found.prompt["1"]["inputs"]["text"] = ["9", 0]
    found.prompt["9"] = {"class_type": "ShowText|pysssss", "inputs": {"text": ["8", 0]}}
    found.prompt["5"] = {"class_type": "ToBasicPipe", "inputs": {"positive": ["1", 0], "negative": ["2", 0]}}
    found.prompt["6"] = {"class_type": "FromBasicPipe", "inputs": {"basic_pipe": ["5", 0]}}
    found.prompt["3"]["inputs"] |= {"positive": ["6", 3], "negative": ["6", 4]}
    assert changes_of(found, INFO | kinds, "prompt=x") == {("8", "value"): "x"}
    assert changes_of(found, INFO | kinds, "negative=x") == {("2", "text"): "x"}


def test_a_conditioning_from_an_unknown_node_is_refused_by_its_name():
    found = plain()
    found.prompt["3"]["inputs"]["positive"] = ["8", 0]
    info = INFO | {"Blender": {"input": {"required": {"a": ["MODEL"]}}, "output": ["CONDITIONING"]}}
    found.prompt["8"] = {"class_type": "Blender", "inputs": {}}
    with pytest.raises(
        HyperAlignError, match=r"positive prompt is not known: it goes through Blender \(#8\)"
    ):
        changes_of(found, info, "prompt=x")


def test_rewards_that_judge_the_same_prompt_follow_it():
    found = plain(n8=("Reward", {"prompt": "a cat"}), n9=("Reward", {"prompt": "something else"}))
    assert set(changes_of(found, INFO, "prompt=x")) == {("1", "text"), ("8", "prompt")}


def test_the_negative_prompt_never_follows():
    found = plain()
    found.prompt["2"]["inputs"]["text"] = "a cat"
    assert set(changes_of(found, INFO, "prompt=x")) == {("1", "text")}


def test_a_negative_made_of_the_positive_prompt_cannot_be_set():
    found = graph(
        n1=("Encode", {"text": "a cat"}),
        n2=("Guidance", {"conditioning": ["1", 0]}, "Zero out"),
        n3=("Sampler", {"positive": ["1", 0], "negative": ["2", 0], **SAMPLING}),
    )
    assert set(changes_of(found, INFO, "prompt=x")) == {("1", "text")}
    with pytest.raises(HyperAlignError, match="no negative prompt of its own"):
        changes_of(found, INFO, "negative=x")


def test_prompts_that_differ_are_ambiguous():
    found = plain(
        n8=("Encode", {"text": "a dog"}, "Second"),
        n9=("Sampler", {"positive": ["8", 0], "negative": ["2", 0], **SAMPLING}),
    )
    with pytest.raises(HyperAlignError, match=r"could mean 2 widgets: text of 'Prompt' .*#8"):
        changes_of(found, INFO, "prompt=x")
    assert changes_of(found, INFO, "Second.text=x") == {("8", "text"): "x"}


def test_without_a_sampler_a_widget_called_prompt_is_the_prompt():
    assert changes_of(graph(n1=("Reward", {"prompt": "a"})), INFO, "prompt=x") == {("1", "prompt"): "x"}


# --- the command line


def test_without_arguments_the_commands_are_listed(capsys):
    assert commands.main([]) == 0
    said = capsys.readouterr().out
    for name in ("sample", "score", "geneval", "audit", "study", "card", "export"):
        assert name in said
    assert commands.main(["draw"]) == 2
    assert "expected one of sample, score" in capsys.readouterr().err
