"""The positive prompt of a ComfyUI graph: exactly that text or a reason, never the negative one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.cli.common.graphs.graph import Output
from hyperalign.cli.common.graphs.prompt import positive_prompt

Graph = dict[str, dict[str, Any]]
POSITIVE, NEGATIVE = "a fox in snow", "blurry, ugly"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def encoder(text: Any) -> dict[str, Any]:
    return node("CLIPTextEncode", text=text, clip=["1", 1])


def sampled(**more: dict[str, Any]) -> Graph:
    """A usual graph: nodes 2 and 3 encode, 4 samples, 5 decodes, 6 saves; `n7` is node 7."""
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="x.safetensors"),
        "2": encoder(POSITIVE),
        "3": encoder(NEGATIVE),
        "4": node("KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["9", 0]),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="x"),
        "9": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }
    return graph | {key[1:]: value for key, value in more.items()}


def ksampler(positive: list[Any], negative: list[Any]) -> dict[str, Any]:
    return node("KSampler", positive=positive, negative=negative)


def both(kind: str) -> dict[str, Any]:
    """A node that takes the usual graph's conditioning."""
    return node(kind, positive=["2", 0], negative=["3", 0])


FLUX = {
    "1": node("CLIPTextEncodeFlux", clip_l="", t5xxl="a harbour at dawn", guidance=3.5),
    "2": node("FluxGuidance", conditioning=["1", 0], guidance=3.5),
    "3": node("BasicGuider", model=["9", 0], conditioning=["2", 0]),
}
PAIR = node("ControlNetApplyAdvanced", positive=["2", 0], negative=["3", 0], image=["7", 0])


def from_strings(**strings: dict[str, Any]) -> Graph:
    """The usual graph, with the positive text from node 10."""
    return sampled(n2=encoder(["10", 0]), **strings)


@pytest.mark.parametrize(
    "graph",
    [
        sampled(),
        from_strings(
            n10=node("StringConcatenate", string_a="a fox", string_b=["11", 0], delimiter=" "),
            n11=node("PrimitiveString", value="in snow"),
        ),
        from_strings(
            n10=node("StringReplace", string="a cat in snow", find="cat", replace=["11", 0]),
            n11=node("PrimitiveStringMultiline", value="fox"),
        ),
        from_strings(
            n10=node("ShowText|pysssss", text=["11", 0], text_0="what an earlier run showed"),
            n11=node("StringTrim", string=f"\n {POSITIVE} ", mode="Both"),
        ),
        from_strings(
            n10=node(
                "StringFunction|pysssss", action="append", tidy_tags="no", text_a="a fox ", text_b="in snow"
            )
        ),
        from_strings(
            n10=node(
                "Text Concatenate", delimiter=" ", clean_whitespace="true", text_b="in snow ", text_a="a fox"
            )
        ),
        from_strings(
            n10=node(
                "JoinStringMulti",
                inputcount=2,
                delimiter=" ",
                return_list=False,
                string_1="a fox",
                string_2="in snow",
            )
        ),
        from_strings(n10=node("CR Text Concatenate", text1="a fox", text2=" in snow")),
        from_strings(n10=node("CaseConverter", string=POSITIVE.upper(), mode="lowercase")),
        from_strings(n10=node("StringSubstring", string=f"{POSITIVE}!!", start=0, end=len(POSITIVE))),
        from_strings(
            n10=node("ImpactWildcardProcessor", wildcard_text="a {fox|cat}", populated_text=POSITIVE)
        ),
    ],
    ids=lambda graph: graph.get("10", graph["2"])["class_type"],
)
def test_the_text_is_followed_through_string_nodes(graph: Graph) -> None:
    """The folder scorer used to answer with the negative prompt."""
    assert positive_prompt(graph).text == POSITIVE


SAMPLER = ksampler(["7", 0], ["7", 1])
PIPE = both("ToBasicPipe")


