"""SeqIO tasks of prompts and responses, the paper's fine-tuning: `finetune_gsm8k`, `finetune_xsum`,
`finetune_cnn_dailymail`, `finetune_anli_r1` to `_r3` and the mixture `finetune_anli` of the three.

They read the TFDS datasets of these names (in TFDS_DATA_DIR), tokenized by SALT_VOCABULARY of
environment.py. Their features are `inputs`, the prompt, and `targets`, the response and the end of
document.

The templates are those of gin/templates; `text_tasks.register_response_task` makes tasks with
others. XSum's articles must be downloaded manually; GSM8K has no validation split in TFDS, so the
first 2% of train are held out.
"""

import seqio

from salt_jax.preparation.templates import Template
from salt_jax.t5x.text_tasks import register_response_task
from salt_jax.tasks import environment

GSM8K = Template("Question: {question}\nAnswer:", " {answer}")
XSUM = Template("Article: {document}\nSummary:", " {summary}")
CNN_DAILYMAIL = Template("Article: {article}\nHighlights:", " {highlights}")
# The words of Brown et al. (arXiv 2005.14165) for entailment, neutral and contradiction, as TFDS
# numbers them and as the release's own files name them.
ANLI = Template(
    "{context}\nQuestion: {hypothesis} True, False, or Neither?\nAnswer:",
    " {label}",
    {
        "label": {
            **{"0": "True", "1": "Neither", "2": "False"},
            **{"e": "True", "n": "Neither", "c": "False"},
        }
    },
)

FINETUNE_GSM8K = register_response_task(
    "finetune_gsm8k",
    "gsm8k:1.0.0",
    GSM8K,
    environment.chosen_vocabulary,
    {"train": "train[2%:]", "validation": "train[:2%]", "test": "test"},
)
FINETUNE_XSUM = register_response_task(
    "finetune_xsum", "xsum:1.1.0", XSUM, environment.chosen_vocabulary
)
FINETUNE_CNN_DAILYMAIL = register_response_task(
    "finetune_cnn_dailymail", "cnn_dailymail:3.4.0", CNN_DAILYMAIL, environment.chosen_vocabulary
)
FINETUNE_ANLI_ROUNDS = [
    register_response_task(
        f"finetune_anli_{name}", f"anli/{name}:0.1.0", ANLI, environment.chosen_vocabulary
    )
    for name in ("r1", "r2", "r3")
]
FINETUNE_ANLI = seqio.MixtureRegistry.add(
    "finetune_anli", FINETUNE_ANLI_ROUNDS, default_rate=seqio.mixing_rate_num_examples
)
