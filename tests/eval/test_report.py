"""The report of a small run folder: every section, one file of valid HTML, unusual input, and artificial features that
must be visible."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import DataError, UserError
from data_pipeline.build.build_shards import build
from data_pipeline.shards.samples import Samples
from eval import feature_map, pictures, report, report_comparison, results, similarity_maps
from eval.features import Encoder
from eval.report_page import page
from launch import commands
from launch.command_parser import HomePath
from pretrain.interchange import export, model_card
from pretrain.models.build import build_model
from pretrain.models.layers import Features
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.recipe_file import write_recipe
from tests.conftest import tiny_recipe, unlabeled
from tests.tars import jpeg, write_tar

OPENING = ["Did it learn?"]
IMAGES = [
    "What the patches learned",
    "Patches at several resolutions",
    "Similarity to a patch",
    "Nearest neighbours",
    "Map of the features",
]
CURVES = ["Curves: learning", "Curves: health"]
SECTIONS = [*OPENING, "Scores", *IMAGES, "Reconstructions", *CURVES, "How to run it again"]
PICTURES = 3 * 4 + 4 * 4 + 4 * 3  # mosaics at 3 checkpoints; four images at 3 sizes; their similarity at 2 checkpoints
MAPS = 2  # of thumbnails
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """The headings, images, captions, links and text of a page. Asserts that only open tags are closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.append((self.open[-1], data))

    def all(self, tag: str) -> list[str]:
        return [text for inside, text in self.text if inside == tag]

    def images(self) -> list[np.ndarray]:
        urls = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        assert all(re.match(r"data:image/(png|jpeg);base64,", url) for url in urls)
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")) for url in urls
        ]


