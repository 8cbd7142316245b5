"""SeqIO tasks over this machine's own text: `smoke_text`, and its selected rows `smoke_salt_ds`.

In: the environment variables of environment.py. Out: two registered tasks with train, validation
and test splits.
"""

from salt_jax.preparation.own_text import own_text
from salt_jax.preparation.salt_ds import register_selected_rows
from salt_jax.preparation.text_tasks import register_text_task
from salt_jax.tasks import environment

SMOKE_TEXT = register_text_task("smoke_text", own_text, environment.vocabulary)
SMOKE_SALT_DS = register_selected_rows("smoke_salt_ds", environment.selected_rows)
