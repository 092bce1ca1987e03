"""How often a ranking of symmetries has the true one among its first k."""

from collections.abc import Iterable
from typing import Any

from common.crystal.wyckoff import wyckoff_summary
from common.prior import TemplatePrior

CUTOFFS = (1, 5, 20)


def evaluate_prior(
    prior: TemplatePrior, records: Iterable[Any], given: str | None = None
) -> dict[str, Any]:
    """Ranks the symmetries of every record's composition and looks for its own.

    Args:
        prior: fitted on other records.
        records: ``common.data.store.Record``.
        given: ``band_gap`` or ``formation_energy``: the property is told as well; rows without it
            are left out.

    Returns:
        ``space_group`` and ``assignment`` (group and the letters of every element, up to
        relabelling by the group's normaliser): share of rows by cutoff. ``seen_formula`` is the
        share of rows whose reduced formula also occurs in training, where the row is another
        polymorph of it; ``*_new_formula`` are the shares among the other rows.
    """
    hits: dict[str, dict[int, list[int]]] = {
        name: {k: [0, 0] for k in CUTOFFS} for name in ("space_group", "assignment")
    }
    rows = [0, 0]
    for record in records:
        value = None if given is None else record.properties[given]
        if given is not None and value is None:
            continue
        crystal = record.crystal
        properties = {} if given is None or value is None else {given: value}
        candidates = prior.rank(crystal.formula_counts, properties, top=max(CUTOFFS))
        groups = list(dict.fromkeys(c.space_group for c in candidates))
        own = [(site.atomic_number, site.letter) for site in crystal.sites]
        truth = wyckoff_summary(crystal.space_group).canonical(own)
        same = [
            c.space_group == crystal.space_group
            and wyckoff_summary(c.space_group).canonical(c.sites) == truth
            for c in candidates
        ]
        new = not prior.reference.rows_of_formula(crystal.formula_counts)
        rows[new] += 1
        for k in CUTOFFS:
            hits["space_group"][k][new] += crystal.space_group in groups[:k]
            hits["assignment"][k][new] += any(same[:k])
    total = sum(rows)
    result: dict[str, Any] = {
        "rows": total,
        "given": given,
        "prior": prior.hash,
        "seen_formula": round(rows[0] / max(total, 1), 4),
    }
    for name, by_cutoff in hits.items():
        result[name] = {k: round(sum(n) / max(total, 1), 4) for k, n in by_cutoff.items()}
        result[f"{name}_new_formula"] = {
            k: round(n[1] / max(rows[1], 1), 4) for k, n in by_cutoff.items()
        }
    return result
