"""Koi in Lightning's loop and in its checkpoints: `python examples/lightning_loop.py`"""

import os
import tempfile
import warnings
from pathlib import Path

import lightning
import torch

from koi import Koi
from koi.models import sine_mlp
from koi.problems import Sines

warnings.filterwarnings("ignore", module="lightning")  # about Lightning itself and the loader

ITERATIONS = 10 if "KOI_EXAMPLE_SHORT" in os.environ else 2000


class Meta(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False  # a step of Koi's is a whole meta-iteration
        self.koi = Koi(sine_mlp(), step_size=0.02, num_steps=5, num_iterations=ITERATIONS, seed=0)
        self.model = self.koi.model
        self.tasks = Sines()

    def train_dataloader(self):  # as many batches as there are meta-iterations; tasks are drawn
        return torch.utils.data.DataLoader(range(ITERATIONS - self.koi.iteration))

    def training_step(self, batch, index):
        self.log("loss_after", self.koi.step(self.tasks).loss_after)

    def configure_optimizers(self):
        return []

    def on_save_checkpoint(self, checkpoint):
        checkpoint["koi"] = self.koi.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.koi.load_state_dict(checkpoint["koi"])


def trainer(epochs, **more):
    return lightning.Trainer(accelerator="cpu", max_epochs=epochs, logger=False, **more)


with tempfile.TemporaryDirectory() as folder:
    half = trainer(1, limit_train_batches=ITERATIONS // 2)
    half.fit(Meta())
    half.save_checkpoint(Path(folder, "meta.ckpt"))
    meta = Meta()
    trainer(2).fit(meta, ckpt_path=Path(folder, "meta.ckpt"))  # the other half

whole = Meta().koi
whole.train(Sines(), progress=False)
pairs = zip(meta.model.parameters(), whole.model.parameters(), strict=True)
assert meta.koi.iteration == ITERATIONS
assert all(torch.equal(a, b) for a, b in pairs)
print(f"{ITERATIONS} meta-iterations, in two halves, are those of koi.train, bit for bit")
