"""The networks, training and sampling in MindSpore."""

import os

# Before MindSpore is imported: its warnings are about itself.
os.environ.setdefault("GLOG_v", "3")

import ms_impl.leaving  # noqa: F401 - whose handler must be older than MindSpore's
