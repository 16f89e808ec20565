"""A tokenizer becomes keys, and the keys a tokenizer again."""

import json

import pytest
import tokenizers

from dsjax.checkpoint.gguf import splits, vocabulary
from tests.checkpoint.gguf.files import write_tokenizer

TEXTS = ("the theory\n  of 1234 things, they're <think> here", "\u4e2d\u6587 <s> caf\u00e9")


def written(folder, size=310):
    found = vocabulary.write(folder, size)
    return {key: field.value for key, field in found.fields.items()}, found


def test_keys_list_tokens_kinds_and_merges(tmp_path):
    inner = write_tokenizer(tmp_path, pad_token="</s>", add_bos_token=True)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    keys, found = written(tmp_path)
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    size = inner.get_vocab_size()
    assert len(tokens) == len(kinds) == 310
    assert all(inner.id_to_token(i) == token for i, token in enumerate(tokens[:size]))
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 310)]
    assert kinds == [3, 3, *[1] * (size - 3), 4, *[5] * (310 - size)]
    model = json.loads(inner.to_str())["model"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.padding_token_id"] == 1
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.chat_template"] == "{{ bos_token }}"
    assert found.stops == ["</s>"] and not found.remarks


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("pre", ["gpt-2", "deepseek-v3"])
def test_tokenizer_is_read_back(tmp_path, pre, whole):
    inner = write_tokenizer(tmp_path, splits.named(pre), add_bos_token=False)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 300]}')
    keys, _ = written(tmp_path)
    if not whole:  # as other programs write them
        del keys["tokenizer.huggingface.json"]
    files = vocabulary.read(keys, "m.gguf")
    again = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    for text in TEXTS:
        assert again.encode(text).ids == inner.encode(text).ids
    assert again.get_vocab() == inner.get_vocab()
    config = json.loads(files["tokenizer_config.json"])
    assert config["bos_token"] == "<s>" and config["eos_token"] == "</s>"
    assert config["add_bos_token"] is False
    assert files["chat_template.jinja"] == "{{ messages }}"


def test_another_tokens_json_in_the_file_is_not_believed(tmp_path):
    write_tokenizer(tmp_path)
    keys, _ = written(tmp_path)
    keys["tokenizer.ggml.tokens"][5], keys["tokenizer.ggml.tokens"][6] = (
        keys["tokenizer.ggml.tokens"][6],
        keys["tokenizer.ggml.tokens"][5],
    )
    again = tokenizers.Tokenizer.from_str(vocabulary.read(keys, "m.gguf")["tokenizer.json"])
    assert again.id_to_token(5) == keys["tokenizer.ggml.tokens"][5]


def test_tokens_that_end_a_reply_are_kept(tmp_path):
    end = write_tokenizer(tmp_path).token_to_id("<think>")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [1, {end}, 305]}}')
    keys, found = written(tmp_path)
    assert keys["tokenizer.ggml.eot_token_id"] == end
    assert sorted(found.stops) == ["</s>", "<think>"]
    read = vocabulary.read(keys, "m.gguf")
    assert json.loads(read["generation_config.json"])["eos_token_id"] == [1, end]


def test_what_llama_cpp_leaves_out_is_said(tmp_path):
    inner = write_tokenizer(tmp_path)
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    inner.save(str(tmp_path / "tokenizer.json"))
    _, found = written(tmp_path)
    assert len(found.remarks) == 2
    assert "NFC" in found.remarks[0] and "<x>" in found.remarks[1]


def test_folder_without_tokenizer_gives_token_ids(tmp_path):
    keys, found = written(tmp_path)
    assert keys == {"tokenizer.ggml.model": "none"} and "no tokenizer.json" in found.remarks[0]
    assert vocabulary.read(keys, "m.gguf") == {}


def test_unknown_splitting_is_refused(tmp_path):
    write_tokenizer(tmp_path, tokenizers.pre_tokenizers.ByteLevel(use_regex=False))
    with pytest.raises(ValueError, match=r"knows no pre-tokenizer.*without tokenizer\.json"):
        vocabulary.write(tmp_path, 310)


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with pytest.raises(ValueError, match="is a WordLevel; only byte-level BPE"):
        vocabulary.write(tmp_path, 310)
    with pytest.raises(ValueError, match=r"'llama'; only gpt2.* use the Hugging Face folder"):
        vocabulary.read({"tokenizer.ggml.model": "llama"}, "m.gguf")


@pytest.mark.parametrize("missing", ["tokens", "merges", "token_type"])
def test_missing_lists_are_named(tmp_path, missing):
    write_tokenizer(tmp_path)
    keys, _ = written(tmp_path)
    del keys[f"tokenizer.ggml.{missing}"]
    with pytest.raises(ValueError, match="damaged"):
        vocabulary.read(keys, "m.gguf")
