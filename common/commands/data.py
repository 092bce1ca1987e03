"""`uni-mdm data ...`."""

from common.data.cli import app

__all__ = ["app"]
