"""The demo from beginning to end, with a few steps of training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from sb3_rfm import RFM

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def files(run: Path) -> set[str]:
    expected = ("model.zip", "learning_curve.png", "video.mp4", "evaluations.npz", "training.monitor.csv")
    return {name for name in expected if (run / name).stat().st_size > 0}


def test_demo_stopped_by_ctrl_c_leaves_everything(tmp_path: Path) -> None:
    """Ctrl-C after the first evaluation: the model can be loaded, and the pictures and the video are there."""
    arguments = ["--steps", "1000000", "--evaluations", "1000000", "--eval-episodes", "1", "--runs", str(tmp_path)]
    command = [sys.executable, str(DEMO), *arguments, "--no-progress-bar"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step       1 "):
                process.send_signal(signal.SIGINT)
                break
        output = process.stdout.read()
    assert process.returncode == 0, output
    (run,) = tmp_path.iterdir()
    assert len(files(run)) == 5
    model = RFM.load(run / "model")
    assert 1 <= model.num_timesteps < 100
    assert "ending training" in output and f"Written to {run}" in output
