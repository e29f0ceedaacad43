"""torch distributed checkpoints: `.metadata` and `*.distcp`, in torchtitan's or Hugging Face's names.

What `torch.distributed.checkpoint.save` writes, whatever was sharded over how many devices: torchtitan's
`checkpoint/step-N`, Accelerate's `pytorch_model_fsdp_0`, or a program's own tree with the model in it.
Written are torchtitan's names, so that its `initial_load_path` takes it.
"""

from convert.formats.dcp.read import read, recognizes
from convert.formats.dcp.write import target_specs, write
from convert.formats.plain import cast_rule, losses, stored_bytes

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]
