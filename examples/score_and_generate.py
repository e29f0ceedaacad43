"""Score several answers to a question in one batch, and continue several prompts in another.

    python examples/score_and_generate.py HF_DIR

HF_DIR is a Hugging Face directory with a tokenizer.
"""

import sys

import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaForCausalLM, load_tokenizer
from llama_jax.scoring import encode_pair, loglikelihood

QUESTION, ANSWERS = "The capital of France is", (" Paris.", " London.", " a river.")
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time")


def main(checkpoint: str, new_tokens: int = 16) -> tuple[list[float], list[str]]:
    """Return the log-probability of each answer, and the continued prompts."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    tokenizer = load_tokenizer(checkpoint)

    pairs = [encode_pair(tokenizer, QUESTION, answer) for answer in ANSWERS]
    scores = [score.total for score in loglikelihood(model, pairs)]
    for score, answer in sorted(zip(scores, ANSWERS, strict=True), reverse=True):
        print(f"{score:8.2f}  {QUESTION}{answer}")

    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros_like(ids)  # 1 for tokens, 0 for padding
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt  # padded on the left
        mask[row, width - len(prompt) :] = 1
    tokens = model.generate(jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=new_tokens)
    texts = [
        tokenizer.decode(row[width - len(prompt) :])
        for row, prompt in zip(tokens, prompts, strict=True)
    ]
    for text in texts:
        print(repr(text))
    return scores, texts


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
