"""Our text models compared with transformers, through exported folders in both directions: logits, losses and
gradients, with noise on every parameter. The second half: packed documents give the results of separate ones, the
implementations of attention agree, and a key-value cache changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import ConfigError, UserError
from pretrain.interchange import export, export_formats, weights
from pretrain.interchange.layouts import transformers_text
from pretrain.interchange.weight_sources import find_source, model_config
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.text_layers import Cache, RopeScaling, TextBackbone, rotary_tables
from pretrain.models.text_mlp import RMSNorm
from pretrain.recipes import recipe
from tests.parity.test_models import noise

ABOUT = {"step": 3, "objective": "gpt", "pool": "mean"}
PAD = 1  # of the tokenizer below
SMALL = {"vocab_size": 96, "dim": 32, "depth": 2, "heads": 4, "context": 24}
LLAMA = {**SMALL, "qk_norm": False}
MODELS = {
    "llama": ("gpt", {**LLAMA, "kv_heads": 2, "rope_base": 500.0}),
    "llama_tied": ("gpt", {**LLAMA, "tied": True, "bias": True, "head_dim": 16}),
    "arcee": ("gpt", {**LLAMA, "mlp": "relu2", "kv_heads": 1}),
    "qwen3": ("gpt", {**SMALL, "kv_heads": 2, "head_dim": 16, "tied": True}),
    "qwen3_windows": ("gpt", {**SMALL, "depth": 3, "windows": [5, 5, 0]}),
    "llama_long": ("gpt", {**LLAMA, "head_dim": 16, "rope_factor": 8.0, "rope_context": 16, "rope_high": 3.0}),
    "apertus": ("gpt", {**SMALL, "mlp": "relu2"}),
    "apertus_long": (
        "gpt",
        {**SMALL, "mlp": "relu2", "kv_heads": 2, "head_dim": 16, "rope_factor": 4.0, "rope_context": 16},
    ),
    "gpt2": ("gpt2_124m", SMALL),
    "gpt2_untied": ("gpt2_124m", {**SMALL, "tied": False, "mlp": "gelu"}),
    "bert": ("bert_base", SMALL),
    "t5": ("t5_small", {**SMALL, "head_dim": 16, "mlp_width": 48, "buckets": 8, "max_distance": 12}),
    "t5_v1_1": ("t5_v1_1_small", {**SMALL, "head_dim": 8, "mlp_width": 48, "decoder_depth": 3}),
}
OWN = {
    "gelu": {"mlp": "gelu"},
    "softcap": {"softcap": 5.0},
    "windows": {"windows": [4, 7]},
    "layer": {"norm": "layer"},
}


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal byte-level BPE. It knows only the letters of its text, because 256 bytes are too many for the models
    here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|pad|>", "<|mask|>"]
    own.train_from_iterator(["the cat sat on the mat"] * 9, trainers.BpeTrainer(vocab_size=40, special_tokens=names))
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    own.save(str(path))
    return path


def build(name: str, options: dict, noisy: bool = True) -> TextBackbone:
    torch.manual_seed(0)
    model = build_model(model_config(name, options, "test"))
    if noisy:
        noise(model)
        for part in model.modules():  # those of queries and keys, too, whose names do not say what they are
            if isinstance(part, RMSNorm):
                nn.init.uniform_(part.weight, 0.5, 1.5)
    return model.eval()


def tokens_of(rows: int = 2, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: TextBackbone, tokens: Tensor, answer: Tensor) -> Tensor:
    """[B, T, V]. A T5 reads tokens and predicts `answer`, after the tokenizer's padding token, which also replaces
    -100."""
    hidden = model(tokens).tokens
    if isinstance(model.cfg, families.EncoderDecoder):
        begun = torch.cat([torch.full_like(answer[:, :1], PAD), answer.where(answer >= 0, PAD)[:, :-1]], dim=1)
        hidden = model.decoder(begun, hidden)
    return model.head(hidden)


def theirs_of(hf: ModuleType, cfg: object) -> type:
    decoder, t5 = isinstance(cfg, families.Decoder), isinstance(cfg, families.EncoderDecoder)
    return hf.AutoModelForCausalLM if decoder else hf.AutoModelForSeq2SeqLM if t5 else hf.AutoModelForMaskedLM


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_both_directions(name: str, tmp_path: Path, hf: ModuleType, tokenizer: Path):
    """transformers computes the same from our files, gradients included, and our model from the files that
    transformers writes."""
    ours = build(*MODELS[name])
    folder = tmp_path / "ours"
    export.write(folder, ours, ABOUT, tokenizer=tokenizer)
    kind, info = theirs_of(hf, ours.cfg).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(kind).__name__ == transformers_text.CLASSES[name.split("_")[0]]
    theirs = kind.eval()
    assert not any(isinstance(m, nn.Dropout) and m.p for m in theirs.modules())

    tokens, labels = tokens_of(), tokens_of(seed=2)
    labels[0, :5] = labels[1, 7:9] = -100
    causal = isinstance(ours.cfg, families.Decoder)
    mine, other = logits_of(ours, tokens, labels), theirs(input_ids=tokens, labels=labels)
    same(mine, other.logits)
    shifted, wanted = (mine[:, :-1], labels[:, 1:]) if causal else (mine, labels)
    loss = F.cross_entropy(shifted.flatten(0, 1), wanted.flatten())
    same(loss, other.loss)
    loss.backward()
    other.loss.backward()
    _, gradients = transformers_text.write(ours.cfg, {k: p.grad for k, p in ours.named_parameters()})
    for key, parameter in theirs.named_parameters():
        same(gradients.pop(key), parameter.grad)
    assert not gradients

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    again, _ = weights.load_backbone(tmp_path / "theirs")
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(logits_of(again, tokens, labels), logits_of(ours.requires_grad_(False), tokens, labels))
    assert "opened again" in export_formats.release(folder, ["transformers"])[0]


def test_random_weights_of_theirs(tmp_path: Path, hf: ModuleType):
    """A T5 v1.1 that transformers has created has a tied head without scaling."""
    config = hf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=1, pad_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    theirs = hf.T5ForConditionalGeneration(config).eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    ours, _ = weights.load_backbone(tmp_path)
    same(logits_of(ours, tokens_of(), tokens_of()), theirs(input_ids=tokens_of(), labels=tokens_of()).logits)


def test_the_tokenizer_opens(tmp_path: Path, hf: ModuleType, tokenizer: Path):
    export.write(tmp_path / "out", build(*MODELS["llama"]), ABOUT, tokenizer=tokenizer)
    opened = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = opened("the cat").input_ids
    assert (
        ids[0] == 0
        and opened.decode(ids[1:]) == "the cat"
        and opened.eos_token == "<|endoftext|>"
        and opened.pad_token_id == 1
    )
    export.write(tmp_path / "bert", build(*MODELS["bert"]), ABOUT, tokenizer=tokenizer)
    around = hf.AutoTokenizer.from_pretrained(tmp_path / "bert")("the cat").input_ids
    assert around == [*ids, 0]  # an encoder reads a text between BOS and EOS, as in training
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    own = tmp_path / "own"  # whose tokenizer_config.json says what its tokens are for
    own.mkdir()
    content = json.loads(tokenizer.read_text())
    content["added_tokens"].append({**content["added_tokens"][1], "content": "<turn>", "id": 40})
    (own / "tokenizer.json").write_text(json.dumps(content))
    named = {"eos_token": {"content": "<turn>"}, "pad_token": "<|pad|>", "chat_template": "{{ messages }}", "x": 1}
    (own / "tokenizer_config.json").write_text(json.dumps(named))
    export.write(tmp_path / "named", build(*MODELS["llama"]), ABOUT, tokenizer=own / "tokenizer.json")
    opened = hf.AutoTokenizer.from_pretrained(tmp_path / "named")
    assert (opened.eos_token, opened.chat_template) == ("<turn>", "{{ messages }}")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "named").config.eos_token_id == 40
    with pytest.raises(UserError, match=r"is not a valid tokenizer\.json"):
        export.write(tmp_path / "none", build(*MODELS["llama"]), ABOUT, tokenizer=tmp_path / "out" / "config.json")


@pytest.mark.parametrize("name", OWN)
def test_what_no_class_has(name: str, tmp_path: Path):
    ours = build("gpt", {**SMALL, **OWN[name]})
    export.write(tmp_path / "out", ours, ABOUT)
    with pytest.raises(
        UserError,
        match=rf"transformers has no class for model\.{'mlp' if name == 'gelu' else name if name != 'layer' else 'norm'}",
    ):
        export_formats.release(tmp_path / "out", ["transformers"])
    again, _ = weights.load_backbone(tmp_path / "out")
    assert torch.equal(again(tokens_of()).tokens, ours(tokens_of()).tokens)


def test_every_recipe_on_text_opens_in_transformers():
    for name in ("gpt_demo", "gpt_dial", "gpt2_124m", "llama_1b", "llama_8b", "bert_base", "t5_base"):
        assert transformers_text.kind_of(recipe.load(name).model)[0] != transformers_text.OWN, name


def test_exports_of_relu2_with_qk_norm_from_before_apertus_was_known(tmp_path: Path):
    """They have our names, and can still be loaded."""
    ours = build("gpt", {**SMALL, "mlp": "relu2"})
    export.write(tmp_path / "out", ours, ABOUT)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    old = {key: fields[key] for key in ("vocab_size", "dtype", "unlabeled")} | {"model_type": transformers_text.OWN}
    (tmp_path / "out" / "config.json").write_text(json.dumps(old))
    save_file(ours.state_dict(), tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    again, _ = weights.load_backbone(tmp_path / "out")
    assert torch.equal(again(tokens_of()).tokens, ours(tokens_of()).tokens)
    with pytest.raises(
        UserError,
        match="was written by an earlier version, which did not use transformers' apertus for it; export its step",
    ):
        export_formats.release(tmp_path / "out", ["transformers"])


def test_rope_scaling_of_llama_3(tmp_path: Path, hf: ModuleType):
    """With the values in the config.json of LLaMA 3.2, the angles equal those of transformers."""
    scaling = {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    more = {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **more}))
    cfg = find_source(tmp_path).cfg
    assert (cfg.rope_factor, cfg.rope_low, cfg.rope_high, cfg.rope_context) == (32.0, 1.0, 4.0, 8192)
    theirs = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(hf.AutoConfig.from_pretrained(tmp_path))
    places = torch.tensor([[0, 1, 700, 9000, 100_000]])
    cos, sin = theirs(torch.zeros(1), places)
    scale = RopeScaling(cfg.rope_factor, cfg.rope_low, cfg.rope_high, cfg.rope_context)
    mine = rotary_tables(places[0], 64, cfg.rope_base, scale)
    assert not torch.allclose(cos[0, :, :32], rotary_tables(places[0], 64, cfg.rope_base)[0].squeeze(1), atol=0.1)
    torch.testing.assert_close(mine[0].squeeze(1), cos[0, :, :32], atol=0.02, rtol=0)  # angles of 100,000 in fp32
    torch.testing.assert_close(mine[1].squeeze(1)[:4], sin[0, :4, :32], atol=2e-3, rtol=0)
    with pytest.raises(ConfigError, match=r"model.rope_low = 4.0: must be above 0 and below model.rope_high = 4.0"):
        build("gpt", {**SMALL, "rope_factor": 8.0, "rope_low": 4.0})


def test_what_does_not_fit_a_decoder_is_told_by_its_options(tmp_path: Path):
    export.write(tmp_path / "long", build(*MODELS["llama_long"]), ABOUT)
    plain = {**LLAMA, "head_dim": 16, "kv_heads": 2, "vocab_size": 128}
    says = r"model.vocab_size is 128 here and 96 there, model.rope_factor is 1.0 here and 8.0 there, model.kv_heads is 2 here and 4 there, .*; write model.vocab_size=96 "
    with pytest.raises(UserError, match=says):
        weights.load_into(build("gpt", plain), tmp_path / "long")
    other = {**MODELS["llama_long"][1], "rope_context": 32, "context": 48}  # a rotary context is no table
    with pytest.raises(
        UserError, match=r"model: model.rope_context is 32 here and 16 there; write model.rope_context=16$"
    ):
        weights.load_into(build("gpt", other), tmp_path / "long")


def test_folders_that_we_cannot_compute(tmp_path: Path, hf: ModuleType):
    config = hf.LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only rope_type default and llama3"):
        weights.load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "feed_forward_proj": "gated-silu"}')
    with pytest.raises(UserError, match="feed_forward_proj = 'gated-silu'"):
        weights.load_backbone(tmp_path)


# ---------------------------------------------------------------- documents, attention's paths, precision
PACKED = ["llama", "qwen3_windows", "gpt2", "bert", "t5"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_separate(name: str):
    """Features and gradients of packed rows are those of the separate documents, unless positions are absolute in
    the row."""
    model = build(*MODELS[name]).double()
    tokens = tokens_of(2, 20)
    documents = torch.tensor([[7] * 6 + [2] * 9 + [-1] * 5, [0] * 20])
    packed = model(tokens, documents=documents)
    parts = [model(tokens[:1, :6]), model(tokens[:1, 6:15]), model(tokens[1:])]
    for got, part in zip((packed.tokens[:1, :6], packed.tokens[:1, 6:15], packed.tokens[1:]), parts, strict=True):
        torch.testing.assert_close(got, part.tokens)
    assert packed.tokens.isfinite().all()
    if isinstance(model.cfg, families.Decoder):
        torch.testing.assert_close(packed.cls, torch.cat([packed.tokens[:1, 14], packed.tokens[1:, -1]]))
    weight = torch.randn(packed.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[0, 15:] = 0
    parameters = [p for k, p in model.named_parameters() if not k.startswith(("head", "decoder"))]
    whole = torch.autograd.grad((packed.tokens * weight).sum(), parameters)
    pieces = [
        (part.tokens * w).sum() for part, w in zip(parts, (weight[:1, :6], weight[:1, 6:15], weight[1:]), strict=True)
    ]
    for a, b in zip(whole, torch.autograd.grad(sum(pieces), parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "t5"])
def test_bf16_is_near(name: str):
    """Under bf16 autocast, features agree within 3 % of the largest one, gradients within 10 % of their norm."""
    options = MODELS[name]
    wide, narrow = build(*options, noisy=False), build(*options, noisy=False)
    with torch.autocast("cpu", torch.bfloat16):
        low = narrow(tokens_of()).tokens.float()
    high = wide(tokens_of()).tokens
    same(low, high, 3e-2)
    weight = torch.randn(high.shape, generator=torch.Generator().manual_seed(0))
    (low * weight).sum().backward()
    (high * weight).sum().backward()
    for (key, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        if b.grad is not None:
            assert (a.grad - b.grad).norm() <= 0.1 * b.grad.norm() + 1e-6, key


@pytest.mark.parametrize("options", [{}, {"windows": [5, 0]}, {"kv_heads": 2}, {"positions": "learned"}])
def test_a_cache_changes_nothing(options: dict):
    model = build("gpt", {**SMALL, **options})
    tokens = tokens_of(2, 18)
    with torch.no_grad():
        whole, cache = model(tokens).tokens, Cache(20)
        for first, last in ((0, 7), (7, 8), (8, 12), (12, 13), (13, 18)):
            same(model(tokens[:, first:last], cache=cache).tokens, whole[:, first:last])
        with pytest.raises(ValueError, match="room for 20 tokens, not for 21"):
            model(tokens[:, :3], cache=cache)


def test_a_cache_changes_nothing_in_t5():
    model = build(*MODELS["t5"])
    tokens, memory = tokens_of(2, 18), model(tokens_of(2, 9)).tokens
    seen = torch.arange(9).expand(2, -1) < torch.tensor([[9], [6]])
    with torch.no_grad():
        whole, cache = model.decoder(tokens, memory, seen), Cache(18)
        for first, last in ((0, 7), (7, 8), (8, 18)):
            same(model.decoder(tokens[:, first:last], memory, seen, cache), whole[:, first:last])
