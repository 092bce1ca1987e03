"""`python -m common` is `uni-mdm`, for launchers that start a module."""

from common.cli import main

main()
