"""The report of a preparation: report.json for programs, report.html for people, in one file."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.curate import deciding, rules
from dsjax.curate.writing import KEPT, SIDES
from dsjax.display import size
from dsjax.files import write, write_json

_COLUMNS = 4  # of histograms
_LANGUAGES = 10  # that are shown, of a source
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
.share { display: inline-block; height: .8em; background: #4a7bb5; }
"""


def gather(
    kinds: Mapping[str, str],
    read: Mapping[str, Sequence[int]],
    decided: Sequence[Mapping[str, Any]],
    written: Sequence[Mapping[str, Any]],
    *,
    samples: int,
) -> dict[str, Any]:
    """Joins what the stages found.

    Args:
      kinds: of sources, by name.
      read: documents and bytes of each source.
      decided: by stage `rules`, per job.
      written: by the stages `join` and `text`, per job.
      samples: how many to keep of each source and verdict.
    """
    sources = {}
    for name, kind in kinds.items():
        counts = _added(part["counts"].get(name, {}) for part in written)
        sides = _added(part["sides"].get(name, {}) for part in written)
        sources[name] = {
            "kind": kind,
            "read": list(read[name]),
            "languages": _counted(part["languages"].get(name, {}) for part in decided),
            "removed": {key: counts[key] for key in sorted(counts) if key != KEPT},
            **{side: sides.get(side, [0, 0]) for side in SIDES},
        }
    found: dict[tuple[str, str], list[list[Any]]] = {}
    for part in written:
        for source, verdict, texts in part["samples"]:
            found.setdefault((source, verdict), []).extend(texts)
    chosen = [
        {"source": source, "verdict": verdict, "id": name, "text": text}
        for (source, verdict), texts in sorted(found.items())
        for _, name, text in sorted(texts)[:samples]
    ]
    distributions: dict[str, dict[str, list[int]]] = {}
    for part in decided:
        for rule_set, counted in part["distributions"].items():
            total = distributions.setdefault(rule_set, {})
            for signal, counts in counted.items():
                before = total.get(signal, [0] * len(counts))
                total[signal] = [a + b for a, b in zip(before, counts, strict=True)]
    return {"sources": sources, "distributions": distributions, "samples": chosen}


def save(report: Mapping[str, Any], table: rules.Table, out: Path) -> None:
    """Writes report.json and report.html into the folder `out`."""
    write_json(out / "report.json", report)
    body = [
        "<h1>Prepared text</h1>",
        _funnel(report["sources"]),
        _tokens(report.get("tokens", {})),
        *(_source(name, source) for name, source in report["sources"].items()),
        *(_histograms(name, found, table) for name, found in report["distributions"].items()),
        _groups(report.get("duplicate_groups", {})),
        _rejected(report.get("rejected", 0), report.get("problems", [])),
        _samples(report["samples"]),
    ]
    head = f"<meta charset=utf-8><title>Prepared text</title><style>{_STYLE}</style>"
    page = (
        f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>{''.join(body)}</body></html>"
    )
    write(out / "report.html", page + "\n")


