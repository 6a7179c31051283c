"""Every command of the benchmarks, tiny; what fails is named; the report."""

import json
import os
import pathlib
import sys
import time
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks import gpu, jax_steps, report, results, step_time, sweep  # noqa: E402
from benchmarks.__main__ import COMMANDS, TRAINING, main, parser  # noqa: E402
from benchmarks.cases import Case, cases  # noqa: E402
from benchmarks.programs import work_of  # noqa: E402
from benchmarks.race import (  # noqa: E402
    ENVIRONMENTS,
    Contender,
    _worker,
    chosen,
    environment,
    race,
)
from benchmarks.work import Workload  # noqa: E402

T5 = str(pathlib.Path(__file__).parent.parent / "examples/assets/tiny-t5-de-en")
GPT2 = str(pathlib.Path(T5).with_name("tiny-gpt2-places"))
BERT = str(pathlib.Path(T5).with_name("tiny-bert"))
TINY = ["--quick", "--repeats", "2", "--warmup", "0", "--in-process"]
GPT = ["--shape", "gpt2-4x128"]
RUNS = {
    "step_time": [*GPT, "--contenders", *step_time.OURS],
    "compile_time": [*GPT, "--repeats", "1", "--depths", "2", "3"],
    "memory": [*GPT, "--contenders", "jlora", "full fine-tuning"],
    "head": [*GPT],
    "merge": [*GPT, "--contenders", "jlora", "jlora, donated"],
    "generate": [*GPT, "--contenders", "jlora", "merged", "--beams", "2"],
    "text": ["--contenders", "jlora"],
    "load": ["--contenders", "jlora", "--repeats", "1"],
    "sweep": [*GPT, "--axes", "adapters", "--contenders", "floor", "jlora"],
    "many": [*GPT, "--contenders", "one step"],
    "mixed_batches": [
        *GPT,
        "--adapters",
        "2",
        "--contenders",
        "jlora",
        "merged, adapter by adapter",
        "product, ragged_dot",
    ],
    "qlora": ["--model", T5, "--contenders", "LoRA", "nf4"],
    "initialise": ["--model", T5, "--contenders", "default", "PiSSA"],
    "optimisers": ["--model", T5, "--contenders", "AdamW", "LoRA-FA"],
    "data": ["--model", T5, "--workers", "0"],
    "plan": [],
    "gpu": ["--contenders", "jlora", "floor", "jlora, nf4", "merge"],
    "e2e": ["--tokenizer", GPT2, "--contenders", "base", "jlora", "full fine-tuning"],
    "dispatch": ["--kernels", "5"],
    "glue": ["--model", BERT, "--tasks", "sst2", "--contenders", "jlora", "head alone"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for code, words in (("de", "ein Haus mit Garten"), ("en", "a house and garden")):
        lines = [" ".join(words.split()[: 1 + i % 4]) + f" {i}" for i in range(12)]
        (folder / f"train.{code}").write_text("\n".join(lines) + "\n")
    for file, kind in (("devset.csv", "coffee shop"), ("testset_w_refs.csv", "pub")):
        rows = [f'"name[N{i}], eatType[{kind}]",N{i} is a {kind}.' for i in range(12)]
        (folder / file).write_text("\n".join(["mr,ref", *rows]) + "\n")
    (folder / "sst2").mkdir()
    for split in ("train", "dev"):
        rows = [f"the book was {'good' if i % 3 else 'bad'} {i}\t{int(i % 3 > 0)}\n"
                for i in range(40)]  # fmt: skip
        (folder / "sst2" / f"{split}.tsv").write_text(
            "sentence\tlabel\n" + "".join(rows)
        )
    return folder


def options(**changes):
    given = {"in_process": True, "warmup": 1, "repeats": 3, "env": "default",
             "gpu": False, "dry": False, "quick": True, "python": []}  # fmt: skip
    return types.SimpleNamespace(**{**given, **changes})


def test_all_commands_are_run():
    assert {*RUNS} == {*COMMANDS}


@pytest.mark.parametrize("command", RUNS)
def test_a_command_measures_saves_and_is_reported(command, corpus, tmp_path):
    reads = command in ("text", "glue", "e2e", "data", *TRAINING)
    data = ["--data", str(corpus)] if reads else []
    data += ["--model", str(tmp_path / "base")] if command == "e2e" else []
    folder = tmp_path / "results"
    rows = main([command, *TINY, *RUNS[command], *data, "--results", str(folder)])
    saved = json.loads((folder / f"{command}.json").read_text())
    assert saved["rows"] == rows
    assert [*saved] == ["command", "arguments", "machine", "environment", "rows"]
    assert {"jax", "jaxlib"} <= {*saved["machine"]["versions"]}
    assert saved["machine"]["device"].startswith("cpu")
    assert "--quick" in saved["arguments"]
    assert str(corpus.parent) not in json.dumps(saved)  # nor any other path of here
    shown = sys.modules[f"benchmarks.{command}"].COLUMNS
    for row in rows:
        assert not row.get("error")
        assert any(isinstance(row.get(c), float) and row[c] > 0 for c in shown)
    text = report.report(str(folder)).read_text()
    assert f"\n## {command}\n" in text
    assert f"`python -m benchmarks {command} --quick" in text
    assert text.count("not measured") == text.count("| at ")  # tiny sizes meet no bar
    CHECKS.get(command, lambda rows: None)(rows)


def check_step_time(rows):
    by_name = {row["contender"]: row for row in rows}
    assert [*by_name] == list(step_time.OURS)
    assert by_name["floor"]["to_floor"] == 1.0
    assert "trainable" not in by_name["floor"]
    ours, full = by_name["jlora"], by_name["full fine-tuning"]
    assert ours["trainable"] == by_name["by hand"]["trainable"] == 4 * (24 + 72)
    assert full["trainable"] > 10 * ours["trainable"]
    for row in rows:  # one model, one batch, B is zero
        assert row["loss"] == pytest.approx(ours["loss"], 1e-5)
    assert len(ours["all_ms"]) == 2
    assert ours["share_of_peak"] == pytest.approx(1 / ours["to_roofline"])


def check_compile_time(rows):
    assert [row["depth"] for row in rows] == [2] * 4 + [3] * 4
    assert {row["stage"] for row in rows} == {"trace", "lower", "compile", "all"}
    assert [row["to_first_depth"] for row in rows[:4]] == [1.0] * 4


def check_memory(rows):
    assert rows[0]["to_full"] < 1 == rows[1]["to_full"]
    assert all(row["peak_mib"] > row["arguments_mib"] > 0 for row in rows)


def check_head(rows):
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx(losses[:1] * len(rows), rel=1e-5)
    assert rows[-1]["contender"] == "whole logits"
    assert all(row["temporary_mib"] > 0 for row in rows)


def check_dispatch(rows):
    plain, trees, ours = rows
    # Of each kernel A and B, their moments, base and scale; two counts less than three.
    assert plain["arrays"] == trees["arrays"] == 5 * 8 + 2
    assert ours["arrays"] < 3 * 2 + 5 * 2 + 5
    assert plain["to_flat_lists"] == 1.0


def check_glue(rows):
    ours, head = rows
    assert ours["trainable"] > head["trainable"] == 2 * 96 + 2
    assert ours["steps"] == head["steps"] == len(ours["losses"]) == 6
    assert 0 <= ours["score"] <= 1
    assert ours["losses"][0] == head["losses"][0]  # B is zero: the same model


def check_data(rows):
    memory = [row for row in rows if row["task"].startswith("memory")]
    assert len(memory) == 3
    assert all(
        row["to_corpus"] == row["grown_mib"] / row["corpus_mib"] for row in memory
    )


def check_plan(rows):
    for row in rows:
        assert row["plan_mib"] > row["temporaries_plan_mib"] > 0
        held = [
            row[f"{who}_mib"] - row[f"temporaries_{who}_mib"] for who in ("plan", "xla")
        ]
        assert held[0] == held[1] > 0  # one account of what is held
        assert row["plan_to_xla"] == row["plan_mib"] / row["xla_mib"]


def check_e2e(rows):
    base, ours, full = rows
    assert base["trainable"] == 0 < ours["trainable"] < full["trainable"]
    assert ours["steps"] == len(ours["losses"]) == full["steps"] == 3
    assert ours["losses"][0] == pytest.approx(full["losses"][0], 1e-5)  # one base
    assert ours["losses"] != full["losses"]
    assert all(0 <= row["bleu"] <= 100 for row in rows)


def check_text(rows):
    assert rows[0]["compilations"] <= rows[0]["steps"] == 2
    assert 0 <= rows[0]["padding"] < 0.5


def check_optimisers(rows):
    adam, fixed = rows
    assert adam["losses"][0] == pytest.approx(fixed["losses"][0], 1e-6)  # one start
    assert adam["loss"] != fixed["loss"]
    assert 0 < fixed["state_mb"] < 0.7 * adam["state_mb"]  # none of A
    assert adam["step_mflop"] > adam["update_mflop"] > 0


CHECKS = {"step_time": check_step_time, "compile_time": check_compile_time,
          "memory": check_memory, "head": check_head, "text": check_text, "plan": check_plan,
          "data": check_data,
          "optimisers": check_optimisers, "glue": check_glue, "e2e": check_e2e,
          "dispatch": check_dispatch}  # fmt: skip


# -- the report ------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "met"), [(1.03, "yes"), (1.05, "no")])
def test_bars_are_met_or_not(ratio, met):
    row = {"case": Case("t5-small-8x64").title, "contender": "jlora", "to_floor": ratio}

    def result(date, device="cpu: cpu", arguments=(), rows=(row,)):
        return {"command": "step_time", "arguments": arguments, "rows": rows,
                "environment": {"name": "default"},
                "machine": {"date": date, "device": device, "load": 0.5}}  # fmt: skip

    found = {
        "this": result("2026-01-01"),
        # The newest counts; a quick run and another device never do.
        "old": result("2025-01-01", rows=[{**row, "to_floor": 9.0}]),
        "gpu": result("2027-01-01", device="gpu: H100"),
        "quick": result("2027-01-01", arguments=["--quick"]),
    }
    rows = [row for row in report.bars(found) if row["value"] != "not measured"]
    assert rows == [
        {"figure": "jlora / floor, T5-small, query value", "bar": "at most 1.04",
         "value": ratio, "met": met, "environment": "default", "load": 0.5,
         "file": "this"}
    ]  # fmt: skip


def test_the_report_is_that_of_the_results(tmp_path):
    for name in ("results", "bars.toml"):
        (tmp_path / name).symlink_to(results.RESULTS.with_name(name))
    text = report.report(str(tmp_path / "results")).read_text()
    assert text == results.RESULTS.with_name("RESULTS.md").read_text()


# -- races -----------------------------------------------------------------------------


def failing(at):
    """A step that fails at a given call."""
    left = [at]

    def step():
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of\nmemory")

    return step, {}


class Noted:
    """Steps that say in which order they ran."""

    ran: ClassVar[list] = []


def noted(name):
    return lambda: Noted.ran.append(name), {}


def test_one_that_fails_midway_is_named_and_the_others_go_on():
    build = f"{__name__}:failing"
    entries = [Contender("good", build, {"at": 0}), Contender("bad", build, {"at": 3})]
    out = race(entries, options())
    assert out.errors == {"bad": "RuntimeError: out of"}
    assert len(out.times["good"]) == 3
    assert out.ratio("good", "bad") is None
    good, bad = out.rows({"case": "x"}, ["good", "bad"])
    assert good["median_ms"] > 0
    assert bad == {"case": "x", "contender": "bad", "error": "RuntimeError: out of"}


def test_rounds_differ_in_their_order():
    names = ["a", "b", "c", "d"]
    race([Contender(n, f"{__name__}:noted", {"name": n}) for n in names], options())
    rounds = [Noted.ran[i : i + 4] for i in range(0, 16, 4)]
    assert len(Noted.ran) == 16
    assert all(sorted(one) == names for one in rounds)
    assert len({*map(tuple, rounds)}) > 1


def test_contenders_that_nobody_knows():
    for command in {*RUNS} - {"compile_time", "data", "plan"}:
        reads = command in ("glue", "e2e", *TRAINING)
        data = ["--data", "."] if reads or command == "text" else []
        data += ["--model", T5] if reads else []
        with pytest.raises(SystemExit, match="no contender nothing; there are "):
            main([command, *TINY, *data, "--contenders", "nothing"])


def test_a_worker_that_dies_is_an_error_with_its_status():
    entry = Contender("PEFT", "nowhere:Nothing", {}, "PEFT")
    out = race([entry], options(in_process=False, python=["PEFT=/bin/false"]))
    assert out.errors["PEFT"].startswith("the worker ended with status 1")


def test_a_worker_prints_what_it_likes():
    with _worker(options(in_process=False, quick=False), "jax") as ask:
        said = {"do": "build", "name": "x", "arguments": {}}
        reply = json.loads(ask(json.dumps({**said, "build": "this:__name__"}), None))
        assert "error" in reply  # a string is no function; the poem is not in the way
        reply = json.loads(ask(json.dumps({**said, "build": "nowhere:f"}), None))
        assert reply["error"].startswith("ModuleNotFoundError")


def test_workers_get_the_environment():
    found = environment(options(env="tuned", compile_for="h100"))
    assert ENVIRONMENTS["tuned"].items() <= found.items()
    assert found["JAX_PLATFORMS"] == "cpu"
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


# -- what is measured ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ("t5-small-8x64", "query value"),
        ("gpt2-4x128", "query value"),  # thirds of a kernel
        ("llama-1b-2x2048", "all-linear"),
    ],
)
def test_lora_by_hand_trains_as_jlora_does(shape, targets):
    work = Workload(Case(shape, targets=targets, dtype="float32", quick=True))
    losses = {}
    for kind in ("by hand", "jlora"):
        step, state = jax_steps.CONTENDERS[kind](work, work.params)
        for _ in range(3):  # B is zero in the first
            state, found = step(state, work.batch)
        losses[kind] = float(found["loss"] if kind == "jlora" else found)
    assert losses["by hand"] == pytest.approx(losses["jlora"], 1e-5)


