"""The quickstart over several seeds, kept as results for the README.

    python -m experiments.quickstart --seeds 0 1 2

Runs `bitnet-jax quickstart` for each seed in runs/quickstart-seed-N (what is done there is not done again), and copies what the README
shows to experiments/results/quickstart/. Cost: about 4 minutes a seed on two CPU cores.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from bitnet_jax import cli

RESULTS = Path(__file__).parent / "results" / "quickstart"


def main(args: list[str] | None = None) -> int:
    """Runs the seeds named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parsed = parser.parse_args(args)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in parsed.seeds:
        out = parsed.runs / f"quickstart-seed-{seed}"
        code = cli.main(["quickstart", "--out", str(out), "--seed", str(seed)])
        if code or not (out / "results.json").exists():  # a signal ends it with 0 as well, once everything is saved
            return code
        facts = json.loads((out / "results.json").read_text(encoding="utf-8"))
        facts["provenance"]["run"] = f"quickstart --seed {seed}"
        (RESULTS / f"seed-{seed}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if seed == parsed.seeds[0]:
            shutil.copy(out / "loss.png", RESULTS / "loss.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
