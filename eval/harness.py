"""Score an exported decoder with lm-evaluation-harness: `unlabeled harness RUN/export/STEP arc_easy hellaswag`, or on
the user's tasks in YAML files (`--include`).

When this module is imported, the model is also registered for the command line of the harness: `--model unlabeled
--model_args path=FOLDER`. A context begins with BOS, as documents do in training; `bos=False` omits it, as the harness
does for most models of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, nearest
from common.untrusted import is_number
from eval import generate
from eval.features import open_encoder
from eval.results import Row

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("lm_eval is not installed; pip install 'unlabeled[harness]'") from None

VERSION = 1
NOT_METRICS = ("name", "sample_len", "sample_count")  # other entries in the results of a task
Pair = tuple[list[int], list[int]]  # (tokens of the context, tokens that are scored)
Score = tuple[float, bool]  # (log-likelihood of the scored tokens, whether greedy decoding would produce them)


@register_model("unlabeled")
class Model(TemplateLM):
    """An exported decoder with the interface that the harness expects. Raises UserError for any other folder.

    `batch_size`: number of texts in a batch. `bos`: whether a context begins with BOS.
    """

    def __init__(self, path: str, batch_size: int | str = 16, bos: bool = True, **_: Any):
        super().__init__()
        encoder, self.facts = open_encoder(path)
        if encoder.unit != "texts" or not encoder.backbone.cfg.causal:
            kind = encoder.backbone.cfg.name if encoder.unit == "texts" else "model that reads images"
            raise UserError(f"{path}: holds a {kind}, but the harness scores decoders; name an export of gpt")
        if not is_number(str(batch_size)) or int(batch_size) < 1:
            raise UserError(f"--batch {batch_size}: write 1 or more")
        self.name, self.model, self.vocabulary = encoder.name, encoder.backbone, encoder.vocabulary
        self._device = encoder.device  # the property `device` of TemplateLM returns it
        self.batch, self.bos, self.tokens = int(batch_size), bos, self.vocabulary.tokenizer()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: EOS, or BOS if the tokenizer has no EOS."""
        return self.prefix_token_id if self.vocabulary.eos is None else self.vocabulary.eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if the tokenizer has no BOS."""
        first = self.vocabulary.bos if self.vocabulary.bos is not None else self.vocabulary.eos
        if first is None:
            raise UserError(
                f"{self.vocabulary.source}: has no token that begins or ends a text, which the harness needs"
            )
        return first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, after BOS if `self.bos` is true and `add_special_tokens` is not False."""
        tokens = self.tokens.encode(string, add_special_tokens=False).ids
        bos = self.vocabulary.bos
        return [bos, *tokens] if self.bos and add_special_tokens is not False and bos is not None else tokens

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        """The scores of requests (key for the harness's cache or None, tokens of the context, tokens to score)."""
        scored = list(self._scores([(context, target) for _, context, target in requests]))
        for (key, *_), score in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scored

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[Score]:
        """The scores in the order of the pairs. Pairs of similar length are in the same batch."""
        order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
        scores: dict[int, Score] = {}
        for first in range(0, len(order), self.batch):
            numbers = order[first : first + self.batch]
            scores |= zip(numbers, self._score_batch([pairs[n] for n in numbers]), strict=True)
        return (scores[n] for n in range(len(pairs)))

    @torch.inference_mode()
    def _score_batch(self, pairs: Sequence[Pair]) -> list[Score]:
        """The scores of one batch. The beginning of a text that is longer than the model's context is left out.

        Padding comes after a text; a causal model does not attend to it.
        """
        context = self.model.context
        for _, target in pairs:
            if not 1 <= len(target) <= context:
                raise UserError(
                    f"a task scores {len(target)} tokens at once, but the context of the model has {context}"
                )
        # The model reads all tokens of a text but the last, and at each of them predicts the next one.
        texts = [(given + target)[-context - 1 :] for given, target in pairs]
        tokens = torch.zeros(len(texts), max(map(len, texts)) - 1, dtype=torch.long)  # [B, T]
        for n, text in enumerate(texts):
            tokens[n, : len(text) - 1] = torch.tensor(text[:-1])
        hidden = self.model(tokens.to(self.device)).tokens  # [B, T, D]
        out = []
        for n, (text, (_, target)) in enumerate(zip(texts, pairs, strict=True)):
            end = len(text) - 1
            logits = self.model.head(hidden[n, end - len(target) : end])  # [scored tokens, vocabulary]
            targets = torch.tensor(target, device=self.device)
            log_likelihood = logits.log_softmax(-1).gather(1, targets.unsqueeze(1))
            out.append((float(log_likelihood.sum()), bool((logits.argmax(-1) == targets).all())))
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts. Each token is scored once, in consecutive rows of the model's context."""
        out = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            rows = get_rolling_token_windows(tokens, self.prefix_token_id, self.model.context, 1)
            out.append(sum(value for value, _ in self._scores(list(map(make_disjoint_window, rows)))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to the first of the strings `until` of the task. One text is
        generated at a time, with a key-value cache."""
        out = []
        for context, options in (request.args for request in requests):
            limit = min(int(options.get("max_gen_toks", 256)), self.model.context - 1)
            temperature = float(options.get("temperature") or 0)
            if not options.get("do_sample", temperature > 0):
                temperature = 0.0  # greedy decoding
            elif not temperature:
                temperature = 1.0  # sampling without a given temperature
            until = options.get("until") or []
            until = [end for end in ([until] if isinstance(until, str) else until) if end]
            out.append(self._continuation(context, generate.Sampling(limit, temperature), until))
            self.cache_hook.add_partial("generate_until", (context, options), out[-1])
        return out

    def _continuation(self, context: str, sampling: generate.Sampling, until: list[str]) -> str:
        """The text that continues a context, up to the first of the strings `until`."""
        room = self.model.context - sampling.tokens  # for tokens of the context, of which the last are used
        given = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        text, ids = "", list[int]()
        for token in generate.tokens(self.model, given, sampling, [self.eot_token_id], self.vocabulary.size):
            ids.append(token)
            text = self.tokens.decode(ids)
            if any(end in text for end in until):
                break
        for end in until:
            text = text.partition(end)[0]
        return text


def evaluate(
    model: str,
    tasks: Sequence[str],
    include: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    bos: bool = True,
) -> list[Row]:
    """A row for every metric of every task.

    `include`: a folder with task files. `shots`: number of examples before each question. `limit`: number of documents
    of each task that are scored. `batch`, `bos`: see `Model`. Raises UserError.
    """
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include {include}: no such folder; it holds the YAML files of tasks")
    for flag, value, minimum in (("--shots", shots, 0), ("--limit", limit, 1)):
        if value is not None and value < minimum:
            raise UserError(f"{flag} {value}: write {minimum} or more")
    adapter = Model(model, batch, bos)
    manager = TaskManager(include_path=include)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(f"{task!r}: no such task; {nearest(task, manager.all_tasks)}")
    try:
        found = simple_evaluate(
            adapter,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except ConnectionError as error:
        raise UserError(
            f"{', '.join(tasks)}: the texts of a task cannot be downloaded ({error}); "
            "download them on a machine with network access and copy HF_HOME, or write a task (--include FOLDER)"
        ) from None
    common = {"model": adapter.name, "step": adapter.facts["step"], "protocol": "harness", "version": VERSION}
    common["split"] = "test" if limit is None else "custom"
    counts = {task: numbers["effective"] for task, numbers in found["n-samples"].items()}
    return [
        common
        | {"metric": metric, "value": round(value, 6), "gallery_count": 0, "count": counts.get(task, 0)}
        | {"left_out": 0, "passed_over": 0, "unit": "documents"}
        for task, metric, value in _scores_of_tasks(found["results"])
    ]


def _scores_of_tasks(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """(task, name of the metric in a result row, value) of every score in the results of the harness."""
    for task, scores in results.items():
        for key, value in scores.items():
            metric, _, filter_name = key.partition(",")
            is_text = value is None or isinstance(value, bool | str)
            if is_text or metric.endswith("_stderr") or metric in NOT_METRICS:
                continue
            suffix = "" if filter_name in ("", "none") else f"/{filter_name}"
            yield task, f"{task}/{metric}{suffix}", float(value)
