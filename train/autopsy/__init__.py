"""What made a step of a run as it is: `python -m train autopsy RUN STEP`.

`command` runs it and `examine` puts it together. `replay` opens a run for reading and `history` replays it
up to the step; `record` repeats the step with everything recorded. `noise` says what is unusual, `symptoms`
what is unusual about the step as a whole. `documents`, `rates`, `moments`, `layers` and `non_finite` look
at what can be at fault; `document_causes`, `state_causes`, `layer_causes` and `non_finite_causes` judge it,
and `causes` ranks it. `parts` names parts of a state.
`counterfactuals` replays with one thing changed, by the optimizer in `adjustable`. `text`, `page` and
`result` are the output.
"""
