"""SeqIO tasks over the Pile, from the TFDS dataset `the_pile` (t5x/the_pile).

The tasks are `pile`, one for each subset (`pile_arxiv`, `pile_wikipedia_en` …), the mixture
`pile_mixture` and, over a cache, the scored rows `pile_scored` and the selected ones
`pile_salt_ds`. The dataset is read from TFDS_DATA_DIR; environment.py's variables name the rest.

`pile` is the release unchanged: its train files are assumed to be upsampled, so no weights are
applied. `pile_mixture`, for sources without that upsampling, draws documents of the subsets' tasks
at rates that give the Pile's published shares of text.
"""

import seqio

from salt_jax.preparation.pile import PILE_DOCUMENT_RATES, PILE_SUBSETS, pile_slug
from salt_jax.t5x.salt_ds import register_rows
from salt_jax.t5x.text_tasks import register_dataset_task
from salt_jax.t5x.the_pile import the_pile as _the_pile  # noqa: F401 (TFDS must know it)
from salt_jax.tasks import environment

_DATASET = "the_pile/{config}:1.0.0"

PILE = register_dataset_task(
    "pile", _DATASET.format(config="all"), PILE_SUBSETS, environment.chosen_vocabulary
)
for _subset in PILE_SUBSETS:
    register_dataset_task(
        f"pile_{pile_slug(_subset)}",
        _DATASET.format(config=pile_slug(_subset)),
        PILE_SUBSETS,
        environment.chosen_vocabulary,
    )
PILE_MIXTURE = seqio.MixtureRegistry.add(
    "pile_mixture",
    [(f"pile_{pile_slug(subset)}", rate) for subset, rate in PILE_DOCUMENT_RATES.items()],
)
PILE_SCORED = register_rows("pile_scored", environment.scored_rows)
PILE_SALT_DS = register_rows("pile_salt_ds", environment.selected_rows)