def test_memory_for_a_gpu_that_is_not_here(monkeypatch):
    """XLA's account where JAX's plugin is installed, else what to install."""
    run = ["memory", *TINY, *GPT, "--compile-for", "h100"]
    for row in main([*run, "--contenders", "jlora"]):
        words = "CUDA plugin is not here: pip install 'jax[cuda12]'"
        assert words in row["error"] if "error" in row else row["kernels"] > 40
        assert "rss_mib" not in row
    # From shapes alone, wherever they lie.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(jax_steps, "sharding_on", lambda target: here)
    monkeypatch.setattr(Workload, "params", None)
    rows = main([*run, "--contenders", *step_time.OURS])
    assert [row["contender"] for row in rows] == list(step_time.OURS)
    assert all(row["peak_mib"] > row["arguments_mib"] > 0 for row in rows)


def test_the_head_for_a_gpu_that_is_not_here(monkeypatch):
    run = ["head", *TINY, *GPT, "--compile-for", "h100"]
    for row in main([*run, "--contenders", "jlora"]):
        words = "CUDA plugin is not here: pip install 'jax[cuda12]'"
        assert words in row["error"] if "error" in row else row["kernels"] > 0
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(jax_steps, "sharding_on", lambda target: here)
    rows = main(run)
    assert rows[-1]["to_whole"] == 1
    assert all(row["accessed_mib"] > 0 and row["median_ms"] is None for row in rows)


