"""KVPrune's C++ and CUDA side, as far as this machine's tools reach: compilers, TensorRT headers, a GPU."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from skipvision_export.tensorrt import plugin
from skipvision_export.tensorrt.manifest import EnginesManifest

SOURCE = Path(__file__).parents[2] / "plugins" / "kv_prune"
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)
FAULTS = ("descending", "no-barrier", "heads-apart", "shift", "narrow")
EXPORTS = ["skipvision_kv_prune", "skipvision_kv_prune_error", "skipvision_kv_prune_version"]


def run(*command: object, ok: tuple[int, ...] = (0,)) -> str:
    """The output of a command, standard error included."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode in ok, f"exit {done.returncode}: {output[-4000:]}"
    return output


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} on the PATH")
    return found


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("kv_prune_emulation") / "host_emulation"
    flags = "-std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
    run(tool("g++"), *flags.split(), SOURCE / "tests" / "host_emulation.cpp", "-o", program)
    return program


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory) -> tuple[Path, str]:
    """The kernel's library for every architecture, and what nvcc said."""
    out = tmp_path_factory.mktemp("kv_prune_kernel") / "libskipvision_kv_prune_kernel.so"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = "-shared -std=c++17 -O3 --threads 2 -Xcompiler -Wall,-Wextra,-fPIC,-fvisibility=hidden".split()
    exports = f"-Xlinker=--version-script={SOURCE / 'cmake' / 'kernel.map'},--no-undefined"
    said = run(tool("nvcc"), *flags, *targets, exports, SOURCE / "kernel" / "kv_prune.cu", "-o", out)
    return out, said


