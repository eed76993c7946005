"""Run benchmarks and keep what they print in benchmarks/results, where the documentation reads it.

Run: python benchmarks/all.py [NAME ...]; without names, all but the long reports.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    "import_time",
    "attach_switch_save",
    "training_step",
    "recompute",
    "cached_prefix",
    "dora",
    "kernels_cpu",
    "kernels_roofline",
    "kernel_fidelity",
    "mixed_batch",
    "combine",
    "resident",
    "threads_and_processes",
    "damaged_files",
    "killed_runs",
    "speech_switching",
    "vlm_peft",
    "block_lora",
    "text_side",
)


def keep(name: str) -> None:
    """Run one and write its table; a picture of the same name is shown below it."""
    script = HERE / f"{name}.py"
    print(f"-- {name}", flush=True)
    run = [sys.executable, str(script)]
    printed = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed, flush=True)
    title = script.read_text().split('"""')[1].splitlines()[0]
    picture = f"\n![{name}]({name}.png)\n" if (HERE / "results" / f"{name}.png").exists() else ""
    text = f"# {title}\n\n`benchmarks/{name}.py`\n\n```text\n{printed.strip()}\n```\n{picture}"
    (HERE / "results" / f"{name}.md").write_text(text)


def main() -> None:
    names = sys.argv[1:] or NAMES
    (HERE / "results").mkdir(exist_ok=True)
    for name in names:
        keep(name)


if __name__ == "__main__":
    main()
