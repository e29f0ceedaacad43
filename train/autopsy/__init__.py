"""What made a step of a run as it is: `python -m train autopsy RUN STEP`.

`command` runs it and `examine` puts it together. `replay` opens a run for reading and `history` replays it
up to the step; `record` repeats the step with everything recorded. `noise` says what is unusual, `symptoms`
what is unusual about the step as a whole. `documents`, `rates`, `moments` and `layers` look at what can be
at fault; `document_causes`, `state_causes` and `layer_causes` judge it, and `causes` ranks it.
`counterfactuals` replays with one thing changed, by the optimizer in `adjustable`. `text`, `page` and
`result` are the output.
"""
