"""`lightning-em fit|validate|test|predict`, by Lightning's own command line."""

import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc import locate
from types import ModuleType
from typing import Any

if not sys.warnoptions:
    # What our dependencies owe to newer versions of each other is no news for whoever runs the command.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")  # torch-geometric, as it is imported
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # lightning
    # The module looks at the labels before they leave the host; our DataModules have no hook there that it could hide.
    warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

# Importing the packages is what makes their classes known by their short names on the command line.
import callbacks
import datamodules
import lightning_modules.detection
import lightning_modules.generated_image_detector
import lightning_modules.mixtures.gaussian.module
import lightning_modules.mixtures.kmeans.module
import lightning_modules.mixtures.student_t.module
import lightning_modules.networks
import lightning_modules.patch_mixture
import lightning_modules.reconstruction
from lightning_modules._checkpoints import UntrustedCheckpointError, building_from, names_in


class EMCommand(LightningCLI):
    """Lightning's command line for modules trained by expectation-maximisation.

    Class names travel from the data to the rows of the parameter table, where the module has one; and `fit` ends by
    saying what to run next.
    """

    def before_instantiate_classes(self) -> None:
        """Give the table one row for each class of the data, unless the configuration names the rows itself; and let
        `--trainer.enable_progress_bar=false` win over the bar that the configuration lists.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.trainer.enable_progress_bar is False and config.trainer.callbacks:
            config.trainer.callbacks = [c for c in config.trainer.callbacks if not _is_progress_bar(c.class_path)]
        table = config.get("model.init_args.em_parameters.init_args")
        if table is None or table.get("row_names") is not None:
            return
        self._parser(self.subcommand).link_arguments(
            "data.class_names", "model.init_args.em_parameters.init_args.row_names", apply_on="instantiate"
        )

    def _parse_ckpt_path(self) -> None:
        """Take the hyperparameters of `--ckpt_path`, which build what this package or the words of the command name."""
        self._named = names_in(self.config)
        with self._trust():
            super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        """Build data, module and trainer, of which `--ckpt_path` may have named parts."""
        with self._trust():
            super().instantiate_classes()

    @contextmanager
    def _trust(self) -> Iterator[None]:
        subcommand = self.config.get("subcommand")
        file = self.config[subcommand].get("ckpt_path") if subcommand else None
        if not file:
            yield
            return
        remedy = "if you trust it, name {name} in a YAML file of your own, or load it in Python with allow=[...]"
        try:
            with building_from(file, named=self._named, remedy=remedy):
                yield
        except UntrustedCheckpointError as error:
            raise SystemExit(f"error: {error}") from None

    def after_fit(self) -> None:
        """Say what to run next."""
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or getattr(
            self.trainer.checkpoint_callback, "last_model_path", ""
        )
        if not checkpoint or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        checkpoint = _relative(checkpoint)
        root = _relative(self.trainer.log_dir or self.trainer.default_root_dir)
        words = shlex.join([*(word for word in self._arguments if word != "fit"), "--ckpt_path", checkpoint])
        lines = [f"  lightning-em {verb} {words}" for verb in ("validate", "test", "predict")]
        lines.append(f"  tensorboard --logdir {root}")
        rank_zero_info("\nNext:\n" + "\n".join(lines))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep the words for the hints at the end."""
        self._arguments: Sequence[str] = args if args is not None else sys.argv[1:]
        super().parse_arguments(parser, args)


def build(args: list[str] | None, run: bool = False) -> EMCommand:
    """Data, module and trainer of a configuration, for scripts that drive them by themselves.

    Args:
        args: Words of the command line without the verb, such as `["-c", "configs/demo.yaml"]`.
        run: Take the verb (`fit`, `validate`, `test` or `predict`) from the words and run it.
    """
    _check_packages()
    return EMCommand(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        run=run,
        args=args,
        parser_kwargs={"epilog": "Beside these: `lightning-em restore PATH...` restores photographs without training."},
    )


def _is_progress_bar(class_path: str) -> bool:
    found = locate(class_path)
    return isinstance(found, type) and issubclass(found, ProgressBar)


def _check_packages() -> None:
    """Refuse a folder of the user's own that shadows one of our packages."""
    ours = _home(lightning_modules)
    for package in (callbacks, datamodules):
        home = _home(package)
        if home != ours:
            raise SystemExit(
                f"{package.__name__} in {home} shadows the package of that name that lightning-em brings ({ours}): "
                "rename yours, or start the command elsewhere"
            )


def _home(package: ModuleType) -> Path:
    """Folder that holds a package, be it a folder with or without an `__init__.py`, or a single file."""
    if hasattr(package, "__path__"):
        return Path(next(iter(package.__path__))).resolve().parent
    return Path(str(package.__file__)).resolve().parent


def _relative(path: str) -> str:
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return path
