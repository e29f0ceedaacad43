"""llama.cpp's shared libraries, called through ctypes: quantize a GGUF file, and decode greedily.

LLAMA_CPP is the directory that has them. npm has them ready, without a compiler:

    npm install --ignore-scripts @node-llama-cpp/linux-x64
    export LLAMA_CPP=$PWD/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64

Structures of parameters change with each version, but begin alike: they are passed as words, of which the
first ones are set and the result is checked.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "LLAMA_CPP"
HOW_TO_GET_IT = f"llama.cpp: {VARIABLE} is not set to its libraries, see benchmarks/llama_cpp.py"

# of `llama_ftype` in llama.h
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "BF16": 32}

_CONTEXT_WORD, _BATCH_WORD, _SEQUENCES_WORD = 0, 1, 3  # of llama_context_params
_THREADS_WORD, _TYPE_WORD = 0, 1  # of llama_model_quantize_params

_Ids = ctypes.POINTER(ctypes.c_int32)
_Address = ctypes.c_void_p


class _Parameters(ctypes.Structure):
    """Longer than any of llama.cpp's: a callee reads the beginning only."""

    _fields_ = (("words", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", _Ids),
        ("embd", _Address),
        ("pos", _Ids),
        ("n_seq_id", _Ids),
        ("seq_id", ctypes.POINTER(_Ids)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def libraries() -> Path | None:
    """The directory in LLAMA_CPP; None if it is not set.

    Raises:
        ValueError: it has no libllama.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    directory = Path(name)
    if not list(directory.glob("libllama.*")):
        raise ValueError(f"{VARIABLE}: no libllama in {name}; set it to llama.cpp's libraries")
    return directory


class LlamaCpp:
    """The functions of the libraries in a directory."""

    def __init__(self, directory: Path):
        def load(pattern: str) -> ctypes.CDLL:
            return ctypes.CDLL(str(min(directory.glob(pattern))), mode=ctypes.RTLD_GLOBAL)

        load("libggml-base.*")
        ggml, self._library = load("libggml.*"), load("libllama.*")
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Address)(_ignore)
        self._function("llama_log_set", None, _Address, _Address)(
            ctypes.cast(self._log, _Address), None
        )
        ggml.ggml_backend_load_all_from_path(ctypes.c_char_p(str(directory).encode()))

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def quantize(self, source: Path, target: Path, kind: str, threads: int) -> None:
        """Write the GGUF file `source` with its matrices in a type of `TYPES`."""
        parameters = self._function("llama_model_quantize_default_params", _Parameters)()
        parameters.words[_THREADS_WORD], parameters.words[_TYPE_WORD] = threads, TYPES[kind]
        paths = ctypes.c_char_p, ctypes.c_char_p
        run = self._function(
            "llama_model_quantize", ctypes.c_uint32, *paths, ctypes.POINTER(_Parameters)
        )
        if run(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
            raise RuntimeError(f"llama.cpp did not quantize {source} to {kind}")

    def generator(
        self, file: Path, threads: int, rows: int, tokens: int
    ) -> Callable[[np.ndarray, int], np.ndarray]:
        """Greedy decoding: of ids [batch, prompt] and a number of new tokens, the new ones.

        Args:
            file: a GGUF file.
            threads: for all that it computes.
            rows: at most so many in a batch.
            tokens: at most so many in a row, and in all prompts together.
        """
        model = self._function(
            "llama_model_load_from_file", _Address, ctypes.c_char_p, _Parameters
        )(str(file).encode(), self._function("llama_model_default_params", _Parameters)())
        parameters = self._function("llama_context_default_params", _Parameters)()
        parameters.words[_CONTEXT_WORD] = rows * tokens
        parameters.words[_BATCH_WORD] = tokens
        parameters.words[_SEQUENCES_WORD] = rows
        create = self._function("llama_init_from_model", _Address, _Address, _Parameters)
        context = create(model, parameters)
        for name, expected in (("llama_n_batch", tokens), ("llama_n_seq_max", rows)):
            found = self._function(name, ctypes.c_uint32, _Address)(context)
            if found != expected:
                raise RuntimeError(f"llama.cpp: {name} is {found}, expected {expected}")
        count = ctypes.c_int32
        self._function("llama_set_n_threads", None, _Address, count, count)(
            context, threads, threads
        )
        memory = self._function("llama_get_memory", _Address, _Address)(context)
        clear = self._function("llama_memory_clear", None, _Address, ctypes.c_bool)
        decode = self._function("llama_decode", count, _Address, _Batch)
        logits = self._function(
            "llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), _Address, count
        )
        vocabulary = self._function("llama_model_get_vocab", _Address, _Address)(model)
        vocab = self._function("llama_vocab_n_tokens", count, _Address)(vocabulary)
        batch = self._function("llama_batch_init", _Batch, count, count, count)(tokens, 0, 1)

        def step(ids: np.ndarray, position: int) -> np.ndarray:
            """Run ids [batch, seq] from a position on; the next token of every row."""
            ends = []
            for row, column in np.ndindex(*ids.shape):
                index = row * ids.shape[1] + column
                is_last = column == ids.shape[1] - 1
                batch.token[index], batch.pos[index] = int(ids[row, column]), position + column
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = is_last
                ends += [index] * is_last
            batch.n_tokens = ids.size
            if decode(context, batch) != 0:
                raise RuntimeError("llama.cpp did not decode")
            rows = (np.ctypeslib.as_array(logits(context, end), (vocab,)) for end in ends)
            return np.array([row.argmax() for row in rows])

        def generate(ids: np.ndarray, new: int) -> np.ndarray:
            clear(memory, True)
            made = [step(ids, 0)]
            for position in range(ids.shape[1], ids.shape[1] + new - 1):
                made.append(step(made[-1][:, None], position))
            return np.stack(made, axis=1)

        return generate


def _ignore(*_: Any) -> None:
    """What llama.cpp has to say."""
