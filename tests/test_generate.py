"""Generation: the sampler compared with a loop without a cache, its options, output in whole characters, and the
command with our folders and those of transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import UserError
from eval import generate
from eval.generate import Sampling
from launch.cli import main
from pretrain.interchange import export
from tests.parity.test_text_models import ABOUT, MODELS, SMALL, build, hf

__all__ = ["hf"]
SPECIALS = ["<|endoftext|>", "<|pad|>", "<|mask|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer in which every byte is a token."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator([], trainers.BpeTrainer(vocab_size=259, special_tokens=SPECIALS, initial_alphabet=alphabet))
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    own.save(str(path))
    return path


@pytest.mark.parametrize("options", [{}, {"windows": [4, 0], "kv_heads": 2}, {"positions": "learned"}])
def test_the_same_as_without_a_cache(options: dict):
    model, prompt = build("gpt", {**SMALL, **options}), [5, 9, 2]
    for sampling in (Sampling(12, 0.0), Sampling(12, 1.0, seed=4)):
        made = list(generate.tokens(model, prompt, sampling))
        generator, whole = torch.Generator().manual_seed(4), list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = model.head(model(torch.tensor([whole])).tokens[0, -1])
            whole.append(sampling.draw(logits, generator))
        assert whole[3:] == made and len(set(made)) > 1


def test_t5_is_what_transformers_generates(tmp_path: Path, hf: ModuleType, tokenizer: Path):
    model = build("t5_small", {**MODELS["t5"][1], "vocab_size": 260})
    export.write(tmp_path / "out", model, ABOUT, tokenizer=tokenizer)
    theirs = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    ids = Tokenizer.from_file(str(tokenizer)).encode("the cat").ids
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0].tolist()
    ours = list(generate.tokens(model, ids, Sampling(9, 0.0), [0], start=1))
    assert made[0] == 1 and [token for token in made[1:] if token != 0] == ours


def test_what_t5_reads_ends_as_in_training(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    export.write(
        tmp_path / "out", build("t5_small", {**MODELS["t5"][1], "vocab_size": 260}), ABOUT, tokenizer=tokenizer
    )
    read = []
    monkeypatch.setattr(generate, "tokens", lambda model, prompt, *_: read.append(prompt) or iter(()))
    ids = Tokenizer.from_file(str(tokenizer)).encode("the cat").ids
    for prompt in ("the cat", ""):
        assert not [*generate.text(tmp_path / "out", prompt, Sampling(3))]
    assert read == [[0, *ids, 0], [0]]


def test_a_prompt_begins_as_documents_do_in_training(
    tmp_path: Path, hf: ModuleType, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
):
    """After BOS, in our exports and if transformers opens them; for a folder of transformers, as its tokenizer does."""
    model = build("gpt", {**SMALL, "vocab_size": 320})
    export.write(tmp_path / "ours", model, ABOUT, tokenizer=tokenizer)
    ids = Tokenizer.from_file(str(tokenizer)).encode("sea").ids
    opened = hf.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert opened("sea").input_ids == [0, *ids]
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for name, source in (("theirs", tmp_path / "ours" / "tokenizer.json"), ("bare", tokenizer)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "tokenizer.json").write_bytes(source.read_bytes())
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del fields["unlabeled"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(fields))
    (tmp_path / "bare" / "model.safetensors").write_bytes((tmp_path / "theirs" / "model.safetensors").read_bytes())
    (tmp_path / "old").mkdir()  # an export of an earlier version, whose tokenizer adds nothing
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "ours" / "config.json").read_bytes())
    (tmp_path / "old" / "model.safetensors").write_bytes((tmp_path / "ours" / "model.safetensors").read_bytes())
    (tmp_path / "old" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    read = []
    monkeypatch.setattr(generate, "tokens", lambda model, prompt, *_: read.append(prompt) or iter(()))
    for name in ("ours", "theirs", "old", "bare"):
        assert not [*generate.text(tmp_path / name, "sea", Sampling(3))]
    assert read == [[0, *ids], [0, *ids], [0, *ids], ids]


def test_a_long_prompt_loses_its_beginning_and_text_ends_before_a_stop(tmp_path: Path, tokenizer: Path):
    model = build("gpt", {**SMALL, "vocab_size": 320})
    run = tmp_path / "run"
    for step in (9, 10):
        export.write(run / "export" / str(step), model, ABOUT, tokenizer=tokenizer)
    (run / "recipe.yaml").write_text("steps: 10\n")
    said: list[str] = []
    prompt, how = "abcdefghij" * 3, Sampling(6, 0.0)  # a token a letter, for a context of 24
    long = "".join(generate.text(run, prompt, how, say=said.append))  # a run: its newest export
    assert said == ["the prompt has 31 tokens, but the context of the model has 24: the first 13 are left out"]
    assert generate.newest(run) == run / "export" / "10" and generate.newest(tmp_path) == tmp_path
    model_ids = Tokenizer.from_file(str(tokenizer)).encode(prompt).ids[-18:]
    assert long == "".join(
        generate.characters(
            Tokenizer.from_file(str(tokenizer)), generate.tokens(model, model_ids, how, [0], 259), model_ids[-1:]
        )
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "recipe.yaml").write_text("steps: 10\n")
    with pytest.raises(UserError, match="has no export yet; write one with `unlabeled export"):
        generate.newest(tmp_path / "none")
    for pieces, stop, expected in [
        (["ab", "c\n", "\nd", "e"], ["\n\n"], ["ab", "c"]),
        (["ab", "c\n", "d", "\n"], ["\n\n"], ["ab", "c", "\nd", "\n"]),
        (["abc"], ["c", "b"], ["a"]),
        (["abc"], [""], ["abc"]),
    ]:
        assert [*generate.until(pieces, stop)] == expected


def test_options(monkeypatch: pytest.MonkeyPatch):
    logits, generator = torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.Generator().manual_seed(0)

    def drawn(**options: float) -> list[float]:
        """Shares of the tokens in 2000 draws."""
        sampling = Sampling(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
        counts = torch.bincount(torch.tensor([sampling.draw(logits, generator) for _ in range(2000)]), minlength=4)
        return (counts / 2000).tolist()

    assert drawn() == pytest.approx(logits.softmax(0).tolist(), abs=0.04)
    assert drawn(temperature=0.0) == [0, 1, 0, 0]
    assert drawn(temperature=2.0) == pytest.approx((logits / 2).softmax(0).tolist(), abs=0.04)
    assert drawn(top_k=2) == pytest.approx([0, *logits[1:3].softmax(0).tolist(), 0], abs=0.04)
    assert drawn(top_p=0.7) == pytest.approx([0, *logits[1:3].softmax(0).tolist(), 0], abs=0.04)
    for options in ({"top_k": 0}, {"top_p": 1.5}, {"temperature": -1.0}, {"tokens": 0}):
        with pytest.raises(UserError, match="must be"):
            Sampling(**options)  # type: ignore[arg-type]
    model = build("gpt", SMALL)
    made = list(generate.tokens(model, [5], Sampling(23, 1.0)))
    assert list(generate.tokens(model, [5], Sampling(23, 1.0), stop=[made[6]])) == made[: made.index(made[6])]
    assert len(list(generate.tokens(model, [5] * 20, Sampling(23)))) == 4  # the context's end
    assert max(generate.tokens(model, [5], Sampling(20, 50.0), vocabulary=10)) < 10
    with pytest.raises(UserError, match="the prompt has 24 tokens"):
        list(generate.tokens(model, [5] * 24, Sampling()))


def test_characters_are_whole(tokenizer: Path):
    own, said = Tokenizer.from_file(str(tokenizer)), "naïve 🙂 日本"
    pieces = list(generate.characters(own, own.encode(said).ids))
    assert "".join(pieces) == said and "�" not in "".join(pieces) and "🙂" in pieces
    ids = own.encode("日").ids
    broken = [*own.encode("a").ids, *ids[:2], *own.encode("bc").ids]
    assert "".join(generate.characters(own, broken)) == own.decode(broken) == "a�bc"
    assert "".join(generate.characters(own, ids[:2])) == "�"
    assert "".join(generate.characters(own, ids[:2], [own.token_to_id("<|endoftext|>")])) == "�"


def test_the_command(
    tmp_path: Path, hf: ModuleType, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def said(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what others have said until now, DeepSpeed's import for one
        monkeypatch.setattr(sys, "argv", ["unlabeled", "generate", *arguments])
        code = main()
        return code or 0, *capsys.readouterr()

    model = build("gpt", {**SMALL, "vocab_size": 320})
    export.write(tmp_path / "ours", model, ABOUT, tokenizer=tokenizer)
    code, text, _ = said(str(tmp_path / "ours"), "the cat", "--max-tokens", "9", "--seed", "3")
    assert code == 0 and 1 <= len(text.rstrip("\n")) <= 9 * 2
    assert said(str(tmp_path / "ours"), "the cat", "--max-tokens", "9", "--seed", "3")[1] == text
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    hf.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert said(str(tmp_path / "theirs"), "the cat", "--max-tokens", "9", "--seed", "3")[1] == text
    assert said(str(tmp_path / "ours"), "--max-tokens", "3")[0] == 0  # from a document's beginning
    export.write(tmp_path / "bert", build("bert_base", {**SMALL, "vocab_size": 320}), ABOUT, tokenizer=tokenizer)
    code, _, error = said(str(tmp_path / "bert"), "the cat")
    assert code == 2 and "a BERT predicts masked tokens and cannot generate text" in error
    export.write(tmp_path / "bare", model, ABOUT)
    assert "has no tokenizer.json" in said(str(tmp_path / "bare"), "the cat")[2]
    (tmp_path / "ours" / "tokenizer.json").write_text("nothing")
    code, _, error = said(str(tmp_path / "ours"), "the cat")
    assert code == 2 and "tokenizer.json: is not a valid tokenizer.json" in error
    (tmp_path / "ours" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    code, _, error = said(str(tmp_path / "ours"), "the cat")
    assert code == 2 and "tokenizer.json: tokenizers" in error and "cannot read it" in error
