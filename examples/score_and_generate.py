"""Score candidate answers and continue several prompts, each in one batch.

python examples/score_and_generate.py HF_DIR
"""

import sys

import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaForCausalLM
from llama_jax.evaluation.scoring import encode_pair, loglikelihood
from llama_jax.text.tokenizer import load_tokenizer

QUESTION, ANSWERS = "The capital of France is", (" Paris.", " London.", " a river.")
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time")


def main(directory: str, new_tokens: int = 16) -> tuple[list[float], list[str]]:
    """Returns the log-probability of each answer, and the continued prompts."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(directory), load_tokenizer(directory)

    pairs = [encode_pair(tokenizer, QUESTION, answer) for answer in ANSWERS]
    scores = [score.total for score in loglikelihood(model, pairs)]
    for answer, score in sorted(zip(ANSWERS, scores, strict=True), key=lambda each: -each[1]):
        print(f"{score:8.2f}  {QUESTION}{answer}")

    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    width = max(map(len, prompts))
    # shorter prompts are padded on the left; the mask says which tokens are text
    ids = np.asarray([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = np.asarray([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tokens = model.generate(jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=new_tokens)
    texts = [
        tokenizer.decode(row[width - len(p) :]) for row, p in zip(tokens, prompts, strict=True)
    ]
    for text in texts:
        print(repr(text))
    return scores, texts


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
