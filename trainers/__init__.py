"""Stages that hold tensors: pretrain, importance, prune, distill, evaluate."""

import os

# The libraries underneath draw a progress bar for every small thing they do; ours is enough.
# Read when tqdm is first imported, hence here.
os.environ.setdefault("TQDM_DISABLE", "1")
