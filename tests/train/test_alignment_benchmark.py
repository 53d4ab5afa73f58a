"""benchmarks/alignment.py from its options to its table, on two prompts."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.alignment import Options, main


def test_it_measures_prints_and_writes(tmp_path: Path, capsys) -> None:
    out = tmp_path / "alignment.json"
    main(Options(prompts=6, seeds=(0,), steps=2, out=out))
    methods = json.loads(out.read_text(encoding="utf-8"))["methods"]
    assert list(methods) == ["base", "tiny_s", "tiny_p", "tiny_i", "tiny_static"]
    assert methods["tiny_s"]["generations_per_run"] == 2
    assert methods["tiny_i"]["generations_per_run"] == 1
    printed = capsys.readouterr().out
    for name, row in methods.items():
        assert f"| {name} | {row['geneval']['overall']:.3f}" in printed
