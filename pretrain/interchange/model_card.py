"""Write the model card of an export, the README.md in its folder: how to load the model, its scores, its training data
with fingerprints, and its recipe. All of this is read from files of the run and of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import yaml_values
from common.errors import UserError
from common.output import printable
from common.untrusted import schema_error
from data_pipeline.formats.pixels import top_level
from pretrain.interchange import run_facts
from pretrain.interchange.layouts import transformers_audio
from pretrain.interchange.layouts import transformers_image_text as image_text
from pretrain.interchange.layouts.transformers_text import CLASSES, OWN
from pretrain.interchange.weight_sources import model_config
from pretrain.recipes.recipe import stored
from pretrain.recipes.sections import BATCH_SCHEMA, batch_text
from pretrain.run_folder.export_folders import run_of
from pretrain.run_folder.jsonl_rows import read_rows


def write(folder: Path, run: Path | None = None) -> Path:
    """Write the model card of the export in `folder`. Returns the path of the card.

    `run` is the folder of its run; it has to be given only for an export outside RUN/export/. If no run is known, the
    card has no scores, data and recipe. Raises UserError if the run's recipe cannot be used."""
    fields = json.loads((folder / "config.json").read_text())
    run = run or run_of(folder)
    lines = [*_head(fields), *_use(fields)]
    if run is not None:
        about = fields["unlabeled"]
        lines += [*_scores(run, about.get("step"), about.get("student")), *_training(run), *_recipe(run)]
    target = folder / "README.md"
    temporary = folder / ".README.md"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(target)
    return target


def _head(fields: dict[str, Any]) -> list[str]:
    about, task = fields["unlabeled"], _text_task(fields)
    library = "unlabeled" if fields["model_type"].startswith("unlabeled") else "transformers"
    model = about["model"]
    verb = "trained" if "id2label" in fields else "pretrained"
    name = f"{model['name']}, {verb} with {about.get('objective')}"
    options = ", ".join(
        f"{k} {v}"
        for k, v in model.items()
        if k
        in ("dim", "depth", "heads", "patch_size", "widths", "depths", "registers", "architecture", "frames", "tubelet")
        or (task and k in ("vocab_size", "context"))
    )
    if task:
        summary = "A language model trained by `unlabeled`."
        more = ""
    else:
        summary = "A backbone trained without labels by `unlabeled`."
        if "id2label" in fields:
            summary = "An image classifier, trained on labelled images by `unlabeled`."
        if "segmenter" in about:
            summary = "A segmentation model, trained on images with masks by `unlabeled`."
        if "text" in about:
            summary = "An image model and a text model, trained on images and their captions by `unlabeled`."
        more = f" {_input(about)} Features are pooled by {about.get('pool', 'cls')}."
    kind = task or _task(about)
    return [
        "---",
        f"library_name: {'timm' if 'architecture' in fields else library}",
        f"tags: [{'image-classification' if 'id2label' in fields else f'self-supervised, {kind}'}]",
        "---",
        f"# {name}, step {about.get('step')}",
        "",
        summary,
        f"Options: {options}.{more}",
        "",
    ]


def _input(about: dict[str, Any]) -> str:
    """A sentence on how the input of the model was made in training."""
    if "audio" not in about:
        dtype = about.get("pixel_dtype", "uint8")
        scale = "in their own unit" if dtype == "float32" else f"after division by {top_level(dtype):,}"
        return f"Pixels ({dtype}): mean {about['mean']}, std {about['std']} {scale}."
    audio = about["audio"]
    scaled = f" of mean {audio['mean'][0]:g}, std {audio['std'][0]:g}" if "mean" in audio else ""
    return (
        f"Input: log-mel features{scaled} (Kaldi's fbank of 16-bit samples) with {audio['mels']} bands of audio at"
        f" {audio['sample_rate']} Hz, in training of {audio['seconds']:g} s."
    )


def _task(about: dict[str, Any]) -> str:
    """The same for a model of images, clips or audio."""
    if "text" in about:
        return "zero-shot-image-classification"
    if "fps" in about:
        return "feature-extraction"
    return "audio" if "audio" in about else "image-feature-extraction"


def _text_task(fields: dict[str, Any]) -> str:
    """The name that the Hugging Face hub has for the task of a text model; "" for other models."""
    tasks = {"bert": "fill-mask", "t5": "text2text-generation", OWN: "text-generation"}
    return tasks.get(fields["model_type"], "text-generation" if fields["model_type"] in CLASSES else "")


