"""Programs of experiments/ run in this process: a new interpreter takes some four seconds to come and to go."""

import importlib
import inspect
import io
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import tyro


def run_here(module: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """What `python -m module args` would print, and its exit status; any other exception is raised."""
    main = importlib.import_module(module).main
    (parameter,) = inspect.signature(main).parameters.values()
    flags, status = [str(x) for x in args], 0
    out, err = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, env or {}), redirect_stdout(out), redirect_stderr(err):
        try:
            main(tyro.cli(parameter.annotation, args=flags))
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess([module, *flags], status, out.getvalue(), err.getvalue())
