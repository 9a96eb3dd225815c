"""What does the graph add to a network that has it?

`configs/cifar10_denoise.yaml` on CIFAR-10, 1,200 steps of 32, against the same backbone with its graph switched off
and as many parameters: the noisy image takes the place of the diffused one. Three seeds, and one of a network of twice
the width; PSNR on the test images.

    python benchmarks/graph_gain.py --json graph_gain.json
"""

import logging
import tempfile
import time
import warnings
from typing import Any

import torch
from _common import PROJECT, arguments, write_json

from lightning_modules.cli import build


def run(seed: int, graph: bool, width: int, steps: int, data: str, extra: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = build(
            [
                f"--config={PROJECT / 'configs' / 'cifar10_denoise.yaml'}",
                f"--seed_everything={seed}",
                f"--data.root={data}",
                "--data.batch_size=32",
                "--data.val_size=100",
                f"--data.seed={seed}",
                f"--model.backbone.graph={str(graph).lower()}",
                f"--model.backbone.width={width}",
                "--model.lr_interval=step",
                f"--model.lr_scheduler.T_max={steps}",
                "--trainer.accelerator=cpu",
                f"--trainer.max_steps={steps}",
                "--trainer.max_epochs=-1",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                "--trainer.logger=false",
                "--trainer.callbacks=null",
                f"--trainer.default_root_dir={folder}",
                *(
                    [
                        "--trainer.callbacks+=callbacks.EMParameterCallback",
                        "--trainer.callbacks.rule=callbacks.GradientRule",
                        "--trainer.callbacks.rule.lr=0.05",
                    ]
                    if graph
                    else []
                ),
                "--trainer.enable_checkpointing=false",
                *extra,
            ]
        )
        begin = time.perf_counter()
        command.trainer.fit(command.model, command.datamodule)
        seconds = time.perf_counter() - begin
        result = command.trainer.test(command.model, command.datamodule, verbose=False)[0]
    parameters = command.model.em_parameters.get_parameters()
    weights = sum(parameter.numel() for parameter in command.model.backbone.parameters())
    return {
        "seed": seed,
        "graph": graph,
        "psnr": result["test/psnr"],
        "parameters": parameters,
        "seconds": seconds,
        "weights": weights,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--wide-seeds", type=int, nargs="*", default=[0], help="for the network of twice the width")
    options, extra = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    records = []
    runs = [(16, seed) for seed in options.seeds] + [(32, seed) for seed in options.wide_seeds]
    for width, seed in runs:
        for graph in (True, False):
            record = run(seed, graph, width, options.steps, str(options.data), extra)
            records.append(record)
            values = {name: round(value, 3) for name, value in record["parameters"].items()} if graph else ""
            print(
                f"width {width}, seed {seed}, graph {'on ' if graph else 'off'}: {record['psnr']:.3f} dB, "
                f"{record['weights']} weights, {record['seconds']:.0f} s {values}",
                flush=True,
            )
            write_json(options.json, records)
    for (width, seed), on, off in zip(runs, records[::2], records[1::2], strict=True):
        print(f"width {width}, seed {seed}: gain {on['psnr'] - off['psnr']:+.3f} dB")


if __name__ == "__main__":
    main()