def _added(parts: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for part in parts:
        for key, (documents, n_bytes) in part.items():
            before = total.get(key, [0, 0])
            total[key] = [before[0] + documents, before[1] + n_bytes]
    return total


def _counted(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Returns the sums of counts, the largest first."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _sum(counts: Iterable[Sequence[int]]) -> list[int]:
    return [sum(part) for part in zip(*counts, strict=True)] or [0, 0]


def _cells(tag: str, values: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{value}</{tag}>" for value in values) + "</tr>"


def _amount(count: Sequence[int]) -> str:
    return f"{count[0]:,} ({size(count[1])})"


def _funnel(sources: Mapping[str, Any]) -> str:
    rows = []
    for name, source in sources.items():
        removed = _sum(source["removed"].values())
        share = removed[1] / max(source["read"][1], 1)
        amounts = [_amount(source["read"]), _amount(removed), f"{share:.1%}"]
        sides = [_amount(source[side]) for side in SIDES]
        rows.append(_cells("td", [html.escape(name), source["kind"], *amounts, *sides]))
    heads = ("source", "kind", "read", "removed", "of the bytes", "train", "held-out")
    return f"<table>{_cells('th', heads)}{''.join(rows)}</table>"


def _tokens(tokens: Mapping[str, Any]) -> str:
    parts = [
        f"{side}: {found['tokens']:,} tokens, {found['bytes_per_token']} bytes per token"
        for side, found in tokens.items()
    ]
    return f"<p>{'; '.join(parts)}</p>" if parts else ""


def _source(name: str, source: Mapping[str, Any]) -> str:
    """Returns what was removed of a source, and its languages."""
    parts = [
        f"<h2>{html.escape(name)}</h2>",
        _shares("removed by", source["removed"], source["read"][0]),
    ]
    if source["kind"] != "code":
        languages = dict(list(source["languages"].items())[:_LANGUAGES])
        counts = {name: (count,) for name, count in languages.items()}
        parts.append(_shares("language", counts, source["read"][0]))
    return "".join(parts)


def _shares(head: str, counts: Mapping[str, Sequence[int]], total: int) -> str:
    """Returns a table of documents, and bytes where they are known, as shares of all."""
    rows = []
    for what, count in sorted(counts.items(), key=lambda item: -item[1][0]):
        share = count[0] / max(total, 1)
        bar = f"<span class=share style='width:{200 * share:.0f}px'></span>"
        amount = _amount(count) if len(count) > 1 else f"{count[0]:,}"
        rows.append(_cells("td", [html.escape(what), amount, f"{share:.1%}", bar]))
    heads = _cells("th", (head, "documents", "of all", ""))
    return f"<table>{heads}{''.join(rows)}</table>" if rows else ""


def _histograms(name: str, found: Mapping[str, Sequence[int]], table: rules.Table) -> str:
    """Returns the distributions of a set of rules, with what is removed shaded."""
    # Not pyplot, which keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind, language = name.split(".")
    chosen = [rule for rule in table[kind, language] if sum(found.get(rule.signal, []))]
    if not chosen:
        return ""
    n_rows = math.ceil(len(chosen) / _COLUMNS)
    height = 1.9 * n_rows  # inches; margins are set by hand, since finding them takes seconds
    figure = Figure(figsize=(3.4 * _COLUMNS, height))
    figure.subplots_adjust(0.04, 0.3 / height, 0.99, 1 - 0.3 / height, 0.2, 0.6)
    for number, rule in enumerate(chosen):
        axes = figure.add_subplot(n_rows, _COLUMNS, number + 1)
        borders = deciding.edges(rule.signal)
        axes.stairs(np.asarray(found[rule.signal]), borders, fill=True, color="#4a7bb5")
        axes.set_title(rule.signal, fontsize=9)
        axes.set_yscale("symlog")
        axes.tick_params(labelsize=7)
        if borders[-1] > 1:
            axes.set_xscale("symlog")
        for low, high in ((borders[0], rule.low), (rule.high, borders[-1])):
            if borders[0] <= low < high <= borders[-1]:
                axes.axvspan(float(low), float(high), color="#c44", alpha=0.2, linewidth=0)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    image = base64.b64encode(data.getvalue()).decode()
    title = f"<h2>Measures of {html.escape(name)}: what the shade covers is removed</h2>"
    return f"{title}<img alt='histograms' src='data:image/png;base64,{image}'>"


def _groups(groups: Mapping[str, int]) -> str:
    if not groups:
        return ""
    rows = "".join(_cells("td", (size, f"{count:,}")) for size, count in groups.items())
    heads = _cells("th", ("documents", "groups"))
    return f"<h2>Groups of duplicates by size, one of each kept</h2><table>{heads}{rows}</table>"


def _rejected(count: int, problems: Sequence[str]) -> str:
    if not count:
        return ""
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    more = "; rejected.jsonl has all" if count > len(problems) else ""
    return f"<h2>{count:,} records or files could not be read{more}</h2><ul>{items}</ul>"


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for sample in samples:
        groups.setdefault((sample["source"], sample["verdict"]), []).append(sample)
    parts = ["<h2>Samples</h2>"]
    for (source, verdict), members in groups.items():
        what = "kept" if verdict == KEPT else f"removed by {verdict}"
        texts = "".join(
            f"<p>{html.escape(member['id'])}</p><pre>{html.escape(member['text'])}</pre>"
            for member in members
        )
        title = html.escape(f"{source}: {what}, {len(members)} at random")
        parts.append(f"<details><summary>{title}</summary>{texts}</details>")
    return "".join(parts)
