"""The folder that export writes and every runtime reads: layout, manifest, hashes."""

from skipvision_export.bundle.genai import GENAI_CONFIG, check_genai, write_genai
from skipvision_export.bundle.graphs import load_graph, write_graphs
from skipvision_export.bundle.manifest import (
    MANIFEST,
    FileInfo,
    GraphInfo,
    InsidePath,
    Manifest,
    ModelInfo,
    PromptInfo,
    Roles,
    SourceInfo,
    StrictModel,
    VersionedModel,
    file_table,
    seal,
    sha256_of,
)
from skipvision_export.bundle.output import (
    atomic_file,
    atomic_folder,
    check_output,
    check_output_file,
    write_text,
)
from skipvision_export.bundle.references import check_reference
from skipvision_export.bundle.room import check_room

__all__ = [
    "GENAI_CONFIG",
    "MANIFEST",
    "FileInfo",
    "GraphInfo",
    "InsidePath",
    "Manifest",
    "ModelInfo",
    "PromptInfo",
    "Roles",
    "SourceInfo",
    "StrictModel",
    "VersionedModel",
    "atomic_file",
    "atomic_folder",
    "check_genai",
    "check_output",
    "check_output_file",
    "check_reference",
    "check_room",
    "file_table",
    "load_graph",
    "seal",
    "sha256_of",
    "write_genai",
    "write_graphs",
    "write_text",
]
