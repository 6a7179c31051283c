"""The example of several adapters, in process at few steps."""

import sys
from pathlib import Path

from jlora import models, peft

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import multi_adapter as example  # noqa: E402


def test_the_example_at_few_steps(tmp_path, capsys):
    example.main(["--steps", "2", "--output", str(tmp_path)])
    told = capsys.readouterr().out
    assert "AdapterSet(travel (rank 8, active), lower (rank 8)" in told
    assert "active together" in told
    model, params = models.load(tmp_path / "merged")
    assert sorted(p.name for p in (tmp_path / "peft").iterdir() if p.is_dir()) == [
        "both", "lower", "travel"
    ]  # fmt: skip
    peft.load_all(tmp_path / "peft", params, model=model)
    lines = (EXAMPLES / "multi_adapter.py").read_text().splitlines()
    assert len(lines) <= 120