def make_run(run: Path, shards: Path, *overrides: str, steps: int = 40) -> Path:
    data = [f"eval.gallery={shards}", f"eval.val={shards}", f"eval.test={shards}"]
    recipe = tiny_recipe("mae", shards, run, f"steps={steps}", *data, *overrides)
    run.mkdir(parents=True)
    write_recipe(recipe, run)
    for step in (0, 20, 40):
        torch.manual_seed(step)
        about = {"step": step, "objective": "mae", "pool": "mean"}
        export.write(run / "export" / str(step), build_model(recipe.model), about, recipe.data.mean, recipe.data.std)
    rows = []
    for step in range(40):
        rows.append(
            {
                "step": step,
                "loss": 2.0 * 0.9**step,
                "grad_norm": 1.0 + step % 3,
                "lr": 1e-3 * (1 - step / 40),
                "some_term": 0.1 * step,
            }
        )
        if step % 5 == 4:
            rows[-1] |= {"samples_per_second": 8.0, "data_share": 0.02, "loop_share": 0.001}
    rows[7]["loss"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "lo')
    common = {
        "version": 1,
        "gallery": [str(shards)],
        "gallery_count": 48,
        "query": [str(shards)],
        "count": 400,
        "left_out": 0,
        "seconds": 1.0,
    }
    for model, step, split, value in [
        ("pixels", 0, "test", 0.2),
        ("untrained", 0, "test", 0.3),
        ("pretrained", 40, "test", 0.615),
        ("untrained", 0, "val", 0.3),
        ("pretrained", 20, "val", 0.5),
    ]:
        for protocol in ("knn", "linear"):
            for metric, change in (("accuracy", 0.0), ("balanced_accuracy", -0.05)):
                row = {
                    "model": model,
                    "step": step,
                    "protocol": protocol,
                    "split": split,
                    "metric": metric,
                    "value": value + change,
                }
                results.append(run / "results.jsonl", [common | row])
    for step, value in ((0, 0.2), (40, 0.4)):
        row = {"model": "pretrained" if step else "untrained", "step": step, "protocol": "patch_knn", "split": "full"}
        results.append(run / "results.jsonl", [common | row | {"metric": "miou", "value": value}])
    (run / "pictures").mkdir()
    for step in (0, 20, 40):
        Image.new("RGB", (30, 20), (step, 0, 0)).save(run / "pictures" / f"reconstructions-{step:09d}.png")
    (run / "log.txt").write_text(
        f"2026-01-01 00:00:00 {run}: mae on vit_micro (0.1 M parameters trained), 48 samples, batch 16, fp32 on cpu, 1 threads\n"
    )
    return run


def test_images_whose_store_fails_are_not_replaced_by_others(tmp_path: Path):
    """Of two shards one is deleted after the set was opened: no image of the other one stands for its images."""
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", jpeg(number)), (f"{number}.cls", b"a")])
    for gone in (1, 0):
        samples = Samples([str(tmp_path)])
        (tmp_path / f"{gone}.tar").rename(tmp_path / "gone")
        with pytest.raises(DataError):
            pictures.load_some(samples, 2, 8)
        (tmp_path / "gone").rename(tmp_path / f"{gone}.tar")


def test_a_page_replaces_no_file_but_a_page(tmp_path: Path):
    (tmp_path / "a.html").write_text("<title>of the user</title>")
    with pytest.raises(UserError, match=r"a.html: exists already, and this command has not written it"):
        page(tmp_path / "a.html", "a")
    for _ in range(2):
        assert "<title>b\\udcff · unlabeled</title>" in page(tmp_path / "b.html", "b\udcff").read_text()


def test_images_of_other_channels(tmp_path: Path):
    image = io.BytesIO()
    np.save(image, np.arange(8 * 8 * 4, dtype=np.uint8).reshape(8, 8, 4))
    write_tar(tmp_path / "a.tar", [("0.npy", image.getvalue())])
    images, labels, numbers = pictures.load_some(Samples([str(tmp_path)]), 3, 8, channels=4)
    assert images.shape == (1, 4, 8, 8) and labels == [None] and numbers == [0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "my run", shards)


def test_every_section_in_one_file(run: Path, shards: Path):
    path = report.write(run)
    page = Page(path)
    assert path == run / "report.html" and page.all("h1") == ["my run"] and page.all("h2") == SECTIONS
    assert not [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("src", "href") and not value.startswith("data:")
    ]
    assert "url(" not in page.source and "@import" not in page.source and [*dict(page.tags)].count("script") == 1
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    (script,) = re.findall("<script>(.*)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and policy.endswith(f"script-src 'sha256-{digest}'")
    facts = dict(zip(page.all("dt"), page.all("dd"), strict=True))
    assert facts["objective"] == "mae" and facts["training images"] == "48" and facts["precision"] == "fp32 on cpu"
    assert facts["training data"] == str(shards)
    assert facts["training time"] == "80 s"  # 40 steps of 16 images at 8 per second
    assert "finished: 40 steps" in page.source and "unlabeled train &#x27;" in page.source
    text = "".join(text for _, text in page.text)
    assert text.count("+31.5 points over untrained") == 2 and text.count("+41.5 points over pixels") == 2
    assert "61.5%" in text and "± 4.8" in text and "Test accuracy on 400 images with a gallery of 48" in text
    titles = [t for t in page.all("h3") if t.strip()]
    assert titles == [
        "What to do next",
        "k-NN",
        "linear",
        "untrained",  # maps
        "pretrained, step 40",
        "loss",
        "k-NN on val",
        "linear on val",
        "patch_knn on full: miou",
        "some term",
        "learning rate",
        "grad norm",
        "samples per second",
        "share of time",
    ]
    assert "decoder_dim: 32" in text  # the resolved recipe
    opening, _, rest = text.partition("Test accuracy on 400 images")
    assert (
        "Did it learn?k-NN: 61.5% of 400 test images, 31.5 points above the untrained network and 41.5 points above raw pixels."
        in opening
    )
    assert f"unlabeled eval '{run}/export/40' knn linear gallery=SHARDS query=SHARDS" in opening
    assert f"unlabeled export '{run}' FOLDER" in opening and "AutoModel.from_pretrained" in opening
    assert "unlabeled train" not in opening and "loss" in rest  # the run is finished
    # then 8 queries with 6 neighbours each, and the 3 pictures of the objective
    assert len(page.images()) == PICTURES + 8 * 7 + MAPS + 3
    assert [i.shape for i in page.images()[:4]] == [(128, 128, 3), *3 * [(16, 16, 3)]]
    assert [i.shape[0] for i in page.images()[12:16]] == [128, 4, 8, 16]  # an image, and its patches at 3 sizes
    assert [int(i[0, 0, 0]) for i in page.images()[-3:]] == [0, 20, 40]
    assert report.write(run).read_text() == page.source  # the choice of images is deterministic


def test_system_curves_are_folded_and_have_units(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    measured = {
        **{"flops_per_second": 5.498e10, "mfu": 0.41, "memory_gb": 1.31, "epoch": 2.0, "stream/mb": 12.5},
        **{
            "stream/requests": 40,
            "stream/hedges": 3,
            "stream/hits": 7,
            "stream/wait_ms_p50": 0.25,
            "stage": "the model is the bottleneck",
        },
        **{"stream/unheard_of": 1250, "tokens_per_second": 12500.0},
    }
    rows = [row | (measured if "samples_per_second" in row else {}) for row in read_rows(copy / "metrics.jsonl")]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = report.write(copy).read_text()
    before, _, folded = source.partition("<summary>Curves: speed and memory</summary>")
    speed, _, of_data = folded.partition("<summary>Curves: data</summary>")
    of_data = of_data.partition("</details>")[0]
    titles = re.findall(r"<h3>([^<]+)<span>", speed)
    assert titles[:4] == ["samples per second", "share of time", "tokens per second", "model FLOP/s"]
    titles, folded = re.findall(r"<h3>([^<]+)<span>", of_data), speed + of_data
    assert {"hedged requests", "chunks found in the cache", "stream unheard of"} <= set(titles)
    assert "hedged" not in before and "<details" in before[-80:] and "open" not in before[-80:]
    for shown in ("55 GFLOP/s", "1.31 GB", "12.5 MB", "41%", "3 requests", "0.25 ms", "8 samples/s", "12.5k tokens/s"):
        assert f"</b> {shown}<" in folded, shown
    assert "e+" not in folded


def test_the_opening_without_scores(run: Path, tmp_path: Path, shards: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [row | {"value": 0.1} if row["model"] == "pretrained" else row for row in read_rows(copy / "results.jsonl")]
    (copy / "results.jsonl").unlink()
    results.append(copy / "results.jsonl", rows)
    assert '<span class="down">20.0 points below the untrained network</span>' in report.write(copy).read_text()
    bare = make_run(tmp_path / "bare", shards, "eval.gallery=[]", "eval.val=[]", "eval.test=[]", steps=100)
    text = "".join(text for _, text in Page(report.write(bare)).text)
    assert f"unlabeled train {bare}" in text.partition("Curves")[0] and "eval.gallery=SHARDS" in text


def test_an_image_of_the_gallery_is_its_own_nearest_neighbour(run: Path):
    figures = [attrs.get("class") for tag, attrs in Page(report.write(run)).tags if tag == "figure"]
    classes = [kind for kind in figures if kind in ("", "right", "wrong")]
    assert all(
        classes[7 * i] == "" and classes[7 * i + 1] == "right" for i in range(8)
    )  # here the gallery contains the queries


def test_scores_on_the_recipes_data_of_the_last_export_are_used(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    last = read_rows(copy / "results.jsonl")[8]
    assert (last["model"], last["step"], last["metric"]) == ("pretrained", 40, "accuracy")
    results.append(
        copy / "results.jsonl", [last | {"value": 0.99, "step": 20}, last | {"value": 0.98, "gallery": ["elsewhere"]}]
    )
    (copy / "results.jsonl").open("a").write('{"model": "pre')
    source = report.write(copy).read_text()
    assert "61.5%" in source and "99.0%" not in source and "98.0%" not in source


def test_invalid_rows_do_not_change_the_report(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = report.write(copy).read_text()
    score, step = read_rows(copy / "results.jsonl")[8], read_rows(copy / "metrics.jsonl")[0]
    checked = [key for key in score if key not in ("gallery", "query")]
    results.append(copy / "results.jsonl", [score | {key: odd} for key in checked for odd in ({"a": []}, None)])
    results.append(copy / "results.jsonl", [score | {"step": 1 << 62}, {"step": 1}])
    results.append(copy / "metrics.jsonl", [step | {"step": odd} for odd in ("0", None, [], -1, 1 << 62)])
    assert report.write(copy).read_text() == before


def test_extreme_values(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    score = read_rows(copy / "results.jsonl")[8]
    bare = {key: score[key] for key in ("model", "protocol", "split", "gallery", "query", "metric")}
    scores = [bare | {"step": 40, "value": value} for value in (float("inf"), -3.0, 5, 1e308)]  # without counts
    extreme = [
        {"step": 60 + n, "loss": value, "lr": value, "grad_norm": value, "samples_per_second": 1.0}
        for n, value in enumerate((1e308, -1e308, 1e-320, 1 << 62, True, "x", None, {}))
    ]
    results.append(copy / "results.jsonl", scores)
    results.append(copy / "metrics.jsonl", extreme)
    assert "step 40 of 40" not in (source := report.write(copy).read_text()) and "finished: 40 steps" in source


def test_notes_and_a_collapse_are_reported(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert "collapsed" not in report.write(copy).read_text()
    rows = read_rows(copy / "results.jsonl")
    results.append(copy / "results.jsonl", [row | {"note": "48 of 48 <images>"} for row in rows])
    steps = [row | {"feature_std": 0.5 if row["step"] < 10 else 0.01} for row in read_rows(copy / "metrics.jsonl")]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    page = Page(report.write(copy))
    assert "collapsed at step 29 (feature_std), and was still collapsed at the end" in page.source
    assert page.all("p").count("note: 48 of 48 <images>") == 2  # k-NN and linear
    assert "Note: 48 of 48 <images>." in model_card.write(copy / "export" / "40").read_text()


def test_sections_without_content_have_no_heading(run: Path, tmp_path: Path, shards: Path):
    bare = make_run(tmp_path / "bare", shards, "eval.gallery=[]", "eval.val=[]", "eval.test=[]", steps=100)
    for name in ("results.jsonl", "log.txt"):
        (bare / name).unlink()
    shutil.rmtree(bare / "pictures")
    shutil.rmtree(bare / "export" / "0")
    page = Page(report.write(bare))
    assert page.all("h2") == [*OPENING, *IMAGES, *CURVES, "How to run it again"]
    assert "step 40 of 100" in page.source and "Nothing has been scored" in page.source
    assert page.all("figcaption")[:3] == ["image", "pretrained, step 20", "pretrained, step 40"]
    images = page.images()[3 * 3 + 4 * 4 + 4 * 3 :]
    assert len(images) == 8 * 7 + MAPS  # training images; no image is its own neighbour
    assert not any(np.array_equal(images[7 * i], images[7 * i + j]) for i in range(8) for j in range(1, 7))


def test_damaged_images_and_files(run: Path, tmp_path: Path, shards: Path):
    copy = shutil.copytree(shards, tmp_path / "shards")
    samples = Samples([str(copy)])
    (piece,) = samples.pieces(0, 30)
    with Path(piece.url).open("r+b") as tar:
        for offset in piece.records["offset"][::2, samples.extensions.index("jpg")]:
            tar.seek(int(offset))
            tar.write(b"\0" * 100)
    damaged = make_run(tmp_path / "damaged", copy)
    (damaged / "pictures" / "reconstructions-000000040.png").write_bytes(b"\x89PNG no")
    (damaged / "pictures" / "other-000000040.png").write_bytes(b"")
    (damaged / "pictures" / "no-step.png").write_bytes(
        (damaged / "pictures" / "reconstructions-000000000.png").read_bytes()
    )
    page = Page(report.write(damaged))
    assert page.all("h2") == SECTIONS and len(page.images()) == PICTURES + 8 * 7 + MAPS + 2
    assert "among 33 of 48 gallery images" in page.source


def test_missing_data_leaves_the_other_sections(tmp_path: Path, shards: Path):
    copy = shutil.copytree(shards, tmp_path / "<s>shards")
    moved = make_run(tmp_path / "moved", copy)
    shutil.rmtree(copy)
    page = Page(report.write(moved))
    assert page.all("h2") == [name for name in SECTIONS if name not in IMAGES]
    assert f"are missing: {copy}: no such file or folder" in "".join(page.all("p"))


def test_names_are_escaped(tmp_path: Path, photos: Path):
    for name, source in (("<b>", "china"), ("a&\"'", "flower")):
        shutil.copytree(photos / source, tmp_path / "photos" / name)
    build(tmp_path / "photos", tmp_path / "<s>shards")
    run = make_run(tmp_path / "<i>run", tmp_path / "<s>shards")
    Image.new("RGB", (4, 4)).save(run / "pictures" / '<u>"x-000000001.png')
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "<q>a", "text": "<q>b"}\n')
    rows = [row | {'<q>"c': 1.0} for row in read_rows(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report.write(run))
    assert page.all("h1") == ["<i>run"] and page.all("title")[0] == "<i>run · unlabeled"
    assert '<u>"x' in [attrs.get("alt") for tag, attrs in page.tags if tag == "img"]
    assert {"<b>", "a&\"'"} <= {attrs.get("alt") for tag, attrs in page.tags if tag == "img"}
    chosen = [n for n, (_, attrs) in enumerate(page.tags) if attrs.get("class") == "picker"]
    assert {page.tags[n + 1][1]["alt"] for n in chosen} == {"<b>", "a&\"'"}  # the images of similarity maps
    assert '<q>"c' in page.all("h3") and '<q>"c by step' in [attrs.get("aria-label") for _, attrs in page.tags]
    assert page.all("b").count("<q>a") == 1 and page.all("p").count("<q>b") == 1
    assert not {"i", "u", "s", "q"} & {tag for tag, attrs in page.tags if "style" not in attrs}
    assert {"<b>", "a&\"'"} <= {attrs["title"] for tag, attrs in page.tags if tag == "figcaption" and "title" in attrs}
    assert any("✓ <b>" in text for text in page.all("figcaption")) and "rows: <b>" in "".join(page.all("figcaption"))


def test_without_labels_the_features_of_the_training_images_tell(run: Path, tmp_path: Path, shards: Path):
    bare = make_run(tmp_path / "bare", shards, "eval.gallery=[]", "eval.val=[]", "eval.test=[]")
    row = {"protocol": "health", "split": "train", "metric": "rankme", "count": 48, "unit": "images"}
    rows = [
        row | {"model": "untrained", "step": 0, "value": 9.0},
        row | {"model": "pretrained", "step": 40, "value": 7.5},
    ]
    (bare / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    page = Page(report.write(bare))
    text = "".join(text for _, text in page.text)
    assert "health of the features, RankMe: 7.5 of 48 training images, 1.5 below the untrained network." in text
    assert "These numbers need no labels" in text and "rankme of the features" in page.all("h3")


def test_runs_are_compared(run: Path, tmp_path: Path, shards: Path):
    other = make_run(tmp_path / "other <run>", shards, "optim.lr.value=0.5", "model.depth=1", "eval.cache=<run>")
    rows = [row | {"value": row["value"] + (0.05 if row["step"] else 0)} for row in read_rows(other / "results.jsonl")]
    (other / "results.jsonl").unlink()
    results.append(other / "results.jsonl", rows)
    page = Page(report_comparison.write([run, other], tmp_path / "both.html"))
    text = " ".join(" ".join(text for _, text in page.text).split())
    assert page.all("h1") == ["my run · other <run>"] and "script" not in dict(page.tags)
    assert page.all("h2") == [
        "What was trained",
        "Did they learn?",
        IMAGES[0],
        "Maps of the features",
        "Curves",
        "Recipes",
    ]
    assert "66.5% ± 4.6 36.5 points above the untrained network 46.5 points above raw pixels" in text
    assert page.all("b").count("66.5%") == 2 and "61.5%" not in page.all("b")  # by k-NN and linear
    differences = text.partition("differ.")[2]
    assert "optim.lr.value" in differences and "model.depth" in differences and "steps" not in differences
    assert len(page.images()) == 2 * 3 and "loss of mae" in page.all("h3")
    legend = re.findall(r'<b class="(s\d)">([^<]*)</b>', page.source)
    assert {*legend} == {("s0", "my run"), ("s1", "other &lt;run&gt;")}
    swapped = report_comparison.write([other, run], tmp_path / "swapped.html").read_text()
    for source in (page.source, swapped):
        assert "<run>" not in source and ">&lt;run&gt;</td>" in source  # the cache
    for wrong, message in (([run, run], "is named twice"), ([run], "a page compares 2 to 8"), ([run] * 9, "9 runs")):
        with pytest.raises(UserError, match=message):
            report_comparison.write(wrong, tmp_path / "wrong.html")
    with pytest.raises(UserError, match=r"ends in \.html"):
        commands.report([str(run)], out=HomePath("report.pdf"))


@pytest.mark.slow
def test_errors(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is no run folder"):
        report.write(tmp_path)
    for gone, what in (("metrics.jsonl", "has no metrics"), ("export", "has no export")):
        copy = shutil.copytree(run, tmp_path / what.replace(" ", "-"))
        shutil.rmtree(copy / gone) if gone == "export" else (copy / gone).write_text('{"step": 0, "lo')
        with pytest.raises(UserError, match=what):
            report.write(copy)
    done = unlabeled("report", tmp_path)
    assert done.returncode == 2 and "is no run folder" in done.stderr


# ---------------------------------------------------------------- parts
def texture(images: torch.Tensor) -> Features:
    """An artificial encoder: the features of a patch of 8 pixels are its contrast and its brightness."""
    patches = images.mean(1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)  # [B, h, w, 64]
    tokens = torch.stack([patches.std(-1), 0.1 * patches.mean(-1), torch.zeros(patches.shape[:3])], dim=-1)
    return Features(
        tokens.flatten(1, 2).mean(1), tokens.flatten(1, 2), tokens.flatten(1, 2)[:, :0], tuple(patches.shape[1:3])
    )


def test_two_textures_get_two_colours():
    rng = np.random.default_rng(0)
    image = np.full((3, 64, 96), 128, np.uint8)
    image[:, :, 48:] = np.where(np.indices((64, 48)).sum(0) % 2, 40, 216)  # with the same mean
    image = (image + rng.integers(0, 8, image.shape)).astype(np.uint8)
    encoder = Encoder(texture, "planted", 64, [0.5] * 3, [0.25] * 3)
    features = pictures.patch_features(encoder, image)
    assert features.shape == (8, 12, 3)
    colors = pictures.pca_colors(features[None])[0].astype(int)
    left, right = colors[:, :6].reshape(-1, 3), colors[:, 6:].reshape(-1, 3)
    assert colors.shape == (8, 12, 3) and abs(left[:, 0].mean() - right[:, 0].mean()) > 200
    assert max(left[:, 0].std(), right[:, 0].std()) < 20
    assert colors.shape == pictures.pca_colors(features[None, ..., :1])[0].shape  # fewer features than colours


def test_pca_equals_numpys_svd():
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 8)) * np.arange(1, 9)
    colors = pictures.pca_colors(x).reshape(-1, 3)
    flat = x.reshape(-1, 8) - x.reshape(-1, 8).mean(0)
    scores = flat @ np.linalg.svd(flat, full_matrices=False)[2][:3].T
    for i in range(3):
        assert abs(np.corrcoef(scores[:, i], colors[:, i])[0, 1]) > 0.99
    assert np.array_equal(colors, pictures.pca_colors(x + 100).reshape(-1, 3))
    assert not pictures.pca_colors(np.full((1, 2, 2, 4), np.nan)).any()


def test_pairs_are_cosines_of_patches():
    features = np.random.default_rng(0).normal(size=(3, 5, 8))
    flat = features.reshape(15, 8)
    naive = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat])
    found, low = similarity_maps.pairs(features).astype(float), np.percentile(naive, 2)
    assert (np.diag(found) == 255).all()
    assert np.abs(found / 255 - ((naive - low) / (1 - low)).clip(0, 1)).max() < 1 / 255


def test_the_map_keeps_neighbours_as_well_as_scikit_learn():
    from sklearn.datasets import load_digits
    from sklearn.manifold import TSNE, trustworthiness

    features = load_digits().data[:200].astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ours = feature_map.positions(torch.from_numpy(features))
    theirs = TSNE(perplexity=feature_map.PERPLEXITY, init="pca", random_state=0).fit_transform(features)
    assert trustworthiness(features, ours) > trustworthiness(features, theirs) - 0.01
    assert ours.min() == 0 and ours.max() == 1
    for few in (torch.zeros(30, 4), torch.ones(1, 3), torch.randn(5, 1), torch.full((9, 2), torch.nan)):
        assert np.isfinite(feature_map.positions(few)).all() and len(feature_map.positions(few)) == len(few)


def test_images_on_the_map_do_not_cover_each_other():
    images = np.arange(1, 10, dtype=np.uint8).reshape(9, 1, 1, 1) * np.full((9, 3, 8, 8), 20, np.uint8)
    drawn = feature_map.thumbnails(np.full((9, 2), 0.5), images)
    assert {*np.unique(drawn[..., 0])} == {128, *range(20, 200, 20)}
    assert len({(drawn[..., 0] == value).sum() for value in range(20, 200, 20)}) == 1


def test_spread_uses_every_class_and_no_image_twice():
    labels = ["a"] * 40 + ["b"] * 8 + ["c"] * 3 + ["d"] * 100
    groups = pictures.spread(labels, 6, 4)
    assert [{labels[i] for i in group} for group in groups] == [{"a"}, {"b"}, {"d"}] * 2  # c has too few images
    assert len({i for group in groups for i in group}) == 24
    assert [labels[i] for (i,) in pictures.spread(labels, 4, 1)] == ["a", "b", "c", "d"]
    assert len({i for group in pictures.spread([None] * 48, 12, 4) for i in group}) == 48
    assert pictures.spread([f"{i:03d}" for i in range(100)], 8, 1) == [[i * 100 // 8] for i in range(8)]
    assert all(
        i in (0, 1) for group in pictures.spread(["a", "b"], 12, 4) for i in group
    )  # not enough images: some are used twice


def test_a_mosaic_is_filled_row_by_row():
    images = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1) * np.ones((1, 3, 2, 2), np.uint8)
    out = pictures.mosaic(images)
    assert out.shape == (3, 8, 8) and out[0, ::2, ::2].tolist() == np.arange(16).reshape(4, 4).tolist()


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [3.0, 3.0],
        [0.0, 0.0, 0.0],
        list(np.linspace(-5, 1e7, 1000)),
        [1e-9, 2e-9, 5e-9],
        [1.0] * 99 + [1e30],
        [-1e-3, -2e-3],
    ],
)
def test_charts_stay_inside_their_frame(values: list[float]):
    svg = pictures.chart("<x>", {"one": (list(range(len(values))), values)})
    assert "&lt;x&gt;" in svg and "nan" not in svg and "inf" not in svg
    points = [tuple(map(float, p.split(","))) for path in re.findall(r'points="([^"]*)"', svg) for p in path.split()]
    assert points and all(48 <= x <= 408 and 9.9 <= y <= 198.1 for x, y in points) and len(points) <= 1200
    assert 2 <= svg.count("<line") <= 7
    spike = pictures.chart("loss", {"": (list(range(4000)), [1.0] * 1777 + [9.0] * 3 + [1.0] * 2220)}, smooth=False)
    assert (
        min(float(y) for y in re.findall(r",([\d.]+)", spike.partition('raw" points="')[2].partition('"')[0])) < 20
    )  # also in a long run
    assert pictures.chart("empty", {"one": ([], [])}) == ""


def test_ticks_and_numbers():
    assert pictures._ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert pictures._ticks(0.31, 0.36) == pytest.approx([0.31, 0.32, 0.33, 0.34, 0.35, 0.36])
    numbers = {
        0: "0",
        0.35: "0.35",
        1e-3: "0.001",
        2.5e-4: "2.5e-4",
        1e-12: "1e-12",
        999: "999",
        1250: "1.25k",
        12500: "12.5k",
        2e6: "2M",
        -1500: "-1.5k",
        5.498e10: "54.98G",
    }
    assert {value: pictures._number(value) for value in numbers} == numbers
    assert pictures._number(0.325, percent=True) == "32.5%"
    assert [pictures._number(v, unit="FLOP/s") for v in (5.498e10, 3e15, 12)] == [
        "55 GFLOP/s",
        "3 PFLOP/s",
        "12 FLOP/s",
    ]
    assert [pictures._number(v, unit="ms") for v in (1250, 0.25, 0)] == ["1.25k ms", "0.25 ms", "0 ms"]


def test_data_url_keeps_pixels():
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)

    def back(url: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))

    assert np.array_equal(back(pictures.data_url(image)), image) and np.array_equal(
        back(pictures.data_url(image.transpose(2, 0, 1))), image
    )
    assert back(pictures.data_url(np.zeros((200, 100, 3), np.uint8), 96)).shape == (96, 48, 3)
    assert pictures.data_url(np.zeros((1000, 1000, 3), np.uint8)).startswith("data:image/jpeg")
