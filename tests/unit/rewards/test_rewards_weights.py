"""Weight and tokenizer files: converted once, never executed, refused in one sentence."""

from __future__ import annotations

import pickle
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import clip_score, hpsv2, loading, text, weights
from hyperalign.rewards.text import page

Published = Callable[[str], Path]


def score(folder: Path, name: str) -> list[float]:
    images = torch.linspace(0, 1, 2 * 3 * 30 * 30).view(2, 3, 30, 30)
    with torch.no_grad():
        return loading.load(name, folder).score(images, ["a cat", "the moon"]).tolist()


def test_the_official_pickle_is_converted_once_and_the_copy_is_enough(published: Published) -> None:
    folder = published("hpsv2.1")
    original = folder / hpsv2.V2_1.path
    first = score(folder, "hpsv2.1")
    converted = original.with_suffix(".safetensors")
    assert set(load_file(converted)) == set(torch.load(original, weights_only=True)["state_dict"])
    original.unlink()
    assert score(folder, "hpsv2.1") == pytest.approx(first, rel=1e-5)
    assert {path.name for path in folder.iterdir()} == {converted.name, "tokenizer"}


def test_the_older_of_torch_s_two_formats_is_read_too(published: Published) -> None:
    folder = published("imagereward")
    path = folder / "ImageReward.pt"
    expected = score(folder, "imagereward")
    path.with_suffix(".safetensors").unlink()
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert score(folder, "imagereward") == pytest.approx(expected, rel=1e-4)


def test_weights_in_a_read_only_folder_are_read_without_conversion(
    published: Published, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published("imagereward")
    converted = folder / "ImageReward.safetensors"
    converted.mkdir()  # a folder cannot be replaced by a file
    assert len(score(folder, "imagereward")) == 2
    assert "was not converted" in caplog.text
    assert not list(folder.glob(".*"))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_never_run(
    published: Published, tmp_path: Path, zipped: bool
) -> None:
    folder, trace = published("hpsv2.1"), tmp_path / "executed"
    path = folder / hpsv2.V2_1.path
    if zipped:
        torch.save({"state_dict": {"logit_scale": torch.ones(())}, "x": Malicious(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(HyperAlignError, match="contains more than tensors, or is damaged") as caught:
        loading.load("hpsv2.1", folder)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not trace.exists()
    assert not path.with_suffix(".safetensors").exists()


@pytest.mark.parametrize("kind", ["TorchScript", "tar"])
@pytest.mark.filterwarnings("ignore")
def test_formats_with_code_are_refused_without_advice_to_run_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "HPS_v2.1_compressed.pt"
    if kind == "tar":
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(__file__, "storages")
    else:
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(path)
    with pytest.raises(HyperAlignError, match="contains more than tensors, or is damaged") as caught:
        weights.read(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))


BEGINNINGS = [b"", b"PK\x03\x04", b"\x80\x02", b"<html>", b"\x10\x00\x00\x00\x00\x00\x00\x00{"]


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(BEGINNINGS), rest=st.binary(max_size=60))
@example(start=b"", rest=b"X")
def test_any_other_bytes_are_refused(tmp_path: Path, name: str, start: bytes, rest: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(start + rest)
    with pytest.raises(HyperAlignError, match="HPS_v2.1_compressed"):
        weights.read(path)


@pytest.mark.parametrize("name", ["hpsv2.1", "clip"])
def test_a_cut_off_file_is_refused(published: Published, name: str) -> None:
    folder = published(name)
    path = folder / loading.PUBLISHED[name].files[0].path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(HyperAlignError, match="not a whole weight file"):
        loading.load(name, folder)


def test_another_model_s_file_is_refused_and_not_converted(published: Published) -> None:
    folder = published("hpsv2.1")
    path = folder / hpsv2.V2_1.path
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(
        HyperAlignError, match=r"contains another model: \d+ tensors are missing .* 1 are unknown"
    ):
        loading.load("hpsv2.1", folder)
    torch.save([torch.ones(2)], path)
    with pytest.raises(HyperAlignError, match="it contains a list instead of named tensors"):
        loading.load("hpsv2.1", folder)
    assert not path.with_suffix(".safetensors").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value[:-1], r"has shape \(31, 64\), expected \(32, 64\)"),
        (lambda value: value * float("nan"), "NaN or infinite"),
    ],
)
def test_a_spoilt_tensor_is_refused(
    published: Published, spoil: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    folder = published("pickscore")
    path = folder / loading.PUBLISHED["pickscore"].files[0].path
    state = load_file(path)
    save_file(state | {"visual_projection.weight": spoil(state["visual_projection.weight"])}, path)
    with pytest.raises(HyperAlignError, match=message):
        loading.load("pickscore", folder)


@pytest.mark.parametrize("name", loading.PUBLISHED)
def test_missing_weights_are_named_with_size_source_and_folder(name: str, tmp_path: Path) -> None:
    file = loading.PUBLISHED[name].files[0]
    with pytest.raises(HyperAlignError) as caught:
        loading.load(name, tmp_path)
    for fact in (Path(file.path).name, " GB", page(file.url), str((tmp_path / file.path).parent)):
        assert fact in str(caught.value)


def test_a_small_file_s_size_is_in_megabytes(published: Published) -> None:
    folder = published("aesthetic")
    (folder / "sac+logos+ava1-l14-linearMSE.pth").unlink()
    with pytest.raises(HyperAlignError, match=r"linearMSE\.pth \(4 MB\)"):
        loading.load("aesthetic", folder)


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="no reward 'hpsv3'; expected one of tiny reward, .*pickscore"):
        loading.load("hpsv3", tmp_path)
    with pytest.raises(HyperAlignError, match="no reward 'hpsv3'"):
        loading.random_weights("hpsv3")


