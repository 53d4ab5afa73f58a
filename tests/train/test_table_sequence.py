"""The README's commands from a recipe to a table, run small: every line of that block, in its order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from train import evaluate, generate, train

ROOT = Path(__file__).parents[2]
SETS = ["base", "s", "p", "i", "static", "best", "guided"]
MAIN = {"train/train.py": train.main, "train/generate.py": generate.main, "train/evaluate.py": evaluate.main}
FEWER = {
    "train/train.py": [
        "--optim.steps", "1", "--objective.prompt-batch", "1", "--objective.rollout-steps", "4",
        "--objective.timesteps", "1", "--objective.preference-batch", "2", "--validation.every", "0",
        "--data.scenes", "16", "--network.layers", "1", "--model.statistics-prompts", "2",
    ],
    "train/generate.py": ["--steps", "2", "--limit", "2", "--images-per-prompt", "2"],
    "train/evaluate.py": ["--cpu"],
}  # fmt: skip


def commands(folder: Path) -> list[list[str]]:
    """Returns the words of each command of the README's block, writing into a folder."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"### From a hypernetwork to a table.*?```sh\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    first, *lines = block[1].splitlines()
    values = dict(word.split("=", 1) for word in shlex.split(first, comments=True))

    def placed(word: str) -> str:
        for name, value in values.items():
            word = word.replace(f"${name}", value)
        return re.sub(r"^(\w+=)?(images/\w+|report|prompts\.txt|runs/.*)$", rf"\1{folder}/\2", word)

    return [[placed(word) for word in shlex.split(line, comments=True)] for line in lines]


def test_a_hypernetwork_becomes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "prompts.txt").write_text("a dog and a tree\na red car\na cat\n", encoding="utf-8")
    taken = commands(tmp_path)
    drawn = ["train/generate.py"] * len(SETS)
    assert [words[1] for words in taken] == ["train/train.py", *drawn, "train/evaluate.py"]
    for python, program, *words in taken:
        assert python == "python"
        own = ["--run.out", str(tmp_path / "runs" / "tiny_s")] if program == "train/train.py" else []
        assert MAIN[program]([*words, *FEWER[program], *own]) == 0, capsys.readouterr().err
    table = (tmp_path / "report" / "table.md").read_text(encoding="utf-8").splitlines()
    assert [row.split("|")[1].strip() for row in table[2:9]] == SETS
    assert "diversity" in table[0] and "s/image" in table[0] and "tiny validation reward" in table[0]
    records = {name: json.loads((tmp_path / "images" / name / "run.json").read_text()) for name in SETS}
    assert [records[name]["settings"]["method"] for name in SETS] == [
        "base", "S", "P", "I", "static", "best-of-N", "guidance",
    ]  # fmt: skip
    assert all(record["seconds_per_image"]["count"] == 4 for record in records.values())
    assert (tmp_path / "report" / "report.html").read_text(encoding="utf-8").count("<img") >= 2 * len(SETS)