@pytest.mark.parametrize(
    "graph",
    [
        sampled(n7=PAIR, n4=SAMPLER),
        sampled(n7=PIPE, n8=node("FromBasicPipe", basic_pipe=["7", 0]), n4=ksampler(["8", 3], ["8", 4])),
        sampled(
            n7=PIPE,
            n4=node("ImpactKSamplerBasicPipe", basic_pipe=["7", 0]),
            n5=node("VAEDecode", samples=["4", 1]),
        ),
        sampled(
            n7=PIPE,
            n8=node("EditBasicPipe", basic_pipe=["7", 0], negative=["2", 0]),
            n4=node("ImpactKSamplerBasicPipe", basic_pipe=["8", 0]),
        ),
        sampled(
            n7=both("Context (rgthree)"),
            n8=node("Context (rgthree)", base_ctx=["7", 0]),
            n4=ksampler(["8", 4], ["8", 5]),
        ),
        sampled(
            n7=both("Context (rgthree)"),
            n8=node("Context Switch (rgthree)", ctx_02=["7", 0]),
            n4=ksampler(["8", 4], ["8", 5]),
        ),
        sampled(
            n7=node("Any Switch (rgthree)", any_02=["2", 0], any_03=["3", 0]), n4=ksampler(["7", 0], ["3", 0])
        ),
        sampled(
            n7=node("Efficient Loader", positive=POSITIVE, negative=NEGATIVE),
            n4=node("KSampler (Efficient)", positive=["7", 1], negative=["7", 2]),
        ),
        sampled(
            n7=node("Efficient Loader", positive=["10", 0], negative=NEGATIVE),
            n10=node("easy positive", positive=POSITIVE),
            n4=node("KSampler (Efficient)", positive=["7", 1], negative=["7", 2]),
        ),
        sampled(
            n7=node("easy a1111Loader", positive=POSITIVE, negative=NEGATIVE),
            n8=node("easy preSampling", pipe=["7", 0]),
            n4=node("easy kSampler", pipe=["8", 0]),
        ),
        sampled(
            n7=node("easy pipeIn", pos=["2", 0], neg=["3", 0]),
            n8=node("easy pipeOut", pipe=["7", 0]),
            n4=ksampler(["8", 2], ["8", 3]),
        ),
        sampled(
            n7=node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["8", 0]),
            n8=node("ConditioningSetArea", conditioning=["2", 0]),
            n4=ksampler(["7", 0], ["3", 0]),
        ),
        sampled(n7=both("CFGGuider"), n4=node("SamplerCustomAdvanced", guider=["7", 0])),
        sampled(n7=node("ConditioningZeroOut", conditioning=["2", 0]), n4=ksampler(["2", 0], ["7", 0])),
        sampled(n4=ksampler(["2", 0], ["2", 0])),
        sampled(n7=encoder("what nobody samples")),
        sampled(n7=ksampler(["2", 0], ["3", 0])),
        {"1": encoder(POSITIVE)},
        sampled(n2=node("CLIPTextEncodeSDXL", text_g=POSITIVE, text_l=POSITIVE)),
    ],
)
def test_the_conditioning_is_followed_to_its_text(graph: Graph) -> None:
    assert positive_prompt(graph).text == POSITIVE


def test_the_text_of_flux_is_that_of_its_guider() -> None:
    assert positive_prompt(FLUX).text == "a harbour at dawn"


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (
            from_strings(n10=node("OllamaGenerate", prompt="write")),
            r"OllamaGenerate \(#10\), and what that node makes",
        ),
        (
            from_strings(n10=node("easy showAnything", anything=["11", 0]), n11=node("LoadText", path="x")),
            r"LoadText \(#11\)",
        ),
        (from_strings(n10=node("Text Multiline", text="a # b")), r"Text Multiline \(#10\).*'#'"),
        (
            from_strings(n10=node("StringTrim", string=["10", 0], mode="Both")),
            r"StringTrim \(#10\) form a cycle",
        ),
        (
            from_strings(n10=node("JoinStringMulti", inputcount=2, return_list=True)),
            "makes a list of prompts",
        ),
        (sampled(n2=encoder(["77", 0])), r"takes text from #77, which is missing"),
        (
            sampled(n2=encoder(["11", 0]), n11=node("StringSubstring", string="x", start=["3", 0], end=1)),
            "not hold its start",
        ),
        (sampled(n7=both("Styler"), n4=SAMPLER), r"Styler \(#7\), and which of its"),
        (
            sampled(n7=node("Context (rgthree)", positive=["2", 0]), n4=node("KSampler", positive=["7", 17])),
            "which of its outputs",
        ),
        (sampled(n7=node("Loader", positive=POSITIVE, negative=NEGATIVE), n4=SAMPLER), r"Loader \(#7\)"),
        (sampled(n7=node("ConditioningZeroOut", conditioning=["2", 0]), n4=SAMPLER), "erases the text"),
        (
            sampled(
                n7=node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["8", 0]),
                n8=encoder("right"),
                n4=ksampler(["7", 0], ["3", 0]),
            ),
            r"could be the text in text of CLIPTextEncode \(#2\) and text of CLIPTextEncode \(#8\)",
        ),
        (
            sampled(
                n7=encoder("a dog"),
                n8=ksampler(["7", 0], ["3", 0]),
                n10=node("VAEDecode", samples=["8", 0]),
                n11=node("SaveImage", images=["10", 0]),
            ),
            r"#2\) and text of CLIPTextEncode \(#7\)",
        ),
        (sampled(n2=node("CLIPTextEncodeFlux", clip_l="fox", t5xxl=POSITIVE)), "t5xxl of .* and clip_l of"),
        (sampled(n7=ksampler(["3", 0], ["2", 0])), r"also the negative prompt of KSampler \(#4\)"),
        (
            sampled(
                n7=node("easy a1111Loader", positive="a {fox|cat}", negative=""),
                n4=node("easy kSampler", pipe=["7", 0]),
            ),
            r"easy a1111Loader \(#7\) replaces the '\{'",
        ),
        (sampled(n4=node("MySampler", pos=["2", 0], neg=["3", 0])), "no node of its graph samples"),
        ({"1": node("ConditioningSetMask", conditioning=["1", 0])}, "no node of its graph samples"),
        (sampled(n2=node("ConditioningSetMask", conditioning=["2", 0])), "form a cycle"),
        ({"1": {"class_type": "no inputs"}}, "no node of its graph samples"),
        ({}, "no node of its graph samples"),
    ],
)
def test_where_there_is_not_one_text_the_node_is_named(graph: Graph, said: str) -> None:
    found = positive_prompt(graph)
    assert found.text is None
    assert re.search(said, found.why), found.why


