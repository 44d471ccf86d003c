"""Accept folders of plain images in a recipe where shards are expected: build shards from them in the cache, and put
their paths into the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import output
from common.errors import UserError
from pretrain.recipes.recipe import Recipe


def use_shards(recipe: Recipe, say: Callable[[str], None] = output.say) -> None:
    """Replace folders of images by folders of shards in data.train, data.mix and the datasets of `eval`. Raises
    UserError if the run folder is inside one of the folders of images.

    The run stores the paths of the shards, so that a resumed run has the same images, even if the folder of images has
    changed.
    """
    data = vars(vars(recipe)["data"])
    if recipe.model.reads != "image":
        return
    lists = [
        data["train"],
        *(vars(source)["shards"] for source in data["mix"]),
        *vars(recipe)["eval"].shard_lists().values(),
    ]
    if not any(Path(path).expanduser().is_dir() for paths in lists for path in paths):
        return
    from data_pipeline.build import folder_cache

    shards_of: dict[str, str] = {}  # {folder of images: folder of shards}
    for paths in lists:
        for n, path in enumerate(paths):
            if path not in shards_of and folder_cache.is_image_folder(path):
                _check_run_is_outside(recipe.run, path)
                shards_of[path] = str(folder_cache.shards_of(path, data["max_pixels"], say))
            paths[n] = shards_of.get(path, path)


def _check_run_is_outside(run: str, images: str) -> None:
    """Raises UserError for a run folder inside a folder of images: the pictures that the run writes there would become
    part of the data."""
    if Path(run).resolve().is_relative_to(Path(images).expanduser().resolve()):
        raise UserError(
            f"run = {run}: lies inside of {images}, a folder of images that is only read; write run=FOLDER,"
            " outside of it"
        )
