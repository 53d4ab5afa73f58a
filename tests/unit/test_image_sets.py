"""Folders of generated images: what is written is read, and what is not whole is told in one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hyperalign.errors import HyperAlignError
from hyperalign.image_sets import (
    RunRecord,
    Settings,
    check_same_prompts,
    check_same_settings,
    image_path,
    metadata_path,
    open_image_set,
    read_record,
    summarise_seconds,
    write_metadata,
    write_record,
)

METADATA = [{"prompt": "a cat", "tag": "single_object"}, {"prompt": "a dog"}]
SETTINGS = Settings(
    base="tiny", base_files="b", method="S", method_file="tiny_s.safetensors", method_sha256="c",
    options={"strength": 1.0}, steps=4, guidance_scale=4.0, width=64, height=64, seed=0,
    images_per_prompt=2, prompts=2, prompts_sha256="d",
)  # fmt: skip


def written(folder: Path, complete: bool = True) -> Path:
    """Writes two prompts of two images, which nobody decodes here."""
    write_metadata(folder, METADATA)
    write_record(folder, RunRecord(SETTINGS, complete, summarise_seconds([2.0, 1.0, 4.0]), {"device": "x"}))
    for prompt in (0, 1):
        for image in (0, 1):
            path = image_path(folder, prompt, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = open_image_set(written(tmp_path))
    assert found.metadata == METADATA
    assert found.prompts == ["a cat", "a dog"]
    assert [[path.name for path in row] for row in found.images] == [["0000.png", "0001.png"]] * 2
    assert found.name == "S (tiny_s.safetensors)"
    assert found.run is not None
    assert found.run.settings == SETTINGS
    assert found.run.seconds_per_image == summarise_seconds([1.0, 2.0, 4.0])
    assert found.run.environment == {"device": "x"}


def test_images_of_other_programs_need_no_record(tmp_path: Path) -> None:
    (written(tmp_path) / "run.json").unlink()
    found = open_image_set(tmp_path)
    assert found.run is None
    assert found.name == tmp_path.name
    assert len(found.images) == 2


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="There is no folder"):
        open_image_set(tmp_path / "none")
    with pytest.raises(HyperAlignError, match="There are no images"):
        open_image_set(tmp_path)
    written(tmp_path, complete=False)
    with pytest.raises(HyperAlignError, match=r"has not finished: 4 of 4.*Run the command"):
        open_image_set(tmp_path)
    image_path(written(tmp_path), 1, 0).unlink()
    with pytest.raises(HyperAlignError, match=r"lacks images of 1 of 2 prompts \(00001\): 3 of 4"):
        open_image_set(tmp_path)
    metadata_path(written(tmp_path), 1).unlink()
    with pytest.raises(HyperAlignError, match=r"00001/metadata.jsonl cannot be read"):
        open_image_set(tmp_path)
    image_path(written(tmp_path), 2, 0).parent.mkdir(parents=True)
    with pytest.raises(HyperAlignError, match=r"has the folders 00002.*2 prompts. Remove"):
        open_image_set(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format_version": 9})])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (written(tmp_path) / "run.json").write_text(text)
    with pytest.raises(HyperAlignError, match=r"run.json cannot be read .*Generate"):
        read_record(tmp_path)


def test_sets_of_other_prompts_are_refused(tmp_path: Path) -> None:
    first, second = (open_image_set(written(tmp_path / name)) for name in ("a", "b"))
    check_same_prompts([first, second])
    fewer = dataclasses.replace(second, metadata=second.metadata[:1])
    with pytest.raises(HyperAlignError, match="has 2 prompts and .* 1"):
        check_same_prompts([first, fewer])
    other = dataclasses.replace(second, metadata=[METADATA[0], {"prompt": "a fox"}])
    with pytest.raises(HyperAlignError, match="00001 is 'a dog' in .* and 'a fox' in"):
        check_same_prompts([first, other])


def test_other_settings_are_named(tmp_path: Path) -> None:
    check_same_settings(tmp_path, SETTINGS, SETTINGS)
    with pytest.raises(HyperAlignError, match="steps was 4 and is now 5. Choose another folder"):
        check_same_settings(tmp_path, SETTINGS, dataclasses.replace(SETTINGS, steps=5))