def test_declared_outputs_say_which_one_is_positive() -> None:
    graph = sampled(n7=both("Styler"), n4=SAMPLER)
    for names, text in (
        (("positive", "negative"), POSITIVE),
        (("negative", "positive"), None),
        (("", ""), POSITIVE),
    ):
        outputs = {"7": [Output("CONDITIONING", name) for name in names]}
        assert positive_prompt(graph, outputs).text == text


def test_a_text_that_doubles_and_a_long_chain_end() -> None:
    doubling = {
        str(at): node("StringConcatenate", string_a=[str(at + 1), 0], string_b=[str(at + 1), 0], delimiter="")
        for at in range(100, 200)
    }
    graph = sampled(n2=encoder(["100", 0])) | doubling
    assert (
        "more than 100000 letters"
        in positive_prompt(graph | {"200": node("PrimitiveString", value="ab")}).why
    )
    assert positive_prompt(graph | {"200": node("PrimitiveString", value="")}).text == ""
    combined = {
        str(at): node("ConditioningCombine", conditioning_1=[str(at + 1), 0], conditioning_2=[str(at + 1), 0])
        for at in range(100, 150)
    }
    graph = sampled(n4=ksampler(["100", 0], ["3", 0])) | combined
    assert positive_prompt(graph | {"150": encoder(POSITIVE)}).text == POSITIVE
    chain = {str(at): node("ConditioningSetMask", conditioning=[str(at + 1), 0]) for at in range(100, 4000)}
    graph = sampled(n4=ksampler(["100", 0], ["3", 0])) | chain
    assert "too many nodes in a row" in positive_prompt(graph | {"4000": encoder(POSITIVE)}).why


# --- The property: a graph whose two texts differ never yields the negative one as positive.

Link = list[Any]
Step = Callable[[Graph, str, Link], Link]


def _string(kind: str, name: str, **more: Any) -> Step:
    def add(graph: Graph, key: str, link: Link) -> Link:
        graph[key] = node(kind, **{name: link}, **more)
        return [key, 0]

    return add


STRINGS = [
    _string("ShowText|pysssss", "text"),
    _string("StringTrim", "string", mode="Both"),
    _string("StringConcatenate", "string_a", string_b="", delimiter=""),
    _string("StringReplace", "string", find="\0", replace=""),
    _string("UnknownText", "text"),
    _string("UnknownText", "string", prompt=NEGATIVE),
    _string("Text Multiline", "text"),
]
CONDITIONINGS = [
    _string("FluxGuidance", "conditioning"),
    _string("ConditioningSetArea", "conditioning"),
    _string("UnknownConditioning", "conditioning"),
    _string("UnknownConditioning", "input"),
    _string("Any Switch (rgthree)", "any_01"),
    _string("ConditioningZeroOut", "conditioning"),
    _string("HunyuanImageToVideo", "positive"),
    _string("GLIGENTextBoxApply", "conditioning_to", text="a box"),
]


