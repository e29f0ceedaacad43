"""All faults that are tried as causes of a departure."""

from parity_tests.faults import attention, backward, ends, norms, projections, rotary
from parity_tests.faults.change import Fault

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for part in (
        rotary.FAULTS,
        norms.FAULTS,
        attention.FAULTS,
        projections.FAULTS,
        ends.FAULTS,
        backward.FAULTS,
    )
    for fault in part
}