class Params(ctypes.Structure):
    """skipvision_kv_prune_params, as a caller from Python would write it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("struct_bytes", "batch", "heads", "sequence", "kept")),
        *((name, ctypes.c_int64) for name in ("row_bytes", "element_bytes", "output_head_rows")),
        *((name, ctypes.c_void_p) for name in ("key", "value", "keep_index", "key_out", "value_out")),
    ]


def params(**changes: int) -> Params:
    """[1, 2, 8, 8] float16 with K = 4 at addresses that are never read."""
    sizes = {"batch": 1, "heads": 2, "sequence": 8, "kept": 4, "row_bytes": 16, "element_bytes": 2}
    places = {"key": 0x1000, "value": 0x2000, "keep_index": 0x3000, "key_out": 0x4000, "value_out": 0x5000}
    values = {"struct_bytes": ctypes.sizeof(Params), "output_head_rows": 4, **sizes, **places, **changes}
    return Params(**values)


def test_emulated_kernel(emulation):
    assert " 0 failed" in run(emulation)


@pytest.mark.parametrize("fault", FAULTS)
def test_emulation_notices(emulation, fault):
    output = run(emulation, "--break", fault, ok=(1,))
    assert "FAILED: " in output and " checks, " in output  # a mismatch, not a crash or a sanitizer's report


def test_kernel_compiles_for_every_architecture(kernel_library):
    assert "warning" not in kernel_library[1]


def test_kernel_library_exports(kernel_library):
    symbols = [line.split() for line in run(tool("nm"), "-D", kernel_library[0]).splitlines()]
    assert sorted(s[-1] for s in symbols if s[-2] not in "Uw") == EXPORTS
    # Undefined names belong to the C and C++ runtimes, which version theirs: no TensorRT, no CUDA library.
    assert [s[-1] for s in symbols if s[-2] == "U" and "@" not in s[-1]] == []


def test_kernel_library_from_python(kernel_library):
    loaded = ctypes.CDLL(str(kernel_library[0]))
    loaded.skipvision_kv_prune_version.restype = ctypes.c_char_p
    loaded.skipvision_kv_prune_error.restype = ctypes.c_char_p
    assert loaded.skipvision_kv_prune_version().startswith(b"1 (")

    def status(**changes):
        return loaded.skipvision_kv_prune(ctypes.byref(params(**changes)), None)

    assert status(kept=0, key=None, value_out=None) == 0
    # A full set in place moves nothing.
    assert status(kept=8, output_head_rows=8, key_out=0x1000, value_out=0x2000) == 0
    assert status(struct_bytes=96) == -1
    assert status(kept=9) == -1
    assert status(keep_index=None) == -1
    assert status(key=0x1001) == -2
    assert status(key_out=0x1010) == -3
    assert status(batch=1 << 31, heads=1 << 31) == -4
    texts = {loaded.skipvision_kv_prune_error(code) for code in (0, -1, -2, -3, -4, -5)}
    assert len(texts) == 6


def test_kernel_on_a_gpu(kernel_library, tmp_path):
    shared, program = kernel_library[0], tmp_path / "kernel_test"
    link = ("-Xcompiler", "-Wall,-Wextra", shared, "-Xlinker", f"-rpath={shared.parent}")
    assert "warning" not in run(
        tool("nvcc"), "-std=c++17", SOURCE / "tests" / "kernel_test.cu", *link, "-o", program
    )
    output = run(program, "--quick", ok=(0, 77))
    if output.startswith("skipped"):
        assert output.count("\n") == 1
        pytest.skip(f"needs an NVIDIA GPU: {output.strip()}")
    assert " 0 mismatches" in output
    assert "MISMATCH: " in run(program, "--quick", "--break", ok=(1,))


def test_cmake_without_nvcc(tmp_path):
    output = run(
        tool("cmake"),
        "-S",
        SOURCE,
        "-B",
        tmp_path,
        "-DSKIPVISION_CUDA=OFF",
        "-DTensorRT_INCLUDE_DIR=NOTFOUND",
    )
    assert "Set TensorRT_ROOT" in output or "TensorRT headers: " in output
    assert "host_emulation" in run(tool("cmake"), "--build", tmp_path, "--target", "help")


@pytest.fixture(scope="session")
def plugin_build(tmp_path_factory) -> Path:
    """A build of everything, the plugin included."""
    if not os.environ.get("TensorRT_ROOT"):  # noqa: SIM112 (CMake's spelling)
        pytest.skip("set TensorRT_ROOT to a folder with include/NvInfer.h of TensorRT 10.3 or later")
    folder = tmp_path_factory.mktemp("kv_prune_plugin")
    run(tool("cmake"), "-S", SOURCE, "-B", folder)
    assert "warning:" not in run(tool("cmake"), "--build", folder, "-j2")
    return folder


def test_plugin(plugin_build):
    output = run(tool("ctest"), "--test-dir", plugin_build, "--output-on-failure")
    assert "plugin_test_twin" in output


@pytest.mark.parametrize("serialize", [False, True])
def test_a_real_compiler_takes_the_plugin(rtx, plugin_build, bundle_folder, tmp_path, serialize):
    file = plugin_build / "libskipvision_kv_prune.so"
    # In a process of its own: once a plugin is registered, it stays.
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[plugin]\nkv_prune = "library"\nserialize = {str(serialize).lower()}\n')
    command = [sys.executable, "-m", "skipvision_export", "build", bundle_folder, "--recipe", recipe]
    output = run(*command, "-o", tmp_path / "e", "--plugin", file)
    assert "3 KVPrune layers" in output
    made = EnginesManifest.load(tmp_path / "e")
    assert made.kv_prune == "library"
    engine = (tmp_path / "e" / made.engines["decoder_prefill"].file).read_bytes()
    assert (b"getCreators" in engine) == serialize
    # What a declaration leaves in an engine is what the library reads.
    recipe.write_text('[plugin]\nkv_prune = "declared"\n')
    run(*command, "-o", tmp_path / "d")
    declared = EnginesManifest.load(tmp_path / "d")
    if not serialize:
        assert declared.engines["decoder_prefill"].bytes == len(engine)


def test_the_declaration_writes_the_library_s_format():
    text = (SOURCE / "tensorrt" / "kv_prune_plugin.h").read_text()
    assert f'kFormatField[] = "{plugin.FORMAT_FIELD}"' in text
    assert f"kFormatVersion = {plugin.FORMAT_VERSION};" in text
