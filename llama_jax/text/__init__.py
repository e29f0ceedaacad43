"""Text in and out: tokenizers, chat templates, streamed decoding.

`tokenizer` loads a checkpoint's tokenizer in any format: `tokenizer_files` reads Hugging Face's JSON files,
`sentencepiece` and `tiktoken` the two kinds of tokenizer.model, and `tokenizer_json` builds what
`tokenizers` loads. `detokenize` and `incremental` turn generated tokens into text as they arrive, `encode`
prepares texts for scoring, `chat_template` renders conversations, `companions` lists and copies all these
files, and `lines` reads text files.
"""
