"""The checkpoint formats, one module or package each; `registry` lists them and says what one provides."""
