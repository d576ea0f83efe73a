"""ONNX files and commands for a device: what README shows, what NVIDIA's tools would read."""

import argparse
import shlex
import subprocess
import sys

import onnx
import pytest
from conftest import EXAMPLE

from skipvision_export.errors import ConfigError
from skipvision_export.tensorrt import commands, handover
from skipvision_export.tensorrt.build import plan
from skipvision_export.tensorrt.recipe import BuilderSettings, ProfileSettings, Recipe

ENGINES = EXAMPLE.parents[1] / "engines"


@pytest.fixture(scope="module")
def orin(example_in):
    """The example in float16 for Orin, planned on another machine."""
    recipe = Recipe.load(ENGINES / "recipes" / "orin.toml")
    return plan(example_in("float16"), recipe, elsewhere=True)


def shown(planned):
    """The block of commands in engines/README.md."""
    lines = ["```sh", "# trtexec"]
    lines += [handover.command_line(planned, graph) for graph in planned.manifest.graphs]
    lines += ["# polygraphy"]
    lines += [handover.command_line(planned, graph, commands.polygraphy) for graph in planned.manifest.graphs]
    return "\n".join([*lines, "```"])


def test_readme_shows_these_commands(orin):
    text = (ENGINES / "README.md").read_text()
    block = text.split("<!-- commands: begin -->\n")[1].split("\n<!-- commands: end -->")[0]
    assert block == shown(orin), f"engines/README.md should show:\n{shown(orin)}"


def test_files_and_script(orin, tmp_path):
    handover.write_onnx(orin, tmp_path / "out")
    for graph in orin.manifest.graphs:
        onnx.load(str(tmp_path / "out" / f"{graph}.onnx"))  # weights beside it
    # Run the script with a trtexec that writes down what it is asked.
    fake = tmp_path / "bin" / "trtexec"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" >> asked\n')
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    subprocess.run([tmp_path / "out" / handover.SCRIPT], check=True, env=env)
    asked = (tmp_path / "out" / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == [f"--onnx={graph}.onnx" for graph in orin.manifest.graphs]
    assert sum("--dynamicPlugins=libskipvision_kv_prune.so" in line for line in asked) == 1


def test_a_recipe_without_a_product_is_refused(orin):
    from dataclasses import replace

    with pytest.raises(ConfigError, match=r"names no builder\.product"):
        handover.target_compiler(replace(orin, recipe=Recipe(name="any")))


@pytest.mark.parametrize("graph", ["decoder_prefill", "vision_encoder"])
def test_polygraphy_reads_its_arguments(orin, graph, monkeypatch):
    from polygraphy.tools.convert import Convert

    profiles = orin.profiles(graph)
    builder = BuilderSettings(tf32=True, workspace_mib=64, hardware_compatibility="ampere_plus")
    recipe = Recipe(builder=builder, profiles=(ProfileSettings(), ProfileSettings()))
    command = commands.polygraphy("a.onnx", "a.engine", profiles * 2, recipe)
    tool = Convert()
    parser = tool.setup_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    args = parser.parse_args(command[2:])
    assert args.convert_to == "trt"
    assert len(args.trt_min_shapes) == 2
    with pytest.raises(SystemExit):
        parser.parse_args([*command[2:], "--no-such-flag"])


def test_all_fields_reach_trtexec(orin):
    builder = BuilderSettings(
        version_compatible=True, hardware_compatibility="same_compute_capability", tf32=True
    )
    recipe = Recipe(builder=builder, plugin={"serialize": True})
    profiles = orin.profiles("decoder_prefill") * 2
    command = commands.trtexec("a.onnx", "a.engine", profiles, recipe, "lib.so")
    for expected in (
        "--versionCompatible",
        "--hardwareCompatibilityLevel=sameComputeCapability",
        "--setPluginsToSerialize=lib.so",
        "--profile=1",
    ):
        assert expected in command
    assert "--noTF32" not in command
    assert shlex.split(shlex.join(command)) == command


if __name__ == "__main__":  # prints the block for engines/README.md
    from pathlib import Path

    made = plan(Path(sys.argv[1]), Recipe.load(ENGINES / "recipes" / "orin.toml"), elsewhere=True)
    print(shown(made))
