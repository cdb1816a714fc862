"""The four methods as runs of a second on a small random model, in this process."""
import importlib
import re
import sys

import torch
from conftest import random_model
from safetensors.torch import load_file

import cli
import grade
import layers
import model as nt_model
import run as training

VOCAB = dict(vocab_size=298, mask_token_id=297, eos_token_id=296, pad_token_id=296)
COMMON = ["--data", "tiny", "--batch_size", "4", "--micro_batch", "2", "--max_steps", "6", "--save_every",
          "1", "--log_every", "1", "--lr", "1e-2", "--warmup_steps", "0", "--lora_r", "4", "--lora_dropout",
          "0.1", "--eval_problems", "0"]
COLLECTED = ["--n_problems", "8", "--gen_len", "8", "--block_len", "4"]
METHODS = {"tad": [*COLLECTED, "--window", "2"], "tabom": COLLECTED, "t3d": [*COLLECTED, "--refresh", "1"],
           "trims": ["--n_problems", "8", "--gen_len", "48"]}


class Writer(training.ThreadPoolExecutor):
    """The thread that writes checkpoints; the end of a process waits for it."""
    made = []

    def __init__(self, *args):
        super().__init__(*args)
        self.made.append(self)


class Runs:
    """folder: base, the model, and whatever runs are made here."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        nt_model.save(random_model(max_position_embeddings=160, **VOCAB), folder / "base")
        nt_model.copy_tokenizer("tiny", folder / "base")
        monkeypatch.setattr(grade, "is_correct", lambda *_: True)  # a random model answers nothing
        monkeypatch.setattr(training, "ThreadPoolExecutor", Writer)
        monkeypatch.setattr(layers, "can_pack", lambda *args: False)  # packing takes longer than these runs

    def __call__(self, method, name, *options):
        """One command -> exit code, and what it said on stderr but for progress bars."""
        args = [*METHODS[method], *COMMON, "--model", self.folder / "base", "--out", self.folder / name]
        self.patch.setattr(sys, "argv", [f"{method}.py", *map(str, [*args, *options])])
        torch.manual_seed(0)
        self.capsys.readouterr()
        try:
            cli.run_cli(importlib.import_module(method).main)
            code = 0
        except SystemExit as e:
            code = e.code
        while Writer.made:
            Writer.made.pop().shutdown()
        said = re.sub(r"[\w ]+: +\d+%\|.*?\[.*?\]|\r", "", self.capsys.readouterr().err)
        return code, [line for line in said.splitlines() if line.strip()]

    def adapter(self, name):
        """The bytes of the result; None where there is none."""
        file = self.folder / name / "adapter/adapter_model.safetensors"
        return file.read_bytes() if file.exists() and load_file(file) else None
