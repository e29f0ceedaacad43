"""Generation: prefill and decoding, sampling, generation_config.json."""
