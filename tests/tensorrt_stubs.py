"""Generate what mypy has to know of TensorRT's Python API: `python tests/tensorrt_stubs.py OUT`.

NVIDIA's bindings are a compiled module without stubs; mypy's stubgen reads them off it. Without the
extra `trt-rtx` nothing is written, and mypy takes TensorRT's objects as Any.
"""

import re
import sys
from pathlib import Path

from skipvision_export.tensorrt import rtx

# Also in the process that stubgen starts to look at the module, which imports this file again.
try:
    rtx.load()
except ImportError as error:
    sys.exit(print(f"no stubs of TensorRT: {error}"))


def main(out: Path) -> None:
    from mypy.stubgen import main as stubgen

    module = "tensorrt_bindings.tensorrt"
    stubgen(["-m", module, "--inspect-mode", "--quiet", "-o", str(out / "raw")])
    text = (out / "raw" / f"{module.replace('.', '/')}.pyi").read_text()
    # In one signature pybind11 gives a default to a parameter in front of one without.
    text = re.sub(r"(= \.\.\., \w+: [\w.]+)(\) ->)", r"\1 = ...\2", text)
    # TensorRT's own `bool` is a value, and would hide the type.
    text = re.sub(r"^bool: .*\n", "", text, flags=re.MULTILINE)
    (out / "tensorrt").mkdir(parents=True, exist_ok=True)
    (out / "tensorrt" / "__init__.pyi").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
