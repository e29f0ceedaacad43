"""Training data: text to token files, token files to batches.

`tokenize` turns `documents` into `token_shards`; `special_ids` are the tokens that begin and end a text;
`stdlib` is the data that every machine has. `tokens` is what every source is opened as, a `token_directory`
or token files of other programs (`formats`). `sources` resolves --data, `identity` tells data sets apart by
digest. `windows` reads fixed-length windows and batches of them; `placement` puts a `batch` on the devices.
"""
