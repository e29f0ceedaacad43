"""`python -m llama_jax quantize`: write a checkpoint with its weights quantized to 8 or 4 bits."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli.arguments import DTYPES, Parser, add_model, option_names, positive
from llama_jax.formatting import printable

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

_WINDOW = 512  # tokens of a text that are run at a time
_CALIBRATION_WINDOWS = 32  # more bring little


def add_quantize(program: Parser) -> None:
    """Add the command to its program."""
    parser = program.add_command("quantize", quantize, help="quantize the weights to 8 or 4 bits")
    add_model(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist"
    )
    parser.add_argument("--bits", type=int, default=8, metavar="N", help="bits of a weight: 8 or 4")
    parser.add_argument(
        "--group-size",
        type=positive,
        metavar="N",
        help="columns that share a scale; default: the whole row for 8 bits; 128 for 4 bits, or 32 if that "
        "divides more input dimensions",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the tensors that are not quantized; default: as stored",
    )
    parser.add_argument(
        "--format",
        choices=("llama_jax", "compressed-tensors"),
        default="llama_jax",
        help="compressed-tensors is what vLLM loads: 4 bits are symmetric, and the embedding and the head "
        "are not quantized; default: llama_jax",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, at best like what the model is for, on which outputs are to change least; "
        "default: every weight is rounded by itself",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text on which to compare the original and the quantized model",
    )


def quantize(options: argparse.Namespace) -> None:
    """Quantize, write, and print the bytes saved and the change in perplexity. Raises ValueError."""
    from llama_jax.evaluation.divergence import divergence
    from llama_jax.files.paths import destination_path
    from llama_jax.files.remote import is_remote
    from llama_jax.files.staging import staged_directory
    from llama_jax.files.upload import output_directory, require_absent
    from llama_jax.load import companions_directory, load_model
    from llama_jax.models.calibration import quantize_calibrated
    from llama_jax.quantization import model as quantization
    from llama_jax.text.companions import copy_companions

    out = destination_path(options.out)
    if is_remote(out):
        require_absent(out)
    elif out.exists():
        raise ValueError(f"--out: {options.out} already exists; choose another directory")
    elif not_a_directory := [path for path in out.parents if path.is_file()]:
        raise ValueError(f"--out: {not_a_directory[0]} is a file, expected a directory")
    if options.text and options.calibrate and options.text.resolve() == options.calibrate.resolve():
        raise ValueError(
            "--text: is the file of --calibrate, on which the loss would look too small; give another"
        )
    ids = _token_ids(options, "text")
    calibration = _token_ids(options, "calibrate")
    model = load_model(options.model, options.dtype)
    window = min(_WINDOW, model.config.max_position_embeddings)
    for_others = options.format == "compressed-tensors"
    how: dict[str, Any] = {
        "bits": options.bits,
        "group_size": options.group_size,
        "vocabulary": not for_others,
        "symmetric": for_others,
    }
    with option_names(options):
        if calibration:
            windows = _windows(calibration, window, _CALIBRATION_WINDOWS)
            quantized = quantize_calibrated(model, windows, **how)
        else:
            quantized = quantization.quantize(model, **how)
    if ids:  # before anything is written: a text may be too short
        difference = divergence(model, quantized, ids, window=window)
    staged = output_directory(out) if is_remote(out) else staged_directory(out, into_existing=False)
    with staged as staging:
        quantized.save_pretrained(staging, compressed_tensors=for_others)
        copy_companions(companions_directory(options.model), staging)
    old_size, new_size = map(quantization.weight_bytes, (model, quantized))
    ratio = new_size / old_size
    name = printable(str(out if is_remote(out) else options.out))
    print(f"{name}: {old_size} bytes of weights before, {new_size} after, {ratio:.1%}")
    for bits, count in sorted(quantization.matrices_by_bits(quantized).items()):
        if count:
            print(f"{count} matrices in {bits} bits")
    if ids:
        before, after = difference.reference_perplexity, difference.perplexity
        print(
            f"over {difference.tokens} tokens: mean KL {difference.kl:.3g}, perplexity "
            f"{before:.5g} before, {after:.5g} after, {after / before - 1:+.2%}"
        )


def _token_ids(options: argparse.Namespace, name: str) -> list[int]:
    """Of the text that an option names; empty if it names none."""
    from llama_jax.load import tokenizer_directory
    from llama_jax.text.lines import read_text
    from llama_jax.text.tokenizer import load_tokenizer

    path = getattr(options, name)
    if path is None:
        return []
    text = read_text(path)
    if not text:
        raise ValueError(f"--{name}: {path} is empty")
    ids: list[int] = load_tokenizer(tokenizer_directory(options.model)).encode(text).ids
    return ids


def _windows(ids: list[int], size: int, most: int) -> "Int[np.ndarray, 'windows size']":
    """Windows of a text, evenly spaced where there are too many; a short text is one window."""
    import numpy as np

    size = min(size, len(ids))
    count = len(ids) // size
    windows = np.asarray(ids[: count * size]).reshape(count, size)
    return windows[np.linspace(0, count - 1, min(count, most)).astype(int)]
