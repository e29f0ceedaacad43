"""Text to token ids and back, by the checkpoint's own tokenizer in whichever form it has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.text.sentencepiece import (
    hugging_face_json,
    metaspace_parts,
    read_model,
    sentencepiece_json,
)
from llama_jax.text.tiktoken import is_tiktoken, plain_tiktoken_json, tiktoken_json
from llama_jax.text.tokenizer_files import (
    CODE_LLAMA,
    LLAMA,
    MODEL,
    NAMED,
    VOCABULARY,
    Settings,
    Token,
    is_bare,
    json_file,
    read_files,
    read_settings,
    str_of,
)
from llama_jax.text.tokenizer_json import Json, bpe, template, tokenizer_json
from llama_jax.text.tokenizers_errors import tokenizers_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a directory, or of a file: `tokenizer.json`, or else `tokenizer.model`.

    With the files beside it that Hugging Face writes (see `text.tokenizer_files`), it gives the ids of
    transformers' `AutoTokenizer`: the tokens added later, what goes around a text, whether a space goes
    before it. A tokenizer.model alone gives those of Meta's code: of SentencePiece, or of tiktoken as
    Meta's `tokenizer.py` calls it, with the beginning token. Special tokens in the text are matched, as
    Hugging Face does; with `encode_special_tokens` set on the result they are text. Truncation, padding and
    dropout that a file may hold are off.

    Args:
        directory: or a file; with one of the two names above, the files beside it count.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        ValueError: no such file, one that is damaged or of another kind, or tokenizers not installed.
    """
    path, files = _open(Path(directory))
    try:
        return read_tokenizer(files)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer ({error})") from None


def read_tokenizer(files: Mapping[str, bytes], *, as_written: bool = False) -> Tokenizer:
    """The tokenizer that files make, see `load_tokenizer`.

    Args:
        files: content by name, of a whole directory.
        as_written: prepare text as tokenizer.json says, also where transformers 5 goes by the class that
            tokenizer_config.json names.

    Raises:
        ValueError: files of no tokenizer, or damaged.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ValueError(
            "tokenizers is not installed, expected the extra: pip install 'llama-jax[generate]'"
        ) from None
    if is_bare(files):
        around = read_settings(files)
        content = model_json(
            files[MODEL],
            add_bos=around.add_bos is not False,
            add_eos=bool(around.add_eos),
            release_3_0=_is_llama_3_0(files),
            meta=True,
        )
        return _made(content)
    settings = complete_settings(files)
    if VOCABULARY not in files:
        tokenizer = _from_model(files[MODEL], settings)
    elif as_written or settings.kind not in (LLAMA, CODE_LLAMA):
        tokenizer = _parsed(files[VOCABULARY])
    else:
        tokenizer = _rebuilt(files, settings)
    _complete(tokenizer, settings)
    return tokenizer


def complete_settings(files: Mapping[str, bytes]) -> Settings:
    """What the files beside a vocabulary say, with what the vocabulary's file says where they do not.

    Raises:
        ValueError: files with values that no tokenizer has.
    """
    settings = read_settings(files)
    extra, names = settings.extra, {}
    if VOCABULARY in files:
        padding = json_file(files, VOCABULARY).get("padding")
        if isinstance(padding, dict) and isinstance(padding.get("pad_token"), str):
            names = {"pad_token": padding["pad_token"]}
    elif MODEL in files and not is_tiktoken(files[MODEL]):
        model = read_model(files[MODEL])
        if settings.kind not in (LLAMA, CODE_LLAMA):
            names = model.names()
        if extra is None:
            extra = [
                Token(text, normalized=False, special=special)
                for text, special in model.whole_tokens()
            ]
    extra = settings.otherwise if extra is None else extra
    names = {name: token for name, token in names.items() if name not in settings.unnamed}
    named = names | settings.named
    order = dict.fromkeys([*(name for name in NAMED if name in named), *named])
    return settings._replace(named={name: named[name] for name in order}, extra=extra)


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens that have a name (bos_token, ...), by name, as chat templates know them.

    Raises:
        ValueError: files with values that no tokenizer has.
    """
    return {name: str_of(token) for name, token in complete_settings(files).named.items()}


def model_json(
    content: bytes,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
    release_3_0: bool = False,
    meta: bool = False,
) -> Json:
    """The tokenizer.json of a `tokenizer.model` alone, of whichever form.

    Args:
        release_3_0: Llama 3's special tokens by the names of its first release.
        meta: cut long texts and long runs as Meta's `tokenizer.py` does, and Hugging Face does not.

    Raises:
        ValueError: a file of neither form.
    """
    if is_tiktoken(content):
        return tiktoken_json(
            content, add_bos=add_bos, add_eos=add_eos, release_3_0=release_3_0, cut_runs=meta
        )
    return sentencepiece_json(content, add_bos=add_bos, add_eos=add_eos)


