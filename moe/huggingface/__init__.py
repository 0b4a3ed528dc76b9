"""Weights of Hugging Face checkpoints, both ways, without transformers: `load` fills a model, `export` writes a directory.

python -m moe.huggingface import DIR --out OUT        config.json and safetensors to a spec and our weights
python -m moe.huggingface export RUN --out DIR        a run, a checkpoint or an import to what transformers loads
python -m moe.huggingface report DIR                  where every tensor of DIR would go
"""

from moe.huggingface.load import load
from moe.huggingface.report import Line, Report
from moe.huggingface.source import WeightsError

__all__ = ["Line", "Report", "WeightsError", "load"]
