"""One training run: ranks and devices, its folder, micro-batches, the optimizer's step, checkpoints, the log.
A method's main() calls them. A batch is a dict with `ids`, `prompts` (lists of token ids) and `xt` (B, L)."""
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import cli
import lora
import model as nt_model
from cli import UserError, refuse_if, sha256, sync, whole_folder
from model import save_tensors


@dataclass
class Options(nt_model.ModelOptions):
    """What every method has. All but the first eight may change when a run is continued."""
    max_prompt: int | None = None  # leave out problems with a longer prompt, tokens
    max_steps: int = 0  # stop after this many steps (0: epochs decide)
    full: bool = False  # train all weights instead of LoRA adapters (a teacher is then a frozen copy)
    clip: float = 1.0  # gradient norm
    lr_schedule: Literal["constant", "cosine", "tail"] = "cosine"  # tail: linear to zero over the last 40%
    lr_floor: float = 0.0  # share of the peak learning rate that the schedules end at
    out: str = ""  # output directory; default out/METHOD-MODEL
    overwrite: bool = False  # start anew in a directory that already holds a run
    save_every: int = 100  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    each_epoch: bool = False  # keep what every epoch ends with, in epoch-1 ...: parts of --max_steps if given
    eval_problems: int = 300  # problems of the closing evaluation (embedded tasks only; 0: none)
    fsdp: bool = False  # LoRA: shard the frozen base over ranks, where it does not fit (--full always does)
    checkpoint_blocks: bool = False  # keep only the inputs of blocks, compute the rest again: less memory
    compile: bool | None = None  # compile every block for training [on a GPU]


ALONE = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT="", MASTER_ADDR="")  # without torchrun
STEP_TIMEOUT = timedelta(minutes=4)  # within which all ranks come to the same place of a step
MADE = ("adapter model checkpoints results.jsonl epoch-[0-9]* log.jsonl adapter.unfinished-nanotraj "
        "model.unfinished-nanotraj trajectories difficulty log.jsonl.damaged log.png curve.png window.jsonl "
        "window.png nonfinite-rank[0-9]*.json config.json").split()
OURS = set("model seed micro_batch batch_size lr full clip lr_schedule".split())  # in config.json
FREE = [f.name for f in fields(Options)][8:]


def parse(Config, presets, doc):
    """The command line of a method: field default < preset of the model's family < what is given."""
    parser = cli.new_parser(doc)
    cli.add_options(parser, Config, presets)
    given = cli.given_to(parser)
    name = given.get("model", Config.model)
    family = nt_model.family_of(name, given.get("revision"))
    own = dict(data=name, teacher=f"{name}-ar") if name in nt_model.FAMILIES[family].tasks else {}
    preset = dict(presets.get(family, presets["others"]))
    for mine, theirs in (("warmup_steps", "warmup_ratio"), ("epochs", "max_steps")):
        if mine in given:  # which the preset's would overrule
            preset.pop(theirs, None)
    cfg = Config(**preset | {k: v for k, v in own.items() if hasattr(Config, k)} | given)
    refuse_if(cfg.full, "lora_r lora_alpha lora_dropout lora_targets fsdp", "is for adapters, with --no-full")
    refuse_if(cfg.lr_schedule == "constant", "lr_floor", "is for an --lr_schedule that falls")
    refuse_if(not getattr(cfg, "collect_temperature", 0), "collect_top_p", "is for a --collect_temperature")
    refuse_if(getattr(cfg, "warmup_ratio", 0), "warmup_steps", "is not for a --warmup_ratio")
    lora.named(cfg.lora_targets)  # an error before anything long
    return cfg


def ranks():
    """torchrun's rank and world size; (0, 1) without."""
    said = {name: os.environ.get(name, value) for name, value in ALONE.items()}
    rank, world, local, port, _ = (int(x) if x.isdecimal() and len(x) < 9 else -1 for x in said.values())
    fits = world == 1 or dist.is_initialized()
    with suppress(OSError):  # of a host that nobody knows, which torch would ask for again and again
        fits = fits or 0 < port < 2**16 and socket.getaddrinfo(os.fsencode(said["MASTER_ADDR"]), port)
    if not (fits and rank in range(world) and local in range(torch.cuda.device_count() or world)):
        raise UserError(f"{said}: a wrong number or an unknown host; use torchrun, or set none of these")
    return rank, world


