"""The two pages, each one file without anything from elsewhere, and the policy that holds the browser to that."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["dashboard", "describe", "policy"]


def dashboard() -> str:
    """The page of GET /dashboard."""
    return (Path(__file__).parent / "dashboard.html").read_text(encoding="utf-8")


def policy(page: str) -> str:
    """A Content-Security-Policy under which a page runs its own scripts and styles, and talks to its own server.

    They are named by their SHA-256, so that no other script runs, wherever it came from.
    """
    hashes = {
        tag: " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script'] or chr(39) + 'none' + chr(39)}; "
        f"style-src {hashes['style'] or chr(39) + 'none' + chr(39)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; } code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: #f4f4f2; padding: .7rem; overflow: auto; } @media (prefers-color-scheme: dark) {
body { background: #16181b; color: #e4e4e0; } pre { background: #22252a; } a { color: #8ab4ff; } }
"""


def describe(api: dict[str, Any], backend: str) -> str:
    """The page of GET /docs: routes, bodies and answers of an OpenAPI description."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>API</title><style>{STYLE}</style>',
        f"<h1>{html.escape(api['info']['title'])}</h1><p>Back end: <b>{html.escape(backend)}</b>. "
        'All but <code>/rules</code> and the pages need the header <code>X-API-Key</code>. As a machine reads it: '
        '<a href="/openapi.json">openapi.json</a>; a page to look at: <a href="/dashboard">dashboard</a>.</p>',
    ]
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{html.escape(method.upper())} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(route.get('description', ''))}</p>")
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                parts.append(f"<p>Takes <code>{html.escape(_name(body))}</code>.</p>")
    parts.append("<h2>Types</h2>")
    for name, schema in api.get("components", {}).get("schemas", {}).items():
        fields = {
            field: {k: v for k, v in value.items() if k != "title"}
            for field, value in schema.get("properties", {}).items()
        }
        about = html.escape(schema.get("description", ""))
        text = html.escape(json.dumps(fields, indent=1).replace("#/components/schemas/", ""))
        parts.append(f"<h2><code>{html.escape(name)}</code></h2><p>{about}</p><pre>{text}</pre>")
    return "\n".join(parts) + "</html>\n"


def _name(schema: dict[str, Any]) -> str:
    return schema.get("$ref", schema.get("title", "")).rsplit("/", 1)[-1]
