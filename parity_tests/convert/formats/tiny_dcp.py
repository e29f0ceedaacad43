"""Tiny checkpoints as torchtitan lays them out and torch's own writer saves them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import LlamaForCausalLM

from parity_tests.convert.formats.meta.tiny_meta import meta_tensors

Tensors = dict[str, torch.Tensor]


def titan_tensors(model: LlamaForCausalLM, *, version: str = "0.3") -> Tensors:
    """A model's weights under the names that torchtitan 0.3.0, or an earlier one, gives them."""
    tensors = meta_tensors(model)
    if version != "0.3":
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for letter in "qkv":
            name = name.replace(f"attention.w{letter}.", f"attention.qkv_linear.w{letter}.")
        renamed["lm_head.weight" if name == "output.weight" else name] = tensor
    return renamed


def save(state: dict[str, Any], directory: Path, **options: Any) -> Path:
    """Saved by torch, in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(directory, **options)
        dcp.save(state, storage_writer=writer, no_dist=True)
    return directory


def trained(tensors: Tensors) -> dict[str, Any]:
    """What torchtitan's checkpointer saves: weights at the top, optimizer and the rest beside them."""
    moments = {
        f"{name}.{kind}": torch.full_like(tensor, 7.0)
        for name, tensor in tensors.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return tensors | {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"dp_rank_0": b"state"},
        "train_state": {"step": torch.tensor(3), "seen": 11},
    }


# one of several processes, each of which holds its shards of the tensors in a file
SHARDED = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

store, rank, size, source, out = sys.argv[1:]
rank, size = int(rank), int(size)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
mesh = dist.init_device_mesh("cpu", (2, size // 2))
placements = ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(0)], [Shard(0)] * 2)
state = {}
for number, (name, tensor) in enumerate(sorted(torch.load(source).items())):
    chosen = placements[number % 4] if tensor.dim() == 2 else [Shard(0), Replicate()]
    state[name] = distribute_tensor(tensor, mesh, chosen)
dcp.save({"model": state}, checkpoint_id=out)
dist.destroy_process_group()
"""


def sharded_commands(tensors: Tensors, folder: Path, out: Path, size: int) -> list[list[str]]:
    """What to run, all at once, to have `tensors` saved by so many processes."""
    torch.save(tensors, folder / "tensors.pt")
    rest = [str(size), str(folder / "tensors.pt"), str(out)]
    return [
        [sys.executable, "-c", SHARDED, str(folder / "store"), str(rank), *rest]
        for rank in range(size)
    ]