def _use_of_dual_encoder(fields: dict[str, Any]) -> list[str]:
    kind = fields["unlabeled"]["text"]["kind"]
    if fields["model_type"] in image_text.CLASSES:
        name = image_text.CLASSES[kind]
        return [
            f"    from transformers import AutoImageProcessor, AutoTokenizer, {name}",
            f"    model = {name}.from_pretrained(FOLDER).eval()",
            '    images = AutoImageProcessor.from_pretrained(FOLDER)(image, return_tensors="pt")',
            "    texts = AutoTokenizer.from_pretrained(FOLDER)(",
            '        ["a photo of a cat"], padding="max_length", truncation=True, return_tensors="pt"',
            "    )",
            '    logits = model(pixel_values=images.pixel_values, input_ids=texts["input_ids"]).logits_per_image',
            "",
        ]
    overrides = image_text.unsupported(kind, *_models(fields))
    why = (
        f"runs with {' '.join(overrides)} have one"
        if overrides
        else "it needs a tokenizer whose EOS is not the token 2"
    )
    return [
        "    from pretrain.interchange import export, text_sides",
        "    (encoder, about), side = export.load(FOLDER), text_sides.load(FOLDER)",
        "    logits = side.logits(side.embed_images(encoder(images).cls), side(tokens, places_of_eos))",
        "",
        f"`transformers` has no class for this model; {why}.",
        "",
    ]


def _models(fields: dict[str, Any]) -> list[Any]:
    """The options of the image model and of the text model of a dual encoder."""
    described = [dict(one) for one in (fields["unlabeled"]["model"], fields["unlabeled"]["text"]["model"])]
    return [model_config(one.pop("name"), one, "config.json") for one in described]


def _use(fields: dict[str, Any]) -> list[str]:
    if "text" in fields["unlabeled"]:
        return _use_of_dual_encoder(fields)
    if fields["model_type"] in CLASSES:
        name = CLASSES[fields["model_type"]]
        return [
            f"    from transformers import AutoTokenizer, {name}",
            f"    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), {name}.from_pretrained(FOLDER).eval()",
            "",
            *([] if name == "BertForMaskedLM" else ['or `unlabeled generate FOLDER "Once upon a time"`.', ""]),
        ]
    if fields["model_type"].startswith("unlabeled"):
        return [
            "    from pretrain.interchange.weights import load_backbone",
            "    encoder, about = load_backbone(FOLDER)",
            "",
        ]
    audio = fields["unlabeled"].get("audio")
    conformer = fields["model_type"] == transformers_audio.KIND
    if audio and (not conformer or audio["sample_rate"] != transformers_audio.RATE):
        name, shape = "pixel_values", f"1, {audio['mels']}, frames"
        if conformer:  # transformers has no extractor for this sample rate
            stack = fields["unlabeled"]["model"]["stack"]
            name, shape = "input_features", f"frames / {stack}, {stack * audio['mels']}"
        return [
            "    from transformers import AutoModel",
            "    model = AutoModel.from_pretrained(FOLDER).eval()",
            f"    # inputs: normalised log-mel features [recordings, {shape}]; transformers cannot compute them",
            f"    features = model({name}=inputs).last_hidden_state",
            "",
        ]
    if conformer:
        return [
            "    from transformers import AutoFeatureExtractor, AutoModel",
            "    extractor, model = AutoFeatureExtractor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER).eval()",
            '    inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")  # from -1 to 1, mono',
            "    features = model(**inputs).last_hidden_state",
            "",
        ]
    if fields["unlabeled"].get("fps"):
        return _use_of_clips(fields)
    if "architecture" in fields:
        return ["    import timm", '    model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()', ""]
    channels = fields["unlabeled"]["model"].get("in_channels", 3)
    guessed = channels in (1, 3, 4)  # numbers of channels by which the processor finds their axis
    inputs = (
        'image, return_tensors="pt"' if guessed else 'image, input_data_format="channels_last", return_tensors="pt"'
    )
    shape = (
        []
        if channels == 3
        else [f"    # image: an array [height, width, {channels}], in the unit of the training data"]
    )
    if fields["architectures"][0].endswith("ForImageClassification"):
        return [
            "    from transformers import AutoImageProcessor, AutoModelForImageClassification",
            "    processor = AutoImageProcessor.from_pretrained(FOLDER)",
            "    model = AutoModelForImageClassification.from_pretrained(FOLDER).eval()",
            *shape,
            f"    logits = model(**processor({inputs})).logits  # names: model.config.id2label",
            "",
        ]
    first = "  # [images, channels, rows, columns]" if fields["model_type"] == "resnet" else "  # class token first"
    return [
        "    from transformers import AutoImageProcessor, AutoModel",
        "    processor, model = AutoImageProcessor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER).eval()",
        *shape,
        f"    features = model(**processor({inputs})).last_hidden_state{first}",
        "",
    ]


