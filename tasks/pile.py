"""SeqIO tasks over the Pile: `pile`, and its selected rows `pile_salt_ds`.

In: the environment variables of environment.py. Out: two registered tasks; a subset name that the
Pile doesn't have is refused. The release's train files are understood to hold its upsampled text,
so no mixture weights are applied.
"""

from salt_jax.preparation.pile import pile_files
from salt_jax.preparation.salt_ds import register_selected_rows
from salt_jax.preparation.text_tasks import register_text_task
from salt_jax.tasks import environment

PILE = register_text_task(
    "pile",
    lambda: pile_files(environment.required("SALT_PILE", "the folder of the Pile")),
    environment.vocabulary,
)
PILE_SALT_DS = register_selected_rows("pile_salt_ds", environment.selected_rows)
