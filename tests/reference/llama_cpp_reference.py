"""llama.cpp as a reference, through the C interface of llama-cpp-python: one thread unless more are
asked for, a float32 cache, no fused attention.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

_LOG = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Model:
    """A GGUF file that llama.cpp has loaded."""

    def __init__(self, model, context, n_vocab: int):
        self._model, self._context, self._n_vocab = model, context, n_vocab

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position: float32 [length, vocabulary]."""
        self._forget()
        return self._extend(ids, 0, [True] * len(ids))

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after a prompt, one at a time."""
        self._forget()
        last = self._extend(ids, 0, [False] * (len(ids) - 1) + [True])
        new = [int(last[-1].argmax())]
        while len(new) < count:
            last = self._extend(new[-1:], len(ids) + len(new) - 1, [True])
            new.append(int(last[-1].argmax()))
        return new

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _extend(self, ids: Sequence[int], start: int, wanted: Sequence[bool]) -> np.ndarray:
        """Adds tokens to the cache and returns the logits of those that are `wanted`."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = int(token)
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = wanted[index]
        assert llama_cpp.llama_decode(self._context, batch) == 0
        found = llama_cpp.llama_get_logits(self._context)
        values = np.ctypeslib.as_array(found, shape=(sum(wanted) * self._n_vocab,)).copy()
        llama_cpp.llama_batch_free(batch)
        return values.reshape(sum(wanted), self._n_vocab)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text without a begin token; `special` recognizes control tokens in it."""
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, False, special)
        assert count >= 0, count
        return list(ids[:count])


@contextlib.contextmanager
def opened(path: Path, n_vocab: int, length: int = 1024, threads: int = 1) -> Iterator[Model]:
    """Loads a file."""
    llama_cpp.llama_log_set(_LOG, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp cannot load {path}"
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = length
    wanted.n_threads = wanted.n_threads_batch = threads
    wanted.type_k = wanted.type_v = 0  # F32; by default F16
    wanted.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, wanted)
    assert context, f"llama.cpp cannot run {path}"
    try:
        yield Model(model, context, n_vocab)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def quantize(source: Path, target: Path, file_type: int) -> None:
    """Lets llama.cpp quantize all matrices of a file to one type."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = file_type, True, 1
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )
    assert failed == 0
