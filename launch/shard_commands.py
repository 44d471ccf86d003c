"""The commands `unlabeled shards …`, one function for each (see `command_parser.py`). Each function imports what it
needs when it runs, so that help and errors of the command line are printed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from common.output import say
from launch.argument_types import NO_FILE, Overrides, RecipeName, ShardMb, Shards, Workers
from launch.command_parser import HomePath

PREVIEW = HomePath("preview.png")
Bits = Annotated[int, "N", "bits that 16-bit images use: numbers from 0 to 2^N - 1 stand for 0 to 1 (default 16)"]
AsStored = Annotated[bool, "do not rotate or mirror images as their EXIF orientation says"]
SpecialTokens = Annotated[
    Sequence[str],
    "TOKEN",
    'special tokens in addition to <|endoftext|>, <|pad|> and <|mask|>; "sentinels" stands for the 100 sentinels of T5',
]


def build(
    source: Annotated[str, "folder, file or URL of the data"],
    target: Annotated[str, "folder or URL for the shards; must not exist"],
    *,
    kind: Annotated[
        str,
        "KIND",
        "images, arrays, tiles, slices, videos, frames, frame-folders, audio, text, image-text, parquet or webdataset"
        " (default: detected from the names of the files); for a folder that holds only videos, `images` stands for their frames",
    ] = "",
    labels: Annotated[HomePath, "FILE", ".csv, .tsv or .jsonl file with a path and a label for each image"] = NO_FILE,
    image_field: Annotated[str, "NAME", "column that holds the path or the bytes of the image"] = "",
    text_field: Annotated[str, "NAME", "column that holds the text (default: text, caption, …)"] = "",
    label_field: Annotated[str, "NAME", "column that holds the label (default: label, class, …)"] = "",
    lines: Annotated[bool, "read each line of a .txt file as a document, instead of each file"] = False,
    bits: Bits = 0,
    as_stored: AsStored = False,
    max_pixels: Annotated[
        int,
        "N",
        "number of pixels of the largest image that is accepted; if you raise it, also train with data.max_pixels=N",
    ] = 100_000_000,
    separator: Annotated[str, "TEXT", "text between two documents of a .txt file, for example '<|endoftext|>'"] = "",
    frames_every: Annotated[
        float | None,
        "SECONDS",
        "store frames of videos as images, as JPEG of quality 95: the first frame of every interval of this length"
        " (default 1)",
    ] = None,
    tile: Annotated[
        int | None,
        "PIXELS",
        "cut images into square tiles of this side, stored without loss; slides, TIFFs and .npy arrays are read row by row"
        " and may be larger than memory",
    ] = None,
    tile_level: Annotated[
        int, "N", "level of a slide from which tiles are cut, such as 1 for the second largest one (default 0)"
    ] = 0,
    tile_min_std: Annotated[
        float,
        "STD",
        "leave out tiles whose standard deviation is lower, such as 0.02 for empty background; for unsigned numbers it is"
        " a share of their range",
    ] = 0.0,
    tile_jpeg: Annotated[int | None, "QUALITY", "store tiles of 8-bit grey or colours as JPEG of this quality"] = None,
    window: Annotated[
        str,
        "LOW,HIGH",
        "DICOM and NIfTI: store the numbers between these two, such as Hounsfield units, as 16-bit grey; others are cut off",
    ] = "",
    dicom_fields: Annotated[
        str,
        "NAME,…",
        "DICOM: keywords whose values each sample states, such as PatientID,SeriesInstanceUID; by default none, because they"
        " may identify patients",
    ] = "",
    fps: Annotated[
        float | None,
        "N",
        "each sub-folder of numbered JPEGs or PNGs is a video with N frames per second; the files are not encoded again",
    ] = None,
    seconds: Annotated[
        float | None,
        "N",
        "audio: cut recordings that are longer than this into equal pieces, which are stored as mono 16-bit FLAC",
    ] = None,
    shard_mb: ShardMb = 256.0,
    workers: Workers = 0,
) -> None:
    """Write images, videos, audio, text, parquet files, tables or other shards as WebDataset shards. Samples that cannot be
    used are left out and listed. A build that was stopped continues when the same command is given again."""
    from data_pipeline.build.build_shards import build, describe
    from data_pipeline.build.sources import Options

    options = Options(
        labels,
        image_field,
        text_field,
        label_field,
        lines,
        bits or Options.bits,
        as_stored,
        _unescaped(separator),
        frames_every=frames_every,
        fps=fps,
        tile=tile,
        tile_level=tile_level,
        tile_min_std=tile_min_std,
        tile_jpeg=tile_jpeg,
        window=window,
        dicom_fields=dicom_fields,
        seconds=seconds,
        max_pixels=max_pixels,
    )
    summary = build(source, target, shard_mb, kind=kind, options=options, workers=workers)
    say(*describe(summary, target))


def _unescaped(text: str) -> str:
    """`text` with the escapes \\n and \\t, which a shell leaves as they are, replaced by a newline and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def index(
    url: Shards,
    *,
    bits: Bits = 0,
    as_stored: AsStored = False,
    members: Annotated[
        Sequence[str], "EXTENSION", "further extensions to index, for a part that you have written, for example seg"
    ] = (),
) -> None:
    """Write an index beside shards that other tools have made."""
    from data_pipeline.build.sources.source import check_bits
    from data_pipeline.build.stats import summarize
    from data_pipeline.shards import durations, index
    from data_pipeline.shards.samples import Samples

    check_bits(bits or 16)
    pixel_options = ({"bits": bits} if bits else {}) | ({"as_stored": True} if as_stored else {})
    manifest = index.write(url, extra=pixel_options, further=members)
    samples = Samples([url])
    durations.write(samples)
    say(*summarize(samples, left_out=False))
    megabytes, shards = manifest.total_bytes / 1e6, len(manifest.names)
    say(f"{url}: indexed {manifest.samples} samples, {megabytes:.1f} MB in {shards} shards")


