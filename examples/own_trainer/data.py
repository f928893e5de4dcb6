"""Writes the 442 patients of scikit-learn's diabetes study: ten numbers each, then a target.

python examples/own_trainer/data.py      # examples/own_trainer/patients/table.csv
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

folder = Path(__file__).resolve().parent / "patients"
folder.mkdir(exist_ok=True)
inputs, target = load_diabetes(return_X_y=True)
order = np.random.default_rng(0).permutation(len(target))  # the last quarter validates
np.savetxt(folder / "table.csv", np.c_[inputs, target][order], delimiter=",")
print(f"wrote {folder / 'table.csv'}: {len(target)} rows")
