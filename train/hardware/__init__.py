"""Hardware: data sheets, topologies, and what a program asks of them.

`chips` has the data sheets and measures a CPU's peak, `topology` devices to compile for, `flops` counts a
traced program's matmuls, `collectives` a compiled program's communication, `roofline` bounds its time.
"""