class Builder:
    """Builds a graph in which it is known which text is the positive one."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.graph, self.free = draw, {}, iter(map(str, range(1, 1000)))
        self.outputs: dict[str, list[Output]] = {}

    def add(self, kind: str, **inputs: Any) -> str:
        key = next(self.free)
        self.graph[key] = node(kind, **inputs)
        return key

    def through(self, steps: list[Step], link: Link) -> Link:
        for step in self.draw(st.lists(st.sampled_from(steps), max_size=3)):
            link = step(self.graph, next(self.free), link)
        return link

    def encoded(self, text: str) -> Link:
        link = self.through(STRINGS, [self.add("PrimitiveString", value=text), 0])
        given = self.draw(st.sampled_from([text, link]))
        return self.through(CONDITIONINGS, [self.add("CLIPTextEncode", text=given), 0])

    def pair(self, positive: Link, negative: Link) -> tuple[Link, Link]:
        kinds = ["none", "core", "context", "pipe", "unknown", "named", "renamed"]
        kind = self.draw(st.sampled_from(kinds))
        sides = {"positive": positive, "negative": negative}
        if kind == "core":
            key = self.add("ControlNetApplyAdvanced", **sides)
            return [key, 0], [key, 1]
        if kind == "context":
            key = self.add("Context (rgthree)", base_ctx=[self.add("Context (rgthree)", **sides), 0])
            return [key, 4], [key, 5]
        if kind == "pipe":
            key = self.add("FromBasicPipe", basic_pipe=[self.add("ToBasicPipe", **sides), 0])
            return [key, 3], [key, 4]
        if kind in ("unknown", "named", "renamed"):
            key = self.add("UnknownPair", **sides)
            slots = self.draw(st.permutations([0, 1, 2]))
            if kind == "named":
                names = {slots[0]: "positive", slots[1]: "negative", slots[2]: "latent"}
                kinds_of = {slots[2]: "LATENT"}
                self.outputs[key] = [Output(kinds_of.get(at, "CONDITIONING"), names[at]) for at in range(3)]
            return [key, slots[0]], [key, slots[1]]
        return positive, negative

    def sampler(self, positive: Link, negative: Link, latent: Link | None) -> Link:
        inputs: dict[str, Any] = {} if latent is None else {"latent_image": latent}
        kind = self.draw(st.sampled_from(["KSampler", "UnknownSampler", "guider", "pipe"]))
        if kind == "guider":
            guider = self.add("CFGGuider", positive=positive, negative=negative)
            return [self.add("SamplerCustomAdvanced", guider=[guider, 0], **inputs), 0]
        if kind == "pipe":
            pipe = self.add("ToBasicPipe", positive=positive, negative=negative)
            return [self.add("ImpactKSamplerBasicPipe", basic_pipe=[pipe, 0], **inputs), 1]
        return [self.add(kind, positive=positive, negative=negative, **inputs), 0]


@st.composite
def known_graphs(draw: st.DrawFn) -> tuple[Graph, dict[str, list[Output]]]:
    build = Builder(draw)
    latent: Link | None = None
    for _ in range(draw(st.integers(1, 2))):
        positive, negative = build.encoded(POSITIVE), build.encoded(NEGATIVE)
        for _ in range(draw(st.integers(0, 2))):
            positive, negative = build.pair(positive, negative)
        latent = build.sampler(positive, negative, latent)
    if draw(st.booleans()):
        build.add("SaveImage", images=[build.add("VAEDecode", samples=latent), 0])
    for text in draw(st.lists(st.sampled_from([NEGATIVE, "else"]), max_size=2)):  # linked to nothing
        build.encoded(text)
    keys = draw(st.permutations(list(build.graph)))
    return {key: build.graph[key] for key in keys}, build.outputs


@given(known_graphs())
def test_the_negative_text_is_never_the_positive_prompt(
    drawn: tuple[Graph, dict[str, list[Output]]],
) -> None:
    found = positive_prompt(*drawn)
    assert found.text in (POSITIVE, None), drawn
    assert found.text or found.why


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=3)
    | st.tuples(st.sampled_from(["1", "2", "3", 1, None]), st.integers(-1, 5)).map(list),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KINDS = st.sampled_from(
    [
        "KSampler",
        "CLIPTextEncode",
        "StringConcatenate",
        "StringTrim",
        "JoinStringMulti",
        "FromBasicPipe",
        "ToBasicPipe",
        "Any Switch (rgthree)",
        "Context (rgthree)",
        "Text Concatenate",
        "StringSubstring",
        "BasicGuider",
        "easy kSampler",
        "x",
        3,
    ]
)
NAMES = st.sampled_from(
    [
        "positive",
        "negative",
        "text",
        "string",
        "string_a",
        "string_1",
        "conditioning",
        "basic_pipe",
        "pipe",
        "any_01",
        "mode",
        "base_ctx",
        "inputcount",
        "delimiter",
        "start",
        "end",
        "return_list",
    ]
)
NODES = st.fixed_dictionaries({"class_type": KINDS, "inputs": st.dictionaries(NAMES, JSON, max_size=5)})


@given(st.dictionaries(st.sampled_from("1234"), NODES | JSON, max_size=4))
def test_any_graph_gives_a_text_or_a_reason(graph: Graph) -> None:
    found = positive_prompt(graph)
    assert (found.text is None) == bool(found.why)
