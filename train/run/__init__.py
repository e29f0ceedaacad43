"""A pretraining run.

`begin` starts a run, `resume` continues one; both end in `loop`, which trains, evaluates and saves.
`folder` says what a run's folder holds, `changes` which options may change on resume, `training_data` and
`processes` prepare what the loop needs, `ahead` compiles the step while the state is read, `kept_step`
keeps it for the next start, `saves` are its checkpoints, `evaluation` is an evaluation during the run,
`lock` keeps two processes from running one folder, and `stop` turns signals into a checkpoint and an
orderly end. `runtime_messages` is what one of several processes says when another one has died.
"""
