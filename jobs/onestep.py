"""Make a distilled LoRA good in one step: distribution matching, for 1 to 8 steps or for the single step alone.
Or make a few-step model of the base by score distillation (Turbo, DMD).

    python jobs/onestep.py tiny --init runs/tiny-minutes/lora/tscd-k1.safetensors                  # minutes on a CPU
    python jobs/onestep.py tiny --mode dedicated --init runs/tiny-minutes/lora/tscd-k1.safetensors
    python jobs/onestep.py sd15 --teacher PATH --init LORA --data.shards 's3://...'
    python jobs/pairs.py --teacher PATH --data.shards 's3://...' --out PAIRS                        # the paper's MSE (Sec. 3.3):
    python jobs/onestep.py sd15 --mode dedicated --regression.pairs PAIRS --teacher PATH --init LORA --data.shards 's3://...'
    python jobs/onestep.py tiny --init LORA --full-unet --zero.stage 2 --run.workers 2              # DeepSpeed ZeRO
    python jobs/onestep.py sdxl --full-unet --plan --gpus 32 --gpu-memory 80                         # what a GPU would hold
    python jobs/onestep.py tiny --init LORA --feedback                                              # a reward judges it too
    python jobs/onestep.py few-tiny --method turbo
    python jobs/onestep.py few-sd15 --method dmd --teacher PATH --data.shards 's3://...'
    ray job submit --working-dir . -- python jobs/onestep.py tiny --init LORA                       # on a cluster
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.cli import Parser, parse, run_job
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.recipes import ONESTEP_RECIPES

PLAN_OPTIONS = """options of the job:
  --plan              train nothing: print what a GPU would hold of a full UNet
  --gpus N            with --plan: how many, one a worker (default: run.workers)
  --gpu-memory GB     with --plan: of each (default: 80)
"""


def main() -> None:
    """Train, say where everything is, and draw; with --plan only say what a GPU would hold."""
    if "--plan" in sys.argv[1:]:
        print_plan(sys.argv[1:])
        return
    config = parse(ONESTEP_RECIPES, OneStepConfig, __doc__, job_options=PLAN_OPTIONS)
    from hypersd_ray.trainer import run  # Ray and torch come after the configuration is known to be right

    result = run.train(config)
    report(config, result)
    for path in draw(config, result.folder):
        print(f"picture  {path}")


def print_plan(arguments: list[str]) -> None:
    """The memory plan of the run that `arguments` ask for. Teacher and LoRA may be left out where a recipe's name says
    the family: no weight is read, and no cluster asked for."""
    parser = Parser(__doc__)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpus", type=int, help="how many, one a worker; without it run.workers")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB of each")
    how, rest = parser.parse_known_args(arguments)
    if how.gpu_memory <= 0 or (how.gpus is not None and how.gpus < 1):
        raise ConfigError(f"--gpus {how.gpus} --gpu-memory {how.gpu_memory:g}: both must be above 0")
    rest += [] if how.gpus is None else ["--run.workers", str(how.gpus)]
    with tempfile.TemporaryDirectory() as folder:
        config = parse(ONESTEP_RECIPES, OneStepConfig, __doc__ or "", rest + stand_ins(rest, Path(folder)))
        if not config.full_unet:
            raise ConfigError(
                "--plan without --full-unet: a LoRA's moments are small, it needs no ZeRO; add --full-unet"
            )
        from hypersd_ray.training.memory_report import model_of, report

        print(report(config, model_of(config), how.gpu_memory))


def stand_ins(arguments: list[str], folder: Path) -> list[str]:
    """Options for what a recipe asks for and a plan does not: the shape of the family's UNet, a LoRA without numbers."""
    recipe = next((argument for argument in arguments if argument in ONESTEP_RECIPES), None)
    if recipe is None:
        return []
    given = {argument.partition("=")[0] for argument in arguments}
    parameters = inspect.signature(ONESTEP_RECIPES[recipe]).parameters
    wanted = [name for name in ("teacher", "init") if name in parameters and f"--{name}" not in given]
    options = []
    if "teacher" in wanted:
        from hypersd_ray.models.shapes import write_shape

        write_shape(folder, "sdxl" if "sdxl" in recipe else "sd")
        options += ["--teacher", str(folder)]
    if "init" in wanted:
        (folder / "lora.safetensors").touch()
        options += ["--init", str(folder / "lora.safetensors")]
    return options


def draw(config: OneStepConfig, folder: str) -> list[str]:
    """Loss curves, and of a LoRA a sample grid, written into the run's folder; returns their paths.

    The grid of a model on GPUs is drawn where a worker would be.
    """
    from evaluation import ending
    from evaluation.pictures import placed_rows
    from hypersd_ray.trainer.kinds.onestep import onestep_name

    omega = (config.distill.omega_min + config.distill.omega_max) / 2
    lora = f"{folder}/lora/{onestep_name(config)}.safetensors"
    rows = {} if config.full_unet else placed_rows(config, lora, omega)
    title = f"same noise, teacher at guidance {omega:g}, student from input {config.t_input - 1}"
    return ending.draw(
        folder, rows, config.run.prompts, title + ("; before: the LoRA it began as" if config.init else "")
    )


def report(config: OneStepConfig, result) -> None:
    """What came out, and where it is."""
    from evaluation import ending
    from hypersd_ray.models.cards import unet_usage
    from hypersd_ray.models.export import usage
    from hypersd_ray.trainer.kinds.onestep import onestep_card, onestep_metadata, onestep_name

    lora, unet = (
        f"{result.folder}/{part}"
        for part in (f"lora/{onestep_name(config)}.safetensors", f"unet-{onestep_name(config)}")
    )
    ending.say_how_it_went(config.run.name, result)
    if not config.full_unet:
        print(f"LoRA     {lora} (in Kohya's layout beside it)")
    if config.full_unet or config.mode == "dedicated":
        print(f"UNet     {unet} (model card in its README.md)")
    ending.say_where_it_is(result)
    if not config.full_unet:
        print("\nUse it:\n" + usage(lora, onestep_metadata(config), base=config.teacher))
    if config.full_unet or config.mode == "dedicated":
        print("\nUse the UNet:\n" + unet_usage(unet, onestep_card(config)))
    print(flush=True)


if __name__ == "__main__":
    run_job(main)
