"""What MkDocs is told when it builds the site: pages made of the code, pages beside docs/, and their links.

Pages are written so that links work in the repository, where READMEs lie beside their packages. The site has them
below `packages/`, and a link to a file that is no page becomes its name.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import reference_pages

ROOT = Path(__file__).parents[1]
# Pages that do not lie in docs/: where the repository has them, and the site.
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/tokenizer/README.md": "packages/example-tokenizer.md",
    **{f"packages/{package}/README.md": f"packages/{package}.md" for package in reference_pages.PACKAGES},
}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference into the navigation."""
    (place,) = (entry for entry in config.nav or [] if "Reference" in entry)
    place["Reference"] = reference_pages.navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and those beside docs/."""
    for path, content in reference_pages.pages().items():
        files.append(File.generated(config, path, content=content))
    for source, path in BESIDE.items():
        files.append(File.generated(config, path, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    del config
    sources = {site: source for source, site in BESIDE.items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")

    def mended(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or here.startswith("reference/"):
            return match[0]
        found = _site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)), files)
        if found is None:
            return text[1:-1]
        return f"{text}({posixpath.relpath(found, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(mended, markdown)


def _site_path(path: str, files: Files) -> str | None:
    """Where the site has a file or folder of the repository; None where it has it not."""
    for candidate in (path, f"{path}/README.md"):
        if candidate in BESIDE:
            return BESIDE[candidate]
        inside = candidate.removeprefix("docs/")
        if candidate.startswith("docs/") and files.get_file_from_path(inside) is not None:
            return inside
    assert (ROOT / path).exists(), f"a link leads to {path}, which does not exist"
    return None
