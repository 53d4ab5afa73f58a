"""Training and test prompts come from the published files, fixed and disjoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.geneval.prompts import read_metadata
from train.data.prompt_sets import HPD_STYLES, chosen, normalised, without
from train.data.prompts import load_prompts
from train.prompt_sets import main

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GENEVAL = DATA / "geneval" / "evaluation_metadata.jsonl"
PARTI = DATA / "parti" / "PartiPrompts.tsv"
real = pytest.mark.skipif(
    not (GENEVAL.exists() and PARTI.exists()), reason="GenEval and PartiPrompts are not in ../shared/data"
)


def write_parquet(path: Path, captions: list[str]) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"caption": captions, "label_0": [1.0] * len(captions)}), path)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The real GenEval and PartiPrompts, and prompts of Pick-a-Pic and HPD in their files' layout."""
    folder, parti = tmp_path / "published", load_prompts(PARTI)
    for name, file in (("geneval", GENEVAL), ("parti", PARTI)):
        (folder / name).mkdir(parents=True)
        shutil.copy(file, folder / name)
    training = [f"a painting of {i} foxes" for i in range(900)]
    leaks = ["A photo of a bench!", parti[3].upper(), "validation 7", "test  9.", "anime hero 5"]
    data = folder / "pickapic" / "data"
    write_parquet(data / "train-00000-of-00002-a.parquet", [*training, *leaks])
    write_parquet(data / "train-00001-of-00002-b.parquet", ["a Painting of 3 foxes.", "one\nmore line"])
    write_parquet(data / "validation_unique-0-c.parquet", [f"validation {i}" for i in range(500)])
    write_parquet(data / "test_unique-0-d.parquet", [f"test {i}" for i in range(500)])
    (folder / "hpdv2" / "benchmark").mkdir(parents=True)
    for style in HPD_STYLES:
        prompts = [f"{style} hero {i}" for i in range(800)]
        (folder / "hpdv2" / "benchmark" / f"{style}.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


@real
def test_the_command_makes_the_papers_numbers_and_no_list_shares_a_prompt(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    command = ["--published", str(published), "--out", str(out), "--train", "700", "--validation", "100"]
    assert main(command) == 0
    said = capsys.readouterr().out
    lists = {path.stem: load_prompts(path) for path in sorted(out.glob("*.*")) if path.suffix != ".json"}
    assert {name: len(prompts) for name, prompts in lists.items()} == {
        "prompts": 700, "validation": 100, "test_pickapic": 1000, "test_hpd": 500, "test_parti": 1000,
        "test_geneval": 553,
    }  # fmt: skip
    everything = [normalised(prompt) for prompts in lists.values() for prompt in prompts]
    assert len(everything) == len(set(everything))
    assert not {"a photo of a bench", "validation 7", "test 9", "anime hero 5"} & {
        normalised(prompt) for name in ("prompts", "validation") for prompt in lists[name]
    }
    assert f"{out / 'prompts.txt'}: 700 prompts (907 read, 1 duplicates, 5 in other lists)" in said
    assert (out / "test_geneval.jsonl").read_bytes() == GENEVAL.read_bytes()
    assert len(read_metadata(out / "test_geneval.jsonl")) == 553
    assert [sum(prompt.startswith(style) for prompt in lists["test_hpd"]) for style in HPD_STYLES] == [
        125
    ] * 4
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    table = json.loads(before["prompt_sets.json"])
    assert table["prompts.txt"]["sha256"] == hashlib.sha256(before["prompts.txt"]).hexdigest()
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@real
def test_the_chosen_parti_prompts_are_these_for_ever(published: Path, tmp_path: Path) -> None:
    found = chosen([" ".join(prompt.split()) for prompt in load_prompts(PARTI)], 1000)
    assert hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] == "20d2544d0b9aa533"
    backwards = chosen([" ".join(prompt.split()) for prompt in load_prompts(PARTI)][::-1], 1000)
    assert sorted(map(normalised, backwards)) == sorted(map(normalised, found))


@real
def test_what_is_missing_is_named_with_its_command_and_nothing_is_written(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(published / "hpdv2")
    (published / "parti" / "PartiPrompts.tsv").unlink()
    assert main(["--published", str(published), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "lacks hpdv2/benchmark/anime.json (63 kB), " in said
    assert said.count("hf download zhwang/HPDv2") == 1
    assert "PartiPrompts.tsv (123 kB). Download them with\n" in said
    assert "geneval" not in said
    assert not (tmp_path / "out").exists()


@real
def test_too_few_prompts_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--published", str(published), "--out", str(tmp_path / "out")]
    assert main([*command, "--validation", "2000"]) == 2
    assert "leaves 901 training prompts; expected more than the 2000" in capsys.readouterr().err
    (published / "hpdv2" / "benchmark" / "photo.json").write_text('["a", "b"]', encoding="utf-8")
    assert main(command) == 2
    assert "Found 2 distinct prompts from 'a' on; expected at least 125" in capsys.readouterr().err


@given(st.text())
def test_prompts_that_differ_in_case_and_punctuation_alone_are_equal(prompt: str) -> None:
    name = normalised(prompt)
    assert normalised(name) == name
    assert normalised(f"  {prompt}!") == name or not any(map(str.isalnum, prompt))


def test_counts_add_up_and_the_first_spelling_stays() -> None:
    kept, counts = without(["A cat.", "a dog", "a cat", "a hen"], {"a hen"})
    assert kept == ["A cat.", "a dog"]
    assert counts == {"read": 4, "duplicates": 1, "in other lists": 1, "written": 2}