PROGRAM = """\
%fused (param_0: f32[8,100], param_1: s32[]) -> f32[8,10] {
  %param_0 = f32[8,100]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %cut.1 = f32[8,10]{1,0} dynamic-slice(%param_0, %param_1, %param_1), sizes={8,10}
  ROOT %e.1 = f32[8,10]{1,0} exponential(%cut.1)
}

%body (p: (f32[8,100], s32[], f32[8,10])) -> (f32[8,100], s32[], f32[8,10]) {
  %p = (f32[8,100]{1,0}, s32[], f32[8,10]{1,0}) parameter(0)
  %x = f32[8,100]{1,0} get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  %y = f32[8,10]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %z = (f32[8,10]{1,0}, s8[4096]{0}) custom-call(%y, %y), custom_call_target="gemm"
  ROOT %out = (f32[8,100]{1,0}, s32[], f32[8,10]{1,0}) tuple(%x, %i, %y)
}

ENTRY %main (a: f32[8,100], b: s32[], c: f32[8,10]) -> bf16[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %start = (f32[8,100]{1,0}, s32[], f32[8,10]{1,0}) tuple(%a, %b, %c)
  %loop = (f32[8,100]{1,0}, s32[], f32[8,10]{1,0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = bf16[8,100]{1,0} convert(%a)
}
"""