def tokenizer(
    source: Annotated[str, "folder or URL of text shards"],
    target: Annotated[str, "a .json file, or a folder for tokenizer.json and tokenizer_config.json"],
    *,
    vocab: Annotated[int, "N", "size of the vocabulary, including special tokens"] = 4096,
    specials: SpecialTokens = (),
    text_mb: Annotated[float, "MB", "amount of text to train on, taken from all parts of the set"] = 256.0,
) -> None:
    """Train a byte-level BPE tokenizer on text shards."""
    from data_pipeline.build.tokenizer import check_new, train

    check_new(target)

    vocabulary = train(source, target, vocab, specials, int(text_mb * 1e6))
    say(f"{target}: a byte-level BPE tokenizer with {vocabulary.size} tokens")


def tokenize(
    source: Annotated[str, "folder or URL of text shards, as `unlabeled shards build` writes them"],
    target: Annotated[str, "folder or URL for the token shards; must not exist"],
    *,
    tokenizer: Annotated[HomePath, "FILE", "a tokenizer.json, or a folder that contains one"] = NO_FILE,
    vocab: Annotated[int, "N", "train a new tokenizer with N tokens on the source"] = 0,
    specials: SpecialTokens = (),
    shard_mb: Annotated[float, "MB", "text in the largest shard"] = 256.0,
    block: Annotated[int, "N", "number of tokens in the longest row that training will read"] = 1 << 18,
    workers: Workers = 0,
) -> None:
    """Write text shards as token shards, which training reads. Documents that cannot be used are left out and listed.
    A call that was stopped continues when the same command is given again."""
    from data_pipeline.build.tokenize_text import describe, tokenize

    summary = tokenize(
        source,
        target,
        tokenizer,
        vocab,
        tuple(specials),
        shard_mb,
        block,
        workers=workers,
    )
    say(*describe(summary, target))


def verify(url: Shards) -> int:
    """Read all bytes of shards again and compare them with the hashes in their index."""
    from data_pipeline.shards import index

    problems = index.verify(url)
    say(*problems or [f"{url}: every byte is as it was indexed"])
    return 1 if problems else 0


def stats(
    url: Shards, *, sheet: Annotated[HomePath, "FILE.png", "write a contact sheet of up to 48 samples"] = NO_FILE
) -> None:
    """Count the members of shards, and decode up to 1000 images from all parts of the set."""
    from data_pipeline.build import contact_sheet, stats

    say(*stats.describe(stats.gather(url)))
    if sheet:
        say("", f"{contact_sheet.sheet(url, sheet)}: a contact sheet of samples from all parts of the set")


def split(
    source: Shards,
    target: Annotated[str, "folder or URL in which train/, val/ and test/ are written"],
    *,
    val: Annotated[float, "SHARE", "share of the samples for validation, for example 0.02"],
    test: Annotated[float, "SHARE", "share of the samples for the test (default 0)"] = 0.0,
    shard_mb: ShardMb = 256.0,
    workers: Workers = 0,
) -> None:
    """Copy shards into train, val and test sets. A hash of the key of a sample determines its set, so that the set does
    not change when samples are added to the source."""
    from data_pipeline.build.build_shards import describe
    from data_pipeline.build.split import split

    sides = split(source, target, val, test, shard_mb, workers=workers)
    for side, summary in sides.items():
        say(*describe(summary, f"{target}/{side}"))


def preview(
    recipe: RecipeName,
    overrides: Overrides = (),
    *,
    out: Annotated[HomePath, "FILE", "image file to write; for a text recipe, rows are printed instead"] = PREVIEW,
    rows: Annotated[int, "N", "number of samples"] = 8,
) -> None:
    """Draw the input of a recipe's model: all views of some samples, with masked patches darkened. For a text recipe,
    print some rows and mark the tokens that the model predicts."""
    from pretrain.recipes.recipe import load

    resolved = load(recipe, overrides)
    from pretrain import image_folders

    image_folders.use_shards(resolved)
    if resolved.model.reads == "tokens":
        from launch import preview_text

        say(
            *preview_text.preview(resolved, rows),
            "‹…› is a token that the model does not predict; ⟦a→b⟧ is a masked token: it reads a and predicts b",
        )
        return
    if resolved.model.reads == "audio":
        from launch import preview_audio

        path = preview_audio.preview(resolved, out, rows)
        say(f"{path}: spectrograms of {rows} cuts; what {resolved.objective.name} masks is dark")
        return
    from launch.preview import preview

    say(f"{preview(resolved, out, rows)}: one row for each sample, with all views that {resolved.objective.name} makes")
