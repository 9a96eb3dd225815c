"""
Your own LightningModule
========================

The callback learns the parameters of any module that has a `ParameterTable` called `em_parameters` and returns an `EStep`
from its `training_step`. Here, images come from two cameras with unknown exposures.
"""

# %%
# A global gain, and one for each camera. `loss` is the mean over the batch of each image's loss: the callback recovers the
# gradient of each image from it.
import lightning as L
import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader, TensorDataset

from callbacks import EMParameterCallback, GradientRule
from lightning_modules import EStep, ParameterTable


class Exposure(L.LightningModule):
    """Two cameras, whose gains are learned by EM, and a network, which is trained by Adam."""

    def __init__(self):
        super().__init__()
        self.em_parameters = ParameterTable(
            initial={"gain": 1.0}, bounds={"gain": (0.1, 10.0)}, per_row=["gain"], row_names=["phone", "scanner"]
        )
        self.network = torch.nn.Conv2d(3, 3, 3, padding=1)

    def training_step(self, batch, batch_idx):
        image, clean, camera = batch
        responsibilities = torch.nn.functional.one_hot(camera, 2).double()
        gain = self.em_parameters(responsibilities)["gain"].view(-1, 1, 1, 1)
        exposed = gain * image
        error = (exposed + 0.1 * self.network(exposed) - clean).square().mean((1, 2, 3))
        return {"loss": error.mean(), "em": EStep(responsibilities, None, error.detach())}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


torch.manual_seed(0)
clean, camera = torch.rand(64, 3, 16, 16), torch.arange(64) % 2
image = clean * torch.tensor([0.5, 2.0])[camera].view(-1, 1, 1, 1)
module = Exposure()
learner = EMParameterCallback(GradientRule(lr=0.05, pseudo_count=1))
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=40,
    callbacks=[learner],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(TensorDataset(image, clean, camera), batch_size=16, shuffle=True))

# %%
# The true gains are 2 and 1/2, up to what the network takes over: their ratio is 4.
table = module.em_parameters
phone, scanner = (table.get_parameters(row)["gain"] for row in (0, 1))
print(f"phone {phone:.2f}, scanner {scanner:.2f}, ratio {phone / scanner:.2f}")

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for row, name in ((None, "global"), (0, "phone"), (1, "scanner")):
    axis.plot([past["gain"] for past in learner.class_parameter_history(row)], label=name)
axis.set(xlabel="step", ylabel="gain", yscale="log")
axis.legend()
