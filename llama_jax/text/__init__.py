"""Text in and out: tokenizers, chat templates, streamed decoding."""