def barrier(group=None):
    if dist.is_initialized():
        dist.barrier(group)


def mend_shards(files, rank, world):
    """Before anyone reads *rankN.jsonl: cut torn lines off this rank's, and its share of a larger run's."""
    for file in files:
        number = re.search(r"rank(\d+)\.jsonl$", file.name)
        if number and int(number[1]) % world == rank:
            cli.read_jsonl(file, True, mend=True)
    barrier()


def read_shards(folder, pattern, key, rank, world, **kinds):
    """{row[key]: row, its shard added} of all ranks' files; none of them goes on before all have read."""
    mend_shards(folder.glob(pattern), rank, world)
    rows = {row[key]: row | {"shard": shard.name} for shard in sorted(folder.glob(pattern))
            for row in cli.read_jsonl(shard, ours=True, **kinds, **{key: str})}
    barrier()
    return rows


def agreed(value):
    values = [value]  # that of rank 0, on every rank
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def check_alike(what, names):
    """UserError on a rank that has read other things than rank 0. names: what they are called."""
    if agreed(names) != names:
        raise UserError(f"{what}: this rank reads others than rank 0: all machines must see the same files")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def local(t):
    """This rank's rows of a tensor: all of them unless it is sharded."""
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


def shard(model, device, train=False, group=None):
    """Spread all but adapters over all ranks (FSDP2), in place; decode with unsharded(). train: in fp32."""
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, device.type)
    in_bf16 = train and device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16 if in_bf16 else None, torch.float32 if in_bf16 else None,
                                  cast_forward_inputs=False)  # the angles of RoPE stay fp32
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    for unit in [*model.blocks, model]:  # embedding, norm, head: whole from hidden() to the end of backward
        if train:
            unit.float()
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=adapters)
    for p in adapters:
        p.data = p.data.to(device)
    register_fsdp_forward_method(model, "hidden")
    return model


@torch.no_grad()
def unsharded(model):
    """Of a model that is spread over ranks, which all call it: a plain one on rank 0's CPU, or None."""
    if not is_sharded(model):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    with torch.device("meta"):
        plain, pairs = nt_model.Transformer(model.cfg), lora.adapters(model)
        if pairs:
            layer = pairs[0][1]
            targets = {name.rpartition(".")[2] for name, _ in pairs}
            lora.add(plain, layer.r, layer.alpha, layer.dropout, targets)
    plain.load_state_dict(state, assign=True)
    if model.cfg.tied:
        plain.head.weight = plain.embed.weight
    plain.revision = model.revision
    return plain.eval()


def compile_blocks(model):
    """For training: once for batches and lengths of any size, again for what is another computation."""
    torch._dynamo.config.recompile_limit = 1000  # the decoder's count too; beyond it they run uncompiled
    for block in model.blocks:
        block.compile(dynamic=True)


def adamw(params, cfg, betas=(0.9, 0.999)):
    """The optimizer of all methods; fused on a GPU, where one kernel reads and writes each number once."""
    return torch.optim.AdamW(params, cfg.lr, betas, weight_decay=cfg.weight_decay,
                             fused=torch.cuda.is_available() or None)


