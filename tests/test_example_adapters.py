"""The examples of several adapters and of many, in process at few steps."""

import sys
from pathlib import Path

from jlora import models, peft

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import many_adapters  # noqa: E402
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


def test_a_queue_of_tenants_at_few_steps(tmp_path):
    jobs = (EXAMPLES / "assets/tenants.jsonl").read_text().splitlines()
    (tmp_path / "corpus").symlink_to(EXAMPLES / "assets/corpus")
    wanted = [line for line in jobs if "harbour" in line or "moved-away" in line]
    (tmp_path / "jobs.jsonl").write_text("\n".join(wanted))
    results = many_adapters.main([
        "--jobs", str(tmp_path / "jobs.jsonl"), "--output", str(tmp_path / "out"),
        "--slots", "1", "--steps", "2", "--batch-size", "4",
    ])  # fmt: skip
    assert [r.status for r in results] == ["done", "failed"]
    model, params = models.load(EXAMPLES / "assets/tiny-t5-de-en")
    peft.load(tmp_path / "out/harbour/peft", params, model=model)
