"""Draw the pictures of docs/images from stored rows. Usage: python scripts/pictures.py"""

from pathlib import Path

from louver.experiments.catalog import experiments
from louver.experiments.charts import chart_png
from louver.experiments.rows import read_rows, write_bytes

ROOT = Path(__file__).resolve().parent.parent
# picture -> experiment, which of its charts, rows
PICTURES = {
    "quality": ("quality", 0, "quality"),
    "perplexity_kl": ("perplexity", 0, "perplexity"),
    "denoising": ("denoising", 0, "denoising"),
    "cliff": ("false-negatives", 1, "false_negatives"),
}

for _name, (_experiment, _chart, _rows) in PICTURES.items():
    _document = read_rows(ROOT / "benchmarks" / "results" / f"{_rows}.json")
    _png = chart_png(experiments()[_experiment].charts[_chart], _document["rows"])
    write_bytes(ROOT / "docs" / "images" / f"{_name}.png", _png)
