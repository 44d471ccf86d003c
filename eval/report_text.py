"""The sections of the report of a language model: bits per byte, and generated text."""

from __future__ import annotations

from html import escape

from eval.report_page import section
from eval.results import Row


def scores(rows: list[Row]) -> str:
    """Bits per byte on test text for the untrained model, the pretrained model, and the token frequencies of the
    text."""
    newest: dict[tuple[str, str], Row] = {}  # by (model, metric)
    for row in sorted(rows, key=lambda r: r["step"]):
        if (row.get("split"), row["protocol"]) == ("test", "bits_per_byte"):
            newest[row["model"], row["metric"]] = row
    if ("pretrained", "bits_per_byte") not in newest:
        return ""
    row = newest["pretrained", "bits_per_byte"]
    value = {model: r["value"] for (model, metric), r in newest.items() if metric == "bits_per_byte"}
    if ("pretrained", "unigram") in newest:
        value["token frequencies"] = newest["pretrained", "unigram"]["value"]
    largest, lines = max(*value.values(), 1e-9), ""
    for name in ("untrained", "token frequencies", "pretrained"):
        if name in value:
            bar = f'<span class="bar"><i style="width:{value[name] / largest:.1%}"></i></span>'
            lines += f'<tr class="{name.split()[0]}"><th>{name}</th><td><b>{value[name]:.3f}</b>{bar}</td></tr>'
    text = (
        f"Bits that the model needs for each byte of {row.get('count', 0):,} bytes of test text; less is better. Every"
        " token is predicted once from the tokens before it in its document and row. The token frequencies are those"
        " of the test text."
    )
    return section("Scores", text, f'<div class="card"><table>{lines}</table></div>', columns="400px")


def samples(rows: list[Row]) -> str:
    """The texts with which the first, the middle and the last export continue each prompt. `rows`: of samples.jsonl."""
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    cards = []
    for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
        latest = {row["prompt"]: row["text"] for row in rows if row["step"] == step}
        texts = "".join(f"<p><b>{escape(prompt)}</b>{escape(text)}</p>" for prompt, text in latest.items())
        cards.append(f'<div class="card"><h3>step {step:,}</h3>{texts}</div>')
    return section("Samples", "How the model continues each prompt (bold), sampled at temperature 0.8.", *cards)
