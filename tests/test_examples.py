import os
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_quickstart_on_the_released_pipeline_and_the_real_backbone() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--gradient_steps", "2"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = dict(re.findall(r"^(generated|frozen|gradient).*?(\d\.\d\d) +\d+ ms$", run.stdout, re.MULTILINE))
    assert set(rows) == {"generated", "frozen", "gradient"}
    # Twenty sentences in four classes: a generator or a backbone that is broken is near 0.25.
    assert float(rows["generated"]) >= 0.8
