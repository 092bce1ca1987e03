"""Symmetries as text: what a language model is asked, and what it may answer."""