def test_the_tokenizer_is_found_in_three_places(published: Published, vocabularies: Path) -> None:
    folder = published("clip")
    expected = score(folder, "clip")
    (folder / "tokenizer").unlink()
    with pytest.raises(HyperAlignError, match=r"vocab\.json and merges\.txt .* are in none of .*tokenizer"):
        loading.load("clip", folder)
    elsewhere = loading.load("clip", folder, tokenizer_folder=vocabularies)
    assert elsewhere.name == "clip"
    for name in text.CLIP.file_names:
        (folder / name).symlink_to(vocabularies / name)
    assert score(folder, "clip") == expected


def test_damaged_tokenizer_files_are_refused(published: Published) -> None:
    folder = published("clip")
    (folder / "tokenizer").unlink()
    (folder / "tokenizer").mkdir()
    for name in text.CLIP.file_names:
        (folder / "tokenizer" / name).write_text("<html>", encoding="utf-8")
    with pytest.raises(HyperAlignError, match="tokenizer files in .* cannot be read"):
        loading.load("clip", folder)


def test_clip_tokens_are_open_clip_s(vocabularies: Path) -> None:
    import open_clip

    prompts = ["A Photo, of two  cats!", "it's 1984 & the café's n°5", "", "word " * 100]
    found = text.CLIP.load(vocabularies)(prompts)
    expected = open_clip.get_tokenizer("ViT-H-14")(prompts)
    ends = expected.argmax(dim=1)
    assert found.shape == expected.shape
    for row, end in enumerate(ends):  # the padding after the end differs; the networks ignore it
        assert torch.equal(found[row, : end + 1], expected[row, : end + 1])


def test_bert_tokens_are_those_of_the_official_tokenizer(vocabularies: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").symlink_to(vocabularies / "vocab.txt")
    official = BertTokenizer.from_pretrained(str(tmp_path))
    prompts = ["A photograph of two Cats, café!", "", "coffee " * 60]
    expected = official(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    found = text.BERT.load(tmp_path)(prompts)
    assert torch.equal(found, expected.input_ids)
    assert torch.equal((found != text.BERT_PAD).long(), expected.attention_mask)


def test_hash_tokens_differ_by_word_and_fit_the_vocabulary() -> None:
    for vocabulary, length, size in ((text.CLIP, 77, 49408), (text.BERT, 35, 30524)):
        tokens = vocabulary.hash_tokenizer(["a red cat", "a blue cat", "", "word " * 100])
        assert tokens.shape == (4, length)
        assert int(tokens.max()) < size
        assert not torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens, vocabulary.hash_tokenizer(["a red cat", "a blue cat", "", "word " * 100]))


def test_precise_tensors_stay_in_float32(published: Published) -> None:
    reward = loading.load("pickscore", published("pickscore"), dtype=torch.bfloat16)
    assert reward.module.clip.logit_scale.dtype == torch.float32
    assert reward.module.clip.visual_projection.weight.dtype == torch.bfloat16


def test_one_encoder_file_serves_two_rewards(published: Published) -> None:
    folder = published("aesthetic")
    clip, aesthetic = loading.load("clip", folder), loading.load("aesthetic", folder)
    images = torch.rand(2, 3, 40, 30)
    assert torch.allclose(clip.embed_images(images), aesthetic.embed_images(images), atol=1e-6)
    assert clip_score.WEIGHTS.path == loading.PUBLISHED["aesthetic"].files[0].path
