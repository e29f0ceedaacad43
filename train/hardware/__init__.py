"""Hardware: data sheets, topologies, and what a program asks of them.

`chips` has the data sheets and measures a CPU's peak, `gpus` what XLA has to know of a GPU; `topology` has
devices to compile for, from `tpu_topology` and `gpu_topology`, whose compiler `gpu_compiler` finds; `flops`
counts a traced program's matmuls; `hlo` reads a compiled program, `transfers` finds what it communicates,
which `collectives` sums by kind and `links` by where it goes; `roofline` bounds its time.
"""
