"""Parts of samples, from their members in a shard to their tensors on the device."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import Absent, ConfigError, Damaged, DataError
from data_pipeline.build.build_shards import build
from data_pipeline.parts.caption import Caption, CaptionTokens, token_row
from data_pipeline.parts.image import Image
from data_pipeline.parts.label import Label
from data_pipeline.parts.part import About, Part
from data_pipeline.parts.tokens import Tokens
from data_pipeline.shards import index
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_rows import Rows
from data_pipeline.stream.stream import Stream, to_device
from pretrain.build import open_samples, parts_of
from pretrain.models.families import Decoder
from pretrain.recipes.recipe import load
from tests.conftest import tokens, unlabeled
from tests.data.building import make, quiet
from tests.tars import jpeg, write_tar

CPU = torch.device("cpu")


@pytest.fixture
def pairs(tmp_path: Path) -> Samples:
    members = []
    for n in range(4):
        members += [(f"{n}.jpg", jpeg(n)), (f"{n}.txt", f"picture {n}".encode()), (f"{n}.cls", b"%d" % (n % 2))]
    write_tar(tmp_path / "a.tar", [*members, ("4.jpg", jpeg(4)), ("4.txt", b"\xff"), ("4.cls", "²".encode())])
    return Samples([str(tmp_path)])


def read(samples: Samples, number: int, parts: dict[str, Part]) -> dict:
    members = samples.read_columns(number, samples.columns([e for part in parts.values() for e in part.extensions]))
    return samples.sample(number, members, parts)


def test_a_sample_has_an_entry_for_each_part(pairs: Samples):
    sample = read(pairs, 1, {"image": Image(), "text": Caption(), "label": Label()})
    assert sample.keys() == {"image", "text", "label"}
    assert sample["image"].shape == (64, 64) and sample["text"] == "picture 1" and sample["label"] == 1


def test_parts_that_cannot_be_decoded_are_damaged(pairs: Samples):
    with pytest.raises(Damaged, match=r"its text is not UTF-8 \(invalid start byte at byte 0\)"):
        read(pairs, 4, {"text": Caption()})
    with pytest.raises(Damaged, match="its label is '²'; a label is the number of a class"):
        read(pairs, 4, {"label": Label()})


def test_a_sample_without_a_part_is_absent_and_a_set_without_one_an_error(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("1.txt", b"a text")])
    samples = Samples([str(tmp_path)])
    with pytest.raises(Absent, match=r"holds no caption member \(txt\)"):
        read(samples, 0, {"image": Image(), "text": Caption()})
    Caption().check([samples], None)
    with pytest.raises(ConfigError, match=r"holds \.jpg, \.txt and no label; members are read whose names end in cls"):
        Label().check([samples], None)


def test_the_names_of_classes_reach_the_views(shards: Path, pairs: Samples):
    assert Label().about([Samples([str(shards)])], None) == {"classes": ("china", "flower")}
    assert Label().about([pairs], None) == Label().about(None, None) == {"classes": ()}
    assert Label().about([pairs, Samples([str(shards)])], None) == {"classes": ()}  # some have no names


def test_a_number_of_a_label_has_one_name_in_a_run(tmp_path: Path):
    """Shards whose numbers stand for other classes are refused; those that lack only the last classes are not."""
    for name, classes in {"all": "cat cow dog", "first": "cat cow", "other": "cow dog"}.items():
        for n, one in enumerate(classes.split()):
            (tmp_path / "in" / name / one).mkdir(parents=True)
            (tmp_path / "in" / name / one / "a.jpg").write_bytes(jpeg(n))
        make(tmp_path / "in" / name, tmp_path / name)
    everything, first, other = (Samples([str(tmp_path / name)]) for name in ("all", "first", "other"))
    Label().check([first, everything], None)
    assert Label().about([first, everything], None) == {"classes": ("cat", "cow", "dog")}
    assert Samples([*first.specs, *everything.specs]).merged().classes == ["cat", "cow", "dog"]
    assert Samples([*other.specs, *everything.specs]).merged().classes == []
    says = rf"{tmp_path}/other: its label 0 is cow, but label 0 of {tmp_path}/all is cat; a number needs one meaning"
    for mixed in ([everything, other], [Samples([str(tmp_path / "all"), str(tmp_path / "other")])]):
        with pytest.raises(ConfigError, match=says):
            Label().check(mixed, None)


def test_a_caption_becomes_a_row_of_tokens(shards: Path):
    part = Caption(tokenizer=str(tokens(shards.parent)), length=12)
    about = About(**part.about(None, None))
    vocabulary = about.vocabulary
    assert vocabulary is not None and about.length == 12 and Caption().about([], None)["vocabulary"] is None
    tokenizer = vocabulary.tokenizer()
    ids = tokenizer.encode("the sea", add_special_tokens=False).ids
    framed = [
        *([vocabulary.bos] * (vocabulary.bos is not None and not vocabulary.joined)),
        *ids,
        *([vocabulary.eos] * (vocabulary.eos is not None)),
    ]
    assert token_row("the sea", about, tokenizer).tolist() == framed + [-1] * (12 - len(framed))
    long = token_row("the sea " * 50, about, tokenizer)
    assert len(long) == 12 and (long >= 0).all() and long[-1] == vocabulary.eos


def test_captions_of_a_field_of_which_one_is_drawn(shards: Path, tmp_path: Path):
    rows = [b'{"c": ["one", "two"]}', b'{"c": "three"}', b'{"d": 1}', b'{"c": [1]}', b"{"]
    members = [m for n, row in enumerate(rows) for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.json", row))]
    write_tar(tmp_path / "a.tar", members)
    data = load("demo", [f"data.tokenizer={tokens(shards.parent)}", "data.length=8", "data.captions=c"]).data
    samples, part = Samples([str(tmp_path)]), Caption().configured(data, None)
    assert read(samples, 0, {"text": part})["text"] == ["one", "two"]
    assert read(samples, 1, {"text": part})["text"] == "three"
    with pytest.raises(Absent, match=r"has no field 'c' with a caption in its .json member; its fields: d"):
        read(samples, 2, {"text": part})
    for number, says in ((3, "'c' is neither a text nor a list of texts"), (4, "is not valid JSON")):
        with pytest.raises(Damaged, match=says):
            read(samples, number, {"text": part})
    part.check([samples], None)
    with pytest.raises(ConfigError, match=r"data.captions = e: none of the first 5 samples of .* its fields: c"):
        Caption(field="e", extensions=("json",)).check([samples], None)
    about = About(**part.about([samples], None))
    make = CaptionTokens(about, Decoder(vocab_size=512, context=8), "objective.text")
    drawn = {tuple(make(["one", "two"], np.random.default_rng(n))["tokens"]) for n in range(20)}
    tokenizer = about.vocabulary.tokenizer()  # type: ignore[union-attr]
    expected = [token_row(word, about, tokenizer) for word in ("one", "two")]
    assert drawn == {tuple(np.where(row < 0, make.pad, row)) for row in expected}
    last = make("one", np.random.default_rng(0))["last"]
    assert expected[0][last] == about.vocabulary.eos  # type: ignore[union-attr]


def test_captions_that_do_not_fit_the_text_model(shards: Path):
    part = Caption(tokenizer=str(tokens(shards.parent)), length=12)
    about = About(**part.about([], None))
    size = about.vocabulary.size  # type: ignore[union-attr]
    for given, vocab_size, context, says in (
        (About(**Caption().about([], None)), 512, 12, "data.tokenizer is empty"),
        (about, size - 1, 12, rf"text.vocab_size = {size - 1}: .* has {size} tokens; write text.vocab_size=512"),
        (about, 512, 11, "data.length = 12: is more than text.context = 11; write data.length=11"),
    ):
        with pytest.raises(ValueError, match=says):
            CaptionTokens(given, Decoder(vocab_size=vocab_size, context=context), "text")
    stand_in = CaptionTokens(About(**Caption(length=12).about(None, None)), Decoder(vocab_size=256, context=12), "text")
    row = stand_in("a b c", np.random.default_rng(0))
    assert row["tokens"].max() < 256 and row["last"] == 3


def test_rows_of_tokens_have_the_length_of_the_recipe(shards: Path):
    rows = Tokens(length=16, packing="best_fit").open([str(tokens(shards.parent))])
    assert isinstance(rows, Rows) and (rows.length, rows.packing, rows.unit) == (16, "best_fit", "rows")
    held_out = Tokens(length=16, packing="best_fit").open([str(tokens(shards.parent))], held_out=True)
    assert held_out.packing == "split"  # type: ignore[attr-defined]
    known = Tokens(length=16).about([rows], None)
    entries = Tokens(length=16).stand_in("tokens", np.random.default_rng(0), About(**known))
    assert entries["tokens"].shape == entries["documents"].shape == (17,)
    assert entries["tokens"].max() < known["vocabulary"].size


def test_tensors_are_placed_by_the_part_that_they_are_made_from():
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    batch = {"global": pixels, "image": pixels, "label": torch.tensor([3]), "mask": torch.tensor([True])}
    parts = {"image": Image(mean=[0.5] * 3, std=[0.5] * 3), "label": Label()}
    out = to_device(batch, CPU, parts, {"global": "image"})
    assert torch.equal(out["global"], torch.ones(1, 3, 2, 2)) and torch.equal(out["image"], out["global"])
    assert out["label"].dtype == torch.int64 and out["mask"].dtype == torch.bool
    assert (
        to_device(batch, CPU, parts)["global"].dtype == torch.uint8
    )  # without `part_of`, it is not known to be an image


@dataclass
class Sound(Part):
    """A user's part: 16-bit sound, which becomes float on the device."""

    extensions = ("npy",)

    def decode(self, members, known):
        with wave.open(BytesIO(members["npy"])) as file:
            return np.frombuffer(file.readframes(file.getnframes()), np.int16)

    def place(self, tensor, device, **extras):
        return tensor.to(device).float() / 32768 * extras["gain"].unsqueeze(1)


