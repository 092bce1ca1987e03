"""Moves weights and training state between the frameworks' files, by literal maps of names.

Tensors pass as bytes: no number is computed with, none is rounded, and neither framework is
imported, except torch for ``.pt`` files.
"""
