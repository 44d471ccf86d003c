"""The tokenizer in an exported folder: tokenizer.json with a tokenizer_config.json, so that `transformers.AutoTokenizer` opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data_pipeline import vocabulary
from pretrain.errors import UserError

# names of special tokens by what they are for, the first that a tokenizer has; "sep" and "cls" are BERT's
ROLES = {**vocabulary.ROLES, "unk": ("<unk>", "[UNK]"), "cls": ("[CLS]",), "sep": ("[SEP]",)}
KEPT = ("additional_special_tokens", "chat_template")  # of a tokenizer_config.json, with the names of special tokens


def specials(path: Path) -> dict[str, tuple[str, int]]:
    """{role: (token, id)} of a tokenizer.json, by the tokenizer_config.json beside it where that names them. Raises UserError where it is none."""
    try:
        content, own = json.loads(path.read_text()), _config(path)
        known = {**content["model"].get("vocab", {})} if isinstance(content["model"].get("vocab"), dict) else {}
        known |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no tokenizer.json ({error}); name the one of the token set") from None
    found = {}
    for role, names in ROLES.items():
        named = own.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        found[role] = next((n for n in ((named,) if named else names) if n in known), None)
    return {role: (name, known[name]) for role, name in found.items() if name is not None}


def write(folder: Path, source: Path, context: int) -> dict[str, Any]:
    """Put a tokenizer.json into a folder, with its tokenizer_config.json; the ids that belong in config.json."""
    found = specials(source)
    shutil.copyfile(source, folder / "tokenizer.json")
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    fields |= {f"{role}_token": name for role, (name, _) in found.items()}
    fields["clean_up_tokenization_spaces"] = False
    own = _config(source)
    fields |= {key: own[key] for key in KEPT if key in own}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=1) + "\n")
    return {f"{role}_token_id": number for role, (_, number) in found.items() if role in ("bos", "eos", "pad")}


def _config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json; {} where there is none."""
    beside = path.with_name("tokenizer_config.json")
    return json.loads(beside.read_text()) if beside.is_file() else {}
