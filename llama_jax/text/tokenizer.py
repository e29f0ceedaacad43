"""Load the tokenizer of a checkpoint, whichever files it consists of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.files.paths import source_path
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
    """Load the tokenizer in a directory: `tokenizer.json` or, without one, `tokenizer.model`.

    In a Hugging Face directory it encodes as transformers' `AutoTokenizer` does: tokenizer_config.json and
    the directory's other tokenizer files decide added tokens, the tokens around a text and whether a
    space is put before it. A tokenizer.model alone encodes as Meta's code does, with SentencePiece or
    tiktoken, and adds the beginning-of-text token.

    Special tokens in a text are recognized, as in Hugging Face; set `encode_special_tokens` on the result
    to treat them as text. Truncation, padding and dropout are off.

    Args:
        directory: or a tokenizer file, or a name on the Hub. If a file is called tokenizer.json or
            tokenizer.model, the other files in its directory are read too.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        ValueError: no tokenizer, a damaged one or an unknown kind, or tokenizers is not installed.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from llama_jax import load_tokenizer
    >>> words = Tokenizer(models.WordLevel({"?": 0, "hello": 1, "world": 2}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> words.save("tokenizer.json")
    >>> load_tokenizer(".").encode("hello new world").ids
    [1, 0, 2]
    """
    path, files = _open(source_path(directory, weights=False))
    try:
        return read_tokenizer(files)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer ({error})") from None


def read_tokenizer(files: Mapping[str, bytes], *, as_written: bool = False) -> Tokenizer:
    """As `load_tokenizer`, from the contents of files.

    Args:
        files: content by name, of all files in a directory.
        as_written: prepare text as tokenizer.json says even if transformers 5 would follow the class named
            in tokenizer_config.json.

    Raises:
        ValueError: not a tokenizer, or damaged.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ValueError("tokenizers is not installed: pip install 'llama-jax[generate]'") from None
    if is_bare(files):
        settings = read_settings(files)
        content = model_json(
            files[MODEL],
            add_bos=settings.add_bos is not False,
            add_eos=bool(settings.add_eos),
            release_3_0=_is_llama_3_0(files),
            meta=True,
        )
        return _from_json(content)
    settings = complete_settings(files)
    if VOCABULARY not in files:
        tokenizer = _from_model(files[MODEL], settings)
    elif as_written or settings.tokenizer_class not in (LLAMA, CODE_LLAMA):
        tokenizer = _parsed(files[VOCABULARY])
    else:
        tokenizer = _rebuilt(files, settings)
    _complete(tokenizer, settings)
    return tokenizer


def complete_settings(files: Mapping[str, bytes]) -> Settings:
    """The settings of `read_settings`, completed from the vocabulary file.

    Raises:
        ValueError: a file has an impossible value.
    """
    settings = read_settings(files)
    extra, names = settings.extra, {}
    if VOCABULARY in files:
        padding = json_file(files, VOCABULARY).get("padding")
        if isinstance(padding, dict) and isinstance(padding.get("pad_token"), str):
            names = {"pad_token": padding["pad_token"]}
    elif MODEL in files and not is_tiktoken(files[MODEL]):
        model = read_model(files[MODEL])
        if settings.tokenizer_class not in (LLAMA, CODE_LLAMA):
            names = model.names()
        if extra is None:
            extra = [
                Token(text, normalized=False, special=special)
                for text, special in model.matched_tokens()
            ]
    extra = settings.legacy_extra if extra is None else extra
    names = {name: token for name, token in names.items() if name not in settings.absent}
    named = names | settings.named
    order = dict.fromkeys([*(name for name in NAMED if name in named), *named])
    return settings._replace(named={name: named[name] for name in order}, extra=extra)


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Special tokens by name (bos_token, ...), as chat templates use them.

    Raises:
        ValueError: a file has an impossible value.
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
    """The tokenizer.json equivalent to a `tokenizer.model` of SentencePiece or of tiktoken.

    Args:
        release_3_0: name Llama 3's special tokens as its first release did.
        meta: cut long texts as Meta's `tokenizer.py` does; Hugging Face does not.

    Raises:
        ValueError: neither format.
    """
    if is_tiktoken(content):
        return tiktoken_json(
            content, add_bos=add_bos, add_eos=add_eos, release_3_0=release_3_0, cut_runs=meta
        )
    return sentencepiece_json(content, add_bos=add_bos, add_eos=add_eos)


def _open(path: Path) -> tuple[Path, dict[str, bytes]]:
    """The vocabulary file, and the content of all files by name."""
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
    raise ValueError(f"{path / VOCABULARY}: not found, expected a tokenizer")


def _is_llama_3_0(files: Mapping[str, bytes]) -> bool:
    """Whether the model is Llama 3.0, whose special tokens differ from 3.1's for the same file.

    Its rotary frequencies are not scaled, those of 3.1 are.
    """
    if "params.json" in files:
        return not json_file(files, "params.json").get("use_scaled_rope")
    if "config.json" in files:
        config = json_file(files, "config.json")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        # transformers 5 also writes the default
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "default"
        return not rope or plain
    return False


def _from_json(content: Json) -> Tokenizer:
    """The `Tokenizer` of a complete tokenizer.json. Raises ValueError if it is not one."""
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
        model.unk_token = None  # tokenizers would raise at the first unknown character
    return tokenizer


def _rebuilt(files: Mapping[str, bytes], settings: Settings) -> Tokenizer:
    """A tokenizer with the vocabulary and post-processor of tokenizer.json; the class decides the rest."""
    content = json_file(files, VOCABULARY)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError("no model in it")
    vocab, merges = model.get("vocab"), model.get("merges") or []
    if isinstance(vocab, list):
        vocab = {entry[0] if isinstance(entry, list) else entry: i for i, entry in enumerate(vocab)}
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("no vocabulary in its model")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return _from_json(
        _llama_json(vocab, merges, settings) | {"post_processor": content.get("post_processor")}
    )


def _from_model(content: bytes, settings: Settings) -> Tokenizer:
    if is_tiktoken(content):
        # how text is split belongs to the format, whatever the class
        texts = [str_of(token) for token in settings.extra or []]
        return _from_json(plain_tiktoken_json(content, settings.added_by_id, texts))
    model = read_model(content)
    if settings.tokenizer_class in (LLAMA, CODE_LLAMA):
        return _from_json(_llama_json(*model.vocabulary(), settings))
    return _from_json(hugging_face_json(model, settings.added_by_id))


def _llama_json(vocab: Any, merges: Any, settings: Settings) -> Json:
    """The tokenizer that transformers 5 builds for its Llama 2 and Code Llama classes."""
    code = settings.tokenizer_class == CODE_LLAMA
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
            after_added_tokens=settings.legacy and not code,
            strip=settings.prefix_space or code,
        ),
    )


def _complete(tokenizer: Tokenizer, settings: Settings) -> None:
    """Apply the settings of the files beside the vocabulary."""
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

    def with_flags(token: str | Token) -> AddedToken:
        if isinstance(token, str):
            return AddedToken(token, special=True)
        special = token.special or token.content in named
        return AddedToken(**token._replace(special=special)._asdict())

    tokenizer.add_tokens([with_flags(token) for token in tokens])
    tokenizer.encode_special_tokens = settings.split_special
    unset = settings.add_bos is None and settings.add_eos is None
    if unset and tokenizer.post_processor is not None:
        return
    before, after = (
        [str_of(settings.named[name])] if add and name in settings.named else []
        for add, name in ((settings.add_bos, "bos_token"), (settings.add_eos, "eos_token"))
    )
    ids = {token: tokenizer.token_to_id(token) or 0 for token in [*before, *after]}
    processor = template(before, after, ids)
    tokenizer.post_processor = None if processor is None else _post_processor(processor)


def _post_processor(content: Json) -> Any:
    empty = tokenizer_json(model=bpe({}, []), added_tokens=[], decoder=None, post_processor=content)
    return _from_json(empty).post_processor
