"""The example specs beside this file are run as tests of their own; here, one of them with a bound that it cannot meet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_an_example_spec_with_another_bound_fails_with_file_line_measured_value_and_bound(tmp_path):
    text = (HERE / "specs" / "stories.yaml").read_text("utf-8")
    changed = text.replace("final_max: 0.7", "final_max: 0.25").replace("max_steps: 200", "max_steps: 4")
    file = tmp_path / "specs" / "stories.yaml"
    file.parent.mkdir()
    file.write_text(changed.replace("src/finetune", f"{ROOT}/src/finetune"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "specs", "--on-cpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1, done.stdout
    said = r"specs/stories\.yaml:8: loss\.final_max: the final training loss: measured (\d\.\d+), bound <= 0\.25 nats"
    found = re.search(said, done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 0.25
