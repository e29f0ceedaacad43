"""The modules: layers, decoder, language-model head, task heads."""
