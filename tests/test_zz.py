import hashlib
import pytest
from small_runs import METHODS, Runs
def test_b(tmp_path, monkeypatch, capsys):
    runs = Runs(tmp_path, monkeypatch, capsys)
    with open("/tmp/w19x/bytes", "a") as f:
        for m in METHODS:
            for o in ([], ["--full"]):
                c = runs(m, m + "".join(o), "--max_steps", "3", "--refresh", "1", *o) if m == "t3d" else runs(m, m + "".join(o), "--max_steps", "3", *o)
                p = next((tmp_path / (m + "".join(o))).glob("*/*model.safetensors"))
                f.write(f"{m} {o} {c} {hashlib.sha256(p.read_bytes()).hexdigest()[:12]}\n")
