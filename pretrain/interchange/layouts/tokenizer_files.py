"""The tokenizer in an exported folder: tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer`
opens.

The exported tokenizer adds the same special tokens to a text as the training data has: BOS before the text, and for
encoders also EOS after it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.untrusted import loads, read_text
from data_pipeline.shards import vocabulary

# {role: usual names of its special token, of which the first that the tokenizer has is used}; BERT has "cls" and "sep"
ROLES = {**vocabulary.ROLES, "unk": ("<unk>", "[UNK]"), "cls": ("[CLS]",), "sep": ("[SEP]",)}
# keys of the source's tokenizer_config.json that are copied to the export, in addition to the special token of each
# role
KEPT = ("additional_special_tokens", "chat_template")


def read_special_tokens(path: Path) -> dict[str, tuple[str, int]]:
    """{role: (token, id)} of the special tokens in a tokenizer.json. The name of a role's token is the one in the
    tokenizer_config.json next to it, if that has one, otherwise one of the usual names. Raises UserError if the file is
    not a valid tokenizer.json."""
    try:
        content, config = loads(read_text(path)), _config(path)
        vocabulary.Vocabulary.parse(json.dumps(content), json.dumps(config), str(path))
        ids = {**content["model"].get("vocab", {})} if isinstance(content["model"].get("vocab"), dict) else {}
        ids |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is not a valid tokenizer.json ({error}); name the one in the folder of token shards"
        ) from None
    found = {}
    for role, names in ROLES.items():
        named = config.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        found[role] = next((name for name in ((named,) if named else names) if name in ids), None)
    return {role: (name, ids[name]) for role, name in found.items() if name is not None}


def write(folder: Path, source: Path, context: int, add_eos: bool = False, captions: bool = False) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json into `folder`, from the tokenizer.json at `source`. Returns the
    ids of special tokens that belong in the model's config.json, as {"bos_token_id": …}.

    `context`: the maximum number of tokens that the model reads. `add_eos`: whether the tokenizer adds EOS after a
    text. `captions`: whether texts are captions, to which EOS is added, but no BOS that is the same token, and which EOS
    pads if the tokenizer has no padding token (see `data_pipeline.parts.caption.token_row`).
    """
    found = read_special_tokens(source)
    if captions and "eos" in found:
        found.setdefault("pad", found["eos"])
    ids = {role: number for role, (_, number) in found.items()}
    begin = None if captions and ids.get("bos") == ids.get("eos") else ids.get("bos")
    end = ids.get("eos") if add_eos or captions else None
    text = vocabulary.with_template(source.read_text(), begin, end)
    (folder / "tokenizer.json").write_text(text)
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    fields |= {f"{role}_token": name for role, (name, _) in found.items()}
    fields["clean_up_tokenization_spaces"] = False
    config = _config(source)
    fields |= {key: config[key] for key in KEPT if key in config}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=1) + "\n")
    return {f"{role}_token_id": number for role, (_, number) in found.items() if role in ("bos", "eos", "pad")}


def _config(path: Path) -> dict[str, Any]:
    """The content of the tokenizer_config.json next to a tokenizer.json; {} if there is none."""
    config = path.with_name("tokenizer_config.json")
    return loads(read_text(config)) if config.is_file() else {}
