"""Recipes: those shipped, defaults, and one line for each mistake."""

import pytest
from conftest import EXAMPLE

from skipvision_export.errors import ConfigError
from skipvision_export.tensorrt.library import parse_version
from skipvision_export.tensorrt.recipe import (
    BuilderSettings,
    PluginSettings,
    ProfileSettings,
    Recipe,
)

ENGINES = EXAMPLE.parents[1] / "engines"
RECIPES = sorted((ENGINES / "recipes").glob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes_load(file):
    recipe = Recipe.load(file)
    assert recipe.name == file.stem and recipe.description
    assert recipe.builder.product is not None


def test_the_targets_of_the_project_have_recipes():
    assert {file.stem for file in RECIPES} >= {"rtx", "h100", "orin", "thor"}


@pytest.mark.parametrize(
    "table", [Recipe, BuilderSettings, PluginSettings, ProfileSettings], ids=lambda t: t.__name__
)
def test_every_field_is_documented(table):
    text = (ENGINES / "README.md").read_text()
    for field in table.model_fields:
        assert f"| `{field}`" in text or f"`[[{field}]]`" in text or f"`[{field}]`" in text, field


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("precison = ['float16']", "precison: unknown field; expected one of name, description"),
        ("[builder]\nopt = 3", "builder.opt: unknown field; expected one of product"),
        ("[[profiles]]\nbach = [1, 1, 1]", "profiles.0.bach: unknown field; expected one of batch"),
        ("[[profiles]]\nbatch = [2, 1, 1]", "[min, opt, max] must ascend"),
        ("[[profiles]]\ntext = [-1, 1, 1]", "[min, opt, max] must ascend"),
        ("[[profiles]]\nbatch = [1, 1]", "profiles.0.batch"),
        ("precision = ['float8']", "precision.0: Input should be 'float32'"),
        ("profiles = []", "profiles"),
        ("[builder]\nversion = 'new'", "builder.version"),
        ("[builder\n", "is no TOML"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, text, said):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        Recipe.load(file)
    assert said in str(error.value) and "\n" not in str(error.value) and "mine.toml" in str(error.value)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Recipe.load(tmp_path / "none.toml")


def test_versions():
    assert parse_version("10.13.3.9.post1") == (10, 13, 3)
    assert parse_version("10.3") < parse_version("10.14") < parse_version("11.4.0.106")
