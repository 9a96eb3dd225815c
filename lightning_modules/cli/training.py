"""`lightning-em fit|validate|test|predict`, by Lightning's own command line."""

import contextlib
import io
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
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
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

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
import lightning_modules.point_cloud_reconstruction
import lightning_modules.reconstruction
from lightning_modules._version import __version__
from lightning_modules.checkpoints.file import CheckpointError, read_checkpoint
from lightning_modules.checkpoints.module import (
    AtomicCheckpointIO,
    check_class,
    check_content,
    checkpoint_paths,
)
from lightning_modules.checkpoints.trust import building_from, check_entries, differences, names_in
from lightning_modules.cli.configs import config_names, find_config
from lightning_modules.cli.console import Parser, Refusal, calm
from lightning_modules.cli.folds import leave_one_source_out
from lightning_modules.cli.run_logger import RunLogger, evaluation_place, remove_unbegun
from lightning_modules.cli.stopping import INTERRUPTED, StopBetweenSteps

# The mode of `test` that leaves each source out in turn.
_FOLDS = "--leave_one_source_out"
# The split that each command takes after a fit, and what a module calls its step where that differs.
_SPLITS = {"validate": "val", "test": "test", "predict": "predict"}
_STEPS = {"validate": "validation"}
# Seconds that a rank which is to end has for what remains.
_PATIENCE = 10.0


