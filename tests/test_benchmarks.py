"""Every command of the benchmarks, tiny; what fails is named; the report."""

import dataclasses
import json
import pathlib
import sys
import types
from typing import ClassVar

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks import _needed, _results, _workers, report, step_time, sweep  # noqa: E402
from benchmarks.__main__ import COMMANDS, main, parser  # noqa: E402
from benchmarks._cases import GPT2, Case, case  # noqa: E402
from benchmarks._choice import cases  # noqa: E402
from benchmarks._race import Entry, race  # noqa: E402

TINY = ["--quick", "--repeats", "2", "--warmup", "0", "--in-process"]
GPT = ["--shape", "gpt2-4x128"]
RUNS = {
    "step_time": [*GPT, "--peers"],
    "compile_time": [*GPT, "--repeats", "1"],
    "memory": [*GPT, "--contenders", "jlora", "full fine-tuning", "--peers"],
    "load": ["--contenders", "jlora", "--repeats", "1"],
    "generate": [*GPT, "--contenders", "jlora", "merged", "--beams", "2"],
    "merge": [*GPT, "--contenders", "jlora", "jlora, donated"],
    "files": GPT,
    "lorafy": [],
    "import_time": [],
    "text": ["--contenders", "jlora"],
    "sweep": [*GPT, "--axes", "adapters", "--contenders", "floor", "jlora"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for code, words in (("de", "ein Haus mit Garten"), ("en", "a house and garden")):
        lines = [" ".join(words.split()[: 1 + i % 4]) + f" {i}" for i in range(12)]
        (folder / f"train.{code}").write_text("\n".join(lines) + "\n")
    return folder


def options(**changes):
    given = {"in_process": True, "warmup": 1, "repeats": 3, "env": "default",
             "gpu": False, "dry": False, "quick": True, "python": []}  # fmt: skip
    return types.SimpleNamespace(**{**given, **changes})


def test_all_commands_are_run():
    assert {*RUNS, "report"} == {*COMMANDS}


@pytest.mark.parametrize("command", RUNS)
def test_a_command_measures_and_saves(command, corpus, tmp_path):
    data = ["--data", str(corpus)] if command == "text" else []
    where = ["--results", str(tmp_path)]
    rows = main([command, *TINY, *RUNS[command], *data, *where])
    saved = json.loads((tmp_path / f"{command}.json").read_text())
    assert saved["rows"] == rows
    assert {*_results.REQUIRED} <= {*saved}
    assert {"date", "device", "processor", "versions", "commit"} <= {*saved["machine"]}
    assert saved["environment"] == {"name": "default"}
    assert str(corpus.parent) not in json.dumps(saved)  # nor any other path of here
    columns = sys.modules[f"benchmarks.{command}"].COLUMNS
    for row in rows:
        assert {*row} & {*columns}
        assert not row.get("error")
        assert any(isinstance(v, float) and v > 0 for v in row.values()) or (
            row["stage"] == "compilations after it" and row["jlora_s"] == 0
        )
    if command == "step_time":
        check_each_is_compared_with_each(rows)


def check_each_is_compared_with_each(rows):
    by_name = {row["contender"]: row for row in rows}
    assert [*by_name] == list(step_time.OWN)
    assert by_name["floor"]["to_floor"] == 1.0
    assert by_name["floor"]["trainable"] is None
    ours, full = by_name["jlora"], by_name["full fine-tuning"]
    assert ours["trainable"] == 4 * (24 + 72)  # rank 4 on c_attn
    assert full["trainable"] > 10 * ours["trainable"]
    for name in ("jlora", "naive W+sAB", "floor"):  # one model, one batch, B is zero
        assert by_name[name]["loss"] == pytest.approx(by_name["by hand"]["loss"], 1e-5)
    assert len(ours["all_ms"]) == 2
    assert ours["cpu_ms"] > 0
    assert ours["share_of_peak"] == pytest.approx(1 / ours["to_roofline"])


def test_memory_for_a_gpu_that_is_not_here():
    """XLA's account where JAX's plugin is installed, else what to install."""
    run = ["memory", *TINY[:-1], *GPT, "--compile-for", "h100"]
    (row,) = main([*run, "--contenders", "jlora"])
    if row["error"]:
        assert "CUDA plugin is not here: pip install 'jax[cuda12]'" in row["error"]
    else:
        assert row["compiled_for"] == "h100"
        assert row["peak_mib"] > row["arguments_mib"] > 0
    assert "rss_mib" not in row


# -- the report ------------------------------------------------------------------------


def result(command, rows, **machine):
    machine = {"date": "2026-01-01", "device": "cpu: cpu", "processor": "2 x CPU",
               "versions": {}, "commit": "abc", "load": 0.0, "python": "3.11",
               **machine}  # fmt: skip
    return {"command": command, "machine": machine, "environment": {"name": "default"},
            "options": {"quick": False}, "rows": rows}  # fmt: skip


def test_report_shows_every_result_and_plots_sweeps(tmp_path):
    folder = tmp_path / "results"
    main(["sweep", *TINY, *RUNS["sweep"], "--results", str(folder)])
    for command in {*RUNS} - {"sweep"}:
        made = json.dumps(result(command, [{"contender": f"who ran {command}"}]))
        (folder / f"{command}.json").write_text(made)
    path = report.main(types.SimpleNamespace(results=str(folder)))
    text = path.read_text()
    for command in RUNS:
        assert f"\n## {command}\n" in text
    assert "results/sweep_adapters.png" in text
    assert (folder / "sweep_adapters.png").stat().st_size > 1000
    assert "not measured" in text  # tiny sizes meet no bar


@pytest.mark.parametrize(("ratio", "met"), [(1.03, "yes"), (1.05, "no")])
def test_bars_are_met_or_not(tmp_path, ratio, met):
    title = case("t5-small-8x64").title
    rows = [
        {"case": title, "contender": "floor", "median_ms": 800.0, "to_floor": 1.0},
        {"case": title, "contender": "jlora", "median_ms": 820.0, "to_floor": ratio},
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    whole = {
        "one": result("step_time", rows),
        # The newest counts; a quick run and another device never do.
        "old": result("step_time", [], date="2025-01-01"),
        "gpu": result("step_time", rows, device="gpu: H100", date="2027-01-01"),
    }
    whole["quick"] = result("step_time", rows, date="2028-01-01")
    whole["quick"]["options"]["quick"] = True
    for name, one in whole.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    text = report.main(types.SimpleNamespace(results=str(folder))).read_text()
    (line,) = [x for x in text.splitlines() if "floor, T5-small, query value" in x]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == [
        "at most 1.04", f"{ratio:.3f}", met, "jlora 820.0 ms", "floor 800.0 ms"
    ]  # fmt: skip
    assert cells[-1] == "one"


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no result"):
        _results.read(tmp_path)


# -- what fails is named ---------------------------------------------------------------


class Runner:
    """A step that fails from a given one on."""

    def __init__(self, fails_at):
        self.facts, self.left = {}, fails_at

    def step(self):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of\nmemory")


def test_one_that_fails_midway_is_named_and_the_others_go_on():
    maker = f"{__name__}:Runner"
    entries = [
        Entry("good", maker, {"fails_at": 0}),
        Entry("bad", maker, {"fails_at": 3}),
    ]
    out = race(entries, options())
    assert out.errors == {"bad": "RuntimeError: out of"}
    assert len(out.times["good"]) == 3
    assert "bad" not in out.times
    assert out.ratio("good", "bad") is None


class Noted(Runner):
    ran: ClassVar[list] = []

    def __init__(self, name):
        super().__init__(0)
        self.name = name

    def step(self):
        self.ran.append(self.name)


def test_rounds_differ_in_their_order():
    names = ["a", "b", "c", "d"]
    race([Entry(n, f"{__name__}:Noted", {"name": n}) for n in names], options())
    rounds = [Noted.ran[i : i + 4] for i in range(0, 16, 4)]
    assert len(Noted.ran) == 16
    assert all(sorted(one) == names for one in rounds)
    assert len({*map(tuple, rounds)}) > 1


def test_a_peer_that_cannot_start_stands_in_the_table(capsys, tmp_path):
    run = ["step_time", *TINY, *GPT, "--contenders", "by hand"]
    rows = main([*run, "--peers", "lorax", "--results", str(tmp_path)])
    (row,) = [row for row in rows if row["contender"] == "lorax"]
    assert "Error: " in row["error"]
    assert "median_ms" not in row
    assert row["error"] in capsys.readouterr().out
    saved = json.loads((tmp_path / "step_time.json").read_text())["rows"]
    assert row in saved


@pytest.mark.parametrize(
    ("contenders", "peers", "want"),
    [
        (None, None, (["jlora"], ["PEFT", "qwix"])),
        (["floor"], None, (["floor"], ["PEFT", "qwix"])),
        (["floor", "PEFT"], None, (["floor"], ["PEFT"])),
        (["floor", "PEFT"], ["quax", "PEFT"], (["floor"], ["PEFT", "quax"])),
        (["floor"], [], (["floor"], [])),
    ],
)
def test_a_peer_may_stand_among_the_contenders(contenders, peers, want):
    asked = options(contenders=contenders, peers=peers)
    assert step_time.chosen(asked, ("jlora",), ("PEFT", "qwix")) == want


def test_contenders_that_nobody_knows(tmp_path):
    run = ["step_time", *TINY, *GPT, "--contenders", "nothing", "--peers"]
    (row,) = main([*run, "--results", str(tmp_path)])
    assert row["error"].startswith(
        "ValueError: no contender 'nothing'; there are floor"
    )
    for command in ("generate", "text"):
        run = [command, *TINY, "--contenders", "nothing"]
        data = ["--data", str(tmp_path)] if command == "text" else []
        with pytest.raises(SystemExit, match=f"{command}: no contender nothing; there"):
            main([*run, *data])


def test_a_worker_that_dies_is_an_error_with_its_status():
    entry = Entry("PEFT", "nowhere:Nothing", {}, "PEFT")
    out = race([entry], options(in_process=False, python=["PEFT=/bin/false"]))
    assert out.errors["PEFT"].startswith("the worker ended with status 1")


def test_workers_get_the_environment_and_print_what_they_like():
    worker = _workers.start(options(in_process=False, env="tuned", quick=False), "jax")
    try:
        ask = {"do": "call", "function": "os:getenv"}
        for name, value in _workers.TUNED.items():
            assert worker.ask(**ask, arguments={"key": name}) == value
        worker.ask(
            do="call", function="os:system", arguments={"command": "echo no JSON"}
        )
        assert worker.ask(do="about")["rss_bytes"] > 2**20
        with pytest.raises(
            _workers.WorkerError, match=r"ModuleNotFoundError: .*nowhere"
        ):
            worker.ask(do="call", function="nowhere:f", arguments={})
    finally:
        worker.stop()


# -- what is measured ------------------------------------------------------------------


def test_gpu_rows_are_the_wide_models_in_bfloat16():
    asked = parser().parse_args(["step_time", "--gpu"])
    found = cases(asked, step_time.CPU, step_time.GPU)
    assert [one.title for one in found] == [
        "t5-base 32x512/128, bfloat16, r8, query value, attn_implementation cudnn",
        "llama-1b 2x2048, bfloat16, r8, query value, attn_implementation cudnn",
        "llama-1b 2x2048, bfloat16, r16, all-linear, attn_implementation cudnn",
    ]
    for more in (["--dry"], ["--attn-implementation", "einsum"]):
        asked = parser().parse_args(["step_time", "--gpu", *more])
        found = cases(asked, step_time.CPU, step_time.GPU)
        assert found[0].title.endswith("r8, query value")
    # From a shape's own count: all of the base, 1.24 billion, four operations a token.
    assert _needed.flops(found[1]) == pytest.approx(4 * 1.24e9 * 4096, rel=0.25)


def test_what_models_are_asked_for_reads_alike_however_it_is_said():
    one, two = {"attn_implementation": "cudnn", "remat": True}, ["--remat"]
    want = case("t5-base-32x512", model_fields=one)
    asked = parser().parse_args(["sweep", "--gpu", "--axes", "rank", *two])
    for _, found in sweep.points("rank", "t5-base-32x512", asked):
        assert found.model_fields == want.model_fields
        assert found.title.endswith("query value, remat, attn_implementation cudnn")
    # cuDNN takes no float32, which this shape has of its own.
    asked = parser().parse_args(["step_time", "--gpu", "--shape", "t5-small-8x64"])
    (small,) = cases(asked, step_time.CPU, step_time.GPU)
    assert small.model_fields == {}


def test_gpu_rows_run_dry(tmp_path):
    run = ["step_time", "--gpu", "--dry", "--repeats", "1", "--warmup", "0"]
    which = ["--shape", "llama-1b-2x2048", "--targets", "all-linear"]
    more = ["--in-process", "--contenders", "jlora", "--peers"]
    (row,) = main([*run, *which, *more, "--results", str(tmp_path)])
    assert row["dtype"] == "bfloat16"
    assert row["targets"] == "all-linear"
    assert not row["error"]
    assert (tmp_path / "step_time_gpu.json").exists()


@pytest.mark.parametrize(
    ("shape", "gflop"), [("t5-small-8x64", 127.3), ("t5-small-16x128", 523.9)]
)
def test_needed_flops_as_counted_by_hand(shape, gflop):
    assert _needed.flops(case(shape)) / 1e9 == pytest.approx(gflop, rel=5e-4)


@pytest.mark.parametrize("targets", [["c_attn"], "all-linear"])
def test_needed_flops_are_what_xla_counts(targets):
    from benchmarks._runners import CONTENDERS
    from benchmarks._workload import Workload

    config = {**GPT2, "n_embd": 192, "n_head": 2, "n_layer": 1, "vocab_size": 512}
    one = Case("gpt2-4x128", config, 4, 64, 0, 8, 16.0, targets, "float32")
    for contender, full in (("by hand", False), ("full fine-tuning", True)):
        work = Workload(one)
        step, state, frozen = CONTENDERS[contender](work)
        lowered = jax.jit(step).lower(state, frozen, work.batch)
        counted = lowered.cost_analysis()["flops"]
        needed = _needed.flops(one, full=full)
        assert needed < counted < 1.06 * needed  # elementwise work comes on top


def test_depths_are_compiled_from_shapes_and_failures_are_rows():
    run = ["compile_time", *TINY[:-1], "--repeats", "1", "--in-process", *GPT]
    rows = main([*run, "--depths", "2", "3"])
    assert [row["depth"] for row in rows] == [2] * 4 + [3] * 4
    assert {row["stage"] for row in rows} == {"trace", "lower", "compile", "all"}
    (row,) = main([*run, "--targets", "nothing"])
    assert row["error"].startswith("TargetError")


# -- PyTorch's side --------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("shape", ["t5-small-8x64", "gpt2-4x128", "llama-1b-2x2048"])
def test_peers_train_the_same_model(shape):
    pytest.importorskip("peft")
    one = case(shape, quick=True, dtype="float32")
    names = ["jlora", "full fine-tuning"]
    entries = [step_time.training(one, name) for name in names]
    entries += [step_time.peer(one, name) for name in ("PEFT", "full")]
    out = race(entries, options(repeats=1))
    assert not out.errors
    facts = {name: out.facts[name] for name in out.facts}
    assert facts["PEFT"]["trainable"] == facts["jlora"]["trainable"]
    assert facts["torch full"]["trainable"] == facts["full fine-tuning"]["trainable"]
    # Other random weights of the same sizes: sane logits, losses near log V.
    assert facts["PEFT"]["loss"] == pytest.approx(facts["jlora"]["loss"], rel=0.05)


@pytest.mark.oracle
def test_real_text_and_generation_beside_peft(corpus):
    pytest.importorskip("peft")
    rows = main(["text", *TINY, "--data", str(corpus)])
    rows += main(["generate", *TINY, *GPT, "--beams", "1"])
    assert [row["contender"] for row in rows] == [
        "jlora",
        "PEFT",
        "PEFT, grouped by length",
        "jlora",
        "merged",
        "PEFT",
    ]
    assert not any(row["error"] for row in rows)
    assert rows[0]["to_peft"] > 0
    assert rows[0]["compilations"] <= rows[0]["steps"] == 2


@pytest.mark.oracle
def test_merges_beside_peft():
    pytest.importorskip("peft")
    rows = main(["merge", *TINY, *GPT])
    names = ["jlora", "jlora, donated", "PEFT", "PEFT, safe_merge"]
    assert [row["contender"] for row in rows] == names
    assert len({row["gbytes"] for row in rows}) == 1  # the same kernels and factors
    assert all(row["to_peft"] > 0 and row["to_safe_merge"] > 0 for row in rows)


@pytest.mark.oracle
def test_peft_has_no_thirds_of_a_fused_kernel():
    pytest.importorskip("peft")
    one = dataclasses.replace(
        case("gpt2-4x128", quick=True), targets=["query", "value"]
    )
    out = race([step_time.peer(one, "PEFT")], options())
    assert "--targets c_attn" in out.errors["PEFT"]
