"""Judge few-step models: quality with intervals, diversity, fidelity to the teacher, latency and memory; and a report.

    python jobs/evaluate.py LORA --steps 1 2 4 8 --scheduler tcd                        # the embedded model
    python jobs/evaluate.py LORA RUN_FOLDER UNET_FOLDER --baseline teacher              # several, paired differences
    python jobs/evaluate.py LORA --base SDXL_FOLDER --prompts coco5k --prompts-file data/coco5k.parquet \\
        --teacher-guidance 7.5 --judges.clip-score FILE --judges.pick-score FOLDER --generators.num-gpus 1
    python jobs/evaluate.py A.safetensors B.safetensors --steps 4 --export-images runs/images  # then jobs/study.py

MODEL is a LoRA file, the folder of a run, of a UNet or of a pipeline, or the word teacher; NAME=MODEL gives it a name. Pictures
and scores are kept under --out: started again, the job makes only what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.evaluate import EvaluateConfig


def main() -> None:
    """Make, judge, report."""
    arguments = sys.argv[1:]
    models = arguments[: next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))]
    config: EvaluateConfig = read_options(EvaluateConfig, arguments[len(models) :], __doc__ or "")
    if not models:
        raise ConfigError(
            "no MODEL given: a LoRA, a folder of a run, a UNet or a pipeline, or teacher; before the options"
        )
    if url := next((model for model in models if "://" in model), None):
        raise ConfigError(f"{url}: URLs are not read here: copy it to a disk first")
    from evaluation.harness.pieces import write_json
    from evaluation.harness.plan import plan
    from evaluation.harness.prompts import read_rows
    from evaluation.harness.run import evaluate
    from evaluation.harness.subjects import find_baseline, find_subject
    from evaluation.report.build import write_report

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    rows = read_rows(config, log)
    subjects = [find_subject(model, config) for model in models]
    if len({s.name for s in subjects}) < len(subjects):
        raise ConfigError(
            f"two models have one name ({', '.join(s.name for s in subjects)}): give them names, NAME=MODEL"
        )
    baseline = None
    if config.baseline:
        baseline = find_baseline(config)
    what = plan(config, rows, subjects, baseline)
    results = evaluate(what, log)
    folder = Path("runs") / "report" if "://" in config.out else Path(config.out)
    write_json(folder / "results.json", results)
    written = write_report(results, rows, folder)
    print((folder / "report.md").read_text().split("\n## ")[1] if (folder / "report.md").is_file() else "")
    missing = sum(sum(row["missing"].values()) for row in results["rows"])
    if missing:
        print(f"{missing} scores are missing: a judge failed on those pictures")
    if config.export_images:
        from evaluation.harness.exporting import export_images

        found = export_images(what, Path(config.export_images))
        print(f"study    python jobs/study.py serve --images {' '.join(f'{n}={f}' for n, f in found.items())}")
    for path in written:
        print(f"report   {path}")


if __name__ == "__main__":
    run_job(main)
