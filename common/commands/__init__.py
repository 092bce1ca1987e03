"""The sub-commands of `uni-mdm`, one module each, imported only when it is asked for.

A module has either a function ``command`` with typer's annotations or, if it has sub-commands of
its own, a ``typer.Typer`` named ``app``.
"""