def test_a_programs_kernels_and_bytes():
    fusion, product = 4 + 320 + 320, 3 * 320
    assert work_of(PROGRAM) == (3 * 2 + 1, 3 * (fusion + product) + 3200 + 1600)


def test_gpu_rows_are_the_wide_models_in_bfloat16():
    asked = parser().parse_args(["step_time", "--gpu"])
    found = cases(asked, *step_time.GPU)
    assert [one.title for one in found] == [
        "t5-base 32x512/128, bfloat16, r8, query value, attn_implementation cudnn",
        "llama-1b 2x2048, bfloat16, r8, query value, attn_implementation cudnn",
        "llama-1b 2x2048, bfloat16, r16, all-linear, attn_implementation cudnn",
    ]
    for more in (["--dry"], ["--attn-implementation", "einsum"]):
        asked = parser().parse_args(["step_time", "--gpu", *more])
        assert cases(asked, *step_time.GPU)[0].title.endswith("r8, query value")
    # cuDNN takes no float32, which this shape has of its own.
    asked = parser().parse_args(["step_time", "--gpu", "--shape", "t5-small-8x64"])
    assert cases(asked, *step_time.GPU)[0].model_fields == {}


def test_what_does_not_end_in_time_is_stopped_and_named():
    asked = parser().parse_args(["step_time", "--quick", "--repeats", "1"])
    case = Case("gpt2-4x128", quick=True).json
    late = Contender("late", "benchmarks.jax_steps:matmul", {"case": case, "size": 8})
    result = race([late], asked, end=time.monotonic())
    assert result.errors == {"late": "stopped: the time that was given is over"}
    rows = main(["gpu", *TINY, "--budget-s", "0", "--contenders", "merge", "floor"])
    assert {row["contender"] for row in rows} == {"merge", "floor"}
    assert all("0 s of the budget" in row["error"] for row in rows)


