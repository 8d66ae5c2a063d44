"""Write the sources of the documentation as a site, for Sphinx: pages, commands, Python reference: site.py FOLDER."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from pyvhostvdpa import __version__
from pyvhostvdpa.cli import reference
from pyvhostvdpa.cli.commands import COMMANDS, full_parser, subparsers

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "pyvhostvdpa" / "cli" / "docs"
CONF = f'''project = "pyvhostvdpa"
version = release = "{__version__}"
copyright = "the pyvhostvdpa authors"
extensions = ["myst_parser"]
html_theme = "alabaster"
html_theme_options = {{"description": "live migration between vDPA devices", "page_width": "1100px"}}
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["narrow.css"]
myst_heading_anchors = 3
exclude_patterns = ["static"]
'''
NARROW = """/* What is wider than the screen scrolls by itself, and shows it by a shadow. */
table.docutils, div.body pre {
  overflow-x: auto; max-width: 100%;
  background:
    linear-gradient(to right, var(--under) 30%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--under) 30%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, #b4bac1, transparent) left / .8rem 100% no-repeat scroll,
    linear-gradient(to left, #b4bac1, transparent) right / .8rem 100% no-repeat scroll, var(--under);
}
table.docutils { --under: #fff; display: block; border: 0; }
div.body pre { --under: #f6f3ec; }
table.docutils tr, table.docutils thead { background: transparent; }
div.body img { max-width: 100%; height: auto; }
div.body code { overflow-wrap: anywhere; }
"""
ORDER = ("start", "hardware", "doctor", "probe", "lab", "migration", "downtime", "ladder", "watch", "serve", "python")
# Where a link of a page leads to here.
MOVED = {
    "pyvhostvdpa/cli/docs/": "",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
    "tools/vdpa_hwsim/README.md": "vdpa_hwsim.md",
    "../../tools/vdpa_hwsim/README.md": "vdpa_hwsim.md",
    "../../../tools/vdpa_hwsim/README.md": "vdpa_hwsim.md",
}


def moved(text: str) -> str:
    """Return a page with its links as they are in the site."""
    for there, here in MOVED.items():
        text = text.replace(f"]({there}", f"]({here}")
    return text


def toctree(title: str, names: list[str]) -> str:
    """Return a part of the contents."""
    return "\n".join(["```{toctree}", f":caption: {title}", ":maxdepth: 1", "", *names, "```", ""])


def pages(folder: Path) -> list[str]:
    """Copy the pages and their pictures; return their names in the order of reading."""
    for page in DOCS.glob("*.md"):
        (folder / page.name).write_text(moved(page.read_text()))
    for picture in DOCS.glob("*.svg"):
        shutil.copy(picture, folder)
    others = {"contributing": ROOT / ".github/CONTRIBUTING.md", "security": ROOT / ".github/SECURITY.md"}
    others["vdpa_hwsim"] = ROOT / "tools/vdpa_hwsim/README.md"
    for name, source in others.items():
        (folder / f"{name}.md").write_text(moved(source.read_text()))
    found = {page.stem for page in DOCS.glob("*.md")}
    return [*(name for name in ORDER if name in found), *sorted(found - set(ORDER)), *others]


def commands(folder: Path) -> list[str]:
    """Write the help of each command; return the names of the pages."""
    top = full_parser()
    made = []
    for name, parser in subparsers(top).items():
        texts = [(f"vhost-vdpa {name}", parser)]
        texts += [(f"vhost-vdpa {name} {inner}", each) for inner, each in subparsers(parser).items()]
        blocks = [f"```text\n{each.format_help().rstrip()}\n```\n" for _, each in texts]
        parts = [f"## {title}\n\n{block}" for (title, _), block in zip(texts[1:], blocks[1:], strict=True)]
        head = f"# vhost-vdpa {name}: {COMMANDS[name]}\n\n{blocks[0]}\n"
        (folder / f"command-{name}.md").write_text(head + "\n".join(parts))
        made.append(f"command-{name}")
    return made


def api(folder: Path) -> list[str]:
    """Write the Python reference, one page for each module that has something public; return their names."""
    made = []
    for module in reference.modules():
        members = list(reference.public(module))
        if not members:
            continue
        name = f"api-{module.__name__.replace('.', '-')}"
        lines = [f"# {module.__name__}", "", "```text", (module.__doc__ or "").strip(), "```", ""]
        for member, thing in members:
            described = "\n".join(reference.describe(member, thing, module.__name__))
            lines += [f"## {member}", "", "```text", described.replace("```", "'''"), "```", ""]
        (folder / f"{name}.md").write_text("\n".join(lines))
        made.append(name)
    return made


def main(folder: Path) -> None:
    """Write everything."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "conf.py").write_text(CONF)
    (folder / "static").mkdir()
    (folder / "static" / "narrow.css").write_text(NARROW)
    parts = {"Pages": pages(folder), "Commands": commands(folder), "Python": api(folder)}
    for generated in ("ioctls", "errors"):
        title = reference.GENERATED[generated]
        text = reference.text(generated)
        (folder / f"{generated}.md").write_text(f"# {title[0].upper()}{title[1:]}\n\n```text\n{text}\n```\n")
        parts["Python"].append(generated)
    readme = moved((ROOT / "README.md").read_text())
    contents = "\n".join(toctree(title, names) for title, names in parts.items())
    # between the picture and the first section
    first = re.search(r"^## ", readme, re.MULTILINE)
    assert first
    (folder / "index.md").write_text(f"{readme[: first.start()]}{readme[first.start() :]}\n{contents}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
