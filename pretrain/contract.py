"""Checks that an objective fulfils its contract with the training loop. `unlabeled check my/method.py` runs them on
random samples, and the tests run them for the objectives of the project.

Each check gets a new `Case`, and yields one line for each violation. The first line of its docstring is its title.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.schedules import Schedule
from pretrain import host_syncs
from pretrain.build import build_objective, noise_batch, noise_samples, placed, views
from pretrain.models import presets
from pretrain.models.layers import Backbone
from pretrain.objectives import finder
from pretrain.objectives.base import Objective
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe, load

BATCH, STEP = 16, 5
CPU = torch.device("cpu")
# The default model of `Config.tiny`: a ViT that trains in a second, on images of 32 pixels.
VIT = ["model=vit", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=32", "model.patch_size=8"]
# Sizes of a text model that `Config.tiny` names, for rows of 32 tokens.
TEXT = ["model.dim=32", "model.depth=2", "model.heads=2", "model.context=32", "model.vocab_size=512"]
# Maps a placeholder in a value of `Config.tiny` ("export" or "run NAME") to the path of a folder.
FolderOf = Callable[[str], str]


@dataclass
class Case:
    """An objective with its sizes for tests (`Config.tiny`) on the CPU, and a batch of random samples."""

    name: str
    overrides: list[str]
    recipe: Recipe
    objective: Objective
    host_batch: dict[str, Tensor]  # the batch as the stream returns it
    batch: dict[str, Tensor]  # the same batch on the device

    def rebuilt(self, *overrides: str) -> Case:
        """The same objective, built again with further overrides."""
        return build_case(self.name, [*self.overrides, *overrides])


class MissingFolder(Exception):
    """A value of `Config.tiny` has a placeholder for a folder that does not exist."""


def tiny(name: str, folder_of: FolderOf) -> list[list[str]]:
    """Overrides of a recipe with which an objective trains in seconds. The first entry is complete, the others are
    changes to it (see `Options.tiny`)."""
    first, *variants = (dict(values) for values in finder.config_class(name)[0].tiny())
    model = first.pop("model", None)
    model_sizes = VIT if model is None else [f"model={model}", *(TEXT if _reads_tokens(model) else [])]
    return [[*model_sizes, *_overrides(first, folder_of)], *(_overrides(values, folder_of) for values in variants)]


def _reads_tokens(model: str) -> bool:
    return presets.choose(model)[0].reads == "tokens"


def _overrides(values: dict[str, Any], folder_of: FolderOf) -> list[str]:
    def folder(match: re.Match) -> str:
        return folder_of(match[1])

    return [f"{key}={re.sub(r'{(export|run [^}]+)}', folder, json.dumps(value))}" for key, value in values.items()]


def build_case(name: str, overrides: Sequence[str]) -> Case:
    """A case for an objective, which is given by name or by the path of its file. Raises UserError if it cannot be
    built."""
    fixed = ["threads=1", "precision=fp32", f"data.batch={BATCH}", "steps=8", "optim.lr=1e-3"]
    recipe = load("demo", [f"objective={name}", *fixed, *overrides])
    objective = build_objective(recipe, start=True)
    host_batch = noise_batch(recipe, objective, BATCH)
    return Case(name, list(overrides), recipe, objective, host_batch, placed(objective, host_batch, CPU))


# ---------------------------------------------------------------- the checks
def docstring_names_method_and_paper(case: Case) -> Iterator[str]:
    """The docstring of the file names the method in its first line and cites its paper."""
    text = ast.get_docstring(ast.parse(finder.path_of(case.name).read_text())) or ""
    first = text.partition("\n")[0]
    if len(first) <= 20 or not re.search(r"arXiv|doi|et al", text):
        yield f'its docstring begins with {first!r}; write "NAME: what it does, in a line", with the paper'


def forward_is_pure(case: Case) -> Iterator[str]:
    """`forward(batch, step)` returns the same finite scalar for the same arguments, and detached scalars to log."""
    loss, logs = case.objective(case.batch, 0)
    again, _ = case.objective(case.batch, 0)
    if loss.ndim or not loss.isfinite():
        values = loss.detach().flatten()[:4].tolist()
        yield f"its loss is {values} of shape {list(loss.shape)}; it must be one finite number"
    elif not torch.equal(loss, again):
        values = f"{loss.item()} and then {again.item()}"
        yield f"its loss is {values} for the same batch; make random numbers in `views`, with `rng`"
    for name, value in logs.items():
        if value.ndim or value.requires_grad:
            gradients = " with gradients" * value.requires_grad
            yield f"logs[{name!r}] is of shape {list(value.shape)}{gradients}; log one number, and detach it"


def gradients_arrive(case: Case) -> Iterator[str]:
    """Every parameter that is not frozen gets a gradient."""
    case.objective(case.batch, 0)[0].backward()
    parameters = dict(case.objective.named_parameters())
    no_gradient = [n for n, p in parameters.items() if p.requires_grad and (p.grad is None or not p.grad.any())]
    if no_gradient:
        yield f"no gradient reaches {_few(no_gradient)}; use it in `forward`, or freeze it with requires_grad_(False)"


def frozen_networks_stay_in_evaluation_mode(case: Case) -> Iterator[str]:
    """A frozen network stays in evaluation mode when the loop calls `train()`."""
    frozen = [
        name
        for name, module in case.objective.train().named_modules()
        if module.training
        and any(True for _ in module.parameters())
        and not any(p.requires_grad for p in module.parameters())
        and not getattr(module, "batch_statistics", False)  # a batch norm that is to normalise by the teacher's batch
    ]
    if frozen:
        yield f"{_few(frozen)} is in training mode; name it in `kept_in_eval`, or override `train`"


def modules_are_called(case: Case) -> Iterator[str]:
    """Modules with trained parameters are called as `module(x)`, so that sharded engines gather the parameters."""
    called: set[nn.Module] = set()
    for module in case.objective.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    case.objective(case.batch, 0)
    names = {module: name for name, module in case.objective.named_modules()}
    units = [unit for unit in case.objective.shard_units() if any(p.requires_grad for p in unit.parameters())]
    missed = [names[unit] for unit in units if unit not in called and unit is not case.objective]
    if missed:
        yield f"{_few(missed)} is not called in `forward` (it may be used by a method or an attribute); write module(x)"


def views_are_repeatable(case: Case) -> Iterator[str]:
    """`views` takes all random numbers from `rng`: the same sample and generator give the same arrays."""
    first, again = (noise_samples(case.recipe, case.objective, BATCH) for _ in range(2))
    for name in first[0]:
        if not all(np.array_equal(a[name], b[name]) for a, b in zip(first, again, strict=True)):
            yield f"views: {name!r} differs for the same sample and generator; draw from `rng(k)`"


def views_is_static(case: Case) -> Iterator[str]:
    """`views` is a static method, because data workers have no model."""
    if not isinstance(vars(type(case.objective)).get("views"), staticmethod):
        yield "views: write @staticmethod before it"
    else:
        views(case.recipe, case.objective)


def after_step_respects_skipped(case: Case) -> Iterator[str]:
    """`after_step` changes nothing if the optimizer skipped the step (`self.skipped` is 1)."""
    case.objective(case.batch, 0)
    case.objective.skipped = torch.ones(())
    before = {key: value.clone() for key, value in case.objective.state_dict().items()}
    with torch.no_grad():
        for parameter in case.objective.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    stepped = {key: value.clone() for key, value in case.objective.state_dict().items()}
    case.objective.after_step(0)
    after = case.objective.state_dict()
    changed = [key for key in before if not torch.equal(stepped[key], after[key])]
    if changed:
        yield f"{_few(changed)} moved in a skipped step; pass `self.skipped` to ema_update, or to the push of a queue"


def moving_averages_are_named(case: Case) -> Iterator[str]:
    """Every frozen network that `after_step` changes is named in `averaged`, so that a run can start from it."""
    frozen = {name: p for name, p in case.objective.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in frozen.items()}
    case.objective(case.batch, 0)
    with torch.no_grad():
        for parameter in case.objective.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    case.objective.after_step(0)
    named = tuple(f"{name}." for name in case.objective.averaged.values())
    moved = [name for name, p in frozen.items() if not torch.equal(p, before[name]) and not name.startswith(named)]
    if moved:
        yield (
            f"{_few(moved)} moves in `after_step`; write averaged = {{TRAINED: AVERAGE}} with the names of the trained"
            " sub-module and of its moving average"
        )
    if named:
        case.objective.start_from_teacher()  # raises an error if a name is wrong, or if the two differ


def state_is_complete(case: Case) -> Iterator[str]:
    """Everything that `after_step` changes is in the state dict, so that a resumed run gives the same results."""
    other = case.rebuilt()
    for step in range(2):
        case.objective(case.batch, step)
        case.objective.after_step(step)
    other.objective.load_state_dict(case.objective.state_dict())
    mine, loaded = (one.objective(case.batch, 2)[0] for one in (case, other))
    if not torch.equal(mine, loaded):
        yield (
            f"the loss is {mine.item()}, but {loaded.item()} after its state was loaded into a new objective; register"
            " as a buffer what changes"
        )


def couples_batch_is_correct(case: Case) -> Iterator[str]:
    """Micro-batches give the gradient of the whole batch, unless `couples_batch` is True or a network has batch norms."""
    if case.objective.is_coupled():
        return
    gradients = []
    for micro in (None, BATCH // 4):
        one = case.rebuilt(f"parallel.micro_batch={json.dumps(micro)}")
        engine = Engine(one.objective, one.recipe, CPU)
        parts = [{k: v.chunk(engine.accumulate)[n] for k, v in case.batch.items()} for n in range(engine.accumulate)]
        for number, batch in enumerate(engine.micro_batches(parts)):
            with engine.microbatch(last=number + 1 == engine.accumulate):
                engine.backward(engine.forward(batch, 0)[0])
        gradients.append(torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None]))
    if not torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-5):
        difference = float((gradients[0] - gradients[1]).abs().max())
        yield (
            f"gradients of micro-batches differ from those of the batch by {difference:.2g};"
            " write couples_batch = True, or `target_name`"
        )


def exports_are_backbones(case: Case) -> Iterator[str]:
    """`exports()` returns backbones."""
    found = case.objective.exports()
    for name, one in found.items():
        if not isinstance(one.backbone, Backbone):
            kind = type(one.backbone).__name__
            yield f"exports()[{name!r}] holds a {kind}; it must be a Backbone, as `backbone()` builds it"


def nothing_waits_for_the_device(case: Case) -> Iterator[str]:
    """No host sync: placing a batch, `forward`, backward, the update and `after_step` never wait for the device."""
    file = str(finder.path_of(case.name))
    for sync in host_syncs.of_steps(case.objective, case.recipe, case.host_batch):
        yield f"{sync.place(file)}: {sync.reason}"


CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    docstring_names_method_and_paper,
    views_is_static,
    views_are_repeatable,
    forward_is_pure,
    gradients_arrive,
    frozen_networks_stay_in_evaluation_mode,
    modules_are_called,
    after_step_respects_skipped,
    moving_averages_are_named,
    state_is_complete,
    couples_batch_is_correct,
    exports_are_backbones,
    nothing_waits_for_the_device,
)


def options_are_read(name: str, sizes: list[list[str]]) -> Iterator[str]:
    """Every option is read, and schedules are evaluated at the `step` that `forward` and `after_step` get."""
    read = set[str]()
    for variant in [[], *sizes[1:]]:
        case = build_case(name, [*sizes[0], *variant])
        schedules = {k: v for k, v in vars(case.recipe.objective).items() if isinstance(v, Schedule)}
        for schedule in schedules.values():
            schedule.__class__ = _RecordingSchedule
        case.objective.cfg = case.recipe.objective  # this instance records which options are read
        case.objective(case.batch, STEP)
        case.objective.after_step(STEP)
        for key, schedule in schedules.items():
            if wrong := {step for step in vars(schedule).get("steps_called", ()) if step != STEP}:
                yield f"objective.{key} is evaluated at step {min(wrong)} in step {STEP}; pass the given `step` on"
        read |= vars(case.recipe.objective)["_read"]
    for field in dataclasses.fields(finder.config_class(name)[0]):
        if field.name not in read:
            yield f"nothing reads objective.{field.name}; use it or remove it, or add a variant to `tiny` that reads it"


class _RecordingSchedule(Schedule):
    """A schedule that records the steps at which it is evaluated."""

    def __call__(self, step: int) -> float:
        self.__dict__.setdefault("steps_called", []).append(step)
        return super().__call__(step)


def _few(names: list[str]) -> str:
    """The first three names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------- the command