def _use_of_clips(fields: dict[str, Any]) -> list[str]:
    frames, fps = fields["unlabeled"]["model"]["frames"], fields["unlabeled"]["fps"]
    only_encoder = ", skip_predictor=True" if fields["model_type"] == "vjepa2" else ""
    predictor = ["The predictor of V-JEPA 2 is no part of this export.", ""] if only_encoder else []
    return [
        f"    # frames: a list of {frames} pictures, {fps:g} of each second of the video",
        "    from transformers import AutoModel, AutoVideoProcessor",
        "    processor, model = AutoVideoProcessor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER).eval()",
        f'    tokens = model(**processor(frames, return_tensors="pt"){only_encoder}).last_hidden_state',
        "",
        *predictor,
    ]


def _scores(run: Path, step: int | None, student: str | None) -> list[str]:
    """The section with the scores at a step: of the recipe's model, or of `student`, an additional student of a
    distillation. It begins with their distances from floors."""
    names = (student,) if student else ("untrained", "pretrained")
    all_rows = read_rows(run / "results.jsonl")
    rows = [r for r in all_rows if r["step"] == step and r.get("model") in names]
    if not rows:
        return ["## Scores", "", "The model of this step has not been evaluated.", ""]
    lines = ["## Scores", ""]
    if step:
        split, found = run_facts.best_evidence(all_rows, step, student or "pretrained")
        lines += [f"- {finding.sentence(split)}" for finding in found] + [""]
    lines += ["| split | protocol | metric | value | of |", "|---|---|---|---|---|"]
    newest = {(r["split"], r["protocol"], r["metric"]): r for r in rows}  # later rows replace earlier ones
    lines += [
        f"| {s} | {p} | {m} | {r['value']:.4f} | {r.get('count', 0)} {r.get('unit', 'images')} |"
        for (s, p, m), r in newest.items()
    ]
    notes = dict.fromkeys(row["note"] for row in newest.values() if row.get("note"))
    return [*lines, "", *(f"Note: {printable(note)}.\n" for note in notes)]


def _training(run: Path) -> list[str]:
    """The sections on the training and on its data."""
    recipe, rows = stored(run), read_rows(run / "metrics.jsonl")
    lines = ["## Training", ""]
    lines += [f"- {name}: {printable(value)}" for name, value in run_facts.facts(run, recipe, rows).items()]
    if verdict := run_facts.collapse(recipe, rows):
        lines.append(f"- This run {verdict}.")
    lines.append("")
    if sets := run_facts.data_sets(run):
        lines += ["## Data", "", *(f"- {line}" for line in sets), ""]
    return lines


def _recipe(run: Path) -> list[str]:
    recipe = yaml_values.read_yaml(run / "recipe.yaml")
    if wrong := schema_error(recipe, {"steps": int, "data": {"batch": BATCH_SCHEMA}, "precision": str}):
        raise UserError(f"{run}/recipe.yaml: is not the resolved recipe of a run ({wrong})")
    steps, batch = recipe["steps"], recipe["data"]["batch"]
    text = printable((run / "recipe.yaml").read_text().strip(), keep="\n\t")
    unit = "samples" if isinstance(batch, int) else "recordings"
    summary = f"{steps} steps of {batch_text(batch)} {unit}, {recipe['precision']}."
    if "context" in recipe["model"]:
        length = recipe["data"]["length"] or recipe["model"]["context"]
        summary = (
            f"{steps} steps of {batch} rows of {length} tokens, {steps * batch * length:,} tokens in all,"
            f" {recipe['precision']}."
        )
    return ["## Recipe", "", summary, "", "```yaml", text, "```"]
