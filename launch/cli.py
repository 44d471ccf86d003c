"""The command `unlabeled`. Each sub-command imports only what it needs when it runs, so help and config errors come at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain.errors import UserError, command


def shards_build(args: argparse.Namespace) -> None:
    from data_pipeline.build import build, describe
    from data_pipeline.sources import Options

    options = Options(args.labels, args.image_field, args.text_field, args.label_field, args.lines)
    summary = build(args.source, args.target, args.shard_mb, kind=args.kind, options=options, workers=args.workers)
    print("\n".join(describe(summary, args.target)))


def shards_index(args: argparse.Namespace) -> None:
    from data_pipeline import index

    held = index.write(args.url)
    print(f"{args.url}: {held.samples} samples, {held.total_bytes / 1e6:.1f} MB in {len(held.names)} shards, indexed")


def shards_tokenizer(args: argparse.Namespace) -> None:
    from data_pipeline.tokenizer import train

    vocabulary = train(args.source, args.target, args.vocab, args.specials, int(args.text_mb * 1e6))
    print(f"{args.target}: a byte-level BPE of {vocabulary.size} tokens")


def shards_tokenize(args: argparse.Namespace) -> None:
    from data_pipeline.tokenize_text import describe, tokenize

    summary = tokenize(
        args.source,
        args.target,
        args.tokenizer,
        args.vocab,
        tuple(args.specials),
        args.shard_mb,
        args.block,
        workers=args.workers,
    )
    print("\n".join(describe(summary, args.target)))


def shards_verify(args: argparse.Namespace) -> int:
    from data_pipeline import index

    problems = index.verify(args.url)
    print("\n".join(problems) or f"{args.url}: every byte is as it was indexed")
    return 1 if problems else 0


def shards_stats(args: argparse.Namespace) -> None:
    from data_pipeline import stats

    print("\n".join(stats.describe(stats.gather(args.url))))
    if args.sheet:
        print(f"\n{stats.sheet(args.url, args.sheet)}: pictures of samples from all over the set")


def shards_split(args: argparse.Namespace) -> None:
    from data_pipeline.build import describe
    from data_pipeline.split import split

    sides = split(args.source, args.target, args.val, args.test, args.shard_mb, workers=args.workers)
    for side, summary in sides.items():
        print("\n".join(describe(summary, f"{args.target}/{side}")))


def shards_preview(args: argparse.Namespace) -> None:
    from pretrain.recipe import load

    recipe = load(args.recipe, args.overrides)
    from pretrain.recipe import is_text

    if is_text(recipe):
        from launch import preview_text

        text = "\n".join(preview_text.preview(recipe, args.rows))
        print(f"{text}\n‹ › is not predicted; ⟦seen→asked for⟧")
        return
    from launch.preview import preview

    print(
        f"{preview(recipe, args.out, args.rows)}: a row for each sample, every view that {recipe.objective.name} makes of it"
    )


def train(args: argparse.Namespace) -> int:
    from launch.local import provide, train
    from pretrain.recipe import load

    recipe = load(args.recipe, args.overrides)
    provide(recipe)
    return train(recipe, args.processes)


def evaluate(args: argparse.Namespace) -> None:
    from eval import results
    from eval.run import PROTOCOLS, check, evaluate
    from pretrain import config, recipe

    words = [word for word in args.protocols if "=" not in word]
    check(words)
    data: dict = {"gallery": [], "query": [], "image_size": None}
    run = next((p for p in Path(args.model).resolve().parents if (p / "recipe.yaml").is_file()), None)
    if run is not None:  # an export inside its run: score what the recipe scores
        cfg = recipe.load(run).eval
        data = {"gallery": cfg.test_gallery or cfg.gallery, "query": cfg.test, "image_size": cfg.image_size}
    options: dict[str, dict] = {}
    for key, value in map(config.parse_override, (word for word in args.protocols if "=" in word)):
        section, _, rest = key.partition(".")
        if rest and section in PROTOCOLS:
            options.setdefault(section, {})[rest] = value
        elif key in data:
            data[key] = [value] if isinstance(value, str) else value
        else:
            raise UserError(f"{key!r}: no such option; write gallery=, query=, image_size= or {PROTOCOLS[0]}.OPTION=")
    own = run is not None and len(words) == len(args.protocols)  # nothing was changed: the run's own score
    rows = evaluate(args.model, words or ["knn"], **data, split="test" if own else "custom", options=options)
    for row in rows:
        print(
            f"{row['model']:<12}{row['protocol']:<10}{row['metric']:<20}{row['value']:.4f}   ({row['count']:,} {row['unit']})"
        )
    if run is not None:
        results.append(run / "results.jsonl", rows)


def harness(args: argparse.Namespace) -> None:
    from eval import results
    from eval.harness import evaluate

    rows = evaluate(args.model, args.tasks, args.include, args.shots, args.limit, args.batch, not args.no_bos)
    for row in rows:
        print(f"{row['model']:<12}{row['metric']:<40}{row['value']:.4f}   ({row['count']:,} {row['unit']})")
    run = next((p for p in Path(args.model).resolve().parents if (p / "recipe.yaml").is_file()), None)
    if run is not None:
        results.append(run / "results.jsonl", rows)


def export(args: argparse.Namespace) -> None:
    from pretrain.recipe import load

    run = Path(args.run)
    recipe = load(run)  # before torch is imported: a wrong folder is said at once
    from pretrain import checkpoint
    from pretrain import export as exports
    from pretrain.release import check, opened_by, release
    from pretrain.train import build_objective

    check(args.also)
    store = checkpoint.store_of(run, recipe)
    wanted = store.latest() if args.step is None else checkpoint.name_of(args.step)
    if wanted not in store.whole():
        steps = ", ".join(str(int(name)) for name in store.whole()) or "none"
        raise UserError(f"{run}: no checkpoint {'' if args.step is None else f'of step {args.step}'}; it has: {steps}")
    objective = build_objective(recipe)
    checkpoint.load_model(store, wanted, objective)
    step = int(wanted)
    target = Path(args.target) if args.target else run / "export" / str(step)
    for folder in exports.folders(target, objective).values() if args.target else ():
        if folder.exists():
            raise UserError(f"{folder}: is there already; name another folder, or delete it")
    tokenizer = run / "tokenizer.json"
    folders = exports.save(target, objective, recipe, step, None, tokenizer if tokenizer.is_file() else None, run)
    for folder in folders:
        own, opener = opened_by(folder)
        for line in release(folder, list(dict.fromkeys([own, *args.also] if own else args.also))):
            print(line)
        print(f"{folder}: {opener}")


def generate(args: argparse.Namespace) -> None:
    from pretrain import generate

    sampling = generate.Sampling(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    for piece in generate.text(args.model, args.prompt, sampling):
        print(piece, end="", flush=True)
    print()


def snapshots(args: argparse.Namespace) -> None:
    from pretrain.recipe import load

    run = Path(args.run)
    data = load(run).data
    from eval.snapshots import compare, table

    shards = args.shards or data.train or [shard for source in data.mix for shard in source.shards]
    print(table(compare(run, shards, args.images), run))


def checkpoint_inspect(args: argparse.Namespace) -> None:
    from pretrain import checkpoint_tools

    print("\n".join(checkpoint_tools.inspect(args.path)))


def checkpoint_verify(args: argparse.Namespace) -> int:
    from pretrain import checkpoint_tools

    problems = checkpoint_tools.verify(args.path)
    print("\n".join(problems) or f"{args.path}: every byte is as it was written")
    return 1 if problems else 0


def checkpoint_consolidate(args: argparse.Namespace) -> None:
    from pretrain import checkpoint_tools

    print(f"{checkpoint_tools.consolidate(args.path, args.target)}: open it with safetensors.torch.load_file")


def plan(args: argparse.Namespace) -> None:
    from pretrain.recipe import load

    cfg = load(args.recipe, args.overrides)
    from pretrain import plan

    print("\n".join(plan.describe(cfg, args.device, args.mfu, args.processes)))


def report(args: argparse.Namespace) -> None:
    from eval.report import write

    print(write(Path(args.run)))


def recipes(_: argparse.Namespace) -> None:
    from pretrain import objective, recipe

    for name, purpose in recipe.names().items():
        print(f"{name:<24}{purpose}")
    print("\nobjectives")
    for name in objective.names():
        print(f"{name:<24}{objective.purpose(name)}")


def doctor(_: argparse.Namespace) -> int:
    from launch.doctor import report

    return report()


def demo(args: argparse.Namespace) -> int:
    from launch.demo import demo

    return demo(args.source, args.overrides)


def demo_text(args: argparse.Namespace) -> None:
    from data_pipeline.demo_text import make

    make(Path(args.target), args.source, args.vocab)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        "unlabeled", description="Pretrain foundation models on unlabeled data, from a laptop to a cluster."
    )
    commands = out.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable, text: str, *arguments: tuple[str, dict], under: argparse._SubParsersAction = commands
    ) -> None:
        sub = under.add_parser(name, help=text, description=text)
        for flag, options in arguments:
            sub.add_argument(flag, **options)
        sub.set_defaults(main=run)

    overrides = (
        "overrides",
        {
            "nargs": "*",
            "metavar": "key=value",
            "help": "laid over the recipe, for example steps=100 optim.lr.value=1e-3",
        },
    )
    group = commands.add_parser("shards", help="make WebDataset shards").add_subparsers(
        required=True, metavar="COMMAND"
    )
    workers = ("--workers", {"type": int, "default": 0, "help": "processes (default: one per core)"})
    shard_mb = ("--shard-mb", {"type": float, "default": 256, "help": "MB of the largest shard, about (default 256)"})
    url = ("url", {"help": "folder or URL of shards"})
    add(
        "build",
        shards_build,
        "Write images, videos, text, parquet, lists or other shards as WebDataset shards. What cannot be used is left out and named;"
        " a build that was stopped goes on when the same command is given again.",
        ("source", {"help": "folder, file or URL"}),
        ("target", {"help": "folder or URL for the shards; must not exist"}),
        (
            "--kind",
            {
                "default": "",
                "help": "images, videos, text, image-text, parquet or webdataset (default: what the source holds)",
            },
        ),
        ("--labels", {"default": "", "metavar": "FILE", "help": ".csv, .tsv or .jsonl with path and label of images"}),
        ("--image-field", {"default": "", "metavar": "NAME", "help": "column of image paths, or of image bytes"}),
        ("--text-field", {"default": "", "metavar": "NAME", "help": "column of the text (default: text, caption, …)"}),
        ("--label-field", {"default": "", "metavar": "NAME", "help": "column of the label (default: label, class, …)"}),
        ("--lines", {"action": "store_true", "help": ".txt: a document per line, not per file"}),
        shard_mb,
        workers,
        under=group,
    )
    specials = (
        "--specials",
        {
            "nargs": "+",
            "default": [],
            "metavar": "TOKEN",
            "help": 'special tokens beside <|endoftext|>, <|pad|> and <|mask|>; "sentinels": the 100 of T5',
        },
    )
    add(
        "tokenizer",
        shards_tokenizer,
        "Train a byte-level BPE tokenizer on text shards.",
        ("source", {"help": "folder or URL of text shards"}),
        ("target", {"help": "a .json file to write, or a folder for tokenizer.json and tokenizer_config.json"}),
        ("--vocab", {"type": int, "default": 4096, "help": "tokens, special ones among them (default 4096)"}),
        specials,
        ("--text-mb", {"type": float, "default": 256, "help": "MB of text from all over the set (default 256)"}),
        under=group,
    )
    add(
        "tokenize",
        shards_tokenize,
        "Write text shards as token shards, which training reads. What cannot be used is left out and named; what was stopped goes on when the same"
        " command is given again.",
        ("source", {"help": "folder or URL of text shards, as `unlabeled shards build` writes them"}),
        ("target", {"help": "folder or URL for the token shards; must not exist"}),
        ("--tokenizer", {"default": "", "metavar": "FILE", "help": "a tokenizer.json, or a folder that holds one"}),
        ("--vocab", {"type": int, "default": 0, "help": "train a new tokenizer of so many tokens on the source"}),
        specials,
        ("--shard-mb", {"type": float, "default": 256, "help": "MB of text of the largest shard (default 256)"}),
        ("--block", {"type": int, "default": 1 << 18, "help": "tokens of the longest row to be read (default 262144)"}),
        workers,
        under=group,
    )
    add("index", shards_index, "Write the index of shards that were made elsewhere beside them.", url, under=group)
    add("verify", shards_verify, "Read every byte anew and compare it with the index.", url, under=group)
    add(
        "stats",
        shards_stats,
        "Count what shards hold, and decode up to 1000 images from all over them.",
        url,
        ("--sheet", {"default": "", "metavar": "FILE.png", "help": "draw up to 48 samples into this file"}),
        under=group,
    )
    add(
        "split",
        shards_split,
        "Copy shards into train, val and test by a hash of each key: samples stay on their side when others are added.",
        ("source", {"help": "folder or URL of shards"}),
        ("target", {"help": "folder or URL that gets train/, val/ and test/"}),
        ("--val", {"type": float, "required": True, "help": "share of the samples, for example 0.02"}),
        ("--test", {"type": float, "default": 0.0, "help": "share of the samples (default: none)"}),
        shard_mb,
        workers,
        under=group,
    )
    add(
        "preview",
        shards_preview,
        "Draw what a recipe's model will see: every view of some samples, masked patches dark; of text, print rows with what is predicted.",
        ("recipe", {"help": "a recipe's name, a .yaml file, or a run folder"}),
        overrides,
        (
            "--out",
            {
                "default": "preview.png",
                "metavar": "FILE",
                "help": "picture to write (default preview.png; text is printed)",
            },
        ),
        ("--rows", {"type": int, "default": 8, "help": "samples (default 8)"}),
        under=group,
    )
    add(
        "train",
        train,
        "Train a recipe, or go on with it.",
        ("recipe", {"help": "a recipe's name, a .yaml file, or a run folder"}),
        overrides,
        (
            "--processes",
            {"type": int, "default": 1, "help": "on this machine, with a parallel.mode for several (default 1)"},
        ),
    )
    add(
        "eval",
        evaluate,
        "Score a frozen model. Inside a run folder the recipe says on what; else write gallery=SHARDS query=SHARDS.",
        ("model", {"help": 'an exported folder (RUN/export/STEP), "pixels" or "bytes"'}),
        ("protocols", {"nargs": "*", "metavar": "PROTOCOL|key=value", "help": "knn, linear; options such as knn.k=20"}),
    )
    add(
        "export",
        export,
        "Write a checkpoint's encoder as config.json + model.safetensors with a model card; each form is opened again and compared.",
        ("run", {"help": "run folder"}),
        ("target", {"nargs": "?", "help": "folder to write (default RUN/export/STEP)"}),
        ("--step", {"type": int, "help": "which checkpoint (default: the newest)"}),
        (
            "--also",
            {
                "nargs": "+",
                "default": [],
                "metavar": "FORM",
                "help": "timm, official, torch, onnx: written into the folder as well",
            },
        ),
    )
    add(
        "generate",
        generate,
        "Go on with a text, with an exported language model; text comes as it is made.",
        ("model", {"help": "an exported folder (RUN/export/STEP), or one of transformers with tokenizer.json"}),
        ("prompt", {"nargs": "?", "default": "", "help": "what to go on from (default: the beginning of a document)"}),
        ("--max-tokens", {"type": int, "default": 200, "help": "at most (default 200)"}),
        ("--temperature", {"type": float, "default": 0.8, "help": "0: always the likeliest token (default 0.8)"}),
        ("--top-k", {"type": int, "help": "draw from the k likeliest tokens only"}),
        ("--top-p", {"type": float, "help": "draw from the fewest tokens that have this share of the probability"}),
        ("--seed", {"type": int, "default": 0, "help": "another number, another text (default 0)"}),
    )
    add(
        "harness",
        harness,
        "Score an exported decoder with lm-evaluation-harness.",
        ("model", {"help": "an exported folder (RUN/export/STEP)"}),
        ("tasks", {"nargs": "+", "help": "names of tasks"}),
        ("--include", {"help": "a folder of YAML files of your own tasks"}),
        ("--shots", {"type": int, "help": "examples before each question (default: the task's)"}),
        ("--limit", {"type": int, "help": "documents of each task (default: all)"}),
        ("--batch", {"type": int, "default": 16, "help": "texts at a time (default 16)"}),
        ("--no-bos", {"action": "store_true", "help": "no BOS before a context"}),
    )
    add(
        "snapshots",
        snapshots,
        "Say which export of a run serves best as a Gram teacher, by how clean its patch similarities are; no labels are needed.",
        ("run", {"help": "run folder"}),
        ("--shards", {"nargs": "+", "help": "images to look at (default: the run's data)"}),
        ("--images", {"type": int, "default": 64, "help": "how many (default 64)"}),
    )
    saved = commands.add_parser("checkpoint", help="look into, check or convert a checkpoint").add_subparsers(
        required=True, metavar="COMMAND"
    )
    path = ("path", {"help": "RUN/checkpoints/STEP, a URL, or a run: its latest"})
    add(
        "inspect",
        checkpoint_inspect,
        "Say what a checkpoint is: step, recipe, data, versions, tensors.",
        path,
        under=saved,
    )
    add("verify", checkpoint_verify, "Read every byte and compare it with what was written.", path, under=saved)
    add(
        "consolidate",
        checkpoint_consolidate,
        "Write the model of a checkpoint, from any number of processes, as one safetensors file.",
        path,
        ("target", {"nargs": "?", "default": ".", "help": "file.safetensors, or a folder (default: here)"}),
        under=saved,
    )
    add(
        "plan",
        plan,
        "Say before a run what it takes: parameters, FLOPs, memory and traffic of a process, hours. Allocates nothing, reads no data.",
        ("recipe", {"help": "a recipe's name, a .yaml file, or a run folder"}),
        overrides,
        ("--device", {"default": "h100", "help": "h100, a100, …: for the hours (default h100)"}),
        ("--mfu", {"type": float, "default": 0.4, "help": "share of its peak that it reaches (default 0.4)"}),
        ("--processes", {"type": int, "default": 1, "help": "one for each device (default 1)"}),
    )
    add("report", report, "Write RUN/report.html.", ("run", {"help": "run folder"}))
    add("recipes", recipes, "List recipes and objectives.")
    add("doctor", doctor, "Say what is installed, what is missing, and the command that installs it.")
    source = (
        "--source",
        {
            "default": "auto",
            "choices": ["auto", "materials", "digits"],
            "help": "the images (default: materials, else digits)",
        },
    )
    add(
        "demo",
        demo,
        "Fetch real photographs, pretrain on them without labels, score, and write a report.",
        source,
        overrides,
    )
    add(
        "demo-text",
        demo_text,
        "Fetch real text and make token sets of it: TARGET/train, TARGET/val and TARGET/test, with a tokenizer of their own.",
        ("target", {"nargs": "?", "default": "runs/demo-text", "help": "folder (default runs/demo-text)"}),
        (
            "--source",
            {
                "default": "auto",
                "choices": ["auto", "speeches", "stdlib"],
                "help": "the text (default: the State of the Union addresses, else Python's standard library)",
            },
        ),
        ("--vocab", {"type": int, "default": 4096, "help": "tokens of its tokenizer (default 4096)"}),
    )
    return out


def main() -> int:
    def run() -> int | None:
        own = parser()
        args, rest = own.parse_known_args()
        if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            args = own.parse_args()  # says what it does not know
        else:
            args.overrides += rest  # overrides behind an option, which argparse takes for too many
        return args.main(args)

    return command(run)


if __name__ == "__main__":
    sys.exit(main())
