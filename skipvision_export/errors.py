"""One error tree: a user's mistake exits 2 with one line; a failed check exits 1."""

from __future__ import annotations


class SkipVisionError(Exception):
    """Base of every error the package raises on purpose.

    The message says what is wrong, what was expected and what to do, in one line.
    """

    exit_code = 2


class ConfigError(SkipVisionError):
    """A preset, share or count that does not exist or does not fit the model."""


class ModelError(SkipVisionError):
    """A folder that is no model, an unsupported architecture, or unusable weights."""


class InputError(SkipVisionError):
    """A picture, prompt or data folder that cannot be used."""


class BundleError(SkipVisionError):
    """A bundle with a missing, truncated, altered or too new file."""


class BackendError(SkipVisionError):
    """A bundle of a type that a runtime has no kernels for."""


class OutputError(SkipVisionError):
    """An output folder that exists, is full or cannot be written."""


class RoomError(SkipVisionError):
    """Too little memory or disk for what was asked."""


class PassError(SkipVisionError):
    """A graph pass that refuses a graph; the message names the node and the reason."""


class CompilerError(SkipVisionError):
    """A TensorRT compiler, plugin or engine that is missing, of another version, or refuses a graph."""


class CheckFailed(SkipVisionError):
    """A parity or accuracy check over its limit."""

    exit_code = 1
