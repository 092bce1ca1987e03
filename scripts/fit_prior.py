"""Fits the symmetry prior that comes with the package, and says how good it is.

    python scripts/fit_prior.py [--data train] [--validation val] [--out common/assets/...]

Deterministic: the same training rows and package versions give the same file. Takes a minute.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.data.locations import dataset
from common.data.store import fingerprint
from common.errors import UserError
from common.evaluate.symmetry_prediction import evaluate_prior
from common.prior import SHIPPED
from common.prior_fit import fit_prior


def main(
    data: Annotated[str, typer.Option(help="Training set: a known one, CSV or Parquet.")] = "train",
    validation: Annotated[str, typer.Option(help="Likewise; empty for none.")] = "val",
    out: Annotated[Path, typer.Option(help="The file.")] = SHIPPED,
) -> None:
    """Fits the prior on `data` and measures it on `validation`."""
    records = dataset(data)
    prior = fit_prior(records, {"name": Path(data).name, "fingerprint": fingerprint(records)})
    prior.save(out)
    for name, weights in prior.metadata["weights"].items():
        print(f"{name}: mean log-likelihood {weights['mean_log_likelihood']}")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {len(records)} rows, hash {prior.hash}")
    if validation:
        print(json.dumps(evaluate_prior(prior, dataset(validation)), indent=1))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
