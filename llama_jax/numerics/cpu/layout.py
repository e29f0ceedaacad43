"""The layouts of a matmul's operands, as bits of a number."""

# the contracted index is the first one of `a`, or the last one of `b`
A_FIRST, B_LAST = 1, 2
