"""The process that renders chat templates: a program of its own, which imports jinja2 and nothing of purelm.

A template is a program of whoever made the model. It runs in jinja2's sandbox, which keeps it from files and objects,
and in a process with limits on CPU time and memory, because no sandbox bounds what an expression may take.

Line by line: a request is {"template", "variables", "trusted", "seconds", "bytes", "characters"} as JSON; the answer is
{"parts": [[text, whether it is of the template], ...]} or {"error": text}. `trusted` names the variables whose text
counts as the template's.

Which text is the template's: its own text and constants are `_Text`, a str that remembers this of each part. Adding,
`~`, macros, blocks, slicing, trim and join keep it. Whatever else is done with a text, the result counts as foreign: a
mistake of this kind never lets a message pass for the template.
"""

import json
import re
import resource
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ROLE = re.compile(r"[A-Za-z0-9_-]+")


class _Text(str):
    """A str with parts, (text, whether it is of the template)."""

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, parts):
        self = super().__new__(cls, "".join(text for text, _ in parts))
        self.parts = tuple(parts)
        return self

    def __str__(self):
        return self

    def __add__(self, other):
        return _Text(self.parts + _parts(other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other):
        return _Text(_parts(other) + self.parts) if isinstance(other, str) else NotImplemented

    def _cut(self, start, end):
        found, at = [], 0
        for text, own in self.parts:
            piece = text[max(0, start - at) : max(0, end - at)]
            if piece:
                found.append((piece, own))
            at += len(text)
        return _Text(found)

    def __getitem__(self, key):
        if isinstance(key, slice) and key.step in (None, 1):
            start, end, _ = key.indices(len(self))
            return self._cut(start, end)
        return super().__getitem__(key)

    def lstrip(self, chars=None):
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars=None):
        return self._cut(0, len(super().rstrip(chars)))

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def join(self, values):
        parts: list[tuple[str, bool]] = []
        for number, value in enumerate(values):
            parts += (*self.parts, *_parts(value)) if number else _parts(value)
        return _Text(parts)


def _parts(text):
    return text.parts if isinstance(text, _Text) else ((text, False),)


def trusted(text):
    """`text` as one of the template's own."""
    return _Text(((text, True),))


def _concat(values):
    return _Text([part for value in values for part in _parts(str(value))])


class _Generator(CodeGenerator):
    def visit_Const(self, node, frame):
        if type(node.value) is str:
            self.write(f"environment.trusted({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def _output_const_repr(self, group):
        return f"environment.trusted({''.join(map(str, group))!r})"

    def visit_Concat(self, node, frame):
        self.write("environment.concat((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """{% generation %}: what transformers marks as the assistant's; here its text alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    concat = staticmethod(_concat)
    trusted = staticmethod(trusted)


class _Raised(Exception):
    """raise_exception was called."""


def _raise_exception(message):
    raise _Raised(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # As transformers has it: jinja2's own escapes <, > and &.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    """The environment of a template, as transformers sets it up."""
    found = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def render(request, compiled):
    """The answer to a request; compiled: templates that were compiled before."""
    try:
        template = compiled.get(request["template"])
        if template is None:
            compiled.clear()
            template = compiled[request["template"]] = environment().from_string(request["template"])
        variables = request["variables"]
        for name in request["trusted"]:
            variables[name] = trusted(variables[name])
        for message in variables["messages"]:
            if isinstance(message, dict) and isinstance(message.get("role"), str) and _ROLE.fullmatch(message["role"]):
                message["role"] = trusted(message["role"])
        text = _concat(template.root_render_func(template.new_context(variables)))
    except _Raised as error:
        return {"error": f"raises: {error}"}
    except MemoryError:
        return {"error": f"takes more than {request['bytes']:,} bytes of memory"}
    except RecursionError:
        return {"error": "calls itself too deeply"}
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        return {"error": f"line {line}: {error}" if line else f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if len(text) > request["characters"]:
        return {"error": f"gives {len(text):,} characters, more than {request['characters']:,}"}
    return {"parts": text.parts}


def main():
    """Answer requests until the input ends."""
    compiled: dict = {}
    for line in sys.stdin:
        request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + request["seconds"]
        # Above the limit the kernel ends the process, also within an operation of the interpreter.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        resource.setrlimit(resource.RLIMIT_AS, (request["bytes"], resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            answer = json.dumps(render(request, compiled))
        except MemoryError:
            answer = json.dumps({"error": f"takes more than {request['bytes']:,} bytes of memory"})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