def _open(path: Path) -> tuple[Path, dict[str, bytes]]:
    """The file that has the vocabulary, and all files by name."""
    if path.is_file():
        if path.name not in (VOCABULARY, MODEL):
            return path, {MODEL if path.suffix == ".model" else VOCABULARY: path.read_bytes()}
        files = read_files(path.parent)
        if path.name == MODEL:
            files.pop(VOCABULARY, None)
        return path, files
    files = read_files(path)
    for name in (VOCABULARY, MODEL):
        if name in files:
            return path / name, files
    raise ValueError(f"{path / VOCABULARY}: not found, expected the checkpoint's tokenizer")


def _is_llama_3_0(files: Mapping[str, bytes]) -> bool:
    """Whether the model beside is of Llama 3.0, which had other special tokens in the same file.

    The positions tell: from 3.1 on they are scaled.
    """
    if "params.json" in files:
        return not json_file(files, "params.json").get("use_scaled_rope")
    if "config.json" in files:
        config = json_file(files, "config.json")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        # transformers 5 writes the default out
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "default"
        return not rope or plain
    return False


def _made(content: Json) -> Tokenizer:
    """A `Tokenizer` of a whole tokenizer.json. Raises ValueError for one that is not."""
    return _parsed(json.dumps(content).encode())


def _parsed(content: bytes) -> Tokenizer:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    try:
        with tokenizers_errors():
            tokenizer = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = tokenizer.model
    if getattr(model, "dropout", None):
        model.dropout = None
    unknown = getattr(model, "unk_token", None)
    if isinstance(model, BPE) and unknown and model.token_to_id(unknown) is None:
        model.unk_token = None  # the library would raise at the first unknown character
    return tokenizer


def _rebuilt(files: Mapping[str, bytes], settings: Settings) -> Tokenizer:
    """Of a tokenizer.json the vocabulary and what goes around a text; the rest is the class's."""
    content = json_file(files, VOCABULARY)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    vocab, merges = model.get("vocab"), model.get("merges") or []
    if isinstance(vocab, list):
        vocab = {each[0] if isinstance(each, list) else each: i for i, each in enumerate(vocab)}
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("its model has no vocabulary")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return _made(
        _llama_json(vocab, merges, settings) | {"post_processor": content.get("post_processor")}
    )


def _from_model(content: bytes, settings: Settings) -> Tokenizer:
    if is_tiktoken(content):
        # the splitting is part of the format, whatever the class
        texts = [str_of(token) for token in settings.extra or []]
        return _made(plain_tiktoken_json(content, settings.placed, texts))
    model = read_model(content)
    if settings.kind in (LLAMA, CODE_LLAMA):
        return _made(_llama_json(*model.vocabulary(), settings))
    return _made(hugging_face_json(model, settings.placed))


def _llama_json(vocab: Any, merges: Any, settings: Settings) -> Json:
    """What transformers 5 makes of a vocabulary for its class of Llama 2 or of Code Llama."""
    code = settings.kind == CODE_LLAMA
    unknown = settings.named.get("unk_token") if code else None
    return tokenizer_json(
        added_tokens=[],
        model=bpe(
            vocab,
            merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else str_of(unknown),
        ),
        **metaspace_parts(
            prefix=settings.prefix_space,
            everywhere=settings.legacy and not code,
            strip=settings.prefix_space or code,
        ),
    )


def _complete(tokenizer: Tokenizer, settings: Settings) -> None:
    """Add what the files beside the vocabulary say."""
    from tokenizers import AddedToken

    present = {
        Token(*(getattr(token, name) for name in Token._fields))
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    tokens: list[str | Token] = [token for token in settings.added if token not in present]
    known = {token.content for token in present} | {str_of(token) for token in tokens}
    for token in [*settings.named.values(), *(settings.extra or [])]:
        if str_of(token) not in known and token not in tokens:
            tokens.append(token)
    named = {str_of(token) for token in settings.named.values()}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=True)
            if isinstance(token, str)
            else AddedToken(
                **token._asdict() | {"special": token.special or token.content in named}
            )
            for token in tokens
        ]
    )
    tokenizer.encode_special_tokens = settings.split_special
    if (
        settings.add_bos is None
        and settings.add_eos is None
        and tokenizer.post_processor is not None
    ):
        return
    before, after = (
        [str_of(settings.named[name])] if add and name in settings.named else []
        for add, name in ((settings.add_bos, "bos_token"), (settings.add_eos, "eos_token"))
    )
    ids = {token: tokenizer.token_to_id(token) or 0 for token in [*before, *after]}
    around = template(before, after, ids)
    tokenizer.post_processor = None if around is None else _post_processor(around)


def _post_processor(content: Json) -> Any:
    empty = tokenizer_json(model=bpe({}, []), added_tokens=[], decoder=None, post_processor=content)
    return _made(empty).post_processor
