"""Without lm-evaluation-harness the module says what to install; with it, `tests/reference` runs
it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_harness_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None\nimport dsjax.infer.harness"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "needs lm-evaluation-harness (" in done.stderr
    assert "install it: pip install 'lm-eval>=0.4.13'" in done.stderr
