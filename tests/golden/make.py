"""Makes the golden files anew.

Run: python -m tests.golden.make    (needs the extra `reference`; a minute on two cores)
Expected: one .npz a case beside this file, below 300 KB each; the same numbers to float32 rounding
on any machine.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
import transformers

from tests.golden import transformers_reference
from tests.golden.cases import CASES, LENGTH, STORED

FOLDER = pathlib.Path(__file__).parent


def main() -> None:
    torch.set_num_threads(1)
    versions = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name, case in CASES.items():
        outputs = transformers_reference.run(case, LENGTH)
        # The router's outputs are small and every token's choice matters; of the others every ninth
        # row is kept.
        kept = {
            key: value if key.startswith("router") else value[STORED]
            for key, value in outputs.items()
        }
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, versions=versions, **kept)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
