"""Writes the inventories by which the site links to other projects' pages without a connection.

    python docs/inventories.py          # writes docs/site/inventories/*.inv

Each is a table of the names that our pages mention; the addresses are those of the projects' own sites.
"""

import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "site" / "inventories"

# project: names, each with its kind and its page below the project's address; $ stands for the name itself
NAMES: dict[str, dict[str, tuple[str, str]]] = {
    "python": {
        "pathlib.Path": ("class", "library/pathlib.html#$"),
        "collections.abc.Callable": ("class", "library/collections.abc.html#$"),
        "collections.abc.Iterable": ("class", "library/collections.abc.html#$"),
        "collections.abc.Iterator": ("class", "library/collections.abc.html#$"),
        "collections.abc.Mapping": ("class", "library/collections.abc.html#$"),
        "collections.abc.Sequence": ("class", "library/collections.abc.html#$"),
        "typing.Any": ("data", "library/typing.html#$"),
        "typing.Literal": ("data", "library/typing.html#$"),
        **dict.fromkeys(
            ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple"), ("class", "library/stdtypes.html#$")
        ),
        "None": ("data", "library/constants.html#$"),
        **dict.fromkeys(
            ("RuntimeError", "TypeError", "ValueError", "OSError"), ("exception", "library/exceptions.html#$")
        ),
    },
    "torch": {
        "torch.Tensor": ("class", "tensors.html#$"),
        "torch.Generator": ("class", "generated/$.html"),
        "torch.nn.Module": ("class", "generated/$.html"),
        "torch.nn.modules.module.Module": ("class", "generated/torch.nn.Module.html"),
        "torch.utils.data.DataLoader": ("class", "data.html#$"),
        "torch.utils.data.dataloader.DataLoader": ("class", "data.html#torch.utils.data.DataLoader"),
        "torch.utils.data.Dataset": ("class", "data.html#$"),
        "torch.utils.data.dataset.Dataset": ("class", "data.html#torch.utils.data.Dataset"),
        "torch.compile": ("function", "generated/$.html"),
        "torch.export": ("module", "export.html"),
        "torch.vmap": ("function", "generated/$.html"),
        "torch.optim": ("module", "optim.html"),
        "torch.nn": ("module", "nn.html"),
    },
    "lightning": {
        "lightning.pytorch.core.module.LightningModule": ("class", "common/lightning_module.html"),
        "lightning.pytorch.core.datamodule.LightningDataModule": ("class", "data/datamodule.html"),
        "lightning.pytorch.trainer.trainer.Trainer": ("class", "common/trainer.html"),
        "lightning.pytorch.callbacks.callback.Callback": ("class", "extensions/callbacks.html"),
    },
    "pyg": {
        "torch_geometric.data.Data": ("class", "generated/$.html"),
        "torch_geometric.data.data.Data": ("class", "generated/torch_geometric.data.Data.html"),
    },
    "sklearn": {
        "sklearn.base.BaseEstimator": ("class", "modules/generated/$.html"),
        "sklearn.base.ClusterMixin": ("class", "modules/generated/$.html"),
        "sklearn.base.DensityMixin": ("class", "modules/generated/$.html"),
        "sklearn.base.TransformerMixin": ("class", "modules/generated/$.html"),
        "sklearn.base.ClassNamePrefixFeaturesOutMixin": ("class", "modules/generated/$.html"),
    },
    "numpy": {
        "numpy.ndarray": ("class", "reference/generated/$.html"),
    },
}


def inventory(project: str, names: dict[str, tuple[str, str]]) -> bytes:
    """An inventory in Sphinx's format, version 2."""
    header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    lines = "".join(f"{name} py:{kind} 1 {page.replace('$', name)} -\n" for name, (kind, page) in sorted(names.items()))
    return header.encode() + zlib.compress(lines.encode(), 9)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for project, names in NAMES.items():
        (FOLDER / f"{project}.inv").write_bytes(inventory(project, names))


if __name__ == "__main__":
    main()
