"""Initial weights."""

from __future__ import annotations

from torch import nn


def trunc_normal(linear: nn.Module, std: float = 0.02) -> None:
    """Initialise a linear layer as ViT, MAE and DINO do: weights are normal with `std`, truncated at ±2, and biases
    are zero. Other modules are not changed."""
    if isinstance(linear, nn.Linear):
        nn.init.trunc_normal_(linear.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def xavier(module: nn.Module) -> None:
    """Initialise all linear layers in a module as VideoMAE and SigLIP do: weights are uniform with variance 2 / (inputs +
    outputs), and biases are zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


WRITES = ("proj", "down", "fc2")  # the layers of a block that write to the residual stream
FIRST_OF_MLP = ("up", "fc1")


def by_width(tower: nn.Module, dim: int) -> None:
    """Initialise the blocks of a transformer of width `dim`, its class token and its learned positions as CLIP does
    (arXiv 2103.00020, published code): weights are normal with std dim^-½, which is divided by √(2 · depth) in layers
    that write to the residual stream, and by √2 in the first layer of an MLP. A network without blocks is not changed.

    A std of 0.02 is about the same at a width of 768 or more. At a width of 96 it is so small that the class tokens of all
    images have cosines of 0.9996, and the loss stays at that of guessing.
    """
    blocks = getattr(tower, "blocks", None)
    if blocks is None:
        return
    for name, part in blocks.named_modules():
        if isinstance(part, nn.Linear):
            last = name.rpartition(".")[2]
            share = (2 * len(blocks)) ** -0.5 if last in WRITES else 0.5**0.5 if last in FIRST_OF_MLP else 1.0
            nn.init.normal_(part.weight, std=share * dim**-0.5)
    for token in (getattr(tower, name, None) for name in ("cls_token", "pos_embed")):
        if isinstance(token, nn.Parameter):
            nn.init.normal_(token, std=dim**-0.5)
