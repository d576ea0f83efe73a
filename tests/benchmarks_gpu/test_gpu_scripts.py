"""The GPU benchmarks at small size on a CPU: they run, check before they time, go on, and can fail."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from full import FULL, only_in_full

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
# A whole run of each but the last four takes seconds; these export, compile or train.
QUICK = {
    "inference": ["--shapes", "llava-1.5-7b"],
    "kv_prune": [],
    "row_gather": [],
    "training": ["--shapes", "llava-1.5-7b"],
}
SLOW = {"inference": [], "training": ["--lora"], "ort_cuda": [], "engines": [], "tiny_vlm": []}


def run(*command, ok=(0,)):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode in ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def small(name, folder, *options, ok=(0,)):
    """A script's JSON."""
    file = folder / f"gpu_{name}.json"
    run(GPU / f"{name}.py", "--small", "--rounds", 1, "--json", file, *options, ok=ok)
    return json.loads(file.read_text())


@pytest.fixture(scope="module", params=QUICK)
def result(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, small(request.param, folder, *QUICK[request.param])


def test_scripts_run_and_say_that_they_are_small(result):
    name, _, found = result
    assert (found["benchmark"], found["small"], found["device"]["kind"], found["exit"]) == (
        name,
        True,
        "cpu",
        0,
    )
    assert found["goals"] == []
    assert not any("error" in cell for cell in found["cells"].values())
    # Only where a twin that is broken on purpose was noticed.
    if name != "kv_prune" or shutil.which("g++"):  # the emulation has it; Triton's interpreter too, if here
        assert '"twin' in json.dumps(found["cells"])


def test_a_run_goes_on(result):
    name, folder, found = result
    if name == "kv_prune" or (name != "row_gather" and not FULL):
        pytest.skip("the same for all: set SKIPVISION_ALL_TESTS=1")
    kept, gone = list(found["cells"])[-2:]
    marked = {**found, "cells": {k: dict(v) for k, v in found["cells"].items() if k != gone}}
    marked["cells"][kept]["mark"] = 1
    (folder / f"gpu_{name}.json").write_text(json.dumps(marked))
    again = small(name, folder, *QUICK[name])
    assert again["cells"][kept]["mark"] == 1
    assert again["cells"].keys() == found["cells"].keys()
    # By other sources nothing counts.
    (folder / f"gpu_{name}.json").write_text(json.dumps(marked | {"sources_sha256": "other"}))
    left = small(name, folder, *QUICK[name], "--budget", 0, ok=(0, 3))
    assert "mark" not in left["cells"].get(kept, {})


BROKEN = {
    "inference": """
        import forward
        right = forward.Runner._ffn
        def _ffn(self, layer, h):
            self.rows = None  # every row goes through the FFN
            right(self, layer, h)
        forward.Runner._ffn = _ffn
    """,
    "training": """
        import skipvision_export.method.state as state
        right = state.SkipVisionState.on_norm
        def on_norm(self, tier):
            hook = right(self, tier)
            def wrong(module, args):
                rows = self._rows.get(tier)
                return hook(module, args) if rows is None else (hook(module, args)[0].flip(1),)
            return wrong
        state.SkipVisionState.on_norm = on_norm
    """,
    "row_gather": """
        import torch
        right = torch.Tensor.index_copy_
        torch.Tensor.index_copy_ = lambda self, dim, rows, x: right(self, dim, rows.flip(0), x)
    """,
    "kv_prune": """
        import torch
        from common import arguments
        import kv_prune
        kv_prune.triton_prune = lambda: (
            lambda key, value, keep, key_out, value_out: (
                key_out.copy_(key[:, :, : keep.shape[1]]), value_out.copy_(value[:, :, : keep.shape[1]])
            )
        )
    """,
}


@pytest.mark.parametrize(
    "name", [n if n == "inference" else pytest.param(n, marks=only_in_full) for n in BROKEN]
)
def test_what_is_wrong_is_not_timed(name, tmp_path):
    file, code = tmp_path / "result.json", textwrap.dedent(BROKEN[name])
    options = ["x", "--small", "--rounds", "1", "--json", str(file), *QUICK[name]]
    start = f"import sys; sys.path.insert(0, {str(GPU)!r}); sys.argv = {options!r}\nimport common\n"
    run("-c", f"{start}{code}\nimport {name}\nsys.exit({name}.main())", ok=(1,))
    found = json.loads(file.read_text())
    assert found["exit"] == 1
    assert any("CheckError" in cell.get("error", "") for cell in found["cells"].values())
    wrong = [cell for cell in found["cells"].values() if "error" in cell]
    assert not any("ttft_ms" in json.dumps(cell) or "step_ms" in json.dumps(cell) for cell in wrong)
    if name in ("inference", "training"):
        assert len(found["cells"]) == 1  # the check alone


def test_the_search_for_a_batch_ends_within_a_sixteenth():
    code = """
        import training
        from common import arguments, begin
        class Steps:
            def __init__(self, most): self.most = most
            def run(self, config, samples): return lambda: None
            def fits(self, config, samples): return samples <= self.most
        bench = begin("training", arguments("").parse_args(["--small"]))
        training.MOST_SECONDS = 1e6
        for most in (4, 5, 77, 300):
            found = training.largest(Steps(most), None, bench, 2)
            assert found["batch"] <= most < found["does_not_fit"], found
            assert found["does_not_fit"] - found["batch"] <= max(1, found["does_not_fit"] // 16), found
    """
    run("-c", f"import sys; sys.path.insert(0, {str(GPU)!r})\n{textwrap.dedent(code)}")


def test_nothing_waits_for_the_device():
    """What a CUDA graph cannot hold: sizes that depend on data, numbers for the host, copies from it."""
    code = """
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from forward import Runner
        from shapes import SHAPES, contenders, reference
        forbidden = {"nonzero", "_local_scalar_dense", "masked_select", "lift_fresh", "equal", "_unique2"}
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = str(function).split(".")[1]
                found.update({name} & forbidden)
                return function(*args, **(kwargs or {}))
        cpu, found = torch.device("cpu"), set()
        for name in ("llava-hd", "llava-1.5-7b"):
            shape = SHAPES[name].small()
            model = shape.build(cpu, torch.float32)
            for contender in contenders(shape).values():
                runner = Runner(model, shape, contender, 1, 2)
                runner.first_token()  # tables of selectors are made once
                with Watch():
                    runner.first_token()
                    runner.decode(0)
                assert not found, (name, contender.name, found)
        inputs = shape.inputs(1, cpu, torch.float32, runner.layout.total)
        with torch.no_grad(), reference(model, shape, shape.preset), Watch():
            model(**inputs)
        assert "nonzero" in found and "_local_scalar_dense" in found  # the reference does wait
    """
    run("-c", f"import sys; sys.path.insert(0, {str(GPU)!r})\nimport common\n{textwrap.dedent(code)}")


def readme_gpu():
    spec = importlib.util.spec_from_file_location("readme_gpu", ROOT / "benchmarks" / "readme_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cpu_makes_no_claims_about_gpus(result):
    name, folder, found = result
    rows = readme_gpu()
    assert rows.load_gpu(folder) == {} and rows.gpu_rows({}) == []
    device = {"kind": "cuda", "name": "a GPU", "driver": "1"}
    file = folder / f"gpu_{name}.json"
    file.write_text(json.dumps(found | {"device": device}))
    assert rows.load_gpu(folder) == {}  # small is still small
    file.write_text(json.dumps(found | {"device": device, "small": False}))
    assert any("a GPU, driver 1" in row for row in rows.gpu_rows(rows.load_gpu(folder)))


def test_one_command_for_all(tmp_path):
    command = (GPU / "run_all.py", "--small", "--out", tmp_path, "--only", "row_gather")
    assert "row_gather 0" in run(*command, "--budget", 200).stdout
    assert "finished before" in run(*command, "--budget", 200).stdout
    assert "no time left" in run(*command, "--again", "row_gather", "--budget", 5, ok=(3,)).stdout


@only_in_full
@pytest.mark.parametrize("name", SLOW)
def test_long_scripts(name, tmp_path):
    if name == "engines" and importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs skipvision-export[trt-rtx]")
    found = small(name, tmp_path, *SLOW[name])
    assert found["exit"] == 0
    if name == "engines":
        runs = [cell for key, cell in found["cells"].items() if key.endswith(": run")]
        assert len(runs) == 3
        assert all("no NVIDIA driver here" in cell["said"][-1] for cell in runs)
