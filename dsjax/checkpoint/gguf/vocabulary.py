"""A tokenizer as keys of a GGUF file, and back.

llama.cpp's byte-level BPE ("gpt2") needs the tokens in the order of their ids, what kind each is,
the merges, and the name of a pre-tokenizer. The file also holds the whole tokenizer.json
(`tokenizer.huggingface.json`), so that reading it back gives the same tokenizer.

llama.cpp does not normalize text, and its tokens have no flags such as `lstrip`; what that changes
is said, not refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, decoders, models

from dsjax.checkpoint.gguf import splits
from dsjax.checkpoint.gguf.architecture import Field
from dsjax.files import read_json
from dsjax.text.template import find_template
from dsjax.text.tokenizer import FILE_NAMES
from dsjax.text.vocabulary import Vocabulary, open_vocabulary

_PREFIX = "tokenizer.ggml."
_WHOLE = "tokenizer.huggingface.json"
_TEMPLATE = "tokenizer.chat_template"
_IDS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
# Kinds of token that a text may spell out; the rest are parts of words, or unused.
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)


class Written(NamedTuple):
    """Keys of a tokenizer, what they cannot say, and the names of the tokens that end a reply."""

    fields: dict[str, Field]
    remarks: list[str]
    stops: list[str]


def write(folder: Path, vocab_size: int) -> Written:
    """Returns the keys of the tokenizer in a checkpoint's folder, with its chat template.

    Raises:
      ValueError: it cannot be read, or is of a kind that llama.cpp does not know.
    """
    if not any((folder / name).is_file() for name in FILE_NAMES):
        said = f"{folder} has no {FILE_NAMES[0]}: the file takes and gives token ids, not text"
        return Written({_PREFIX + "model": Field("str", "none")}, [said], [])
    vocabulary = open_vocabulary(folder, vocab_size)
    inner, control = vocabulary.coder.inner, vocabulary.coder.control
    content = json.loads(inner.to_str())
    remarks = _remarks(content, folder)
    name, exact = splits.recognize(_splitter(inner, folder))
    if name is None:
        raise ValueError(
            f"{folder}: llama.cpp knows no pre-tokenizer that cuts text like the one of this "
            "tokenizer.json, and would feed the model other tokens. To write the weights alone, "
            "export a copy of the folder without tokenizer.json"
        )
    if not exact:
        remarks.append(
            f"the tokenizer is written as {name}, the nearest that llama.cpp knows: indented lines "
            "and runs of Chinese or Japanese become other tokens there"
        )
    tokens, kinds = _tokens(inner, content, vocab_size)
    fields = {
        "model": Field("str", "gpt2"),
        "pre": Field("str", name),
        "tokens": Field("strs", tokens),
        "token_type": Field("i32s", kinds),
        "merges": Field("strs", [_joined(merge) for merge in content["model"]["merges"]]),
        "add_bos_token": Field("bool", vocabulary.begins),
        "add_eos_token": Field("bool", False),
    } | _special_ids(vocabulary)
    written = {_PREFIX + key: field for key, field in fields.items()}
    written[_WHOLE] = Field("str", json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    template = find_template(folder, vocabulary)
    if template is not None:
        written[_TEMPLATE] = Field("str", template.source)
    names = {i: token for token, i in control.items()}
    return Written(written, remarks, [names[i] for i in vocabulary.stop_ids if i in names])


def _splitter(inner: tokenizers.Tokenizer, folder: Path) -> Any:
    if inner.pre_tokenizer is None:
        raise ValueError(
            f"{folder}: tokenizer.json has no pre_tokenizer; only byte-level BPE can be written"
        )
    return inner.pre_tokenizer


def _remarks(content: Mapping[str, Any], folder: Path) -> list[str]:
    """Checks that a tokenizer is a plain byte-level BPE; says what llama.cpp leaves out of it.

    Raises:
      ValueError: it is another kind of tokenizer.
    """
    model = content["model"]
    decoder = json.dumps(content.get("decoder") or {})
    odd = [
        name
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
        if model.get(name)
    ]
    if model["type"] != "BPE" or odd or "ByteLevel" not in decoder:
        raise ValueError(
            f"{folder}: tokenizer.json is a {model['type']}"
            f"{' with ' + ', '.join(odd) if odd else ''}; only byte-level BPE, as all DeepSeek "
            "models have, can be written to a GGUF file"
        )
    remarks = []
    normalizer = content.get("normalizer")
    if normalizer and normalizer.get("normalizers") != []:
        kind = normalizer["type"]
        remarks.append(f"llama.cpp does not normalize text; tokenizer.json does, by {kind}")
    flagged = [
        token["content"]
        for token in content["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if flagged:
        remarks.append(
            f"llama.cpp ignores lstrip, rstrip and single_word, which {len(flagged)} tokens have, "
            f"such as {flagged[0]}"
        )
    return remarks


def _tokens(
    inner: tokenizers.Tokenizer, content: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Lists a token and its kind for every row of the embedding."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for token, i in inner.get_vocab(with_added_tokens=False).items():
        tokens[i], kinds[i] = token, int(TokenType.NORMAL)
    for token in content["added_tokens"]:
        control = token["special"] or _looks_control(token["content"])
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return tokens, kinds


def _looks_control(name: str) -> bool:
    """Tells by its spelling whether a token is a control token; releases do not flag all of them.

    <think> and </think> are not: llama.cpp shows only what is no control token.
    """
    return any(name.startswith("<" + bar) and name.endswith(bar + ">") for bar in ("|", "\uff5c"))


def _joined(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _special_ids(vocabulary: Vocabulary) -> dict[str, Field]:
    inner = vocabulary.coder.inner
    pad = vocabulary.config.get("pad_token")
    names = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": pad.get("content") if isinstance(pad, dict) else pad,
    }
    found = {key: inner.token_to_id(name) for key, name in names.items() if isinstance(name, str)}
    fields = {f"{_IDS[key]}_token_id": Field("u32", i) for key, i in found.items() if i is not None}
    others = vocabulary.stop_ids - {found.get("eos_token")}
    others = sorted(i for i in others if inner.id_to_token(i) is not None)
    if others:
        fields["eot_token_id"] = Field("u32", others[0])  # ends a reply too
    return fields


def read(keys: Mapping[str, Any], place: str) -> dict[str, str]:
    """Rebuilds the files of a tokenizer from a GGUF file's keys.

    Returns:
      the contents of tokenizer.json, tokenizer_config.json, generation_config.json and, if the file
      has a template, chat_template.jinja; nothing if it has no tokenizer.

    Raises:
      ValueError: the tokenizer is of a kind that cannot be read.
    """
    model = keys.get(_PREFIX + "model", "none")
    if model in ("none", "no_vocab"):
        return {}
    if model != "gpt2":
        raise ValueError(
            f"{place}: tokenizer.ggml.model={str(model)[:40]!r}; only gpt2, byte-level BPE, can be "
            "read; use the Hugging Face folder that the file was made from"
        )
    tokens, kinds, merges = (keys.get(_PREFIX + key) for key in ("tokens", "token_type", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise ValueError(f"{place} has no {_PREFIX}tokens or merges; it is damaged")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"{place} has no {_PREFIX}token_type for every token; it is damaged")
    whole = keys.get(_WHOLE)
    if not isinstance(whole, str) or not _agrees(whole, tokens):
        whole = _rebuilt(tokens, kinds, merges, str(keys.get(_PREFIX + "pre")), place)
    ids = {name: keys.get(f"{_PREFIX}{ours}_token_id") for name, ours in _IDS.items()}
    ids = {name: i for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: tokens[i] for name, i in ids.items()}
    config["add_bos_token"] = bool(keys.get(_PREFIX + "add_bos_token", "bos_token" in ids))
    stops = [keys.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot")]
    stops = [i for i in stops if type(i) is int and 0 <= i < len(tokens)]
    generation: dict[str, Any] = {f"{name}_id": i for name, i in ids.items()}
    if len(stops) > 1:
        generation["eos_token_id"] = stops
    files = {
        "tokenizer.json": whole,
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    if isinstance(keys.get(_TEMPLATE), str):
        files["chat_template.jinja"] = keys[_TEMPLATE]
    return files


def _agrees(whole: str, tokens: list[str]) -> bool:
    """Tells whether a tokenizer.json has the tokens that the file lists."""
    try:
        content = json.loads(whole)
        found = dict(content["model"]["vocab"])
        found |= {token["content"]: token["id"] for token in content["added_tokens"]}
        return all(0 <= i < len(tokens) and tokens[i] == token for token, i in found.items())
    except (KeyError, TypeError, ValueError):
        return False


def _rebuilt(tokens: list[str], kinds: list[int], merges: list[str], pre: str, place: str) -> str:
    try:
        splitter = splits.named(pre)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    normal = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == TokenType.NORMAL
    }
    added = {i: kinds[i] for i in range(len(tokens)) if kinds[i] in _ADDED}
    pairs: Any = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        names = {tokens[i]: i for i in added}
        bpe = models.BPE(
            vocab=normal | names, merges=pairs, ignore_merges=pre in ("llama-bpe", "kimi-k2")
        )
        inner: Any = tokenizers.Tokenizer(bpe)
        inner.pre_tokenizer, inner.decoder = splitter, decoders.ByteLevel()
        for i, kind in added.items():
            special = kind == TokenType.CONTROL
            token = AddedToken(tokens[i], special=special, normalized=False)
            (inner.add_special_tokens if special else inner.add_tokens)([token])
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"{place}: its tokens and merges are no tokenizer: {error}") from error
    return inner.to_str()


def sampling(folder: Path) -> dict[str, float]:
    """Returns the settings of generation_config.json that ollama's Modelfile has too."""
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    return {
        name: config[name]
        for name in ("temperature", "top_p", "top_k")
        if type(config.get(name)) in (int, float)
    }