def test_kernels_are_told_apart():
    names = {
        "gemm_fusion_dot_39": "Triton's products",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "a library's products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "input_reduce_fusion_7": "reductions",
        "MemcpyD2D": "copies",
        "loop_add_multiply_fusion": "elementwise",
    }
    assert {name: gpu.kind_of(name) for name in names} == names


def check_gpu(rows):
    floors = [row for row in rows if row["contender"] == "floor" and "to_floor" in row]
    ours = next(row for row in rows if row["contender"] == "jlora")
    (floor,) = (row for row in floors if row["case"] == ours["case"])
    assert ours["to_floor"] == ours["median_ms"] / floor["median_ms"]
    kinds = [row for row in rows if "kind" in row]
    whole = {row["contender"]: row for row in kinds if row["kind"] == "all kernels"}
    assert {*whole} == {"jlora", "floor", "jlora, nf4"}
    assert all(row["ms"] > 0 for row in kinds)
    parts = [r["kernels"] for r in kinds if r["case"] == kinds[0]["case"]]
    assert whole["jlora"]["kernels"] > 10
    assert sum(parts) > whole["jlora"]["kernels"]


CHECKS["gpu"] = check_gpu


def test_axes_of_a_sweep_cross():
    asked = parser().parse_args(["sweep"])
    points = {axis: dict(sweep.points(axis, asked)) for axis in sweep.AXES}
    assert [len(found) for found in points.values()] == [3, 3, 4, 3, 3]
    middles = [points[axis][value] for axis, value in
               (("rank", 8), ("depth", 8), ("batch", 8), ("length", 64))]  # fmt: skip
    assert {*middles} == {Case("t5-small-8x64"), points["adapters"]["query value"]}
    assert points["length"][128].target == 128
    assert points["depth"][16].config["num_decoder_layers"] == 16


