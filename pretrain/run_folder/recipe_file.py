"""RUN/recipe.yaml, the resolved recipe of a run. A command that changes it keeps a copy of the former recipe until it
has trained a step. If it fails before that, the former recipe is restored."""

from __future__ import annotations

from pathlib import Path

from common import config, yaml_values
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.written_files import FORMER_RECIPE, RECIPE, write_atomically

HEADER = "# resolved; `unlabeled train"  # the first words of every recipe.yaml that a run writes
# {section: keys} that a recipe for text does not use; its recipe.yaml omits them
IMAGES_ONLY = {"data": ("color", "mean", "std", "pixel_dtype", "decode_mb", "max_pixels"), "eval": ("image_size",)}


def write_recipe(recipe: Recipe, run: Path) -> None:
    """Write the resolved recipe to recipe.yaml, atomically."""
    write_atomically(run / RECIPE, _recipe_text(recipe, run))


def replace_recipe(recipe: Recipe, run: Path) -> None:
    """Like `write_recipe`, but keep a copy of the former recipe.yaml if it differs, for `restore_recipe`."""
    former = (run / RECIPE).read_text()
    if former != _recipe_text(recipe, run):
        write_atomically(run / FORMER_RECIPE, former)
    write_recipe(recipe, run)


def trained_recipe(run: Path) -> Path:
    """The file of the last recipe with which a step was trained. It does not exist in a new run."""
    former = run / FORMER_RECIPE
    return former if former.is_file() else run / RECIPE


def accept_recipe(run: Path) -> None:
    """Delete the copy of the former recipe, after a step was trained with the new one."""
    (run / FORMER_RECIPE).unlink(missing_ok=True)


def restore_recipe(run: Path) -> None:
    """Restore the former recipe if there is a copy of it, because the command that replaced it has not trained a
    step."""
    if (run / FORMER_RECIPE).is_file():
        (run / FORMER_RECIPE).replace(run / RECIPE)


def stored_checkpoint_folder(recipe_yaml: Path) -> str:
    """The `checkpoint.folder` of a stored recipe; "" if it has none."""
    section = yaml_values.read_yaml(recipe_yaml).get("checkpoint")
    return str(section.get("folder") or "") if isinstance(section, dict) else ""


def _recipe_text(recipe: Recipe, run: Path) -> str:
    values = config.to_dict(recipe)
    if vars(recipe)["model"].reads == "tokens":
        for section, keys in IMAGES_ONLY.items():
            values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return f"{HEADER} {run}` resumes this run\n{config.dump(values)}"
