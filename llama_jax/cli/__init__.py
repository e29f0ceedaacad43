"""`python -m llama_jax`, and what every command line here shares."""
