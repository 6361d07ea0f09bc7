"""Make the pages of the site need no network: formulas become MathML, and nothing is loaded.

A hook of MkDocs, named in mkdocs.yml. A formula that cannot be converted ends the build with an
error that shows it.
"""

import html
import re

from math_core import LatexToMathML

CONVERTER = LatexToMathML()

# What `pymdownx.arithmatex` makes of a formula in Markdown.
IN_MARKDOWN = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

# Notebooks arrive as HTML whose formulas are still between dollars. Code has dollars of its own.
MARKDOWN_CELL = re.compile(
    r'(?<=data-mime-type="text/markdown">).*?(?=</div>\s*</div>\s*</div>)', re.DOTALL
)
IN_CELL = re.compile(
    r"<(?P<code>code|pre)\b.*?</(?P=code)>|\$\$(?P<block>.+?)\$\$|\$(?P<line>.+?)\$", re.DOTALL
)
# nbconvert's own way to formulas and diagrams: libraries from a network.
SCRIPT = re.compile(r"<script\b[^>]*>.*?</script>", re.DOTALL)
LIBRARIES = ("mathjax", "mermaid")
BADGE = re.compile(r'<img alt="(Open in Colab)"[^>]*/?>')


def mathml(latex: str, block: bool) -> str:
    """Return a formula, as it is escaped in HTML, as MathML."""
    drawn = CONVERTER.convert_with_local_state(html.unescape(latex).strip(), displaystyle=block)
    # Without a font for mathematics Chromium draws an accent across its letter.
    return drawn.replace('<mover accent="true">', "<mover>")


def in_cell(found: re.Match[str]) -> str:
    """Return a formula of a notebook as MathML, and code as it is."""
    if found["code"]:
        return found[0]
    return mathml(found["block"] or found["line"], bool(found["block"]))


def without_libraries(found: re.Match[str]) -> str:
    """Return a script, or nothing if it is there to load a library."""
    return "" if any(name in found[0].lower() for name in LIBRARIES) else found[0]


def on_post_page(output: str, **_: object) -> str:
    """Keep the theme from asking GitHub how many stars the repository has."""
    return output.replace('data-md-component="source"', "")


def on_page_content(content: str, page, **_: object) -> str:
    """Convert a page before it is put into its template."""
    if page.file.src_uri.endswith(".ipynb"):
        content = SCRIPT.sub(without_libraries, content)
        content = BADGE.sub(r"\1", content)
        return MARKDOWN_CELL.sub(lambda cell: IN_CELL.sub(in_cell, cell[0]), content)
    return IN_MARKDOWN.sub(lambda found: mathml(found[3], found[2] == "["), content)
