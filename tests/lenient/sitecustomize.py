"""On PYTHONPATH of a test's child process: every answer counts as right, so that random models have
trajectories.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grade  # noqa: E402

grade.is_correct = lambda *_: True
