"""What the site does beyond MkDocs: pages for source files, and no request to other hosts."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).resolve().parent.parent.parent
# A link that leaves docs/, as it works where the repository is read on its own.
OUTSIDE = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>[\w./-]+)(?P<anchor>#[\w-]+)?\)")
REQUEST = re.compile(
    r"<(?:script|img|link|iframe|source|audio|video)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//"
    r"[^>]*>"
)
LANGUAGES = {".md": "markdown", ".py": "python", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file or folder outside docs/ that a page links to."""
    for file in list(files.documentation_pages()):
        for link in OUTSIDE.finditer(file.content_string):
            target = linked(file, link)
            if target is not None and files.get_file_from_path(source_page(target)) is None:
                page = File.generated(config, source_page(target), content=listing(target))
                page.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point such links at those pages."""

    def replaced(link: re.Match[str]) -> str:
        target = linked(page.file, link)
        if target is None:
            return link[0]
        return f"]({'../' * page.file.src_uri.count('/')}{source_page(target)})"

    return OUTSIDE.sub(replaced, markdown)


def on_post_page(output: str, page: Page, **_: Any) -> None:
    """Warn, and so fail a strict build, of whatever a page loads from another host."""
    for request in REQUEST.finditer(output):
        log.warning("%s loads something from another host: %s", page.file.src_uri, request[0])


def linked(file: File, link: re.Match[str]) -> Path | None:
    """Return the file or folder outside docs/ that is linked to, from the root; None if inside."""
    target = (ROOT / "docs" / file.src_uri).parent / link["up"] / link["path"]
    target = target.resolve().relative_to(ROOT)
    if target.parts[0] == "docs":
        return None
    if not (ROOT / target).exists():
        log.warning("%s links to %s, which does not exist", file.src_uri, target)
        return None
    return target


def source_page(target: Path) -> str:
    """Return the page of a source file."""
    return f"source/{target.as_posix()}.md"


def listing(target: Path) -> str:
    """Return the Markdown of a source file's page, or of a folder's."""
    path = ROOT / target
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n# {target.as_posix()}\n\n"
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix in LANGUAGES)
        return head + "\n".join(f"- `{name}`" for name in names) + "\n"
    language = LANGUAGES.get(path.suffix, "text")
    return f"{head}````{language}\n{path.read_text(encoding='utf-8')}\n````\n"
