"""The properties that a crystal can be asked to have; data sets have others too."""

#: Names, as batches and checkpoints know them: unit, and the range of values that make sense.
TARGETS = {"band_gap": ("eV", 0.0, 25.0), "formation_energy": ("eV/atom", -10.0, 10.0)}
