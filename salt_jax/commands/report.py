"""`salt report RUN…`: one self-contained page of plots and tables from any runs.

It reads output folders of `salt train`, `salt score`, `salt select` and `salt evaluate --compare`,
finished or still going, and writes index.html, its plots as PNG files, and summary.json with the
same results as numbers.
"""

import datetime
from collections.abc import Sequence

from salt_jax import __version__
from salt_jax.cli.verb import Verb
from salt_jax.errors import InputError
from salt_jax.reporting import page
from salt_jax.reporting.runs import Material, Origin, read_folders
from salt_jax.reporting.sections import compose
from salt_jax.reporting.seeds import REFERENCE
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import print_table, say

PAGE_FILE = "index.html"


def report(
    run: RunFolder,
    *,
    runs: Sequence[str],
    title: str = "SALT training runs",
    charge_teacher_training: bool = False,
    reference: str = REFERENCE,
) -> None:
    """Compares runs on one page: at equal steps, at equal FLOPs, at equal time.

    Arms of one model size are compared; a run of another size, such as the SLM, is drawn faintly
    for reference. A folder of scores adds their distribution, a folder of selected rows the cut in
    it, a paired comparison its differences. A report may be made again into the same folder.

    Args:
      run: The folder the page is written to.
      runs: Output folders of `salt train`, `salt score`, `salt select` and
        `salt evaluate --compare`, in any order.
      title: The page's title.
      charge_teacher_training: Count the cost of training an arm's teacher as the arm's own; by
        default it is shown beside the arms and not charged.
      reference: The arm that the others are compared with, where arms have several seeds.

    Raises:
      InputError: A folder is none of these, or is damaged.
    """
    if isinstance(runs, str):
        raise InputError(f"runs is the string {runs!r}: give a list of folders, ({runs!r},).")
    material = read_folders(runs)
    composed = compose(material, charge_teacher_training, reference)
    run.begin(replace=True)
    files = {f"{name}.png": plot.png for name, plot in composed.plots.items()}
    for name, png in files.items():
        (run.path / name).write_bytes(png)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"Made by salt report {__version__}, {now}."
    path = run.path / PAGE_FILE
    write_text(path, page.render(title, composed, _origins(material), made))
    run.write_summary(
        {
            "title": title,
            "page": PAGE_FILE,
            "plots": [*files],
            "charge_teacher_training": charge_teacher_training,
            **composed.numbers,
        }
    )
    for table in composed.printed:
        print_table(table)
    say(f"The page, with plots, costs and results by subset: {path.resolve()}")


def _origins(material: Material) -> list[tuple[str, Origin]]:
    return [
        *((one.label, one.origin) for one in material.runs),
        *((f"scores: {one.name}", one.origin) for one in material.scores),
        *((f"selection: {one.name}", one.origin) for one in material.selections),
        *((f"comparison: {one.name}", one.origin) for one in material.comparisons),
    ]


VERB = Verb(report, positional="runs")
