"""What the process imports and works out that ranks.py forks all others from."""
import ranks  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import data
import quick
import t3d  # noqa: F401
import tabom  # noqa: F401
import tad  # noqa: F401
import trims  # noqa: F401

for split in data.AVOIDED:
    data.avoided("tiny", split)
quick.sources_are_read_once()
quick.what_is_there_stays()
