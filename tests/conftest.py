"""Small random models that mix every fact of the families, so that nothing is only true of weights/tiny."""
import bz2
import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import cli  # noqa: E402
import model as nt_model  # noqa: E402
import quick  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures"  # their README says what each folder is
DREAM_VOCAB = "87a257b04b17642a0688c98cd1df89c398bda4fee532d6f88b38a659ecb4ac8d"  # sha256 of its vocab.json
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

BASE = dict(model_type="tiny", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, rope_theta=10000.0, rms_norm_eps=1e-6,
            mask_token_id=39, eos_token_id=38, pad_token_id=38)
CONFIGS = {
    "plain": {},
    "grouped": dict(num_key_value_heads=2, head_dim=12, tie_word_embeddings=True),
    "biases": dict(qkv_bias=True, num_key_value_heads=1),
    "qk_norm": dict(qk_norm=True, head_dim=16),
    "shift": dict(shift=True, qkv_bias=True, num_key_value_heads=2),
    "block": dict(block_size=4, qk_norm=True, num_key_value_heads=2),
    "whole": dict(block_size=4, whole_blocks=True, num_key_value_heads=2),
    "all": dict(block_size=2, qk_norm=True, qkv_bias=True, shift=True, num_key_value_heads=2, head_dim=16),
}


def random_model(seed=0, scale=4.0, **facts):
    """A random model whose predictions are far from uniform, so that decoding takes varied paths."""
    cfg = nt_model.config_from_json({**BASE, **facts})
    model = nt_model.Transformer(cfg)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=g))
            else:
                p.copy_(torch.randn(p.shape, generator=g) / max(1, p.shape[-1]) ** 0.5)
        model.head.weight.mul_(scale)
    return model.eval()


# tests that start processes, compile or decode for long: `make check` leaves them out
SLOW_FILES = {"test_distributed", "test_faults", "test_compiled", "test_launch", "test_lm_eval", "test_sweep",
              "test_tiny"}
SLOW_TESTS = {
    "test_sigkill_during_training_is_bit_identical", "test_bad_input_is_one_line_and_exit_2",
    "test_damaged_checkpoint_falls_back", "test_llada_official_samplers", "test_sdars_official_sampler",
    "test_dreams_official_sampler", "test_the_hub_cache_revisions_and_offline_mode", "test_multiblock",
    "test_human_eval", "test_two_ranks_agree_with_batch_one", "test_math",
    "test_sigkill_during_collection", "test_five_problems_of_your_own", "test_a_killed_curve_goes_on",
    "test_any_batch_composition", "test_batch_equals_alone_equals_reference", "test_attacks_are_contained",
    "test_attacks_are_contained_for_a_normal_user", "test_interrupted_training_is_bit_identical",
    "test_without_datasets_or_network_the_files_are_named", "test_bad_commands_are_one_line",
    "test_the_fork_example", "test_a_gradient_that_is_not_finite", "test_ended_anywhere",
    "test_a_run_ends_in_the_same_bytes_or_is_refused"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    return os.cpu_count() + 1  # a sixth of the time tests wait: for a timeout, a disk, the end of a process


def pytest_collection_finish():
    quick.sources_are_read_once()
    quick.what_is_there_stays()


# the longest first, so that no core is idle at the end: a file is one core's (`--dist loadfile`)
LONGEST_FILES = ("test_sample test_distributed test_compiled test_faults test_sweep test_eval test_tiny test_corruption "
                 "test_families test_teachers test_trims test_t3d test_tad test_lm_eval test_launch").split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (LONGEST_FILES.index(item.path.stem) if item.path.stem in LONGEST_FILES else 99))
    for item in items:
        if item.path.stem in SLOW_FILES or item.originalname in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=list(CONFIGS))
def any_model(request):
    return random_model(**CONFIGS[request.param])


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The real checkpoints' small files: a copy of tests/fixtures/hub, unpacked."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    root = shutil.copytree(FIXTURES / "hub", tmp_path_factory.mktemp("fixtures") / "hub")
    for packed in [*root.rglob("*.bz2")]:
        packed.with_suffix("").write_bytes(bz2.decompress(packed.read_bytes()))
        packed.unlink()
    # Dream's ids are the 256 bytes, then the merges in their order: its vocab.json follows, to the byte
    _, *merges = (root / "dream/merges.txt").read_text(encoding="utf-8").splitlines()
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)}, indent=2, sort_keys=True,
                       ensure_ascii=False).encode() + b"\n"
    assert hashlib.sha256(vocab).hexdigest() == DREAM_VOCAB
    (root / "dream/vocab.json").write_bytes(vocab)
    return root


@pytest.fixture(autouse=True)
def no_command_line_stays():
    yield
    cli.GIVEN.clear()
    cli.say.cache_clear()


def command(cwd, script, *args, **env):
    """`python script args` in this process, which starting one would take seconds of: what run() returns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", [script, *map(str, args)])):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            cli.GIVEN.clear()  # of this command line
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def all_weights(words):
    """The words of a command with --full in the place of options for adapters, which are not for it."""
    lora = [i for i, word in enumerate(words) if str(word).startswith("--lora")]
    return [word for i, word in enumerate(words) if i not in lora and i - 1 not in lora] + ["--full"]


def prompts_of(lengths, vocab=38, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=g) for n in lengths]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that dynamo captured, counted by the backend that gets them."""
    import sample
    torch._dynamo.reset()
    seen = []
    monkeypatch.setitem(sample.COMPILE, "backend", lambda gm, inputs: seen.append(gm) or gm.forward)
    yield seen
    torch._dynamo.reset()
