"""Record a Llama that FSDP2 shards over two processes.

`python -m parity_tests.workers.fsdp_trace RANK STORE OUT`, in two processes at once. They meet in STORE, a
new file, and each writes the trace OUT-RANK.
"""

import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parity_tests.harness.cases import BY_NAME, hf_model, weights_of
from parity_tests.record_torch import recording


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    config = BY_NAME["gqa_3_to_1"].config
    model = hf_model(config, weights_of(config)).eval()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.arange(2, 26)[None]
    with recording(model, f"{out}-{rank}", quiet=True) as trace:
        loss = model(input_ids=ids, labels=ids).loss
        trace.loss(loss, labels=ids)
        loss.backward()
        trace.step(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