def check(name: str, overrides: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """(title, violations) of each check, for an objective that is given by name or by the path of its file.

    `overrides` change its sizes for tests. Raises UserError if it cannot be built.
    """

    def missing(kind: str) -> str:
        raise MissingFolder(kind)

    try:
        sizes = tiny(name, missing)
    except MissingFolder as kind:
        raise UserError(
            f"{name}: a value of `Config.tiny` has the placeholder {{{kind}}}, which only the project's tests replace;"
            " give the value, as objective.OPTION=FOLDER"
        ) from None
    complete = [*sizes[0], *overrides]
    try:
        build_case(name, complete)
    except UserError:
        raise
    except Exception as error:  # raised by the objective's code
        raise UserError(f"{name}: cannot be built: {_described(error)}") from None
    for one in CHECKS:
        yield _title(one), _violations(lambda one=one: one(build_case(name, complete)))  # type: ignore[misc]
    yield _title(options_are_read), _violations(lambda: options_are_read(name, [complete, *sizes[1:]]))


def _title(one: Callable) -> str:
    return (one.__doc__ or "").splitlines()[0]


def _violations(run: Callable[[], Iterator[str]]) -> list[str]:
    """The lines that a check yields, or, if the objective's code raises an error, a line with that error."""
    try:
        return list(run())
    except Exception as error:  # raised by the objective's code
        return [_described(error)]


def _described(error: Exception) -> str:
    """An error in one line, with the file and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {str(error).partition(chr(10))[0]} ({Path(last.filename).name}, line {last.lineno})"
    )
