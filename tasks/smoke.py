"""SeqIO tasks over this machine's own text: `smoke_text`, its scored rows `smoke_scored`, and the
selected ones `smoke_salt_ds`.

They have train, validation and test splits, and read the environment variables of environment.py.
"""

from salt_jax.preparation.own_text import own_text
from salt_jax.t5x.salt_ds import register_rows
from salt_jax.t5x.text_tasks import register_text_task
from salt_jax.tasks import environment

SMOKE_TEXT = register_text_task("smoke_text", own_text, environment.chosen_vocabulary)
SMOKE_SCORED = register_rows("smoke_scored", environment.scored_rows)
SMOKE_SALT_DS = register_rows("smoke_salt_ds", environment.selected_rows)