def test_a_users_part(tmp_path: Path):
    """Values keep their dtype until they are placed; the extra tensors for `place` are in the batch, too."""
    members = []
    for n in range(4):
        out = BytesIO()
        with wave.open(out, "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(np.full(100, 1000 * (n + 1), np.int16).tobytes())
        members.append((f"{n}.npy", out.getvalue()))
    write_tar(tmp_path / "a.tar", members)

    def views(sample, rng):
        return {"sound": sample["sound"], "sound.gain": np.float32(2)}

    batch = next(Stream(Samples([str(tmp_path)]), views, 4, workers=0, parts={"sound": Sound()}))
    assert batch["sound"].dtype == torch.int16
    placed = to_device({"sound": batch["sound"], "sound.gain": batch["sound.gain"]}, CPU, {"sound": Sound()})
    assert placed.keys() == {"sound"}
    assert placed["sound"][:, 0].sort().values.tolist() == pytest.approx([2000 * (n + 1) / 32768 for n in range(4)])


CHIRPS = '''
"""Chirps: an objective whose second part has members with an extension that is not in INDEXED_EXTENSIONS."""
from dataclasses import dataclass

import numpy as np

from common.errors import Damaged
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import Part
from pretrain.objectives.base import Objective
from pretrain.objectives.options import Options


@dataclass
class Config(Options):
    pass


@dataclass
class Chirp(Part):
    extensions = ("chirp",)

    def decode(self, members, known):
        if len(members["chirp"]) % 2:
            raise Damaged("half a number")
        return np.frombuffer(members["chirp"], np.int16)


class Chirps(Objective):
    parts = {"image": Image(), "chirp": Chirp()}
'''


def test_a_users_part_reads_members_with_another_extension(tmp_path: Path):
    """Without an index, with an index of these members, and from shards that were built from these shards."""
    (tmp_path / "chirps.py").write_text(CHIRPS)
    (tmp_path / "tars").mkdir()
    members = [("5.other", b"z"), ("4.chirp", b"xy")]
    for n in range(4):
        members += [(f"{n}.jpg", jpeg(n)), (f"{n}.chirp", np.full(3, n, np.int16).tobytes())]
    write_tar(tmp_path / "tars" / "a.tar", members)
    cfg = load("mae_vits16", [f"objective={tmp_path / 'chirps.py'}", f"data.train={tmp_path / 'tars'}", "data.batch=4"])
    parts = parts_of(cfg)

    def heard() -> list[list[int]]:
        (samples,) = open_samples(cfg)
        assert samples.extensions == ["jpg", "chirp"] and len(samples) == 5  # the fifth has no image and is skipped
        stream = Stream([samples], lambda sample, rng: {"chirp": sample["chirp"]}, 4, workers=1, parts=parts)
        batch = next(stream)["chirp"]
        stream.close()
        assert {tuple(row) for row in batch.tolist()} <= {(n,) * 3 for n in range(4)}
        return sorted(batch.tolist())

    found = heard()
    index.write(tmp_path / "tars", quiet)
    with pytest.raises(
        ConfigError, match=r"holds \.jpg and no chirp; .* `unlabeled shards index FOLDER --members chirp`"
    ):
        open_samples(cfg)
    done = unlabeled("shards", "index", tmp_path / "tars", "--members", "chirp")
    assert done.returncode == 0 and "4 jpg" in done.stdout.replace(".", "") and heard() == found, done.stdout
    index.write(tmp_path / "tars", quiet)  # a new index keeps the extensions of the old one
    assert heard() == found and not index.verify(tmp_path / "tars", quiet)
    build(tmp_path / "tars", tmp_path / "built", say=quiet)
    cfg.data.train = [str(tmp_path / "built")]
    heard()
    with pytest.raises(
        DataError, match=r"'\.FLAC' is not a valid extension of a member; write up to 32 lower-case letters"
    ):
        index.write(tmp_path / "tars", quiet, further=[".FLAC"])


def test_a_bug_in_views_or_in_a_part_ends_the_run(pairs: Samples):
    """The bug affects one sample in four; as damage, that would be tolerated."""

    def views(sample, rng):
        return {"x": np.float32(1 / (sample["id"] - 2))}

    class Wrong(Label):
        def decode(self, members, known):
            return super().decode(members, known) if members["cls"] != b"1" else {}["no such key"]

    with pytest.raises(ZeroDivisionError):
        next(Stream([pairs], views, 4, workers=0, shuffle=False, parts={"label": Label()}))
    with pytest.raises(KeyError, match="no such key"):
        next(Stream([pairs], lambda sample, rng: {}, 4, workers=0, shuffle=False, parts={"label": Wrong()}))
