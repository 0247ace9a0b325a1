"""The command line as people use it, in this process: `app.cli.main` against a server that runs elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from app.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class CommandLine:
    """A terminal of one person: its server and its key are in the environment. Not for two threads at once."""

    url: str
    key: str = ""

    def __call__(self, *arguments: str) -> Done:
        out, err = io.StringIO(), io.StringIO()
        environment = {"COLUMNS": "200", "MANIFOLD_KEY": self.key}
        with patch.dict(os.environ, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*arguments, "--url", self.url])
        return Done(status, out.getvalue(), err.getvalue())

    def say(self, *arguments: str) -> str:
        """What a command that succeeds prints."""
        done = self(*arguments)
        assert (done.status, done.err) == (0, ""), done
        return done.out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.say(*arguments, "--json"))

    def refused(self, *arguments: str) -> str:
        """The one sentence of a command that fails."""
        done = self(*arguments)
        assert done.status == 1 and done.out == "", done
        assert done.err.startswith("manifold: ") and done.err.count("\n") == 1
        return done.err.removeprefix("manifold: ").strip()
