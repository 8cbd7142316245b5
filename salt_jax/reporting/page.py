"""One HTML page that holds all of a report: no network, no script, images inside.

In: a composed report and how its runs were made. Out: the page's text. Every text that comes from
a run is escaped, and the page's own policy forbids scripts and anything from outside.
"""

import base64
import html
from collections.abc import Mapping, Sequence

from salt_jax.errors import visible
from salt_jax.reporting.plots import Plot
from salt_jax.reporting.runs import Origin
from salt_jax.reporting.sections import Report, Section
from salt_jax.reporting.selection_audit import Excerpts
from salt_jax.terminal import WRITING, Table

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --soft: #5b6570; --line: #dfe3e8;
  --band: #f5f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e6e9ec; --soft: #9aa5b1;
  --line: #2e353d; --band: #1c2229; --accent: #6fb7e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid
  var(--line); }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 1.25rem 0 0; font-size: .92rem; }
.table { overflow-x: auto; margin: 1rem 0 .25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .4rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid
  var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child { text-align: left; padding-left: .5rem; position: sticky; left: 0; background:
  var(--paper); }
tbody th { color: var(--ink); max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
tbody tr:hover > * { background: var(--band); }
.arm { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem;
  border: 1px solid var(--soft); }
.note, figcaption, footer { color: var(--soft); font-size: .88rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.25rem;
  margin: 1.25rem 0; }
figure { margin: 0; max-width: 40rem; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { margin-top: .4rem; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .6rem
  0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details details summary { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .6rem 0;
  font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 30rem; white-space: pre-wrap; background: var(--band);
  padding: .75rem; border-radius: 6px; font-size: .82rem; }
code { font-size: .88em; }
footer { margin-top: 3rem; }
@media (max-width: 40rem) { h1 { font-size: 1.5rem; } th, td { padding: .35rem .6rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { details { border: 0; } nav { display: none; } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(title: str, report: Report, origins: Sequence[tuple[str, Origin]], made: str) -> str:
    """Makes the page.

    Args:
      title: Its head.
      report: What it shows.
      origins: How each run was made, by the name the report calls it.
      made: By what and when, for its foot.
    """
    parts = [(f"part-{number}", section) for number, section in enumerate(report.sections)]
    links = [f'<a href="#{place}">{_text(section.title)}</a>' for place, section in parts]
    links.append('<a href="#made">How the runs were made</a>')
    colours = {label: look.colour for label, look in report.looks.items()}
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{_text(title)}</h1>",
            *(f"<p>{_text(sentence)}</p>" for sentence in report.summary_sentences),
            f"<nav>{' '.join(links)}</nav>",
            *(_section(place, section, colours) for place, section in parts),
            '<h2 id="made">How the runs were made</h2>',
            *(_origin(name, origin) for name, origin in origins),
            f"<footer>{_text(made)}</footer>",
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(place: str, section: Section, colours: Mapping[str, str]) -> str:
    lines = [f'<h2 id="{place}">{_text(section.title)}</h2>']
    lines += [f"<p>{_text(sentence)}</p>" for sentence in section.text]
    lines += [_table(table, colours) for table in section.tables]
    if section.plots:
        lines += ['<div class="plots">', *map(_figure, section.plots), "</div>"]
    lines += [_excerpts(excerpts) for excerpts in section.excerpts]
    return "\n".join(lines)


def _excerpts(excerpts: Excerpts) -> str:
    """Rows to be read, folded away."""
    rows = [
        f'<p class="note">{_text(head)}</p><pre>{_text(text)}</pre>' for head, text in excerpts.rows
    ]
    summary = f"{excerpts.title} ({len(excerpts.rows)})"
    return f"<details><summary>{_text(summary)}</summary>{''.join(rows)}</details>"


def _table(table: Table, colours: Mapping[str, str]) -> str:
    heads = "".join(f'<th scope="col">{_named(name, colours)}</th>' for name in table.columns)
    rows = [
        f'<tr><th scope="row" title="{_text(row[0])}">{_named(row[0], colours)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    ]
    note = [f'<p class="note">{_text(table.note)}</p>'] if table.note else []
    return "\n".join(
        [
            '<div class="table"><table>',
            f"<caption>{_text(table.title)}</caption>",
            f"<thead><tr>{heads}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
            *note,
        ]
    )


def _named(name: str, colours: Mapping[str, str]) -> str:
    """A name, after a dot in the colour of its curve where it has one."""
    if name not in colours:
        return _text(name)
    return f'<span class="arm" style="background:{colours[name]}"></span>{_text(name)}'


def _figure(plot: Plot) -> str:
    image = base64.b64encode(plot.png).decode("ascii")
    return (
        f'<figure><img alt="{_text(plot.caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{_text(plot.caption)}</figcaption></figure>"
    )


def _origin(name: str, origin: Origin) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in origin.versions.items())
    facts = [
        ("Folder", str(origin.path)),
        ("Command", origin.command_line),
        ("Started", origin.started),
        ("Versions", versions),
        ("git commit", origin.git_commit or "none: it did not run from a clone"),
    ]
    lines = [f"<details><summary>{_text(name)}</summary>", "<dl>"]
    for term, fact in facts:
        shown = f"<code>{_text(fact)}</code>" if term == "Command" else _text(fact)
        lines.append(f"<dt>{term}</dt><dd>{shown if fact else 'not recorded'}</dd>")
    lines.append("</dl>")
    if origin.config:
        lines.append("<details><summary>config.gin</summary>")
        lines.append(f"<pre>{_text(origin.config)}</pre></details>")
    return "\n".join([*lines, "</details>"])


def _text(text: str) -> str:
    return html.escape(visible(str(text), f"\n{WRITING}"), quote=True)