def lr_frac(step, n_steps, cfg):
    """Share of the peak learning rate at a step (0-based), after the schedules of the settings."""
    decay = 1.0
    if cfg.lr_schedule == "cosine":
        done = max(0, step - cfg.warmup_steps) / max(1, n_steps - cfg.warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.lr_schedule == "tail":
        decay = min(1.0, (n_steps - step) / (0.4 * n_steps))
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    return warm * (cfg.lr_floor + (1 - cfg.lr_floor) * decay)


@lru_cache(maxsize=1)
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def steps_per_epoch(n, cfg):
    """Of n examples; the last incomplete batch is left out."""
    if n < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({n} examples): lower it")
    return n // cfg.batch_size


def batch_of(step, n, cfg):
    """The epoch that a step belongs to, and the numbers of its examples among n, in the epoch's order."""
    epoch, i = divmod(step, steps_per_epoch(n, cfg))
    return epoch, shuffled(n, cfg.seed, epoch)[i * cfg.batch_size:(i + 1) * cfg.batch_size]


class Run:
    """A run of the settings cfg, a method's Config, on data. whole: all weights are trained [--full]."""
    teachers = 0  # forwards without a gradient beside each of the trained model, which mfu counts

    def __init__(self, cfg, data=(), whole=False):
        self.cfg, self.whole = cfg, whole or cfg.full
        self.rank, self.world = ranks()
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if cuda else "cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        if cuda:
            torch.cuda.set_device(self.device)
        self.shards = cfg.full or cfg.fsdp
        if (self.world > 1 or cuda and self.shards) and not dist.is_initialized():
            store = None if self.world > 1 else dist.HashStore()
            backend = "nccl" if cuda else "gloo"  # 12 hours: of waiting for others' collection, or evaluation
            dist.init_process_group(backend, None, timedelta(hours=12), self.world, self.rank, store)
        self.group = dist.new_group(timeout=STEP_TIMEOUT) if dist.is_initialized() else None  # in a step
        self.shards = self.shards and dist.is_initialized()  # else every rank has all of the model
        self.split = self.whole and self.shards  # also what is trained
        script = Path(sys.modules[type(cfg).__module__].__file__).stem
        self.out = Path(cfg.out or f"out/{script}-{Path(cfg.model).name}")
        if self.rank == 0:
            self.open_folder(data)
        barrier()
        self.final = self.out / ("model" if self.whole else "adapter")
        family = nt_model.FAMILIES[nt_model.family_of(cfg.model, cfg.revision)]
        self.evaluates = cfg.data in family.tasks and cfg.eval_problems > 0  # at the end, see eval.closing
        last = self.out / "results.jsonl" if self.evaluates else self.final
        done = last.exists() and self.final.exists()
        if done and self.rank == 0:
            cli.check_sums(self.final)
        if agreed(done):
            cli.say(f"{self.out} is finished already; --overwrite starts anew")
            raise SystemExit
        self.stop_asked = threading.Event()  # by SIGTERM
        self.writer = ThreadPoolExecutor(1)  # of checkpoints
        self.writing = self.writer.submit(int)  # the one being written; at first nothing

    def open_folder(self, data):
        """Make and lock the folder. Checkpoints of another configuration or other data are an error."""
        cfg, out, file = self.cfg, self.out, self.out / "config.json"
        if cfg.overwrite and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            raise UserError("--overwrite on several nodes, which may restart: remove the directory instead")
        now = {k: v for k, v in vars(cfg).items() if k not in FREE}
        folders = getattr(cfg, "trajectories", "").split("+")  # rollout() compares a single one's
        used = [cfg.model, getattr(cfg, "teacher", ""), *folders[len(folders) < 2:]]
        now["weights"] = list(map(nt_model.local_weights, used))
        now["problems"] = zlib.crc32(json.dumps(data).encode())
        made = [path for name in MADE for path in out.glob(name)]
        trained = any(any(out.glob(name)) for name in MADE[:4])
        old = cli.read_json(file) if file.exists() else {} if made else now
        if not isinstance(old, dict) or not OURS <= old.keys():
            raise UserError(f"{file} is absent or not that of a run: choose another --out")
        cli.check_apart(vars(cfg).values(), made if cfg.overwrite else [out / "adapter", out / "model"])
        out.mkdir(parents=True, exist_ok=True)
        self.lock = cli.lock(out / "lock")
        restarts = {os.environ.get(f"{by}_RESTART_COUNT", "0") for by in ("TORCHELASTIC", "SLURM")}
        if cfg.overwrite and restarts == {"0"} and file.exists():
            old = now
            before = next(p for i in count() if not (p := out / f"overwritten-{i}").exists())
            before.mkdir()
            for path in made:  # nothing that a user has put beside it, or into it, is lost
                path.rename(before / path.name)
            print(f"the run of before is in {before}")
        differ = [f"{k} {old.get(k)!r} -> {now.get(k)!r}" for k in old | now if old.get(k) != now.get(k)]
        if differ and trained:  # before, nothing is trained that could be mixed up
            raise UserError(f"{out} belongs to another configuration ({'; '.join(differ)}): "
                            f"choose another --out, or --overwrite")
        cli.write_whole(file, json.dumps(now, indent=2) + "\n")

    def load(self, to_train=False):
        """The model that the run starts from. to_train: on the CPU where it will be sharded, see shard()."""
        device = "cpu" if to_train and self.shards else self.device
        gc.collect()  # of a model that has decoded: its compiled blocks are cycles
        return nt_model.load(self.cfg.model, device, self.dtype, self.cfg.revision)

    def for_training(self, model, frozen=False):
        """A model as the settings ask for it: adapters, activations computed again, compiled, sharded."""
        cfg = self.cfg
        block = getattr(cfg, "train_block", getattr(cfg, "block_len", 0))  # where one is given, or collected
        model = nt_model.in_blocks(model, block or model.cfg.block_len)
        if not self.whole:
            lora.add(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)
        elif frozen:  # --full's teacher
            model.requires_grad_(False)
        model.checkpoint_blocks = cfg.checkpoint_blocks
        if cfg.compile or cfg.compile is None and self.device.type == "cuda":
            compile_blocks(model)
        return shard(model, self.device, self.whole and not frozen, self.group) if self.shards else model

    def steps(self, model, optimizers, n_steps, reference=None):
        """The steps left, logged and saved. reference(step) -> {name: tensor} that a checkpoint holds too."""
        cfg = self.cfg
        self.model, self.optimizers, self.n_steps = model, optimizers, n_steps
        self.reference = reference or (lambda step: None)
        first = self.resume()
        log = self.out / "log.jsonl"
        if self.rank == 0:  # without the lines of steps that will be repeated
            rows = cli.read_jsonl(log, True, mend=True, step=int) if log.exists() else []
            cli.write_whole(log, "".join(cli.line_of(row) for row in rows if row["step"] <= first))
        if cfg.warmup_steps > n_steps:
            cli.say(f"warning: --warmup_steps {cfg.warmup_steps} of {n_steps} steps: --lr is never reached")
        model.train()
        logged = time.perf_counter()
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop_asked.set())
        bar = cli.progress_bar(range(first, n_steps), "train", n_steps, unit="step", initial=first)
        for self.step in bar:
            self.began, self.total = time.perf_counter(), {"tokens": 0.0, "data_s": 0.0}
            self.ids = []
            torch.manual_seed((cfg.seed * 1_000_003 + self.step) * self.world + self.rank)  # dropout
            yield self.step
            done = self.step + 1
            speed = self.pace()
            bar.set_postfix(loss=self.total["loss"], **speed, refresh=False)
            if self.rank == 0 and (done % cfg.log_every == 0 or done == n_steps):
                now = time.perf_counter()
                row = dict(step=done, **self.total, **speed, seconds=round(now - logged, 3))
                logged = now
                cli.append_line(log, row)
            for k in range(1, cfg.epochs + 1) if cfg.each_epoch else ():
                if done == math.ceil(k * n_steps / cfg.epochs):
                    self.save(model, self.out / f"epoch-{k}")
            if done % cfg.save_every == 0 or done == n_steps or self.stops:
                self.save_checkpoint(done)
            if self.stops:  # a preempted job; all ranks are at this step
                self.finish_writing(self.group)
                if self.rank == 0:
                    bar.write(f"SIGTERM: stopped after step {done}; the same command goes on", sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)

    def micro_batches(self, chosen, length, build):
        """This rank's share of a step's examples (indices), in micro-batches: build(indices) -> batch."""
        chosen, size = list(map(int, chosen)), self.cfg.micro_batch
        if len(chosen) > size:
            chosen.sort(key=length)  # little padding
        mine = chosen[self.rank::self.world]
        for first in range(0, -(-len(chosen) // self.world), size):  # everywhere as often: it is collective
            part = mine[first:first + size]
            began = time.perf_counter()
            batch, self.weight = build(part or chosen[:1]), 1 if part else 0  # a filler counts nothing
            self.total["data_s"] += time.perf_counter() - began
            if part:
                self.ids += batch["ids"]
                self.total["tokens"] += sum(map(len, batch["prompts"])) + batch["xt"].numel()
            yield batch

    def backward(self, loss, parts):
        """The gradient of the micro-batch, whose loss is divided by the global batch already."""
        self.check_finite("loss", loss.item())
        (loss * self.weight * (self.world if self.split else 1)).backward()  # FSDP averages over ranks
        for key, value in {"loss": loss.item(), **parts}.items():
            self.total[key] = self.total.get(key, 0.0) + self.weight * value

    def check_finite(self, what, value):
        """A loss, gradient or weight that is not finite stops the run before a checkpoint holds it."""
        if not math.isfinite(value):
            file = self.out / f"nonfinite-rank{self.rank}.json"
            facts = {"step": self.step, what: str(value), "ids": self.ids}
            cli.write_whole(file, json.dumps(facts) + "\n")
            raise UserError(f"the {what} is {value} at step {self.step}: the ids of its batch are in {file}; "
                            f"look at these examples, or start anew with a lower --lr")

    def update(self):
        """Sum over ranks, clip by the global norm, step at this step's learning rate."""
        params = list(trainable(self.model).values())
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.total["stop"] = float(self.stop_asked.is_set())
        if self.world > 1:  # in one bucket: what FSDP has not summed, the parts of the loss, whether to stop
            grads = [p.grad for p in params if not isinstance(p, DTensor)]
            grads.append(torch.tensor(list(self.total.values()), device=self.device))
            bucket = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(bucket, group=self.group)
            for g, summed in zip(grads, bucket.split([g.numel() for g in grads])):
                g.copy_(summed.view_as(g))
            self.total = dict(zip(self.total, grads[-1].tolist()))
        self.stops = self.total.pop("stop") > 0
        norm = torch.nn.utils.clip_grad_norm_(params, self.cfg.clip)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.check_finite("gradient norm", norm)
        frac = lr_frac(self.step, self.n_steps, self.cfg)
        self.total.update(grad_norm=norm, lr_frac=frac)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak_lr", group["lr"]) * frac
            optimizer.step()
            optimizer.zero_grad()

    def pace(self):
        """Speed of this step over all ranks; docs/scaling.md says what data_wait and mfu are."""
        seconds = time.perf_counter() - self.began
        tok_per_s = self.total.pop("tokens") / seconds
        wait = self.total.pop("data_s") / (self.world * seconds)
        speed = dict(tok_per_s=round(tok_per_s, 1), data_wait=round(wait, 4))
        if torch.cuda.is_available():
            speed["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if re.search("H[12]00", torch.cuda.get_device_name()):
                per_parameter = (6 if self.whole else 4) + 2 * self.teachers
                flop = per_parameter * sum(p.numel() for p in self.model.parameters())
                speed["mfu"] = round(tok_per_s / self.world * flop / 989e12, 4)
        return speed

    def save_checkpoint(self, step):
        """A thread writes it while training goes on: every rank its rows, or rank 0 everything."""
        self.finish_writing(self.group)
        root = self.out / "checkpoints"
        if self.rank == 0:
            shutil.rmtree(root / "tmp", ignore_errors=True)
            (root / "tmp").mkdir(parents=True)
        barrier(self.group)
        n_files = self.world if self.split else 1
        if self.rank >= n_files:
            return
        kept = checkpoint_tensors(self.model, self.optimizers, self.reference(step))
        tensors = {name: local(t).to("cpu", copy=True).contiguous() for name, t in kept.items()}
        total = sum(t.sum(dtype=torch.float64).item() for t in tensors.values())
        self.check_finite("sum of the weights", total)
        self.writing = self.writer.submit(write_checkpoint, root, step, tensors, self.rank, n_files)

    def finish_writing(self, group=None):
        """Wait until the last checkpoint is on disk, on every rank. group: it says for how long."""
        try:
            self.writing.result()
        except Exception as e:
            raise UserError(f"a checkpoint could not be written: {e}") from None
        barrier(group)

    def resume(self):
        """Fill all from the newest intact checkpoint, whatever its number of ranks -> the next step, or 0."""
        self.finish_writing()
        found = agreed(newest_checkpoint(self.out) if self.rank == 0 else None)
        if found is None:
            return 0
        step = int(found.name.split("-")[1])
        files = [safe_open(f, framework="pt") for f in sorted(found.glob("rank-*.safetensors"))]
        for p in trainable(self.model).values():
            p.grad = torch.zeros_like(p)
        for optimizer in self.optimizers:  # its first step makes the state that is filled here
            optimizer.step()
            optimizer.zero_grad()
        into = checkpoint_tensors(self.model, self.optimizers, self.reference(step))
        names = files[0].keys()
        if {name for name in names if "/" not in name} != trainable(self.model).keys():
            raise UserError(f"{found} does not fit this model: use another --out")
        for name in names:
            target, parts = into[name], [f.get_tensor(name) for f in files]
            whole = torch.cat(parts) if parts[0].ndim else parts[0]  # a shard is a range of rows
            if isinstance(target, DTensor):  # this rank's rows
                n = -(-len(whole) // self.world)
                whole = whole[self.rank * n:][:n]
            local(target).copy_(whole)
        barrier()  # reading took each rank its own time
        return step

    def save(self, model, final=None):
        """Write what was trained. Every rank calls it; rank 0 gets a plain copy of the model, others None."""
        self.finish_writing(self.group)
        plain, final = unsharded(model), final or self.final
        if self.rank != 0:
            return None
        with whole_folder(final) as folder:  # it is there if the closing evaluation was killed
            if self.whole:
                nt_model.save(plain, folder)
                nt_model.copy_tokenizer(self.cfg.model, folder, self.cfg.revision)
            else:
                lora.save(plain, folder, base=self.cfg.model)
        print(f"saved {final}")
        return plain


class Reference:
    """A frozen copy of the weights of an earlier step (at first, of the start): adapters or a model."""
    def __init__(self, r, model):
        self.adapters = None
        if r.whole:
            self.model = r.for_training(r.load(to_train=True), frozen=True)
        else:
            self.adapters = {name: p.detach().clone() for name, p in trainable(model).items()}

    def tensors(self):
        if self.adapters:
            return self.adapters
        if is_sharded(self.model):
            self.model.reshard()  # embedding and head are whole since its last forward
        return dict(self.model.named_parameters())

    def refresh(self, model):
        into = self.tensors()
        for name, p in trainable(model).items():
            local(into[name]).copy_(local(p))

    def in_place_of(self, model):
        """Inside, a model with these weights: with adapters, `model` itself."""
        if not self.adapters:
            return nullcontext(self.model)
        return lora.changed(model, [(p, "data", self.adapters[name]) for name, p in trainable(model).items()])


def checkpoint_tensors(model, optimizers, reference=None):
    """name -> tensor: the trained weights; "name/slot": the optimizer's state, and T3D's reference."""
    params = trainable(model)
    names = {p: name for name, p in params.items()}
    state = {f"{names[p]}/{slot}": t for optimizer in optimizers for p, slots in optimizer.state.items()
             for slot, t in slots.items()}
    return {**params, **state, **{f"{name}/reference": t for name, t in (reference or {}).items()}}


def write_checkpoint(root, step, tensors, rank, n_files):
    """This rank's file, see file_name(); rank 0 waits for those of all, and gives the folder its name."""
    tmp, folder = root / "tmp", root / f"step-{step:06d}"
    file = tmp / f"unnamed-{rank}"
    save_tensors(tensors, file)
    sync(file)
    file.rename(tmp / file_name(file, rank, n_files))
    if rank:
        return
    end = time.monotonic() + STEP_TIMEOUT.total_seconds()
    while len(list(tmp.glob("rank-*"))) < n_files:
        if time.monotonic() > end:
            raise TimeoutError(f"after {STEP_TIMEOUT} the files of other ranks are not in {tmp}")
        time.sleep(0.05)
    sync(tmp)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    sync(root)
    for old in set(checkpoints(root)[:-2]) - {folder}:  # damaged ones may have higher numbers
        shutil.rmtree(old)


def file_name(file, rank, n_files):
    """What a rank's file of a checkpoint is called: it tells how many there are, and its own checksum."""
    return f"rank-{rank:05d}-of-{n_files:05d}-{sha256(file)}.safetensors"


def checkpoints(root):
    return sorted((f for f in root.glob("step-*") if f.name[5:].isdecimal()), key=lambda f: int(f.name[5:]))


def newest_checkpoint(out):
    """The newest folder whose files are as they were written, or None."""
    for folder in reversed(checkpoints(out / "checkpoints")):
        files = sorted(folder.glob("rank-*"))
        if files and all(f.name == file_name(f, i, len(files)) for i, f in enumerate(files)):
            return folder
        cli.say(f"warning: checkpoint {folder} is damaged, trying the one before")