def test_gpu_rows_run_dry(tmp_path):
    run = ["step_time", "--gpu", "--dry", *TINY[1:], "--contenders", "jlora"]
    which = ["--shape", "llama-1b-2x2048", "--targets", "all-linear"]
    (row,) = main([*run, *which, "--results", str(tmp_path)])
    assert row["case"] == "llama-1b 2x8, bfloat16, r4, all-linear"
    assert "error" not in row
    assert (tmp_path / "step_time_gpu.json").exists()


def test_needed_operations_as_counted_by_hand():
    n, d, vocabulary, layers, rank = 4 * 128, 768, 50257, 12, 8
    layer = 2 * n * d * d * (3 + 1 + 4 + 4)
    plain = 2 * (2 * n * d * vocabulary + layers * layer) - 2 * n * d * 3 * d
    adapters = layers * 3 * 2 * n * rank * (d + 3 * d) - 2 * n * rank * d
    attention = layers * 3 * 2 * 2 * n * 128 * d
    work = Workload(Case("gpt2-4x128", rank=rank))
    assert work.needed_flops() == plain + adapters + attention
    full = 3 * (2 * n * d * vocabulary + layers * layer) + attention
    assert work.needed_flops(full=True) == full
    work = Workload(Case("t5-small-8x64"))
    assert work.needed_flops() / 1e9 == pytest.approx(127.339, 1e-5)


def test_labels_of_a_decoder_follow_its_ids():
    arrays = Case("gpt2-4x128", quick=True).arrays()
    assert jnp.all(arrays["labels"][:, :-1] == arrays["input_ids"][:, 1:])
    assert jnp.all(arrays["labels"][:, -1] == -100)


# -- PyTorch's side --------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("shape", ["t5-small-8x64", "gpt2-4x128", "llama-1b-2x2048"])
def test_peers_train_the_same_model(shape):
    pytest.importorskip("peft")
    one = Case(shape, quick=True, dtype="float32")
    entries = chosen(step_time.CONTENDERS, ["jlora", "PEFT"], case=one.json)
    out = race(entries, options(repeats=1))
    assert not out.errors
    ours, peft = out.facts["jlora"], out.facts["PEFT"]
    assert peft["trainable"] == ours["trainable"]
    # Other random weights of the same sizes: sane logits, losses near log V.
    assert peft["loss"] == pytest.approx(ours["loss"], rel=0.05)


@pytest.mark.oracle
def test_every_command_has_peft_beside_jlora(corpus):
    pytest.importorskip("peft")
    for command, more in {"text": ["--data", str(corpus)], "load": [],
                          "generate": [*GPT, "--beams", "1"], "merge": GPT}.items():  # fmt: skip
        rows = main([command, *TINY, *more])
        assert not any(row.get("error") for row in rows)
        ours = [row for row in rows if row["contender"] == "jlora"]
        assert command == "load" or all(row["to_peft"] > 0 for row in ours)
        if command == "merge":  # the same kernels and factors
            assert len({row["gbytes"] for row in rows}) == 1


@pytest.mark.oracle
def test_peft_has_no_thirds_of_a_fused_kernel():
    pytest.importorskip("peft")
    one = Case("gpt2-4x128", targets="query value", quick=True)
    out = race(chosen(step_time.CONTENDERS, ["PEFT"], case=one.json), options())
    assert "--targets c_attn" in out.errors["PEFT"]