class EndTogether(Callback):
    """Ends a rank at once that is sent SIGTERM.

    Lightning's own handler waits for a broadcast in which the other ranks do not take part, so that all of them hang.
    Where one has ended, the others end by what Lightning has for that: an observer of its children in the first rank,
    which looks every five seconds. SLURM's requeuing has handlers of its own, which stay.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the place of Lightning's handler, which is set after every earlier hook."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size > 1 and not isinstance(environment, SLURMEnvironment):

            def end(number: int, frame: Any) -> None:
                signal.signal(number, signal.SIG_DFL)
                late = threading.Timer(_PATIENCE, os._exit, (128 + number,))  # a save, say, waits for other ranks
                late.daemon = True
                late.start()
                if trainer.strategy.launcher is not None:
                    trainer.strategy.launcher.kill(number)
                raise SystemExit(128 + number)

            signal.signal(signal.SIGTERM, end)

    on_validation_start = on_test_start = on_predict_start = on_train_start


class NamedConfigFile(ActionConfigFile):
    """A configuration file, by its path or by the name of one that comes with the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the configuration into what is parsed."""
        try:
            path = find_config(values)
        except FileNotFoundError as error:
            parser.error(str(error))
        self.apply_config(parser, cfg, self.dest, path)


class EMCommand(LightningCLI):
    """Lightning's command line for modules trained by expectation-maximisation.

    Class names travel from the data to the rows of the parameter table, where the module has one. Checkpoints are
    written whole; a run that is resumed goes on in its folder; and `fit` ends by saying what to run next.
    """

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Give `test` its mode for data of several sources."""
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.add_argument(
                _FOLDS,
                type=bool,
                default=False,
                help="fit and test once for each source, which is left out of the fit, and write the table of all; the "
                "same command goes on where it was stopped",
            )
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that knows configurations by name; the configuration it saves names the versions."""
        kwargs.setdefault("dump_header", [f"lightning-em=={__version__}", f"lightning.pytorch=={L.__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=NamedConfigFile,
            help=f"a YAML file, or one of {', '.join(config_names())}; of several the later wins",
        )
        return parser

    def before_instantiate_classes(self) -> None:
        """Give the table one row for each class of the data, unless the configuration names the rows itself; and let
        `--trainer.enable_progress_bar=false` win over the bar that the configuration lists.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.trainer.enable_progress_bar is False and config.trainer.callbacks:
            config.trainer.callbacks = [c for c in config.trainer.callbacks if not _is_progress_bar(c.class_path)]
        self._place_logger(config)
        table = config.get("model.init_args.em_parameters.init_args")
        if table is None or table.get("row_names") is not None:
            return
        self._parser(self.subcommand).link_arguments(
            "data.class_names", "model.init_args.em_parameters.init_args.row_names", apply_on="instantiate"
        )

    def _place_logger(self, config: Any) -> None:
        """Give the run its place: a folder of its own, or in that of the run that it goes on with or evaluates."""
        if self.subcommand == "fit" and config.ckpt_path:
            _stay_in_folder(config.trainer.logger, Path(config.ckpt_path))
        elif self.subcommand not in ("fit", None) and not config.get(_FOLDS.strip("-")):
            for logger in _logger_configs(config):
                evaluation_place(logger.init_args, self.subcommand, config.ckpt_path)

    def instantiate_classes(self) -> None:
        """Build data, module and trainer, of which `--ckpt_path` may have named parts."""
        with self._trust():
            super().instantiate_classes()

    def _trust(self) -> AbstractContextManager[None]:
        subcommand = self.config.get("subcommand")
        file = self.config[subcommand].get("ckpt_path") if subcommand else None
        remedy = "if you trust it, name {name} in a YAML file of your own, or load it in Python with allow=[...]"
        return building_from(file, named=self._named, remedy=remedy) if file else contextlib.nullcontext()

    def after_instantiate_classes(self) -> None:
        """Write checkpoints whole, unless the configuration brings a plugin of its own."""
        strategy = self.trainer.strategy
        if (
            isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
            and type(strategy.checkpoint_io) is TorchCheckpointIO
        ):
            strategy.checkpoint_io = AtomicCheckpointIO()
        config = self.config[self.subcommand] if self.subcommand else self.config
        if not self.trainer.fast_dev_run and (found := _logger_configs(config)):  # type: ignore[attr-defined]
            others = [logger for logger in self.trainer.loggers if type(logger) is not TensorBoardLogger]
            ours = [RunLogger(**logger.init_args) for logger in found]
            self.trainer.loggers = [*ours, *others]
            for logger in ours:
                logger.tabled = "" if self.subcommand == "validate" else logger.tabled  # evaluated once: no course

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; one that fails before it has begun leaves no run behind."""
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, RunLogger)]
        fresh = [Path(log.log_dir) for log in loggers if self.trainer.is_global_zero and not Path(log.log_dir).exists()]
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self.trainer.global_step == 0:
                for folder in fresh:
                    remove_unbegun(folder)
            raise

    def fit(self, model: L.LightningModule, **options: Any) -> None:
        """Fit; stopped by Ctrl-C, say what goes on."""
        try:
            self.trainer.fit(model, **options)
        except SystemExit:
            if not self.trainer.interrupted or self.trainer.world_size > 1:
                raise
            rank_zero_info(f"\nstopped at step {self.trainer.global_step}")
            self.after_fit()
            raise SystemExit(INTERRUPTED) from None

    def test(self, model: L.LightningModule, **options: Any) -> None:
        """Test, or leave each source out in turn."""
        if self.config["test"][_FOLDS.strip("-")]:
            words = _without(_FOLDS, [word for word in self._arguments if word != "test"])
            leave_one_source_out(words, self.trainer, self.datamodule)
        else:
            self.trainer.test(model, **options)

    def after_fit(self) -> None:
        """Say what to run next that has something to do: what evaluates the newest state, and what goes on from it."""
        best, last = checkpoint_paths(self.trainer)
        if not (best or last) or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = _relative(self.trainer.log_dir or self.trainer.default_root_dir)
        words = _without("--ckpt_path", [word for word in self._arguments if word != "fit"])
        # As the closing line and the pages have it, the state that the run has ended with; the best is named above.
        lines = [self._next(verb, words, last or best) for verb in _SPLITS if self._is_useful(verb)]
        if last and not getattr(self.model, "converged", False):
            limit = self.trainer.max_epochs or -1
            if 0 < limit <= self.trainer.current_epoch and not self.trainer.interrupted:
                words = [*_without("--trainer.max_epochs", words), "--trainer.max_epochs", str(2 * limit)]
            lines.append(self._next("fit", words, last))
        lines.append(f"  tensorboard --logdir {root}")
        rank_zero_info("\nNext:\n" + "\n".join(lines))

    def _is_useful(self, verb: str) -> bool:
        """Whether a command has something to do: steps, samples, and what writes predictions."""
        if verb == "predict" and not any(isinstance(c, BasePredictionWriter) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            return False
        if self.datamodule is not None:
            has_split = getattr(self.datamodule, "has_split", None)
            loader = f"{_SPLITS[verb]}_dataloader"
            if not (has_split(_SPLITS[verb]) if has_split else is_overridden(loader, self.datamodule)):
                return False
        return verb == "predict" or is_overridden(f"{_STEPS.get(verb, verb)}_step", self.model)

    @staticmethod
    def _next(verb: str, words: Sequence[str], checkpoint: str) -> str:
        return f"  lightning-em {verb} {shlex.join([*words, '--ckpt_path', _relative(checkpoint)])}"

    def _parse_ckpt_path(self) -> None:
        """Take the hyperparameters of `--ckpt_path`, which build what this package or the words of the command name.

        A file that cannot be used is named before.
        """
        self._named = names_in(self.config)
        config = self.config.get(self.config.get("subcommand") or "") or {}
        path, model = config.get("ckpt_path"), config.get("model")
        if path and path not in ("best", "last", "hpc") and not re.match(r"\w+:", str(path)):
            try:
                stored = check_content(read_checkpoint(path, "meta"), path)
                check_entries(stored, path, "hyper_parameters")
            except FileNotFoundError as error:
                raise CheckpointError(str(error)) from None
            kind = locate(model.class_path) if model is not None else None
            if isinstance(kind, type):
                try:
                    check_class(kind, stored)
                except CheckpointError as error:
                    raise CheckpointError(f"{path} does not fit the configuration: {error}") from None
        try:
            with self._trust(), contextlib.redirect_stderr(io.StringIO()):
                super()._parse_ckpt_path()
        except Refusal as refusal:
            raise CheckpointError(f"{path} does not fit: {differences(refusal.message)}") from None

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
    try:
        with calm() if run else contextlib.nullcontext():
            return EMCommand(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                # Lightning's summary counts weights; `--trainer.enable_model_summary true` shows it.
                trainer_defaults={"callbacks": [EndTogether(), StopBetweenSteps()], "enable_model_summary": False},
                run=run,
                args=args,
                parser_kwargs={
                    "epilog": "Beside these: `lightning-em restore PATH...` restores photographs without training."
                },
            )
    except CheckpointError as error:
        raise SystemExit(f"lightning-em: {error}") from None


def _logger_configs(config: Any) -> list[Any]:
    """What the configuration has of TensorBoard's loggers."""
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    return [logger for logger in loggers if locate(getattr(logger, "class_path", "")) is TensorBoardLogger]


def _stay_in_folder(logger: Any, checkpoint: Path) -> None:
    """Lets a resumed run go on in its folder, `version_N`, unless a later state is there, which it would replace."""
    arguments = getattr(logger, "init_args", None) or {}
    run = checkpoint.resolve().parent.parent
    number = re.fullmatch(r"version_(\d+)", run.name)
    home = Path(str(arguments.get("save_dir"))) / str(arguments.get("name"))
    if number is None or arguments.get("version") is not None or home.resolve() != run.parent:
        return
    last = checkpoint.resolve().parent / "last.ckpt"
    if last.is_file() and last != checkpoint.resolve():
        steps = [read_checkpoint(path, "meta").get("global_step", 0) for path in (checkpoint, last)]
        if steps[0] < steps[1]:
            rank_zero_info(f"{last} is further on, at step {steps[1]}: this run gets a folder of its own")
            return
    arguments["version"] = int(number[1])


def _without(option: str, words: Sequence[str]) -> list[str]:
    """The words without an option and its value."""
    kept = list(words)
    while option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return [word for word in kept if not word.startswith(f"{option}=")]


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
