"""The error for a tokenizer that GGUF cannot express."""


def refusal(reason: str) -> ValueError:
    """One line that says why, and how to convert the weights alone."""
    return ValueError(
        f"the tokenizer cannot be written as GGUF: {reason}; use --no-tokenizer to leave it out"
    )
