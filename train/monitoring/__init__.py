"""What a run shows and records.

`reporter` turns steps into metrics, `loggers` writes them to metrics.jsonl and other services,
`metrics_log` is that file and the picture of the loss, `display` the terminal, `introduction` what is said
before the first step. `statistics_record` is what metrics.jsonl has of a step's statistics,
`heat_maps` their pictures, `history` the events of a run, `report_page` a page about it.
"""
