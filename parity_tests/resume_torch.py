"""Continue a run of llama_jax in plain PyTorch: python resume_torch.py DIR OUT --steps 50 --data TOKENS

DIR is what `python -m train export RUN DIR --with-optimizer` wrote, or an earlier OUT; TOKENS are the run's
token directories. The file can be copied anywhere with torch, transformers and safetensors.
"""

import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def learning_rate(schedule, step):
    """Of step 0, 1, ...: a linear warmup, then constant or falling as a cosine or a line."""
    name, steps, warmup = schedule["name"], schedule["steps"], schedule["warmup_steps"]
    if step < warmup or name == "constant":
        return schedule["peak"] * min((step + 1) / max(warmup, 1), 1)
    falling = max(round(steps * schedule["decay_fraction"]) if name == "wsd" else steps - warmup, 1)
    done = min(max(step - steps + falling, 0) / falling, 1)
    left = (1 + math.cos(math.pi * done)) / 2 if name == "cosine" else 1 - done
    return schedule["peak"] * (left + (1 - left) * schedule["final_fraction"])


def read(path, dtype):
    return torch.from_file(str(path), size=path.stat().st_size // dtype.itemsize, dtype=dtype)


class Source:
    def __init__(self, directory, listed, length):
        index, self.length = json.loads((directory / "index.json").read_text()), length
        if [[s["file"], s["tokens"], s["sha256"]] for s in index["splits"]["train"]] != listed:
            raise ValueError(f"{directory}: not the data of the run; pass that with --data")
        paths, dtype = [directory / file for file, *_ in listed], getattr(torch, index["dtype"])
        self.shards = [read(path, dtype) for path in paths]
        self.starts = torch.tensor([0, *map(len, self.shards)]).cumsum(0).tolist()
        ends = [read(path.with_suffix(".ends"), torch.int64) for path in paths]
        self.ends = torch.cat([e + at for e, at in zip(ends, self.starts, strict=False)])

    def window(self, number):
        """[4, length]: token ids, positions, documents, which do not see each other, and labels."""
        length, first = self.length, number * self.length
        last = min(first + length + 1, self.starts[-1])
        ids, begins = torch.zeros(2, length + 1, dtype=torch.int64)
        for shard, at in zip(self.shards, self.starts, strict=False):
            part = shard[max(first - at, 0) : max(last - at, 0)].long()
            ids[max(at - first, 0) :][: len(part)] = part
        ends = torch.searchsorted(self.ends, torch.tensor([first, first + length]), right=True)
        begins[self.ends[slice(*ends)] - first] = 1
        documents, positions = begins.cumsum(0), torch.arange(length)
        labels = torch.where(documents[1:] == documents[:-1], ids[1:], -100)
        labels[last - first - 1 :] = -100
        starts = torch.where(begins[:-1] == 1, positions, 0).cummax(0).values
        return torch.stack([ids[:-1], positions - starts, documents[:-1], labels])


def losses(model, rows, bfloat16):
    """Summed cross-entropy and z-loss of windows, [rows, 4, length]."""
    ids, positions, documents, labels = rows.unbind(1)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=bfloat16):
        out = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    logits, labels = out.logits.flatten(0, 1), labels.flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z_loss = (logits.logsumexp(-1).square() * (labels != -100)).sum()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), z_loss


def facts(path):
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def train(directory, out, steps, data, device, load=AutoModelForCausalLM.from_pretrained):
    """Train the model in `directory` for `steps` steps, and write it and its state to `out`."""
    folder = directory / "training_state"
    state = json.loads((folder / "state.json").read_text())
    if missing := {"step", "files", "data", "optimizer", "schedule", "rng"} - state.keys():
        raise ValueError(f"{folder / 'state.json'}: has no {', '.join(sorted(missing))}")
    for name, listed in state["files"].items():
        if not (directory / name).is_file() or facts(directory / name) != listed:
            raise ValueError(f"{directory / name}: missing, or not what state.json lists")
    adamw, batches, first = state["optimizer"], state["data"], state["step"]
    order = read(folder / "batches.bin", torch.int64).view(-1, batches["batch_size"], 2)
    order = order[first - batches["first_step"] :][:steps].tolist()
    if len(order) < steps or out.exists():
        raise ValueError(f"{directory}: lists {len(order)} of {steps} batches, or {out} exists")
    pairs = zip(data or [s["path"] for s in batches["sources"]], batches["sources"], strict=True)
    sources = [Source(Path(p), s["shards"], batches["sequence_length"]) for p, s in pairs]
    model, groups = load(directory, dtype="auto").to(device).train(), ([], [])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        groups[name in adamw["no_decay"]].append(parameter)
    groups = [{"params": groups[0], "weight_decay": adamw["weight_decay"]}, {"params": groups[1]}]
    optimizer = torch.optim.AdamW(groups, 0.0, adamw["betas"], adamw["eps"], weight_decay=0.0)
    for moment, tensors in (moments := {"exp_avg": {}, "exp_avg_sq": {}}).items():
        for path in (folder / moment).glob("*.safetensors"):
            tensors |= load_file(path)
        pairs = [{(n, t.shape) for n, t in values.items()} for values in (tensors, parameters)]
        if wrong := sorted({name for name, _ in pairs[0] ^ pairs[1]}):
            raise ValueError(f"{folder / moment}: missing, unexpected or misshapen: {wrong}")
        for name, parameter in parameters.items():
            optimizer.state[parameter]["step"] = torch.tensor(float(first))
            tensors[name] = optimizer.state[parameter][moment] = tensors[name].to(parameter)
    lines = []
    for step, numbers in enumerate(order, first):
        torch.manual_seed(state["rng"]["seed"] + step)  # of dropout
        batch = torch.stack([sources[source].window(number) for source, number in numbers])
        count, total = max(int((batch[:, 3] != -100).sum()), 1), 0.0
        optimizer.zero_grad()
        for rows in batch.to(device).chunk(batches["micro_batches"]):
            loss, z_loss = losses(model, rows, state["compute_dtype"] == "bfloat16")
            ((loss + adamw["z_loss"] * z_loss) / count).backward()
            total += loss.item() / count
        norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm().item()
        for p in parameters.values() if norm >= (adamw["clip_norm"] or math.inf) else ():
            p.grad.mul_(adamw["clip_norm"] / norm)
        rate = learning_rate(state["schedule"], step)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        lines.append({"step": step + 1, "loss": total, "grad_norm": norm, "learning_rate": rate})
    shutil.copytree(directory, out, ignore=shutil.ignore_patterns("*.safetensors*", "*.jsonl"))
    saved = {f"training_state/{m}/model.safetensors": tensors for m, tensors in moments.items()}
    saved["model.safetensors"] = {name: p.detach() for name, p in parameters.items()}
    for name, tensors in saved.items():
        save_file(tensors, out / name, {"format": "pt"})
    names = {*saved, *(name for name in state["files"] if ".safetensors" not in name)}
    state |= {"step": first + steps, "files": {name: facts(out / name) for name in names}}
    (out / "training_state" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--device", default="cpu")
    try:
        train(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
