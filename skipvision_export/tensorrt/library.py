"""Which TensorRT compiler is here: TensorRT, TensorRT-RTX, or TensorRT-RTX by pip alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from skipvision_export.errors import CompilerError
from skipvision_export.tensorrt import rtx

Product = Literal["tensorrt", "tensorrt-rtx"]
NAMES: dict[str, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

# The oldest with plugins of version 3 (10.0) on a device that is still sold (JetPack 6.2).
MINIMUM: dict[str, tuple[int, ...]] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 0)}


@dataclass(frozen=True)
class Compiler:
    """A product and a version of it: all that decides what a graph must look like."""

    product: Product
    version: tuple[int, ...]

    def __str__(self) -> str:
        """Such as TensorRT-RTX 1.7.1."""
        return f"{NAMES[self.product]} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class TensorRT:
    """A compiler that can be called. `route`: how it was found; `module`: its Python API."""

    module: Any
    compiler: Compiler
    route: Literal["tensorrt", "tensorrt_rtx", "trt-rtx"]


def _user_module(name: str) -> tuple[Any, str]:
    module = importlib.import_module(name)
    return module, module.__version__


# In the order of preference.
_ROUTES: tuple[tuple[Literal["tensorrt", "tensorrt_rtx", "trt-rtx"], Product, Callable[[], Any]], ...] = (
    ("tensorrt", "tensorrt", lambda: _user_module("tensorrt")),
    ("tensorrt_rtx", "tensorrt-rtx", lambda: _user_module("tensorrt_rtx")),
    ("trt-rtx", "tensorrt-rtx", rtx.load),
)


def find(product: Product | None = None, oldest: str | None = None) -> TensorRT:
    """The first that is installed of: `tensorrt`, `tensorrt_rtx`, the extra `trt-rtx`.

    product: take no other; oldest: the version that a recipe asks for at least. Raises CompilerError
    that says how to install one.
    """
    reasons = []
    for route, kind, load in _ROUTES:
        if product not in (None, kind):
            continue
        try:
            module, text = load()
        # A broken installation raises what it likes; the next route may work.
        except Exception as error:
            reasons.append(f"{route}: {' '.join(str(error).split())[:160]}")
            continue
        compiler = Compiler(kind, parse_version(text))
        least = max(MINIMUM[kind], parse_version(oldest or "0"))
        if compiler.version < least:
            raise CompilerError(f"{compiler} is too old; expected {Compiler(kind, least)} or newer")
        return TensorRT(module, compiler, route)
    wanted = NAMES[product] if product else "TensorRT"
    how = {
        "tensorrt": "install NVIDIA's tensorrt on the device that will run the engine",
        "tensorrt-rtx": "pip install 'skipvision-export[trt-rtx]', or NVIDIA's tensorrt_rtx",
    }
    advice = how[product] if product else " or ".join(how.values())
    raise CompilerError(f"{wanted} is not installed; {advice} ({'; '.join(reasons)})")


def parse_version(text: str) -> tuple[int, ...]:
    """Major, minor, patch of "10.13.3.9.post1"."""
    numbers = []
    for part in text.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
